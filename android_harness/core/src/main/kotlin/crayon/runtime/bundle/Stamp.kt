/*
 * The install stamp: proof that the files of a folder were hashed here, and have not been touched since.
 *
 * It holds the SHA-256 of the manifest, and the size and times of every file. The change time is part of it because, unlike the modification
 * time, no tool can set it: a copied folder never passes for a checked one. Where the system does not tell change times there is no stamp,
 * and a folder is hashed at each load. The format is Python's.
 */
package crayon.runtime.bundle

import crayon.runtime.CrayonError
import crayon.runtime.IntegrityError
import crayon.runtime.JSON
import crayon.runtime.Malformed
import crayon.runtime.Manifest
import crayon.runtime.fromJson
import crayon.runtime.parseJson
import crayon.runtime.sha256
import crayon.runtime.writeAtomically
import kotlinx.serialization.Serializable
import java.io.IOException
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.attribute.FileTime
import java.util.concurrent.TimeUnit
import kotlin.io.path.fileSize
import kotlin.io.path.getLastModifiedTime
import kotlin.io.path.readBytes

/** By file: its size, modification time and change time, in bytes and nanoseconds. */
internal typealias Times = Map<String, List<Long>>

@Serializable
private data class Stamp(val manifest: String? = null, val files: Map<String, List<Long>>? = null)

/** What the stamp records of the files, taken before they are hashed, so that a change meanwhile is noticed. Null: it cannot be told. */
internal fun times(folder: Path, manifest: Manifest): Times? =
    try {
        manifest.files.associate { file ->
            val path = folder.resolve(file.path)
            val changed = Files.getAttribute(path, "unix:ctime") as FileTime
            file.path to listOf(path.fileSize(), path.getLastModifiedTime().to(TimeUnit.NANOSECONDS), changed.to(TimeUnit.NANOSECONDS))
        }
    } catch (_: UnsupportedOperationException) {
        null
    } catch (_: IllegalArgumentException) {
        null
    }

/** Records that the files, as they were at these times, are what the manifest says. A read-only folder stays without. */
internal fun writeStamp(folder: Path, document: ByteArray, checked: Times?) {
    if (checked == null) return
    val stamp = JSON.encodeToString(Stamp.serializer(), Stamp(sha256(document), checked))
    try {
        writeAtomically(folder.resolve(STAMP), stamp.toByteArray())
    } catch (_: CrayonError) {
        return
    }
}

/** Whether these are the files that were hashed here. False without a stamp, or with that of another place. */
internal fun holds(folder: Path, now: Times?): Boolean = now != null && read(folder).files == now

/**
 * Refuses a manifest that is not the one the folder was stamped with. Without a stamp there is nothing to compare.
 *
 * @throws IntegrityError it is another one.
 */
internal fun checkStampedManifest(folder: Path, document: ByteArray) {
    val stamped = read(folder).manifest ?: return
    if (stamped != sha256(document)) {
        throw IntegrityError(
            "manifest.json is not the one that was installed here",
            folder,
            "install the bundle again, or remove $STAMP if you changed the manifest yourself",
        )
    }
}

private fun read(folder: Path): Stamp =
    try {
        fromJson(Stamp.serializer(), parseJson(folder.resolve(STAMP).readBytes()))
    } catch (_: IOException) {
        Stamp()
    } catch (_: Malformed) {
        Stamp()
    }
