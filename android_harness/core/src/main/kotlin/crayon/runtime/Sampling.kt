/*
 * From logits to a token. The specification is the docstring of Python's `crayon_runtime.sampling`: the same seed gives the same tokens.
 * Step 0 of it, constraints, is not here.
 */
package crayon.runtime

import java.security.SecureRandom
import kotlin.math.abs
import kotlin.math.exp
import kotlin.math.ln

/**
 * How the next token is chosen. The default is greedy.
 *
 * @property temperature 0: always the most likely token; else at least 0.001.
 * @property topK only the k most likely tokens; 0: all.
 * @property topP only the most likely tokens that together have this probability; 1: all.
 * @property minP only tokens at least this many times as likely as the most likely one; 0: all.
 * @property repetitionPenalty above 1, tokens that the prompt or the answer already has become less likely; 1: off.
 * @property seed the same seed gives the same answer; null: another one each time.
 * @throws InvalidInput a value is out of range.
 */
data class SamplingOptions(
    val temperature: Double = 0.0,
    val topK: Int = 0,
    val topP: Double = 1.0,
    val minP: Double = 0.0,
    val repetitionPenalty: Double = 1.0,
    val seed: ULong? = null,
) {
    init {
        check("temperature", temperature, temperature == 0.0 || temperature in 0.001..1000.0, "0, or from 0.001 to 1000")
        check("topK", topK, topK >= 0, "a whole number from 0")
        check("topP", topP, topP in 0.0..1.0, "from 0 to 1")
        check("minP", minP, minP in 0.0..1.0, "from 0 to 1")
        check("repetitionPenalty", repetitionPenalty, repetitionPenalty in 0.01..100.0, "from 0.01 to 100")
    }

    private fun check(name: String, value: Any, holds: Boolean, wanted: String) {
        if (!holds) throw InvalidInput("$name is $value; it must be $wanted", name)
    }
}

/** Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014. */
internal class SplitMix64(private var state: ULong) {
    /** 64 random bits. */
    fun next(): ULong {
        state += 0x9E3779B97F4A7C15u
        var x = state
        x = (x xor (x shr 30)) * 0xBF58476D1CE4E5B9u
        x = (x xor (x shr 27)) * 0x94D049BB133111EBu
        return x xor (x shr 31)
    }

    /** In [0, 1). */
    fun uniform(): Double = (next() shr 11).toLong() * TWO_MINUS_53
}

private const val TWO_MINUS_53 = 1.0 / (1L shl 53)

/**
 * Chooses the tokens of one answer. All that grows with the vocabulary is allocated here, once.
 *
 * @param vocabSize V.
 */
internal class Sampler(private val options: SamplingOptions, vocabSize: Int) {
    /** Natural logarithm of the last token's probability in the plain softmax of its logits, before any option changed them. */
    var logProbability = 0.0
        private set
    private val random = SplitMix64(options.seed ?: SecureRandom().nextLong().toULong())
    private val penalty = options.repetitionPenalty.toFloat()
    private val seen = BooleanArray(vocabSize)
    private val scores = FloatArray(vocabSize)
    private val negated = FloatArray(if (options.temperature > 0) vocabSize else 0)
    private val sums = DoubleArray(negated.size)
    private var best = 0.0
    private var logSum = 0.0

    /** Tells of tokens of the prompt, for the repetition penalty. Sampled tokens are known already. */
    fun observe(tokens: IntArray) = tokens.forEach { seen[it] = true }

    /**
     * Chooses a token.
     *
     * @param logits [V], left as they are. A token with -inf is never chosen.
     * @throws BackendError there is a NaN or +inf among them, or nothing but -inf.
     */
    fun sample(logits: FloatArray): Int {
        best = largest(logits).toDouble()
        if (!(abs(best) < 1e30)) { // NaN is not either
            throw BackendError(
                "the model's logits are not usable: their maximum is $best",
                advice = "`crayon verify` tells whether the bundle is damaged",
            )
        }
        for (i in logits.indices) {
            val z = logits[i]
            scores[i] = if (penalty == 1f || !seen[i]) {
                z
            } else if (z >= 0) {
                z / penalty
            } else {
                z * penalty
            }
        }
        val token = if (options.temperature == 0.0) firstLargest(scores) else draw()
        seen[token] = true
        var total = 0.0
        for (z in logits) total += exp(z - best)
        logSum = ln(total)
        logProbability = logits[token] - best - logSum
        return token
    }

    /**
     * The ids and log-probabilities of the likeliest tokens in the plain softmax of the logits that were last sampled from. One of
     * probability 0 is not among them; of equally likely ones those with the smallest ids come first.
     */
    fun mostLikely(logits: FloatArray, count: Int): List<Pair<Int, Double>> {
        if (count == 0) return emptyList()
        val found = ArrayList<Int>(count + 1)
        for (i in logits.indices) {
            if (found.size == count && logits[i] <= logits[found.last()]) continue
            val place = found.indexOfFirst { logits[it] < logits[i] }.let { if (it < 0) found.size else it }
            found.add(place, i)
            if (found.size > count) found.removeAt(count)
        }
        return found.filter { logits[it] > Float.NEGATIVE_INFINITY }.map { it to logits[it] - best - logSum }
    }

    private fun draw(): Int {
        val temperature = options.temperature.toFloat()
        for (i in scores.indices) scores[i] = scores[i] / temperature
        var n = candidates()
        val first = negated[0].toDouble()
        var sum = 0.0
        for (i in 0 until n) {
            sum += exp(-(negated[i] - first))
            sums[i] = sum
        }
        if (options.topP < 1) {
            val limit = options.topP * sums[n - 1]
            n = minOf(n, firstIndex(n) { sums[it] >= limit } + 1)
        }
        if (options.minP > 0) {
            val limit = -ln(options.minP)
            n = minOf(n, firstIndex(n) { negated[it] - first > limit })
        }
        val total = sums[n - 1]
        val drawn = random.uniform() * total
        val last = firstIndex(n) { sums[it] >= total }
        return tokenOf(minOf(firstIndex(n) { sums[it] > drawn }, last))
    }

    /** Writes the scores that top-k keeps to `negated`, ascending; returns how many. */
    private fun candidates(): Int {
        for (i in scores.indices) negated[i] = -scores[i]
        val k = options.topK
        if (k == 0 || k >= negated.size) {
            negated.sort()
            return negated.size
        }
        val kth = select(negated, k - 1)
        var kept = 0
        for (score in scores) if (-score <= kth) negated[kept++] = -score
        negated.sort(0, kept)
        return kept
    }

    /** The id of a candidate: of the tokens with its score, the smallest ids come first. */
    private fun tokenOf(index: Int): Int {
        val score = -negated[index]
        var before = index - firstIndex(index) { negated[it] >= negated[index] }
        return scores.indices.first { scores[it] == score && before-- == 0 }
    }
}

/** The first of 0 … n - 1 for which a condition holds that holds for all after it too; n if there is none. */
private inline fun firstIndex(n: Int, holds: (Int) -> Boolean): Int {
    var low = 0
    var high = n
    while (low < high) {
        val middle = (low + high) ushr 1
        if (holds(middle)) high = middle else low = middle + 1
    }
    return low
}

/** What would be at `index` if the values were sorted; reorders them. */
private fun select(values: FloatArray, index: Int): Float {
    var low = 0
    var high = values.lastIndex
    while (low < high) {
        val pivot = values[(low + high) ushr 1]
        var i = low
        var j = high
        while (i <= j) {
            while (values[i] < pivot) i++
            while (values[j] > pivot) j--
            if (i <= j) {
                val value = values[i]
                values[i++] = values[j]
                values[j--] = value
            }
        }
        if (index <= j) {
            high = j
        } else if (index >= i) {
            low = i
        } else {
            break
        }
    }
    return values[index]
}

/** NaN if one of them is. */
private fun largest(values: FloatArray): Float {
    var best = Float.NEGATIVE_INFINITY
    for (value in values) {
        if (value.isNaN()) return value
        if (value > best) best = value
    }
    return best
}

private fun firstLargest(values: FloatArray): Int {
    var best = 0
    for (i in values.indices) if (values[i] > values[best]) best = i
    return best
}
