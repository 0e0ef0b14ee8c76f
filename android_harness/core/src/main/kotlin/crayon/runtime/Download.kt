/*
 * Downloads that go on where they were cut, in this process or in a later one.
 *
 * What came so far lies beside its target, as `.NAME.part`, with the ETag of the file that it is the beginning of. The server is asked for the
 * rest of that very file; where it has another one now, or no ETag, or no parts, it all comes again. Redirects are followed, as places that store
 * large files send to others that do: from the address that was given, each time.
 */
package crayon.runtime

import crayon.runtime.bundle.Bundle
import crayon.runtime.bundle.install
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.withContext
import kotlinx.serialization.Serializable
import java.io.IOException
import java.nio.channels.FileChannel
import java.nio.channels.OverlappingFileLockException
import java.nio.file.Files
import java.nio.file.LinkOption.NOFOLLOW_LINKS
import java.nio.file.Path
import java.nio.file.StandardCopyOption.ATOMIC_MOVE
import java.nio.file.StandardOpenOption.CREATE
import java.nio.file.StandardOpenOption.READ
import java.nio.file.StandardOpenOption.WRITE
import kotlin.io.path.absolute
import kotlin.io.path.deleteIfExists
import kotlin.io.path.exists
import kotlin.io.path.isDirectory
import kotlin.io.path.name
import kotlin.io.path.readBytes

private val HASH = Regex("[0-9a-f]{64}")

/**
 * How to download.
 *
 * @property sha256 of the file, in lower-case hex; null: it is not known, and a bundle is checked by its manifest alone.
 * @property largest bytes; more is refused, whatever the server announces.
 * @property apiKey sent as `Authorization: Bearer`, and not to another server that this one redirects to.
 * @property plainHttp allow http to other machines, where everybody on the way can read and change what is sent.
 * @property timeoutMs without a byte, after which a connection counts as cut.
 * @property deadlineMs that a download may take in all, retries included.
 */
data class DownloadOptions(
    val sha256: String? = null,
    val largest: Long = Long.MAX_VALUE,
    val apiKey: String? = null,
    val plainHttp: Boolean = false,
    val timeoutMs: Int = 30_000,
    val deadlineMs: Long = 86_400_000,
)

/**
 * Downloads one file, for example a `.crayon` archive, to be installed then; it appears at [target] when it is whole. A download that was cut,
 * cancelled or killed is continued by the next one.
 *
 * Cancelling the coroutine takes effect with the next bytes.
 *
 * @param onProgress called with the bytes that are there, and with those of the whole file, if the server tells.
 * @return `target`.
 * @throws InvalidInput the address or an option cannot be used, or another download to this target is running.
 * @throws ServerError the server cannot be reached, refuses, or breaks off again and again. What came stays.
 * @throws IntegrityError it is not the file of `sha256`, or larger than `largest`. Nothing stays.
 * @throws OutputError the disk is full, or a folder is in its place. What came stays.
 */
suspend fun download(
    url: String,
    target: Path,
    options: DownloadOptions = DownloadOptions(),
    onProgress: (Long, Long?) -> Unit = { _, _ -> },
): Path {
    val place = target.absolute().normalize()
    if (place.isDirectory(NOFOLLOW_LINKS)) {
        throw OutputError("there is a folder in the place of the file to write", place, "choose another path")
    }
    fetched(url, place, options, onProgress) { part -> Files.move(part, place, ATOMIC_MOVE) }
    return place
}

/**
 * Downloads a bundle, a `.crayon` archive, and installs it: as [download] and [install] with what both throw, without a copy of the archive
 * that stays.
 *
 * @param replace put it in the place of an existing one, at the end; the old one works until then, and if this fails.
 * @param onProgress of the download.
 * @param check see [install].
 */
suspend fun installFrom(
    url: String,
    target: Path,
    replace: Boolean = false,
    options: DownloadOptions = DownloadOptions(),
    onProgress: (Long, Long?) -> Unit = { _, _ -> },
    check: (ByteArray, ByteArray?) -> Unit = { _, _ -> },
): Bundle {
    val place = target.absolute().normalize()
    if (!replace && place.exists(NOFOLLOW_LINKS)) throw targetExists(place)
    return fetched(url, place, options, onProgress) { part -> install(part, place, replace, check = check) }
}

/** Fetches a file to beside its place, and hands it over when it is whole. What is damaged does not stay. */
private suspend fun <T> fetched(
    url: String,
    place: Path,
    options: DownloadOptions,
    onProgress: (Long, Long?) -> Unit,
    use: (Path) -> T,
): T =
    withContext(Dispatchers.IO) {
        val checked = { address: String ->
            checkedUrl(address, options.plainHttp, "everybody on the way could read and change what is sent")
        }
        val base = checked(url.substringBefore('?'))
        val query = url.substring(url.substringBefore('?').length)
        if ('#' in query || query.any { it !in '!'..'~' }) throw InvalidInput("the address has a fragment, or a space", base)
        if (options.sha256 != null && !HASH.matches(options.sha256)) {
            throw InvalidInput("this is no SHA-256: ${shown(options.sha256)}", "sha256", "give 64 hexadecimal digits in lower case")
        }
        val connection = Connection(base, checkedKey(options.apiKey), options.timeoutMs, options.deadlineMs) { checked(it) }
        try {
            PartFile.open(place, base).use { part ->
                val status = connection.fetch(query, options.largest, part) { _, total -> onProgress(part.length, total) }
                if (status != 200) throw ServerError("there is no such file", base, "check the address")
                part.flush()
                try {
                    checkHash(part.path, options.sha256, base)
                    use(part.path).also { part.discard() }
                } catch (e: BundleError) {
                    part.discard()
                    throw e
                }
            }
        } catch (e: IOException) {
            throw OutputError(e.said(), place, "free some space, or choose another path", e)
        }
    }

private fun checkHash(file: Path, wanted: String?, url: String) {
    if (wanted != null && sha256(file) != wanted) {
        throw IntegrityError(
            "what the server sent is not the file of this SHA-256",
            url,
            "try again; if it stays so, the server has another file",
        )
    }
}

/** What is written down beside a part. */
@Serializable
private data class PartOf(val url: String, val etag: String?)

/** The beginning of a file, which outlives a process; open for one download at a time. */
private class PartFile private constructor(val path: Path, private val channel: FileChannel, private val url: String) :
    Destination,
    AutoCloseable {
        private val about = path.resolveSibling("${path.name}.json")
        override var etag: String? = readAbout()
            private set
        override val length: Long get() = channel.size()

        init {
            if (etag == null) channel.truncate(0)
            channel.position(channel.size())
        }

        override fun restart(etag: String?) {
            channel.truncate(0) // before it is said to be of another file
            this.etag = etag
            writeAtomically(about, COMPACT.encodeToString(PartOf.serializer(), PartOf(url, etag)).toByteArray())
        }

        override fun write(buffer: ByteArray, count: Int) = channel.writeFully(buffer, count)

        fun flush() = channel.force(true)

        fun discard() {
            path.deleteIfExists()
            about.deleteIfExists()
        }

        /** What nothing came of does not stay. */
        override fun close() {
            if (length == 0L) discard()
            channel.close()
        }

        private fun readAbout(): String? =
            try {
                decodeJson(PartOf.serializer(), about.readBytes()).takeIf { it.url == url }?.etag
            } catch (_: IOException) {
                null
            } catch (_: Malformed) {
                null
            }

        companion object {
            fun open(target: Path, url: String): PartFile {
                val path = target.resolveSibling(".${target.name}.part")
                Files.createDirectories(path.parent)
                val channel = FileChannel.open(path, CREATE, READ, WRITE)
                try {
                    if (!isFree(channel)) {
                        throw InvalidInput("another download to this place is running", target, "wait for it, or choose another path")
                    }
                    return PartFile(path, channel, url)
                } catch (e: Throwable) {
                    channel.close()
                    throw e
                }
            }

            private fun isFree(channel: FileChannel): Boolean =
                try {
                    channel.tryLock() != null
                } catch (_: OverlappingFileLockException) {
                    false
                } catch (_: IOException) {
                    true // a file system without locks
                }
        }
    }
