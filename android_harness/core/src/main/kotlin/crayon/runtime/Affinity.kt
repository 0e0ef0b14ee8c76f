/*
 * How much a few texts belong to each cluster of a pool: from hidden states to alpha. As Python's `crayon_runtime.affinity`:
 *
 *     q(x)  = mean state of the text                                            (the Crayon paper's query)
 *     q(x)  = (answer - answer_mean) - (prompt - prompt_mean) @ ridge           (the task residual)
 *     z     = (q - mean) @ projection                                           [k]
 *     cos_n = z . indicator_n / |z|                                             [N]
 *     alpha = softmax(cos / temperature)                                        [N]; see `weights`
 */
package crayon.runtime

import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlin.math.abs
import kotlin.math.exp
import kotlin.math.sqrt

private const val SMALLEST = 1.17549435e-38 // the least normal float32

/** How cosines become weights. */
@Serializable
enum class WeightingKind {
    @SerialName("softmax")
    SOFTMAX,

    @SerialName("relu")
    RELU,

    @SerialName("topk")
    TOPK,

    @SerialName("raw")
    RAW,
}

/** How cosines become weights. The paper does not say; the softmax is the default. */
@Serializable
data class Weighting(
    val kind: WeightingKind = WeightingKind.SOFTMAX,
    val temperature: Double = 0.1,
    @SerialName("top_k") val topK: Int? = null,
) {
    /** Whether weights may be negative. */
    val signed: Boolean get() = kind == WeightingKind.RAW
}

/**
 * Where a pool's clusters lie.
 *
 * @property mean [d].
 * @property projection [d][k].
 * @property indicators [N][k], of unit length: the cluster centres.
 * @property promptMean, answerMean, ridge [d], [d] and [d][d], all three or none: what a query is freed of.
 */
class Projection(
    val mean: FloatArray,
    val projection: List<FloatArray>,
    val indicators: List<FloatArray>,
    val promptMean: FloatArray? = null,
    val answerMean: FloatArray? = null,
    val ridge: List<FloatArray>? = null,
) {
    /**
     * The query embedding of a text, [d].
     *
     * @param prompt [d], mean state of the prompt's tokens; needed for the task residual only.
     * @param answer [d], mean state of the tokens that the pool's embedding is made of.
     * @throws InvalidInput an array has another length, or holds NaN or infinity.
     */
    fun query(prompt: FloatArray?, answer: FloatArray): DoubleArray {
        check("answer", answer)
        if (ridge == null || promptMean == null || answerMean == null) return DoubleArray(answer.size) { answer[it].toDouble() }
        if (prompt == null) throw InvalidInput("the task residual needs the mean state of the prompt", "prompt")
        check("prompt", prompt)
        val predicted = times(DoubleArray(prompt.size) { prompt[it].toDouble() - promptMean[it] }, ridge)
        return DoubleArray(answer.size) { answer[it].toDouble() - answerMean[it] - predicted[it] }
    }

    /** The cosine between a query, [d], and each indicator: [N]. All 0 for a query that projects to nothing. */
    fun cosines(query: DoubleArray): FloatArray {
        val z = times(DoubleArray(query.size) { query[it] - mean[it] }, projection)
        val length = sqrt(z.sumOf { it * it })
        if (length < SMALLEST) return FloatArray(indicators.size)
        return FloatArray(indicators.size) { n ->
            z.indices
                .sumOf { z[it] * indicators[n][it] / length }
                .coerceIn(-1.0, 1.0)
                .toFloat()
        }
    }

    private fun check(name: String, state: FloatArray) {
        if (state.size != mean.size) throw InvalidInput("a state of ${state.size}; this pool takes ${mean.size}", name)
        if (!state.all { it.isFinite() }) throw InvalidInput("a state holds NaN or infinity", name)
    }
}

/**
 * Alpha from cosines, [N]; it sums to 1 unless it is raw.
 *
 * softmax: exp(cos / temperature), normalized. topk: the same over the `topK` largest cosines (1 if not given), others 0. relu:
 * max(cos, 0), normalized; uniform where no cosine is positive. raw: the cosines themselves.
 */
fun weights(cosines: FloatArray, weighting: Weighting): FloatArray {
    val n = cosines.size
    val alpha = when (weighting.kind) {
        WeightingKind.RAW -> {
            return cosines.copyOf()
        }

        WeightingKind.RELU -> {
            DoubleArray(n) { maxOf(cosines[it], 0f).toDouble() }
        }

        else -> {
            val largest = cosines.max()
            DoubleArray(n) { exp((cosines[it] - largest) / weighting.temperature) }
        }
    }
    if (weighting.kind == WeightingKind.TOPK) {
        cosines.indices
            .sortedByDescending { cosines[it] }
            .drop(weighting.topK ?: 1)
            .forEach { alpha[it] = 0.0 }
    }
    val total = alpha.sum()
    return FloatArray(n) { if (total > 0) (alpha[it] / total).toFloat() else 1f / n }
}

/**
 * Alpha of the texts of one user, [N]: the weights of their mean query.
 *
 * @param prompts, answers mean states, [d] of each text; see [Projection.query].
 */
fun alpha(projection: Projection, weighting: Weighting, prompts: List<FloatArray>?, answers: List<FloatArray>): FloatArray {
    val sum = DoubleArray(projection.mean.size)
    answers.forEachIndexed { i, answer ->
        val query = projection.query(prompts?.get(i), answer)
        for (j in sum.indices) sum[j] += query[j] / answers.size
    }
    return weights(projection.cosines(sum), weighting)
}

/** A row [d] times a matrix [d][k]. */
internal fun times(row: DoubleArray, matrix: List<FloatArray>): DoubleArray {
    val out = DoubleArray(matrix.firstOrNull()?.size ?: 0)
    for (i in row.indices) for (j in out.indices) out[j] += row[i] * matrix[i][j]
    return out
}

/** Whether rows are of unit length, as far as float32 tells. */
internal fun areUnits(rows: List<FloatArray>): Boolean = rows.all { row -> abs(sqrt(row.sumOf { it.toDouble() * it }) - 1) < 1e-3 }
