/*
 * `.crayon`: a bundle as one file, a zip archive whose entries are stored as they are.
 *
 * java.util.zip hides what has to be refused (links, encryption, names that come twice), and Android's knows no zip64 before API 34. Nothing
 * is compressed, so the directory at the end of the file is all that has to be understood.
 */
package crayon.runtime.bundle

import crayon.runtime.BundleError
import crayon.runtime.Malformed
import crayon.runtime.at
import crayon.runtime.flipped
import crayon.runtime.utf8
import java.io.EOFException
import java.io.IOException
import java.io.InputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel
import java.nio.file.Path
import java.nio.file.StandardOpenOption.READ
import kotlin.math.max
import kotlin.math.min

private const val LOCAL = 0x04034b50
private const val CENTRAL = 0x02014b50
private const val END = 0x06054b50
private const val END64 = 0x06064b50
private const val LOCATOR64 = 0x07064b50
private const val END_SIZE = 22
private const val LARGEST_COMMENT = 0xffff
private const val LARGEST_DIRECTORY = 64L shl 20
private const val ENCRYPTED = 0x41 // flag bits: encrypted, strongly encrypted
private const val KIND = 0xf000
private const val REGULAR = 0x8000
private const val LINK = 0xa000
private const val ALL_ONES = 0xffffffffL

/** A bundle as one file. Close it. */
internal class Archive(override val path: Path) :
    Source,
    AutoCloseable {
    private val channel: FileChannel
    private val offsets = HashMap<String, Long>()
    override val entries: Map<String, Entry>

    init {
        var opened: FileChannel? = null
        try {
            opened = FileChannel.open(path, READ)
            channel = opened
            entries = readDirectory()
        } catch (e: IOException) {
            opened?.close()
            throw damaged(e.message ?: "it ends too early", e)
        } catch (e: Malformed) {
            opened?.close()
            throw damaged("a name in it: ${e.problem}", e)
        }
    }

    override fun open(path: String): InputStream {
        val header = read(offsets.getValue(path), 30)
        if (header.getInt(0) != LOCAL) throw IOException("its header is damaged")
        val start = offsets.getValue(path) + 30 + header.short(26) + header.short(28)
        return Slice(channel, start, entries.getValue(path).size)
    }

    override fun close() = channel.close()

    private fun readDirectory(): Map<String, Entry> {
        val (start, size, count) = findDirectory()
        if (size > LARGEST_DIRECTORY || start < 0 || size < 0) throw IOException("its directory has $size bytes")
        val directory = read(start, size.toInt())
        val found = LinkedHashMap<String, Entry>()
        for (i in 0 until count) {
            if (directory.remaining() < 46 ||
                directory.getInt(directory.position()) != CENTRAL
            ) {
                throw IOException("its directory is damaged")
            }
            val at = directory.position()
            val nameLength = directory.short(at + 28)
            val extraLength = directory.short(at + 30)
            val next = at + 46 + nameLength + extraLength + directory.short(at + 32)
            if (next > directory.limit()) throw IOException("its directory is damaged")
            val name = utf8(directory.bytes(at + 46, nameLength))
            val sizes = sizes(directory, at, at + 46 + nameLength, extraLength)
            val fault = if (name in found) "is in the archive more than once" else fault(directory, at, sizes)
            found[name] = Entry(sizes.size, fault)
            offsets[name] = sizes.offset
            directory.at(next)
        }
        return found
    }

    /** Where the directory starts, its bytes, and how many entries it has. */
    private fun findDirectory(): Triple<Long, Long, Long> {
        val length = channel.size()
        val tail = read(max(0, length - END_SIZE - LARGEST_COMMENT), min(length, (END_SIZE + LARGEST_COMMENT).toLong()).toInt())
        val end = (tail.limit() - END_SIZE downTo 0).firstOrNull { tail.getInt(it) == END } ?: throw IOException("it is no zip file")
        val locator = length - tail.limit() + end - 20
        if (locator >= 0) {
            val found = read(locator, 20)
            if (found.getInt(0) == LOCATOR64) {
                val end64 = read(found.getLong(8), 56)
                if (end64.getInt(0) != END64) throw IOException("its directory is damaged")
                return Triple(end64.getLong(48), end64.getLong(40), end64.getLong(32))
            }
        }
        return Triple(tail.int(end + 16), tail.int(end + 12), tail.short(end + 10).toLong())
    }

    private class Sizes(val size: Long, val stored: Long, val offset: Long)

    /** With what zip64 has in its extra field where 32 bits are too few. */
    private fun sizes(directory: ByteBuffer, at: Int, extra: Int, extraLength: Int): Sizes {
        val narrow = longArrayOf(directory.int(at + 24), directory.int(at + 20), directory.int(at + 42))
        var field = extra
        while (field + 4 <= extra + extraLength) {
            val end = field + 4 + directory.short(field + 2)
            if (directory.short(field) == 1) {
                var value = field + 4
                for (i in narrow.indices) {
                    if (narrow[i] != ALL_ONES) continue
                    if (value + 8 > min(end, extra + extraLength)) throw IOException("its directory is damaged")
                    narrow[i] = directory.getLong(value)
                    value += 8
                }
            }
            field = end
        }
        if (narrow.any { it < 0 }) throw IOException("its directory is damaged")
        return Sizes(narrow[0], narrow[1], narrow[2])
    }

    private fun fault(directory: ByteBuffer, at: Int, sizes: Sizes): String? {
        val kind = directory.short(at + 40) and KIND
        return when {
            kind == LINK -> "is a symbolic link"
            kind != 0 && kind != REGULAR -> "is not a regular file"
            directory.short(at + 8) and ENCRYPTED != 0 -> "is encrypted"
            directory.short(at + 10) != 0 || sizes.stored != sizes.size -> "is compressed; use `crayon pack` to make archives"
            else -> null
        }
    }

    private fun read(start: Long, size: Int): ByteBuffer {
        val buffer = ByteBuffer.allocate(size).order(ByteOrder.LITTLE_ENDIAN)
        while (buffer.hasRemaining()) {
            if (start < 0 || channel.read(buffer, start + buffer.position()) < 0) throw EOFException("it ends too early")
        }
        return buffer.flipped()
    }

    private fun damaged(why: String, cause: Exception) =
        BundleError("not a readable .crayon archive: $why", path, "fetch it again, or pack the bundle again", cause)
}

/** A part of a file. */
private class Slice(private val channel: FileChannel, private var position: Long, size: Long) : InputStream() {
    private val end = position + size

    override fun read(): Int {
        val one = ByteArray(1)
        return if (read(one, 0, 1) < 1) -1 else one[0].toInt() and 0xff
    }

    override fun read(buffer: ByteArray, offset: Int, length: Int): Int {
        if (length == 0) return 0
        if (position >= end) return -1
        val count = channel.read(ByteBuffer.wrap(buffer, offset, min(length.toLong(), end - position).toInt()), position)
        if (count > 0) position += count
        return count
    }
}

private fun ByteBuffer.short(at: Int): Int = getShort(at).toInt() and 0xffff

private fun ByteBuffer.int(at: Int): Long = getInt(at).toLong() and ALL_ONES

private fun ByteBuffer.bytes(at: Int, size: Int): ByteArray = ByteArray(size) { get(at + it) }
