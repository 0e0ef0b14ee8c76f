/*
 * ONNX Runtime as a backend, on the CPU. On a phone `onnxruntime-android` has the same classes.
 *
 * Every buffer is allocated once a cache: the KV cache is written in place (past and present are the same memory), logits and taps land in
 * buffers that are reused, and of the attention mask only the length changes.
 */
package crayon.runtime.backends

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
import crayon.runtime.AdapterError
import crayon.runtime.BackendError
import crayon.runtime.KvDtype
import crayon.runtime.at
import crayon.runtime.bundle.Bundle
import crayon.runtime.upTo
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer

/** A model bundle in ONNX Runtime. */
class OnnxBackend private constructor(internal val session: OrtSession, bundle: Bundle) : Backend {
    private val model = bundle.model
    override val name = "onnx"
    override val versions get() = mapOf("onnxruntime" to OrtEnvironment.getEnvironment().version)
    override val vocabSize = model.architecture.vocabSize
    override val contextLength = model.contextLength
    override val tapSize = model.tap.size
    internal val kvSlots = model.architecture.passes
    internal val kvShape =
        longArrayOf(1, model.architecture.kvHeads.toLong(), contextLength.toLong(), model.architecture.headSize.toLong())
    internal val kvType = if (model.kvDtype == KvDtype.FP16) OnnxJavaType.FLOAT16 else OnnxJavaType.FLOAT
    internal val kvBytes = model.kvDtype.bytes

    override fun readAdapter(bundle: Bundle): Adapter {
        val manifest = bundle.asAdapter
        val slots = model.adapterSlots
            ?: throw AdapterError("this model has no adapter slots", bundle.path, "export it without --merge and with adapter slots")
        checkBase(bundle, model.baseFingerprint)
        val variant = manifest.variants.onnx ?: throw AdapterError("the adapter has no ONNX variant", bundle.path)
        return OnnxAdapter.read(manifest.name, bundle.file(variant.file), variant.dtype, model.architecture, slots)
    }

    override fun newCache(adapter: Adapter?): Cache =
        try {
            OnnxCache(this, adapter)
        } catch (e: OutOfMemoryError) {
            throw BackendError("there is no memory for a KV cache of $contextLength tokens", advice = "export a shorter context", cause = e)
        }

    override fun close() = session.close()

    companion object {
        /**
         * Loads the bundle's ONNX variant.
         *
         * @param threads cores to compute on; null: as many as there are physical ones.
         * @throws BackendError the bundle has no ONNX variant, or ONNX Runtime refuses it.
         */
        fun load(bundle: Bundle, threads: Int? = null): Backend {
            val variant = bundle.model.variants.onnx
                ?: throw BackendError("the bundle has no ONNX variant", bundle.path, "export the model again with --backend onnx")
            if (bundle.model.kvDtype == KvDtype.INT8) throw BackendError("ONNX Runtime cannot keep an int8 KV cache here", bundle.path)
            val model = bundle.file(variant.model)
            try {
                OrtSession.SessionOptions().use { options ->
                    // It warns once for every adapter slot that keeps its default.
                    options.setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR)
                    options.setIntraOpNumThreads(threads ?: 0)
                    // Shapes change with every token: a memory plan per shape would be made once, never used again, and kept.
                    options.setMemoryPatternOptimization(false)
                    return OnnxBackend(OrtEnvironment.getEnvironment().createSession(model.toString(), options), bundle)
                }
            } catch (e: OrtException) {
                throw BackendError(
                    "ONNX Runtime ${OrtEnvironment.getEnvironment().version} refuses the model: ${e.message}",
                    model,
                    "`crayon verify` tells whether the bundle is damaged; else upgrade onnxruntime",
                    e,
                )
            }
        }
    }
}

/** One sequence: its KV cache, and the buffers that a run reads and writes. */
private class OnnxCache(private val backend: OnnxBackend, adapter: Adapter?) : Cache {
    private val environment = OrtEnvironment.getEnvironment()
    private val logits = floats(1, 1, backend.vocabSize)
    private val tapSum = floats(1, backend.tapSize)
    private val tapLast = floats(1, backend.tapSize)
    private val step = Step(FloatArray(backend.vocabSize), FloatArray(backend.tapSize), FloatArray(backend.tapSize))
    private val token: LongBuffer = direct(Long.SIZE_BYTES).asLongBuffer()
    private val oneToken = OnnxTensor.createTensor(environment, token, longArrayOf(1, 1))
    private val mask: LongBuffer = direct(Long.SIZE_BYTES * backend.contextLength).asLongBuffer()
    private val inputs = HashMap<String, OnnxTensor>()
    private val outputs = HashMap<String, OnnxTensor>()
    private var options = runOptions(null)
    private var closed = false

    override var length = 0
        private set
    override var adapter: Adapter? = null
        private set

    init {
        for (i in 0 until mask.capacity()) mask.put(i, 1)
        outputs["logits"] = logits.tensor
        outputs["tap_sum"] = tapSum.tensor
        outputs["tap_last"] = tapLast.tensor
        for (slot in 0 until backend.kvSlots) {
            for (side in listOf("key", "value")) {
                val bytes = backend.kvShape.fold(backend.kvBytes.toLong(), Long::times)
                val tensor = OnnxTensor.createTensor(environment, direct(Math.toIntExact(bytes)), backend.kvShape, backend.kvType)
                inputs["past_key_values.$slot.$side"] = tensor
                outputs["present.$slot.$side"] = tensor
            }
        }
        use(adapter)
    }

    override fun prefill(ids: IntArray): Step {
        val buffer = direct(Long.SIZE_BYTES * ids.size).asLongBuffer()
        for (i in ids.indices) buffer.put(i, ids[i].toLong())
        return OnnxTensor.createTensor(environment, buffer, longArrayOf(1, ids.size.toLong())).use { advance(it, ids.size) }
    }

    override fun decode(token: Int): Step {
        this.token.put(0, token.toLong())
        return advance(oneToken, 1)
    }

    override fun rewind(length: Int) {
        if (length !in 0..this.length) throw BackendError("cannot rewind a cache of ${this.length} tokens to $length")
        this.length = length
    }

    override fun reset(adapter: Adapter?) {
        length = 0
        if (adapter !== this.adapter) use(adapter)
    }

    override fun close() {
        if (closed) return
        closed = true
        options.close()
        oneToken.close()
        for (tensor in inputs.values.toSet() + outputs.values) tensor.close()
        inputs.clear()
        outputs.clear()
    }

    private fun advance(ids: OnnxTensor, tokens: Int): Step {
        val total = length + tokens
        if (total > backend.contextLength) throw BackendError("$total tokens in a cache of ${backend.contextLength}")
        try {
            OnnxTensor.createTensor(environment, mask.upTo(total).slice(), longArrayOf(1, total.toLong())).use { attention ->
                inputs["input_ids"] = ids
                inputs["attention_mask"] = attention
                backend.session.run(inputs, emptySet(), outputs, options).close()
            }
        } catch (e: OrtException) {
            throw BackendError("ONNX Runtime failed at position $length: ${e.message}", cause = e)
        } finally {
            inputs.remove("input_ids")
            inputs.remove("attention_mask")
        }
        length = total
        logits.copyTo(step.logits)
        tapSum.copyTo(step.tapSum)
        tapLast.copyTo(step.tapLast)
        return step
    }

    private fun use(adapter: Adapter?) {
        if (adapter != null && adapter !is OnnxAdapter) throw AdapterError("adapter '${adapter.name}' was read by another backend")
        options.close()
        options = runOptions(adapter)
        this.adapter = adapter
    }

    private fun runOptions(adapter: OnnxAdapter?) =
        OrtSession.RunOptions().apply {
            if (adapter !=
                null
            ) {
                addActiveLoraAdapter(adapter.lora)
            }
        }

    private inner class Floats(val buffer: FloatBuffer, val tensor: OnnxTensor) {
        fun copyTo(array: FloatArray) {
            buffer.at(0).get(array)
        }
    }

    private fun floats(vararg shape: Int): Floats {
        val buffer = direct(Float.SIZE_BYTES * shape.fold(1, Int::times)).asFloatBuffer()
        return Floats(buffer, OnnxTensor.createTensor(environment, buffer, LongArray(shape.size) { shape[it].toLong() }))
    }
}

private fun direct(bytes: Int): ByteBuffer = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())
