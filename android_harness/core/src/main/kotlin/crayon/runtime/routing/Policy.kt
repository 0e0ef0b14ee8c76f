/*
 * From signals to a route: a weighted sum against a threshold. All policies are such sums; they differ in their numbers.
 *
 * score = bias + sum of weight * signal        (logistic: 1 / (1 + exp(-score)), the probability that the device's answer is right)
 * score < threshold -> the server answers
 */
package crayon.runtime.routing

import crayon.runtime.InvalidInput
import kotlinx.serialization.Serializable
import java.util.Locale
import kotlin.math.ln

/** Who answers. */
enum class Route {
    DEVICE,
    SERVER,
}

/** Who answers, and why; the score is NaN where there was no usable signal. */
data class Decision(val route: Route, val score: Double, val threshold: Double, val reason: String)

/** The signals of each policy by name; a calibration leaves out those that an adapter has not. */
internal val WEIGHED = mapOf(
    "paper" to listOf("prototypes_mean"),
    "confidence" to listOf("log_probability"),
    "calibrated" to listOf("log_odds", "prototypes_top_k", "examples_nearness"),
    "early" to listOf("log_odds", "prompts_nearness"),
    "always" to emptyList(),
    "never" to emptyList(),
)

/**
 * When the device asks the server.
 *
 * @property weights by signal; none: the same decision for every answer, and nothing is computed for it.
 * @property after decide after so many tokens of the answer, at least 2; null: at its end.
 * @throws InvalidInput it weighs a signal that there is not, or holds NaN or infinity.
 */
@Serializable
data class Policy(
    val name: String,
    val weights: Map<String, Double>,
    val bias: Double,
    val threshold: Double,
    val after: Int? = null,
    val logistic: Boolean = false,
) {
    init {
        val unknown = weights.keys.firstOrNull { it !in SIGNALS }
        if (unknown != null) throw InvalidInput("policy '$name' weighs a signal '$unknown', which there is not", "policy")
        if (!(weights.values + bias + threshold).all { it.isFinite() }) throw InvalidInput("policy '$name' holds NaN or infinity", "policy")
        if (after != null && after < 2) throw InvalidInput("after is $after; a policy can decide from the second token on", "policy")
    }

    /**
     * Who answers.
     *
     * @param signals by name; those that the policy does not weigh are ignored.
     * @throws InvalidInput one that it weighs is missing.
     */
    fun decide(signals: Map<String, Double>): Decision {
        if (weights.isEmpty()) {
            return Decision(if (bias >= threshold) Route.DEVICE else Route.SERVER, bias, threshold, "the policy is '$name'")
        }
        val score = score(signals)
        if (!score.isFinite()) return Decision(Route.SERVER, Double.NaN, threshold, "no usable signal")
        val below = score < threshold
        val said = "the score %.3f is %s the threshold %.3f".format(Locale.ROOT, score, if (below) "below" else "not below", threshold)
        return Decision(if (below) Route.SERVER else Route.DEVICE, score, threshold, said)
    }

    /** Higher: rather the device. NaN if a signal is. */
    fun score(signals: Map<String, Double>): Double {
        var total = bias
        for ((signal, weight) in weights) {
            total +=
                weight * (signals[signal] ?: throw InvalidInput("policy '$name' needs the signal $signal, which is missing", "signals"))
        }
        return if (logistic) sigmoid(total) else total
    }

    companion object {
        /** The Crayon paper's: r(x) < threshold asks the server. */
        fun paper(threshold: Double) = Policy("paper", mapOf("prototypes_mean" to 1.0), 0.0, threshold)

        /** Asks the server where the mean log-probability of the answer's tokens, in nats, is below the threshold. */
        fun confidence(threshold: Double = ln(0.9)) = Policy("confidence", mapOf("log_probability" to 1.0), 0.0, threshold)

        /** Asks the server first; the device answers only if that fails. */
        fun always() = Policy("always", emptyMap(), 0.0, 1.0)

        /** The device answers, whatever it is. */
        fun never() = Policy("never", emptyMap(), 0.0, -1.0)
    }
}
