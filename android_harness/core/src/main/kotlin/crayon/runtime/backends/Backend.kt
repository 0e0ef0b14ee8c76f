/*
 * The seam between the engine and whatever multiplies the matrices.
 *
 * A backend is one loaded model. It hands out caches; a cache is one sequence of tokens: its keys and values, and the adapter that computed
 * them. The engine knows only the interfaces below, and tests script them with `FakeBackend`.
 */
package crayon.runtime.backends

import crayon.runtime.AdapterError
import crayon.runtime.BackendError
import crayon.runtime.bundle.Bundle

/**
 * What one backend call returns. The arrays belong to the cache, and its next call overwrites them.
 *
 * @property logits [V]: scores of the token after the last one fed.
 * @property tapSum [D]: the tapped hidden state, summed over the tokens fed by this call.
 * @property tapLast [D]: the tapped hidden state of the last token fed.
 */
class Step(val logits: FloatArray, val tapSum: FloatArray, val tapLast: FloatArray)

/** An adapter that a backend has read. It may be used by any number of caches, also while others use another one. */
interface Adapter {
    val name: String
}

/** One sequence of tokens. Not safe for threads; the engine never shares one between two running answers. */
interface Cache : AutoCloseable {
    /** Tokens held. */
    val length: Int

    /** The adapter that this sequence is computed with; fixed while `length` > 0. */
    val adapter: Adapter?

    /** Appends tokens, at least one, and returns the scores after the last of them. */
    fun prefill(ids: IntArray): Step

    /** Appends one token. Allocates nothing that grows with vocabulary or context. */
    fun decode(token: Int): Step

    /** Forgets every token from position `length` on. */
    fun rewind(length: Int)

    /** Forgets everything, and computes with `adapter` from now on. */
    fun reset(adapter: Adapter?)
}

/** One loaded model. */
interface Backend : AutoCloseable {
    /** The key of the manifest's `variants` that this backend runs. */
    val name: String
    val vocabSize: Int

    /** Of the libraries that compute, for a profile. */
    val versions: Map<String, String> get() = emptyMap()

    /** The most tokens that a cache holds. */
    val contextLength: Int

    /** D, the width of the tapped hidden state. */
    val tapSize: Int

    /** Reads an adapter bundle into memory; [AdapterError] if it does not fit this model. */
    fun readAdapter(bundle: Bundle): Adapter

    fun newCache(adapter: Adapter? = null): Cache
}

/** How to load a bundle in a backend of one's own: an app adds ExecuTorch in this way. */
fun interface BackendLoader {
    /** @param threads cores to compute on; null: as many as the backend thinks right. */
    fun load(bundle: Bundle, threads: Int?): Backend
}

/** The backends of this library, by the keys of a manifest's `variants`. */
val LOADERS: Map<String, BackendLoader> = mapOf("onnx" to BackendLoader(OnnxBackend::load))

/** The backends that a bundle was exported for. */
fun served(bundle: Bundle): List<String> =
    when (val manifest = bundle.manifest) {
        is crayon.runtime.ModelManifest -> manifest.variants.let { names(it.onnx, it.executorch) }
        is crayon.runtime.AdapterManifest -> manifest.variants.let { names(it.onnx, it.executorch) }
    }

/**
 * Loads a model bundle in the first of the backends that serves it.
 *
 * @throws BackendError the bundle was exported for other backends than these, or does not load.
 */
internal fun load(bundle: Bundle, loaders: Map<String, BackendLoader>, threads: Int?): Backend {
    val exported = served(bundle.also { it.model })
    val name = loaders.keys.firstOrNull { it in exported } ?: throw BackendError(
        "the bundle is for ${exported.joinToString().ifEmpty { "no backend" }}; here there is ${loaders.keys.joinToString()}",
        bundle.path,
        "export the model again with --backend ${loaders.keys.firstOrNull() ?: "onnx"}",
    )
    return loaders.getValue(name).load(bundle, threads)
}

/** Refuses an adapter of another base model. */
internal fun checkBase(adapter: Bundle, baseFingerprint: String) {
    val manifest = adapter.asAdapter
    if (manifest.baseFingerprint != baseFingerprint) {
        throw AdapterError(
            "adapter '${manifest.name}' was made for another base model " +
                "(${manifest.baseFingerprint.take(12)}…; this one is ${baseFingerprint.take(12)}…)",
            adapter.path,
            "convert the adapter again for this model",
        )
    }
}

private fun names(onnx: Any?, executorch: Any?): List<String> =
    listOfNotNull("onnx".takeIf { onnx != null }, "executorch".takeIf { executorch != null })
