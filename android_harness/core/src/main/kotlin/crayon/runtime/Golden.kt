/*
 * Golden cases: what the model must answer, recorded at export and replayed on the device.
 *
 * They come from a float32 reference that uses the dequantized weights, so what is left is how a backend computes. Errors are root mean
 * squares, relative to the spread of the reference: the differences of a step's logits over their standard deviation, the differences of a
 * tap over its root mean square. Where the reference's best token leads by more than ten times what the tolerance allows, a backend must
 * choose the same one.
 */
package crayon.runtime

import crayon.runtime.backends.Adapter
import crayon.runtime.backends.Backend
import crayon.runtime.bundle.Bundle
import crayon.runtime.tokenizer.Tokenizer
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import java.io.IOException
import kotlin.io.path.readBytes
import kotlin.math.sqrt

private const val TINY = 1e-12 // outputs that are all zero differ from themselves by nothing
private const val CLEAR_LEAD = 10 // of two logits, each several root mean squares off, one may overtake the other up to here

/**
 * Token ids, fed as a prompt and then one by one.
 *
 * @property adapter the adapter inside the bundle that answers; null: the base.
 * @property text what `ids` are the tokens of; null: the ids are not those of a text.
 * @property steps positions in `ids` after which the logits are recorded; none before the end of the prompt.
 * @property backend the only backend whose weights the case is of; null: those of all.
 */
@Serializable
data class GoldenCase(
    val name: String,
    val adapter: String?,
    val text: String?,
    val ids: List<Int>,
    @SerialName("prompt_length") val promptLength: Int,
    val steps: List<Int>,
    val backend: String? = null,
)

/** How far a backend may be from the reference, relative to its spread. `isa` is "x86-64", "aarch64", or "any". */
@Serializable
data class Tolerance(val backend: String, val isa: String, val logits: Double, val tap: Double)

@Serializable
private class GoldenCases(val cases: List<GoldenCase>, val tolerances: List<Tolerance>)

/**
 * How one case went.
 *
 * @property problem null: it passed.
 * @property logitError largest over the steps, relative.
 */
data class CaseResult(val name: String, val adapter: String?, val problem: String?, val logitError: Double, val tapError: Double)

/**
 * Runs the golden cases of a bundle in a backend that has loaded it. None where the bundle has none.
 *
 * @throws AdapterError an adapter does not load.
 * @throws IntegrityError the recorded cases are damaged.
 */
fun replay(bundle: Bundle, backend: Backend): List<CaseResult> {
    val files = bundle.model.golden ?: return emptyList()
    val golden = try {
        decodeJson(GoldenCases.serializer(), bundle.file(files.cases).readBytes())
    } catch (e: IOException) {
        throw IntegrityError("the golden cases cannot be read: ${e.message}", bundle.path, cause = e)
    } catch (e: Malformed) {
        throw IntegrityError("the golden cases cannot be read: ${e.problem}", bundle.path)
    }
    val arrays = Safetensors.read(bundle.file(files.tensors)).tensors
    val tokenizer = Tokenizer(bundle)
    val tolerance = tolerance(golden, backend.name, bundle)
    val adapters = HashMap<String, Adapter>()
    return golden.cases.filter { it.backend == null || it.backend == backend.name }.map { case ->
        val adapter = case.adapter?.let { name -> adapters.getOrPut(name) { backend.readAdapter(bundle.adapter(name)) } }
        val logits = arrays["${case.name}.logits"] ?: throw IntegrityError("golden case '${case.name}' has no logits", bundle.path)
        val taps = arrays["${case.name}.taps"] ?: throw IntegrityError("golden case '${case.name}' has no taps", bundle.path)
        val result = replay(case, logits.rows, taps.rows, backend, adapter, tolerance)
        val retokenized = case.text?.let { tokenizer.encode(it) }
        if (result.problem == null && retokenized != null && retokenized != case.ids) {
            result.copy(problem = "the tokenizer gives other ids for its text")
        } else {
            result
        }
    }
}

private fun tolerance(golden: GoldenCases, backend: String, bundle: Bundle): Tolerance {
    val machine = System.getProperty("os.arch").lowercase()
    val isa = mapOf("amd64" to "x86-64", "x86_64" to "x86-64", "arm64" to "aarch64")[machine] ?: machine
    return listOf(isa, "any").firstNotNullOfOrNull { wanted -> golden.tolerances.find { it.backend == backend && it.isa == wanted } }
        ?: throw BundleError("the golden cases have no tolerance for $backend on $isa", bundle.path)
}

private fun replay(
    case: GoldenCase,
    logits: List<FloatArray>,
    taps: List<FloatArray>,
    backend: Backend,
    adapter: Adapter?,
    tolerance: Tolerance,
): CaseResult {
    val ids = case.ids.toIntArray()
    val got = HashMap<Int, FloatArray>()
    val means = listOf(DoubleArray(backend.tapSize), DoubleArray(backend.tapSize))
    backend.newCache(adapter).use { cache ->
        var step = cache.prefill(ids.copyOf(case.promptLength))
        means[0].add(step.tapSum)
        got[case.promptLength - 1] = step.logits.copyOf()
        for (position in case.promptLength until ids.size) {
            step = cache.decode(ids[position])
            means[1].add(step.tapSum)
            if (position in case.steps) got[position] = step.logits.copyOf()
        }
    }
    val lengths = listOf(case.promptLength, ids.size - case.promptLength)
    val tapErrors = taps.indices.map { i ->
        val mean = FloatArray(backend.tapSize) { (means[i][it] / maxOf(lengths[i], 1)).toFloat() }
        rms(difference(mean, taps[i])) / (rms(taps[i]) + TINY)
    }
    val outputs = case.steps.map(got::getValue)
    val spreads = logits.map { deviation(it) + TINY }
    val logitErrors = logits.indices.map { rms(difference(outputs[it], logits[it])) / spreads[it] }
    val other = logits.indices.any { i ->
        val sorted = logits[i].sortedArray()
        val lead = sorted[sorted.lastIndex] - sorted[sorted.lastIndex - 1]
        lead > CLEAR_LEAD * tolerance.logits * spreads[i] && best(outputs[i]) != best(logits[i])
    }
    val logitError = logitErrors.max()
    val tapError = tapErrors.max()
    val problem = when {
        !logitError.isFinite() || !tapError.isFinite() -> "the outputs are not finite"
        logitError > tolerance.logits -> "logits are $logitError off; allowed are ${tolerance.logits}"
        tapError > tolerance.tap -> "taps are $tapError off; allowed are ${tolerance.tap}"
        other -> "another token is the most likely one"
        else -> null
    }
    return CaseResult(case.name, case.adapter, problem, logitError, tapError)
}

private fun DoubleArray.add(row: FloatArray) {
    for (i in indices) this[i] += row[i].toDouble()
}

private fun difference(a: FloatArray, b: FloatArray) = FloatArray(a.size) { a[it] - b[it] }

private fun rms(x: FloatArray): Double = sqrt(x.sumOf { it.toDouble() * it } / x.size)

private fun deviation(x: FloatArray): Double {
    val mean = x.average()
    return sqrt(x.sumOf { (it - mean) * (it - mean) } / x.size)
}

private fun best(logits: FloatArray): Int = logits.indices.maxBy { logits[it] }
