// A `.onnx_adapter` file as ONNX Runtime takes it: checked, and made float32 where it is stored in less.
package crayon.runtime.backends

import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoraAdapter
import crayon.runtime.AdapterDtype
import crayon.runtime.AdapterError
import crayon.runtime.AdapterSlots
import crayon.runtime.Architecture
import java.io.IOException
import java.nio.ByteBuffer
import java.nio.file.Path

private val TENSOR = Regex("""model\.layers\.(\d{1,4})\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight""")
private const val LARGEST_SCALE = Float.MAX_VALUE / 128

/** An adapter that ONNX Runtime has in memory, to be used by any number of runs. */
internal class OnnxAdapter private constructor(override val name: String, val lora: OrtLoraAdapter) : Adapter {
    companion object {
        /**
         * Reads the file of an adapter.
         *
         * @throws AdapterError it cannot be read, is not of this dtype, holds NaN or infinity, or does not fit the slots.
         */
        fun read(name: String, path: Path, dtype: AdapterDtype, architecture: Architecture, slots: AdapterSlots): OnnxAdapter {
            try {
                val stored = readOnnxAdapter(path)
                val matrices = stored.filterKeys { it.endsWith(".weight") }.mapValues { (tensor, parameter) ->
                    floats(tensor, parameter, stored[scaleName(tensor)], dtype, path)
                }
                val scales = if (dtype == AdapterDtype.INT8) matrices.keys.map(::scaleName) else emptyList()
                val foreign = stored.keys - matrices.keys - scales.toSet()
                if (foreign.isNotEmpty()) throw AdapterError("${foreign.first()} is not of an adapter in $dtype", path)
                for ((tensor, parameter) in matrices) check(tensor, parameter, matrices, architecture, slots, path)
                val lora = if (dtype ==
                    AdapterDtype.FP32
                ) {
                    OrtLoraAdapter.create(path.toString())
                } else {
                    OrtLoraAdapter.create(writeOnnxAdapter(matrices))
                }
                return OnnxAdapter(name, lora)
            } catch (e: IOException) {
                throw AdapterError("the adapter cannot be read: ${e.message}", path, "fetch or convert the adapter again", e)
            } catch (e: OrtException) {
                throw AdapterError("ONNX Runtime refuses the adapter: ${e.message}", path, "fetch or convert the adapter again", e)
            }
        }
    }
}

/** Refuses a matrix that has no slot in the model, or whose shape is not the slot's. */
private fun check(
    name: String,
    matrix: Parameter,
    all: Map<String, Parameter>,
    architecture: Architecture,
    slots: AdapterSlots,
    path: Path,
) {
    val (layer, target, side) = TENSOR.matchEntire(name)?.destructured ?: throw AdapterError("the model has no slot for $name", path)
    val features = architecture.features(target)
    if (layer.toInt() >= architecture.layers || target !in slots.targets || features == null) {
        throw AdapterError("the model has no slot for $name", path)
    }
    val isA = side == "A"
    val fits = matrix.shape[if (isA) 0 else 1] == if (isA) features.first else features.second
    if (!fits) throw AdapterError("$name has shape ${matrix.shape}; the layer has $features features in and out", path)
    val rank = matrix.shape[if (isA) 1 else 0]
    val other = if (isA) name.replace("lora_A", "lora_B") else name.replace("lora_B", "lora_A")
    if (all[other]?.shape?.get(if (isA) 0 else 1) != rank) throw AdapterError("$name and $other are not of one rank", path)
    if (slots.rankLimit != null &&
        rank > slots.rankLimit
    ) {
        throw AdapterError("$name has rank $rank; the model takes ${slots.rankLimit}", path)
    }
}

/** A matrix as float32, `MODULE.lora_A.weight` [in, r] or `MODULE.lora_B.weight` [r, out]; of int8 there is a scale for each rank. */
private fun floats(name: String, stored: Parameter, scale: Parameter?, dtype: AdapterDtype, path: Path): Parameter {
    if (stored.type != TYPES.getValue(dtype) || stored.shape.size != 2) throw AdapterError("$name is not a matrix in $dtype", path)
    val (rows, columns) = stored.shape
    val isA = name.endsWith(".lora_A.weight")
    val scales = if (dtype == AdapterDtype.INT8) {
        val wanted = listOf(if (isA) columns else rows)
        if (scale?.type != TYPES[AdapterDtype.FP32] ||
            scale?.shape != wanted
        ) {
            throw AdapterError("$name has not one scale for each rank", path)
        }
        FloatArray(wanted[0]) { scale.data.getFloat(4 * it) }
    } else {
        FloatArray(0)
    }
    var usable = scales.all { it in 0f..LARGEST_SCALE }
    val data = if (dtype == AdapterDtype.FP32) stored.data else little(4 * rows * columns)
    for (i in 0 until rows * columns) {
        val value = when (dtype) {
            AdapterDtype.FP32 -> stored.data.getFloat(4 * i)
            AdapterDtype.FP16 -> halfToFloat(stored.data.getShort(2 * i))
            AdapterDtype.INT8 -> stored.data.get(i) * scales[if (isA) i % columns else i / columns]
        }
        usable = usable && value.isFinite()
        if (dtype != AdapterDtype.FP32) data.putFloat(4 * i, value)
    }
    if (!usable) {
        throw AdapterError("$name holds NaN or infinity, or a scale that cannot be", path, "fetch or convert the adapter again")
    }
    return Parameter(TYPES.getValue(AdapterDtype.FP32), stored.shape, data)
}

/** What a float16 stands for. */
internal fun halfToFloat(half: Short): Float {
    val bits = half.toInt()
    val exponentAndMantissa = bits and 0x7fff
    if (exponentAndMantissa >= 0x7c00) return if (exponentAndMantissa == 0x7c00) Float.POSITIVE_INFINITY else Float.NaN
    // Moved to their places in a float32 they are 2^-112 of the value, subnormal or not.
    return Float.fromBits(((bits and 0x8000) shl 16) or (exponentAndMantissa shl 13)) * TWO_112
}

private val TWO_112 = Float.fromBits((127 + 112) shl 23)

private fun scaleName(name: String): String = name.removeSuffix(".weight") + ".scale"

private fun little(bytes: Int): ByteBuffer = ByteBuffer.allocate(bytes).order(java.nio.ByteOrder.LITTLE_ENDIAN)
