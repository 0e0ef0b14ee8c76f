/*
 * ExecuTorch as a backend, by the `Module` of the stock AAR: programs of a single file, which is all that it loads.
 *
 * A program keeps keys and values in memory of its own, so each cache has a `Module`, and a second one costs what a second program costs: the
 * file is mapped, but what ExecuTorch packs of its weights is not shared. An engine that answers one prompt at a time has one.
 * The AAR hands out the logits in a new array for each token: that is the one allocation here that grows with the vocabulary.
 */
package crayon.executorch

import crayon.runtime.AdapterError
import crayon.runtime.BackendError
import crayon.runtime.KvDtype
import crayon.runtime.backends.Adapter
import crayon.runtime.backends.Backend
import crayon.runtime.backends.BackendLoader
import crayon.runtime.backends.Cache
import crayon.runtime.backends.LOADERS
import crayon.runtime.backends.Step
import crayon.runtime.bundle.Bundle
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor
import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.LongBuffer
import java.nio.file.Path

private const val METHOD = "forward_tap"

/** ONNX Runtime, and ExecuTorch where a bundle is for nothing else: for `Engine.load`. */
val WITH_EXECUTORCH: Map<String, BackendLoader> = LOADERS + ("executorch" to BackendLoader(ExecuTorchBackend::load))

/** A model bundle in ExecuTorch. */
class ExecuTorchBackend private constructor(private val bundle: Bundle, private val program: Path, private val threads: Int?) : Backend {
    private val model = bundle.model
    override val name = "executorch"
    override val vocabSize = model.architecture.vocabSize
    override val contextLength = model.contextLength
    override val tapSize = model.tap.size

    /** The most tokens of one step. */
    internal val longestStep: Int
    private var idle: Module?
    private var closed = false

    init {
        val first = open()
        try {
            longestStep = constant(first, "get_max_seq_len")
            val described = METHOD in first.methods && constant(first, "get_tap_size") == tapSize &&
                constant(first, "get_max_context_len") == contextLength && constant(first, "get_vocab_size") == vocabSize
            if (!described || longestStep < 1) throw BackendError("the program is not the one that the manifest describes", program)
        } catch (e: Throwable) {
            first.destroy()
            throw e
        }
        idle = first
    }

    /** Always refused: it would take a runner that fills the slots of a program. */
    override fun readAdapter(bundle: Bundle): Adapter = throw refused(bundle.asAdapter.name)

    override fun newCache(adapter: Adapter?): Cache {
        if (adapter != null) throw refused(adapter.name)
        val module = idle ?: open()
        idle = null
        return ExecuTorchCache(this, module)
    }

    override fun close() {
        closed = true
        idle?.destroy()
        idle = null
    }

    /** What a cache leaves; one is kept for the next. */
    internal fun giveBack(module: Module) {
        if (idle == null && !closed) idle = module else module.destroy()
    }

    private fun open(): Module =
        try {
            Module.load(program.toString(), Module.LOAD_MODE_MMAP, threads ?: 0)
        } catch (e: RuntimeException) {
            throw BackendError(
                "ExecuTorch refuses the program: ${e.message}",
                program,
                "export the model with the ExecuTorch of the app's AAR, or upgrade that",
                e,
            )
        } catch (e: LinkageError) {
            throw BackendError(
                "ExecuTorch's library is not in this app, or not for this processor",
                program,
                "add org.pytorch:executorch-android",
                e,
            )
        } catch (e: OutOfMemoryError) {
            throw BackendError("there is no memory for the program", program, "export the model with a shorter context", e)
        }

    private fun constant(module: Module, name: String): Int =
        try {
            if (name in module.methods) Math.toIntExact(module.execute(name).single().toInt()) else -1
        } catch (e: RuntimeException) {
            throw BackendError("ExecuTorch cannot run the program's $name: ${e.message}", program, cause = e)
        }

    internal fun refused(adapter: String) =
        AdapterError(
            "the stock AAR of ExecuTorch cannot switch to adapter '$adapter'",
            program,
            "export a model of its own with it: --adapter … --merge --single-file; or answer in ONNX Runtime",
        )

    companion object {
        /**
         * Loads the bundle's ExecuTorch variant.
         *
         * @param threads cores to compute on, for all models of the process; null: as ExecuTorch chooses.
         * @throws BackendError the bundle has none, or one of several files, or ExecuTorch refuses it.
         */
        fun load(bundle: Bundle, threads: Int? = null): Backend {
            val variant = bundle.model.variants.executorch
                ?: throw BackendError(
                    "the bundle has no ExecuTorch variant",
                    bundle.path,
                    "export the model again with --backend executorch",
                )
            if (variant.data.isNotEmpty()) {
                throw BackendError(
                    "the program has its weights in another file, which the AAR's Module does not load",
                    bundle.path,
                    "export the model again with --backend executorch --single-file",
                )
            }
            if (bundle.model.kvDtype == KvDtype.FP16) throw BackendError("ExecuTorch cannot keep an fp16 KV cache here", bundle.path)
            return ExecuTorchBackend(bundle, bundle.file(variant.program), threads)
        }
    }
}

/** One sequence, whose keys and values are in its module. */
private class ExecuTorchCache(private val backend: ExecuTorchBackend, module: Module) : Cache {
    private var module: Module? = module
    private val tokens: LongBuffer = longs(backend.longestStep)
    private val position: LongBuffer = longs(1)
    private val positionValue = EValue.from(Tensor.fromBlob(position, longArrayOf(1)))
    private val one: LongBuffer = longs(1)
    private val oneToken = EValue.from(Tensor.fromBlob(one, longArrayOf(1, 1)))
    private val step = Step(FloatArray(backend.vocabSize), FloatArray(backend.tapSize), FloatArray(backend.tapSize))

    override var length = 0
        private set
    override val adapter: Adapter? get() = null

    override fun prefill(ids: IntArray): Step {
        if (ids.isEmpty()) throw BackendError("there are no tokens to feed")
        begin(ids.size)
        for (start in ids.indices step backend.longestStep) {
            val count = minOf(backend.longestStep, ids.size - start)
            (tokens as Buffer).clear()
            for (i in 0 until count) tokens.put(i, ids[start + i].toLong())
            (tokens as Buffer).limit(count)
            run(EValue.from(Tensor.fromBlob(tokens.slice(), longArrayOf(1, count.toLong()))), length + start)
        }
        length += ids.size
        return step
    }

    override fun decode(token: Int): Step {
        begin(1)
        one.put(0, token.toLong())
        run(oneToken, length)
        length++
        return step
    }

    override fun rewind(length: Int) {
        if (length !in 0..this.length) throw BackendError("cannot rewind a cache of ${this.length} tokens to $length")
        this.length = length
    }

    override fun reset(adapter: Adapter?) {
        if (adapter != null) throw backend.refused(adapter.name)
        length = 0
    }

    override fun close() {
        module?.let(backend::giveBack)
        module = null
    }

    private fun begin(count: Int) {
        val total = length + count
        if (total > backend.contextLength) throw BackendError("$total tokens in a cache of ${backend.contextLength}")
        step.tapSum.fill(0f)
    }

    private fun run(ids: EValue, at: Int) {
        val own = module ?: throw BackendError("the cache was closed")
        position.put(0, at.toLong())
        val outputs = try {
            own.execute(METHOD, ids, positionValue).map { it.toTensor().dataAsFloatArray }
        } catch (e: RuntimeException) {
            throw BackendError("ExecuTorch failed at position $at: ${e.message}", cause = e)
        }
        if (outputs.map { it.size } != listOf(backend.vocabSize, backend.tapSize, backend.tapSize)) {
            throw BackendError("the program returned ${outputs.map { it.size }} numbers at position $at", advice = "export the model again")
        }
        outputs[0].copyInto(step.logits)
        for (i in step.tapSum.indices) step.tapSum[i] += outputs[1][i]
        outputs[2].copyInto(step.tapLast)
    }
}

private fun longs(count: Int): LongBuffer = ByteBuffer.allocateDirect(Long.SIZE_BYTES * count).order(ByteOrder.nativeOrder()).asLongBuffer()
