/*
 * The `.onnx_adapter` file. The format is a FlatBuffer of ONNX Runtime's `adapter_schema.fbs`:
 *
 *     table Parameter { name: string; dims: [int64]; data_type: int32; raw_data: [uint8] (force_align: 8); }
 *     table Adapter   { format_version: int32; adapter_version: int32; model_version: int32; parameters: [Parameter]; }
 *     root_type Adapter; file_identifier "TORT";
 */
package crayon.runtime.backends

import crayon.runtime.AdapterDtype
import crayon.runtime.at
import crayon.runtime.cleared
import crayon.runtime.flipped
import crayon.runtime.upTo
import java.io.IOException
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel
import java.nio.file.Path
import java.nio.file.StandardOpenOption.READ

/** A tensor: its type in ONNX, its shape, and its bytes, little-endian. */
internal class Parameter(val type: Int, val shape: List<Int>, val data: ByteBuffer)

/** ONNX's numbers of types. */
internal val TYPES = mapOf(AdapterDtype.FP32 to 1, AdapterDtype.INT8 to 3, AdapterDtype.FP16 to 10)
private val SIZES = mapOf(1 to 4, 3 to 1, 10 to 2)

private const val HEADER_LEFT = 16 // of the file's header: the root's offset, the identifier, and what aligns the table's vtable
private val VTABLE = shortArrayOf(12, 20, 4, 8, 12, 16)

/** The tensors of a file by name; their bytes stay in the file, which is mapped. Throws [IOException]: it is none. */
internal fun readOnnxAdapter(path: Path): Map<String, Parameter> {
    val file = FileChannel.open(path, READ).use { channel ->
        if (channel.size() > Int.MAX_VALUE) throw IOException("it has more than 2 GiB")
        channel.map(FileChannel.MapMode.READ_ONLY, 0, channel.size()).order(ByteOrder.LITTLE_ENDIAN)
    }
    try {
        val parameters = Table(file, file.getInt(0)).vector(3)
        return (0 until file.getInt(parameters)).associate { i ->
            val at = parameters + 4 + 4 * i
            val table = Table(file, at + file.getInt(at))
            val name = table.vector(0).let { start -> String(ByteArray(file.getInt(start)) { file.get(start + 4 + it) }) }
            val shape = table.vector(1).let { start -> List(file.getInt(start)) { Math.toIntExact(file.getLong(start + 4 + 8 * it)) } }
            val type = file.getInt(table.field(2))
            val start = table.vector(3)
            val size = file.getInt(start)
            val wanted = SIZES[type]?.let { shape.fold(it.toLong()) { all, n -> Math.multiplyExact(all, n.toLong()) } }
            if (shape.any { it < 0 } || wanted != size.toLong()) throw IOException("$name has $size bytes, of type $type and shape $shape")
            name to Parameter(type, shape, slice(file, start + 4, size))
        }
    } catch (e: IndexOutOfBoundsException) {
        throw IOException("it is damaged", e)
    } catch (e: IllegalArgumentException) {
        throw IOException("it is damaged", e)
    } catch (e: ArithmeticException) {
        throw IOException("it is damaged", e)
    } catch (e: NegativeArraySizeException) {
        throw IOException("it is damaged", e)
    }
}

/** A file of float32 matrices, in a direct buffer. A FlatBuffer's offsets point forward, so the tensors follow all that is small. */
internal fun writeOnnxAdapter(matrices: Map<String, Parameter>): ByteBuffer {
    val small = matrices.entries.sumOf { (name, matrix) -> 96 + name.toByteArray().size + 8 * matrix.shape.size }
    val total = matrices.values.fold(128L + small) { all, matrix -> all + 16 + matrix.data.capacity() }
    if (total > Int.MAX_VALUE) throw IOException("in float32 it would have more than 2 GiB")
    val out = ByteBuffer.allocateDirect(total.toInt()).order(ByteOrder.LITTLE_ENDIAN)

    fun align(to: Int, then: Int = 0): Int {
        while ((out.position() + then) % to != 0) out.put(0)
        return out.position()
    }

    fun point(field: Int) = out.putInt(field, out.position() - field)
    out.putInt(0).put("TORT".toByteArray())
    val vtable = out.position()
    VTABLE.forEach(out::putShort)
    val root = align(4)
    out.putInt(0, root)
    out
        .putInt(root - vtable)
        .putInt(1)
        .putInt(1)
        .putInt(1)
        .putInt(0)
    point(root + HEADER_LEFT)
    out.putInt(matrices.size)
    val entries = out.position()
    repeat(matrices.size) { out.putInt(0) }
    val tables = matrices.entries.mapIndexed { i, (name, matrix) ->
        val table = align(4)
        out.putInt(entries + 4 * i, table - (entries + 4 * i))
        out
            .putInt(table - vtable)
            .putInt(0)
            .putInt(0)
            .putInt(matrix.type)
            .putInt(0)
        point(table + 4)
        val encoded = name.toByteArray()
        out.putInt(encoded.size).put(encoded).put(0)
        align(8, then = 4)
        point(table + 8)
        out.putInt(matrix.shape.size)
        matrix.shape.forEach { out.putLong(it.toLong()) }
        table
    }
    for ((table, matrix) in tables.zip(matrices.values)) {
        align(8, then = 4) // the tensor itself starts at a multiple of 8
        point(table + HEADER_LEFT)
        out.putInt(matrix.data.capacity())
        out.put(matrix.data.duplicate().cleared())
    }
    return out.flipped().slice().order(ByteOrder.LITTLE_ENDIAN)
}

/** A table of a FlatBuffer. */
private class Table(private val file: ByteBuffer, private val at: Int) {
    /** Where a field is. */
    fun field(number: Int): Int {
        val vtable = at - file.getInt(at)
        val place = 4 + 2 * number
        val offset = if (place < file.getShort(vtable)) file.getShort(vtable + place).toInt() else 0
        if (offset == 0) throw IOException("it lacks a field")
        return at + offset
    }

    /** Where a vector or a text that a field points to is: its length, then its elements. */
    fun vector(number: Int): Int = field(number).let { it + file.getInt(it) }
}

private fun slice(file: ByteBuffer, start: Int, size: Int): ByteBuffer =
    file
        .duplicate()
        .at(start)
        .upTo(Math.addExact(start, size))
        .slice()
        .order(ByteOrder.LITTLE_ENDIAN)
