/*
 * Numbers that say how good the device's own answer is, from what was computed while it was made. As Python's
 * `crayon_runtime.routing.signals`, which says what each is; those in the pool's projected space are not here. Higher is always better.
 * What cannot be computed is NaN.
 */
package crayon.runtime.routing

import crayon.runtime.ExampleStates
import crayon.runtime.InvalidInput
import crayon.runtime.Prototypes
import kotlin.math.exp
import kotlin.math.expm1
import kotlin.math.ln
import kotlin.math.sqrt

private const val TOP_K = 5
private const val LARGEST_PROBABILITY = 0.999
private const val NEAREST = 0.01

/** All that there are, by name. */
val SIGNALS: List<String> = listOf(
    "log_probability",
    "log_odds",
    "least_log_probability",
    "prototypes_mean",
    "prototypes_max",
    "prototypes_top_k",
    "examples_top_k",
    "examples_nearness",
    "prompts_top_k",
    "prompts_nearness",
)

/** What signals are computed of: mean states [D] of prompt and of answer, null where there are none, and the tokens' log-probabilities. */
class Said(val promptTap: FloatArray?, val answerTap: FloatArray?, val logProbabilities: List<Double>)

/**
 * What an answer is compared with.
 *
 * @param prototypes S of this user; null: there are none.
 * @param examples states of the user's own examples; null: there are none.
 * @throws InvalidInput they are of different sizes.
 */
class Reference(prototypes: Prototypes?, examples: ExampleStates?) {
    /** What is subtracted from an answer's state: hidden states have much in common whatever the text. */
    private val center: FloatArray?
    private val rawMean: FloatArray?
    internal val prototypeRows: List<FloatArray>
    internal val answers: List<FloatArray>
    internal val prompts: List<FloatArray>

    /** D; null: there is nothing to compare with. */
    internal val size: Int?

    /** The signals that can be computed with it. */
    val names: Set<String>

    init {
        val states = prototypes?.states.orEmpty()
        val sizes = (states + examples?.answer.orEmpty() + examples?.prompt.orEmpty()).map { it.size }.toSet()
        if (sizes.size > 1) {
            val said = "prototypes and examples are of states of different sizes: ${sizes.sorted()}"
            throw InvalidInput(said, "reference", "customize the model again")
        }
        size = sizes.firstOrNull()
        center = prototypes?.mean
        prototypeRows = states.map { unit(centred(it)) }
        answers = examples?.answer.orEmpty().map { unit(centred(it)) }
        prompts = examples?.prompt.orEmpty().map(::unit)
        rawMean = states.map(::unit).takeIf { it.isNotEmpty() }?.let(::meanOf)
        names = SIGNALS
            .filter { name ->
                when (name.substringBefore('_')) {
                    "prototypes" -> states.isNotEmpty()
                    "examples", "prompts" -> answers.isNotEmpty()
                    else -> true
                }
            }.toSet()
    }

    /** Refuses, with InvalidInput, signals that nobody knows or that cannot be computed with this. */
    fun check(wanted: Iterable<String>) {
        val name = wanted.firstOrNull { it !in names } ?: return
        if (name !in SIGNALS) throw InvalidInput("there is no signal '$name'", "signals", "choose of ${SIGNALS.joinToString()}")
        val (what, advice) = if (name.startsWith("prototypes")) {
            "prototypes, and this adapter came without any" to "customize with a pool that has them, or choose another policy"
        } else {
            "the user's own examples" to "customize the model on this device, or choose another policy"
        }
        throw InvalidInput("the signal $name needs $what", "signals", advice)
    }

    internal fun centred(state: FloatArray): FloatArray = center?.let { FloatArray(state.size) { i -> state[i] - it[i] } } ?: state

    internal fun prototypesMean(state: FloatArray): Double = dot(rawMean ?: return Double.NaN, unit(state))
}

/**
 * The signals of an answer by name, in the order asked for.
 *
 * @param said an answer, whole or so far.
 * @throws InvalidInput a signal is not known, or the reference lacks what it needs.
 */
fun signals(said: Said, reference: Reference, names: Collection<String>): Map<String, Double> {
    reference.check(names)
    val answer = said.answerTap ?: return names.associateWith { Double.NaN }
    val mean = if (said.logProbabilities.isEmpty()) Double.NaN else said.logProbabilities.sum() / said.logProbabilities.size
    val usable = mean.isFinite() // NaN and infinities of either sign spread to the mean
    val prompt = said.promptTap?.let(::unit)
    val centred by lazy { unit(reference.centred(answer)) }
    return names.associateWith { name ->
        when (name) {
            "log_probability" -> if (usable) mean else Double.NaN
            "log_odds" -> if (usable) odds(mean) else Double.NaN
            "least_log_probability" -> if (usable) said.logProbabilities.min() else Double.NaN
            "prototypes_mean" -> reference.prototypesMean(answer)
            "prototypes_max" -> cosines(reference.prototypeRows, centred).last()
            "prototypes_top_k" -> topK(cosines(reference.prototypeRows, centred))
            "examples_top_k" -> topK(cosines(reference.answers, centred))
            "examples_nearness" -> nearness(cosines(reference.answers, centred))
            "prompts_top_k" -> if (prompt == null) Double.NaN else topK(cosines(reference.prompts, prompt))
            else -> if (prompt == null) Double.NaN else nearness(cosines(reference.prompts, prompt))
        }
    }
}

/** Ascending; NaN at the end. */
internal fun cosines(rows: List<FloatArray>, state: FloatArray): List<Double> = rows.map { dot(it, state) }.sorted()

/** Mean of the largest five of ascending cosines, or of all where there are fewer. */
internal fun topK(cosines: List<Double>): Double = cosines.takeLast(TOP_K).average()

/** -log(1.01 - the largest) of ascending cosines. */
internal fun nearness(cosines: List<Double>): Double = cosines.last().let { if (it.isNaN()) it else -ln(1 + NEAREST - minOf(it, 1.0)) }

/** log(p / (1 - p)) of a log-probability, p at most .999. */
internal fun odds(logProbability: Double): Double = minOf(logProbability, ln(LARGEST_PROBABILITY)).let { it - ln(-expm1(it)) }

/** A state at unit length; all NaN if it is not finite. One without a direction stays 0, and so do its cosines. */
internal fun unit(state: FloatArray): FloatArray {
    val square = state.sumOf { it.toDouble() * it }
    if (!square.isFinite()) return FloatArray(state.size) { Float.NaN }
    val length = if (square == 0.0) 1.0 else sqrt(square)
    return FloatArray(state.size) { (state[it] / length).toFloat() }
}

internal fun sigmoid(x: Double): Double = if (x >= 0) 1 / (1 + exp(-x)) else exp(x).let { it / (1 + it) } // NaN stays

private fun dot(a: FloatArray, b: FloatArray): Double {
    var sum = 0.0
    for (i in a.indices) sum += a[i].toDouble() * b[i]
    return sum
}

private fun meanOf(rows: List<FloatArray>): FloatArray =
    FloatArray(rows[0].size) { i -> (rows.sumOf { it[i].toDouble() } / rows.size).toFloat() }
