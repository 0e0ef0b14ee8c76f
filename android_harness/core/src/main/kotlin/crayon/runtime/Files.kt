/*
 * Writing so that nothing half-written is ever visible, and hashing.
 *
 * Everything is written under a hidden name beside its target, flushed to the disk, and renamed at the end. A file beside the hidden name is
 * locked while its writer lives, whatever kills it, so the next writer of the same target knows what is left over and removes it.
 */
package crayon.runtime

import java.io.IOException
import java.nio.channels.FileChannel
import java.nio.channels.OverlappingFileLockException
import java.nio.file.AccessDeniedException
import java.nio.file.FileSystemException
import java.nio.file.Files
import java.nio.file.LinkOption.NOFOLLOW_LINKS
import java.nio.file.NoSuchFileException
import java.nio.file.Path
import java.nio.file.StandardCopyOption.ATOMIC_MOVE
import java.nio.file.StandardOpenOption.CREATE
import java.nio.file.StandardOpenOption.READ
import java.nio.file.StandardOpenOption.WRITE
import java.security.MessageDigest
import java.security.SecureRandom
import kotlin.io.path.absolute
import kotlin.io.path.deleteIfExists
import kotlin.io.path.exists
import kotlin.io.path.isDirectory
import kotlin.io.path.listDirectoryEntries
import kotlin.io.path.name

/** Bytes read or written at once. */
internal const val CHUNK = 1 shl 20

/**
 * Fills a new folder that appears at [target] only when it is whole.
 *
 * @param replace an existing target is put aside, and removed when the new one is in its place; it stays what it was if there is no new one.
 * @param fill gets an empty folder beside the target. It becomes the target when this returns, and is removed when it throws.
 * @throws OutputError the target exists (without `replace`), cannot be written, or the disk is full.
 */
internal fun <T> atomicDirectory(target: Path, replace: Boolean = false, fill: (Path) -> T): T {
    val place = target.absolute().normalize()
    if (!replace && place.exists(NOFOLLOW_LINKS)) throw targetExists(place)
    return partial(place) { folder ->
        Files.createDirectory(folder)
        val made = fill(folder)
        syncTree(folder)
        val aside = if (replace && place.exists(NOFOLLOW_LINKS)) place.resolveSibling(".${place.name}.replaced-${randomHex()}") else null
        if (aside != null) Files.move(place, aside, ATOMIC_MOVE)
        try {
            Files.move(folder, place, ATOMIC_MOVE)
        } catch (e: IOException) {
            if (aside != null) Files.move(aside, place, ATOMIC_MOVE)
            throw e
        }
        sync(place.parent)
        if (aside != null) remove(aside)
        made
    }
}

/**
 * Writes a file that appears at [target], in place of an older one, only when it is whole.
 *
 * @param write gets the channel of the new file, open for reading and writing.
 * @throws OutputError the target is a folder, cannot be written, or the disk is full.
 */
internal fun <T> atomicFile(target: Path, write: (FileChannel) -> T): T {
    val place = target.absolute().normalize()
    if (place.isDirectory(NOFOLLOW_LINKS)) {
        throw OutputError("there is a folder in the place of the file to write", place, "choose another path")
    }
    return partial(place) { path ->
        val written = FileChannel.open(path, CREATE, READ, WRITE).use { channel ->
            write(channel).also { channel.force(true) }
        }
        Files.move(path, place, ATOMIC_MOVE)
        sync(place.parent)
        written
    }
}

/** Writes bytes as [atomicFile] does. */
internal fun writeAtomically(target: Path, content: ByteArray) = atomicFile(target) { it.writeFully(content) }

/**
 * Puts back what a dead writer had moved aside to replace it.
 *
 * [atomicDirectory] does so itself; it is for who reads a target first.
 */
internal fun recover(target: Path) {
    val place = target.absolute().normalize()
    val aside = Regex(Regex.escape(".${place.name}.replaced-") + "[0-9a-f]{8}")
    for (path in siblings(place)) {
        if (!aside.matches(path.name)) continue
        if (place.exists(NOFOLLOW_LINKS)) remove(path) else Files.move(path, place, ATOMIC_MOVE)
    }
}

/** Removes a file, or a folder with all that is in it. What cannot be removed stays. */
internal fun remove(path: Path) {
    if (path.isDirectory(NOFOLLOW_LINKS)) {
        for (inner in runCatching { path.listDirectoryEntries() }.getOrDefault(emptyList())) remove(inner)
    }
    runCatching { path.deleteIfExists() }
}

/** The SHA-256 of bytes, in lower-case hex. */
internal fun sha256(content: ByteArray): String = MessageDigest.getInstance("SHA-256").digest(content).toHex()

/** The SHA-256 of a file, in lower-case hex. */
internal fun sha256(path: Path): String {
    val digest = MessageDigest.getInstance("SHA-256")
    val buffer = ByteArray(CHUNK)
    Files.newInputStream(path).use { stream ->
        while (true) {
            val count = stream.read(buffer)
            if (count < 0) break
            digest.update(buffer, 0, count)
        }
    }
    return digest.digest().toHex()
}

internal fun ByteArray.toHex(): String = joinToString("") { "%02x".format(it) }

internal fun FileChannel.writeFully(content: ByteArray, length: Int = content.size) {
    val buffer = java.nio.ByteBuffer.wrap(content, 0, length)
    while (buffer.hasRemaining()) write(buffer)
}

private fun <T> partial(target: Path, fill: (Path) -> T): T {
    try {
        Files.createDirectories(target.parent)
        recover(target)
        removeLeftovers(target)
        val path = target.resolveSibling(".${target.name}.partial-${System.nanoTime()}-${randomHex()}")
        val lock = path.resolveSibling("${path.name}.lock")
        FileChannel.open(lock, CREATE, WRITE).use { channel ->
            try {
                runCatching { channel.tryLock() } // a file system without locks: leftovers stay there
                return fill(path)
            } finally {
                remove(path)
                remove(lock)
            }
        }
    } catch (e: IOException) {
        throw OutputError(e.said(), target, "free some space, or choose another path", e)
    }
}

/** Removes what dead writers of this target left beside it. */
private fun removeLeftovers(target: Path) {
    val leftover = Regex(Regex.escape(".${target.name}.partial-") + """\d+-[0-9a-f]{8}\.lock""")
    for (lock in siblings(target).filter { leftover.matches(it.name) }) {
        try {
            FileChannel.open(lock, WRITE).use { channel ->
                if (channel.tryLock() != null) {
                    remove(lock.resolveSibling(lock.name.removeSuffix(".lock")))
                    remove(lock)
                }
            }
        } catch (_: OverlappingFileLockException) {
            // its writer is in this process
        } catch (_: NoSuchFileException) {
            // its writer has just ended
        }
    }
}

private fun siblings(target: Path): List<Path> {
    if (!target.parent.isDirectory()) return emptyList()
    return target.parent.listDirectoryEntries().filter { it.name.startsWith(".${target.name}.") }
}

private fun randomHex(): String = ByteArray(4).also { SecureRandom().nextBytes(it) }.toHex()

private fun syncTree(folder: Path) {
    for (path in folder.listDirectoryEntries()) if (path.isDirectory(NOFOLLOW_LINKS)) syncTree(path) else sync(path)
    sync(folder)
}

private fun sync(path: Path) {
    try {
        FileChannel.open(path, READ).use { it.force(true) }
    } catch (e: IOException) {
        if (!path.isDirectory()) throw e // some file systems cannot flush a folder
    }
}

internal fun targetExists(target: Path) =
    OutputError("the target exists already", target, "choose another path, or replace it with replace = true")

/** Why something could not be written. */
internal fun IOException.said(): String {
    val said = (this as? FileSystemException)?.reason ?: message ?: "$this"
    return when {
        "No space left" in said -> "the disk is full"
        "Disk quota" in said -> "the disk quota is used up"
        "Read-only" in said -> "the file system is read-only"
        this is AccessDeniedException -> "writing is not permitted"
        else -> "it cannot be written: $said"
    }
}
