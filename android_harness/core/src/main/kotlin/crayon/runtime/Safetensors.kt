// Reading safetensors files: the JSON of a header, and the numbers after it.
package crayon.runtime

import crayon.runtime.backends.halfToFloat
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.builtins.MapSerializer
import kotlinx.serialization.builtins.serializer
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.add
import kotlinx.serialization.json.buildJsonObject
import kotlinx.serialization.json.put
import kotlinx.serialization.json.putJsonArray
import kotlinx.serialization.json.putJsonObject
import java.io.IOException
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel
import java.nio.file.Path
import java.nio.file.StandardOpenOption.READ

/** A tensor of numbers: its shape, and its values in rows as float32, whatever it is stored in. */
internal class Tensor(val shape: List<Int>, val values: FloatArray) {
    val rows: List<FloatArray>
        get() = List(shape[0]) { values.copyOfRange(it * shape[1], (it + 1) * shape[1]) }
}

/** The tensors of a file by name, and its metadata. */
internal class Safetensors(val tensors: Map<String, Tensor>, val metadata: Map<String, String>) {
    companion object {
        private const val LARGEST_HEADER = 100_000_000L

        /**
         * Reads a file of float32 and float16 tensors into memory.
         *
         * @param largest bytes that it may have.
         * @throws IntegrityError the file cannot be read, is larger, is no safetensors file, or holds another dtype.
         */
        fun read(path: Path, largest: Long = Int.MAX_VALUE.toLong()): Safetensors {
            try {
                val file = FileChannel.open(path, READ).use { channel ->
                    if (channel.size() > largest) throw IOException("it has ${channel.size()} bytes, which is too much")
                    channel.map(FileChannel.MapMode.READ_ONLY, 0, channel.size()).order(ByteOrder.LITTLE_ENDIAN)
                }
                return parse(file)
            } catch (e: IOException) {
                throw damaged(path, e.message)
            } catch (e: Malformed) {
                throw damaged(path, e.problem)
            }
        }

        private fun parse(file: ByteBuffer): Safetensors {
            val length = if (file.limit() >= 8) file.getLong(0) else 0
            if (length !in 2..minOf(file.limit() - 8L, LARGEST_HEADER)) throw IOException("its header has $length bytes")
            val header = parseJson(file.bytes(8, length.toInt())) as? JsonObject ?: throw IOException("its header is not an object")
            val metadata = header["__metadata__"]?.let { fromJson(MapSerializer(String.serializer(), String.serializer()), it) }
            val start = 8 + length
            val tensors = header.filterKeys { it != "__metadata__" }.mapValues { (name, entry) -> tensor(file, start, name, entry) }
            return Safetensors(tensors, metadata.orEmpty())
        }

        private fun tensor(file: ByteBuffer, start: Long, name: String, element: JsonElement): Tensor {
            val entry = fromJson(Entry.serializer(), element)
            val size = when (entry.dtype) {
                "F32" -> 4
                "F16" -> 2
                else -> throw IOException("$name is ${entry.dtype}; float32 and float16 can be read")
            }
            val fits = entry.shape.all { it >= 0 } && entry.offsets.size == 2 && entry.offsets[0] in 0..entry.offsets[1] &&
                start + entry.offsets[1] <= file.limit() &&
                entry.offsets[1] - entry.offsets[0] == entry.shape.fold(size.toLong(), Long::times)
            if (!fits) throw IOException("$name of shape ${entry.shape} does not fit bytes ${entry.offsets}")
            val at = (start + entry.offsets[0]).toInt()
            val count = ((entry.offsets[1] - entry.offsets[0]) / size).toInt()
            val values = FloatArray(count) { if (size == 4) file.getFloat(at + 4 * it) else halfToFloat(file.getShort(at + 2 * it)) }
            return Tensor(entry.shape, values)
        }

        private fun damaged(path: Path, why: String?) =
            IntegrityError("not a safetensors file that can be used: $why", path, "fetch it again")
    }

    @Serializable
    private class Entry(
        val dtype: String,
        val shape: List<Int>,
        @SerialName("data_offsets") val offsets: List<Long>,
    )
}

/** A file of float32 tensors, in this order. The same tensors give the same bytes. */
internal fun safetensors(vararg tensors: Pair<String, Tensor>): ByteArray {
    var end = 0
    val header = buildJsonObject {
        for ((name, tensor) in tensors) {
            putJsonObject(name) {
                put("dtype", "F32")
                putJsonArray("shape") { tensor.shape.forEach { add(it) } }
                putJsonArray("data_offsets") {
                    add(end)
                    end += 4 * tensor.values.size
                    add(end)
                }
            }
        }
    }
    val text = COMPACT.encodeToString(JsonObject.serializer(), header).let { it + " ".repeat(-it.length and 7) }.toByteArray()
    val file = ByteBuffer.allocate(8 + text.size + end).order(ByteOrder.LITTLE_ENDIAN)
    file.putLong(text.size.toLong()).put(text)
    for ((_, tensor) in tensors) tensor.values.forEach(file::putFloat)
    return file.array()
}

private fun ByteBuffer.bytes(at: Int, size: Int): ByteArray = ByteArray(size) { get(at + it) }
