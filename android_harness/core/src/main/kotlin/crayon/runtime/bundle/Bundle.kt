// A bundle on this device: opened, checked, installed.
package crayon.runtime.bundle

import crayon.runtime.AdapterManifest
import crayon.runtime.BundleError
import crayon.runtime.InvalidInput
import crayon.runtime.Manifest
import crayon.runtime.ManifestError
import crayon.runtime.ModelManifest
import crayon.runtime.atomicDirectory
import crayon.runtime.parseManifest
import crayon.runtime.recover
import crayon.runtime.writeFully
import java.io.ByteArrayOutputStream
import java.io.IOException
import java.nio.channels.FileChannel
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.StandardOpenOption.CREATE_NEW
import java.nio.file.StandardOpenOption.WRITE
import java.nio.file.attribute.BasicFileAttributes
import kotlin.io.path.writeBytes

/**
 * A model or an adapter whose files are in a folder of this device.
 *
 * @property document the bytes of manifest.json as they were read and checked.
 */
class Bundle private constructor(val path: Path, val manifest: Manifest, internal val document: ByteArray) {
    /** Bytes of all files that the manifest lists. */
    val size: Long get() = manifest.files.sumOf { it.size }

    /** The manifest of a model; [ManifestError] if this is an adapter. */
    val model: ModelManifest
        get() = manifest as? ModelManifest
            ?: throw ManifestError("${manifest.name} is an adapter, not a model", path, "give the bundle of its model")

    /** The manifest of an adapter; [ManifestError] if this is a model. */
    val asAdapter: AdapterManifest
        get() = manifest as? AdapterManifest
            ?: throw ManifestError("${manifest.name} is a model, not an adapter", path, "give an adapter bundle")

    /** The adapters that travel inside this model. */
    val adapterNames: List<String>
        get() = (manifest as? ModelManifest)?.adapters.orEmpty().map { it.substringAfterLast('/') }

    /** Where a file of the bundle lies, named as in the manifest. */
    fun file(relative: String): Path {
        if (manifest.files.none { it.path == relative }) throw BundleError("the bundle has no file '$relative'", path)
        return path.resolve(relative)
    }

    /** The content of a file of the bundle; [crayon.runtime.IntegrityError] if it is not what the manifest says. */
    fun read(relative: String): ByteArray {
        file(relative)
        val content = ByteArrayOutputStream()
        readFile(Folder(path), manifest.files.first { it.path == relative }) { buffer, count -> content.write(buffer, 0, count) }
        return content.toByteArray()
    }

    /**
     * One of the adapters that travel inside this model.
     *
     * @throws InvalidInput there is no such adapter.
     */
    fun adapter(name: String): Bundle {
        val index = adapterNames.indexOf(name)
        if (index < 0) {
            val choice = adapterNames.joinToString().ifEmpty { null }
            val advice = choice?.let { "choose one of: $it" } ?: "give the path of an adapter bundle"
            throw InvalidInput("there is no adapter '$name' in the bundle", path, advice)
        }
        val folder = path.resolve(model.adapters[index])
        val inner = readManifest(Folder(folder)) // checked, as all files, when this bundle was opened
        return Bundle(folder, parseManifest(inner, folder.resolve(MANIFEST)), inner)
    }

    /**
     * Checks every size and hash, and that there are no links and no other files.
     *
     * @throws BundleError the folder is not exactly what the manifest says.
     */
    fun verify(onBytes: (Int) -> Unit = {}) {
        open(path, verify = true, onBytes = onBytes)
    }

    companion object {
        /**
         * Opens the folder of a bundle and checks it; an archive is opened by [install].
         *
         * The manifest, the size of every file and the headers of known formats are always checked. Hashes are checked when the folder has
         * no valid install stamp: once after it was copied or touched.
         *
         * @param verify check the hashes in any case, and that there is nothing that the manifest does not list.
         * @param onBytes called while hashes are checked, with the number of bytes done since the last call.
         * @throws BundleError there is no bundle, or it is not what its manifest says.
         */
        fun open(path: Path, verify: Boolean = false, onBytes: (Int) -> Unit = {}): Bundle {
            try {
                recover(path)
                if (!isFolder(path)) throw BundleError("this is an archive, not a folder", path, "install it first")
                val folder = path.toRealPath()
                val source = Folder(folder)
                val document = readManifest(source)
                val manifest = parseManifest(document, folder.resolve(MANIFEST))
                checkStampedManifest(folder, document)
                checkFolder(source, manifest, nothingElse = false)
                val now = times(folder, manifest)
                if (verify || !holds(folder, now)) {
                    checkFiles(source, manifest, onBytes)
                    writeStamp(folder, document, now)
                }
                return Bundle(folder, manifest, document)
            } catch (e: IOException) {
                throw BundleError("the bundle cannot be read: ${e.message}", path, "check the path", e)
            }
        }
    }
}

/**
 * Copies a bundle, a folder or a `.crayon` archive, to a folder that appears only when every hash was right.
 *
 * @param replace put this bundle in the place of an existing one, at the end; the old one works until then, and if this fails.
 * @param onBytes called with the number of bytes copied since the last call. What it throws ends the installation, and leaves nothing.
 * @param check called with the bytes of the manifest and of the signature (null: there is none) before anything is copied; to refuse what is
 *   not signed, see [crayon.runtime.TrustedKeys].
 * @throws BundleError the source is not exactly what its manifest says.
 * @throws crayon.runtime.OutputError the target exists, or cannot be written.
 */
fun install(
    source: Path,
    target: Path,
    replace: Boolean = false,
    onBytes: (Int) -> Unit = {},
    check: (ByteArray, ByteArray?) -> Unit = { _, _ -> },
): Bundle {
    if (isFolder(source)) {
        copy(Folder(source), target, replace, onBytes, check)
    } else {
        Archive(source).use { copy(it, target, replace, onBytes, check) }
    }
    return Bundle.open(target)
}

private fun copy(source: Source, target: Path, replace: Boolean, onBytes: (Int) -> Unit, check: (ByteArray, ByteArray?) -> Unit) {
    val (document, manifest) = readSource(source)
    val signature = readSignature(source)
    check(document, signature)
    atomicDirectory(target, replace) { folder ->
        for (file in manifest.files) {
            val path = folder.resolve(file.path)
            Files.createDirectories(path.parent)
            FileChannel.open(path, CREATE_NEW, WRITE).use { out ->
                readFile(source, file) { buffer, count ->
                    out.writeFully(buffer, count)
                    onBytes(count)
                }
            }
        }
        folder.resolve(MANIFEST).writeBytes(document)
        if (signature != null) folder.resolve(SIGNATURE).writeBytes(signature)
        checkFolder(Folder(folder), manifest, nothingElse = true)
        writeStamp(folder, document, times(folder, manifest))
    }
}

/** Whether a bundle is a folder; otherwise it is a file. */
private fun isFolder(path: Path): Boolean {
    val status = try {
        Files.readAttributes(path, BasicFileAttributes::class.java)
    } catch (e: IOException) {
        throw BundleError("there is no bundle here: ${e.message}", path, "check the path", e)
    }
    if (!status.isDirectory && !status.isRegularFile) throw BundleError("this is neither a folder nor a file", path, "check the path")
    return status.isDirectory
}
