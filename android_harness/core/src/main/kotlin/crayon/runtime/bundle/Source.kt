// Where the files of a bundle come from: a folder, or (in `Archive.kt`) one file. Reading through a source is always checked.
package crayon.runtime.bundle

import crayon.runtime.BundleError
import crayon.runtime.BundleFile
import crayon.runtime.CHUNK
import crayon.runtime.IntegrityError
import crayon.runtime.Manifest
import crayon.runtime.ManifestError
import crayon.runtime.ModelManifest
import crayon.runtime.SignatureError
import crayon.runtime.toHex
import java.io.IOException
import java.io.InputStream
import java.nio.file.Files
import java.nio.file.LinkOption.NOFOLLOW_LINKS
import java.nio.file.Path
import java.nio.file.attribute.BasicFileAttributes
import java.security.MessageDigest
import kotlin.io.path.exists
import kotlin.io.path.listDirectoryEntries
import kotlin.io.path.name
import kotlin.math.min

internal const val MANIFEST = "manifest.json"
internal const val STAMP = ".installed.json"

/** The one file besides the stamp that a manifest cannot list, because it signs the manifest. */
internal const val SIGNATURE = "signature.json"

private const val LARGEST_MANIFEST = 16L shl 20
private const val LARGEST_SIGNATURE = 4096L

/** What a source holds under a path; `fault` says why it cannot be a file of a bundle: "is a symbolic link". */
internal data class Entry(val size: Long, val fault: String? = null)

internal interface Source {
    val path: Path

    /** Everything that is not a plain folder, by its path relative to the bundle. */
    val entries: Map<String, Entry>

    fun open(path: String): InputStream
}

/** A bundle as a folder. Symbolic links are never followed. */
internal class Folder(override val path: Path) : Source {
    override val entries: Map<String, Entry>

    init {
        if (!path.resolve(MANIFEST).exists(NOFOLLOW_LINKS)) throw noManifest(path)
        entries = try {
            buildMap { walk(path, "", this) }
        } catch (e: IOException) {
            throw BundleError("the bundle cannot be read: ${e.message}", path, cause = e)
        }
    }

    override fun open(path: String): InputStream = Files.newInputStream(this.path.resolve(path), NOFOLLOW_LINKS)
}

private fun walk(folder: Path, prefix: String, found: MutableMap<String, Entry>) {
    for (item in folder.listDirectoryEntries()) {
        val status = Files.readAttributes(item, BasicFileAttributes::class.java, NOFOLLOW_LINKS)
        val path = prefix + item.name
        when {
            status.isDirectory -> walk(item, "$path/", found)
            status.isRegularFile -> found[path] = Entry(status.size())
            else -> found[path] = Entry(0, if (status.isSymbolicLink) "is a symbolic link" else "is not a regular file")
        }
    }
}

/** The bytes of a bundle's manifest.json, or of that of an adapter inside it. */
internal fun readManifest(source: Source, path: String = MANIFEST): ByteArray {
    val entry = source.entries[path] ?: throw noManifest(source.path)
    if (entry.fault != null || entry.size > LARGEST_MANIFEST) {
        throw ManifestError("$path ${entry.fault ?: "has ${entry.size} bytes"}", source.path)
    }
    return readHead(source, path, LARGEST_MANIFEST.toInt())
}

/**
 * The bytes of a bundle's signature.json, which nothing here vouches for; null if it is not signed.
 *
 * @throws SignatureError it is not a small plain file.
 */
internal fun readSignature(source: Source): ByteArray? {
    val entry = source.entries[SIGNATURE] ?: return null
    if (entry.fault != null || entry.size > LARGEST_SIGNATURE) {
        throw SignatureError("$SIGNATURE ${entry.fault ?: "has ${entry.size} bytes"}", source.path)
    }
    return readHead(source, SIGNATURE, LARGEST_SIGNATURE.toInt())
}

/** The first bytes of a file; fewer if it ends before. */
internal fun readHead(source: Source, path: String, size: Int): ByteArray =
    reading(source, path) {
        source.open(path).use { stream ->
            val head = ByteArray(min(size.toLong(), source.entries.getValue(path).size).toInt())
            head.copyOf(stream.readUpTo(head, head.size))
        }
    }

/**
 * Passes on the contents of one file in pieces (a buffer that is used again, and how much of it), never more than the manifest declares.
 *
 * @throws IntegrityError it cannot be read, or (at the end) its size or SHA-256 is not what the manifest says.
 */
internal fun readFile(source: Source, file: BundleFile, each: (ByteArray, Int) -> Unit) {
    val digest = MessageDigest.getInstance("SHA-256")
    val buffer = ByteArray(min(CHUNK.toLong(), file.size).toInt())
    var left = file.size
    var longer = false
    val stream = reading(source, file.path) { source.open(file.path) }
    stream.use {
        while (left > 0) {
            val count = reading(source, file.path) { stream.read(buffer, 0, min(buffer.size.toLong(), left).toInt()) }
            if (count <= 0) break
            digest.update(buffer, 0, count)
            left -= count
            each(buffer, count)
        }
        longer = reading(source, file.path) { stream.read() } >= 0
    }
    if (left > 0 || longer || digest.digest().toHex() != file.sha256) {
        throw IntegrityError("${file.path} is damaged: its SHA-256 is not what the manifest says", source.path, FETCH)
    }
}

/** Reads everything once, and refuses whatever is not exactly what the manifest says. */
internal fun checkFiles(source: Source, manifest: Manifest, onBytes: (Int) -> Unit = {}) {
    checkEntries(source, manifest, nothingElse = true)
    for (file in manifest.files) readFile(source, file) { _, count -> onBytes(count) }
}

/**
 * Refuses a source in which a file of the manifest is missing, irregular or of another size.
 *
 * @param nothingElse also refuse files that the manifest does not list.
 */
internal fun checkEntries(source: Source, manifest: Manifest, nothingElse: Boolean) {
    val listed = manifest.files.associate { it.path to it.size }
    for ((path, size) in listed) {
        val entry = source.entries[path] ?: parent(source, path)
        val problem = when {
            entry == null -> "is missing"
            entry.fault != null -> entry.fault
            entry.size != size -> "has ${entry.size} bytes; the manifest says $size"
            else -> continue
        }
        val advice = if ("symbolic link" in problem) "copy the bundle with its links followed (cp -rL)" else FETCH
        throw IntegrityError("$path $problem", source.path, advice)
    }
    if (!nothingElse) return
    readSignature(source)
    val stamps = if (manifest is ModelManifest) manifest.adapters.map { "$it/$STAMP" } else emptyList()
    val foreign = (source.entries.keys - listed.keys - setOf(MANIFEST, STAMP, SIGNATURE) - stamps.toSet()).minOrNull() ?: return
    val fault = source.entries
        .getValue(foreign)
        .fault
        ?.let { ", and $it" }
        .orEmpty()
    throw IntegrityError(
        "$foreign is not listed in the manifest$fault",
        source.path,
        "remove it if you know what it is; otherwise do not use this bundle",
    )
}

/** Something that is not a plain folder, where a folder should be that holds `path`. */
private fun parent(source: Source, path: String): Entry? {
    var folder = path.substringBeforeLast('/', "")
    while (folder.isNotEmpty()) {
        source.entries[folder]?.let { return Entry(0, "cannot be read: $folder ${it.fault ?: "is a file"}") }
        folder = folder.substringBeforeLast('/', "")
    }
    return null
}

private fun noManifest(path: Path) =
    ManifestError("there is no manifest.json; this is not a bundle", path, "make a bundle of a model with `crayon export`")

/** As `InputStream.readNBytes`, which Android has from API 33 on. */
internal fun InputStream.readUpTo(buffer: ByteArray, count: Int): Int {
    var done = 0
    while (done < count) {
        val got = read(buffer, done, count - done)
        if (got < 0) break
        done += got
    }
    return done
}

private inline fun <T> reading(source: Source, path: String, read: () -> T): T =
    try {
        read()
    } catch (e: IOException) {
        throw IntegrityError("$path cannot be read: ${e.message ?: "it ends too early"}", source.path, FETCH, e)
    }

private const val FETCH = "fetch, copy or export the bundle again"
