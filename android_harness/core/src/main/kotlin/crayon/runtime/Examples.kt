// The examples that a user customizes with: checked, and scored. They never leave the device.
package crayon.runtime

import crayon.runtime.backends.Adapter
import kotlinx.serialization.Serializable
import java.nio.file.Path
import kotlin.io.path.exists
import kotlin.math.exp
import kotlin.math.ln

/** A prompt, and how this user wants it answered. */
@Serializable
data class Example(val prompt: String, val completion: String)

/**
 * What a model makes of its n examples.
 *
 * @property prompt, answer [n][D]: mean tapped states over the tokens of the prompt, and of the answer.
 * @property logProbability [n]: mean over the tokens of each answer, eos included, in nats.
 */
class ExampleStates(val prompt: List<FloatArray>, val answer: List<FloatArray>, val logProbability: FloatArray) {
    /** As [read] reads them. */
    internal fun toBytes(): ByteArray =
        safetensors(
            "answer" to tensor(answer),
            "log_probability" to Tensor(listOf(logProbability.size), logProbability),
            "prompt" to tensor(prompt),
        )

    companion object {
        private const val LARGEST = 256L shl 20

        /**
         * Reads what is kept in a file; null: there is none.
         *
         * @throws IntegrityError it cannot be read, is too large, or holds something else, NaN or infinity.
         */
        internal fun read(path: Path): ExampleStates? {
            if (!path.exists()) return null
            val found = Safetensors.read(path, LARGEST).tensors
            val shape = found["prompt"]?.shape.orEmpty()
            val shapes = mapOf("answer" to shape, "log_probability" to shape.take(1), "prompt" to shape)
            val finite = found.values.all { tensor -> tensor.values.all { it.isFinite() } }
            if (shape.size != 2 || 0 in shape || !finite || found.mapValues { it.value.shape } != shapes) {
                throw IntegrityError("these are no states of examples", path, "customize again")
            }
            return ExampleStates(found.getValue("prompt").rows, found.getValue("answer").rows, found.getValue("log_probability").values)
        }

        private fun tensor(rows: List<FloatArray>): Tensor {
            val values = FloatArray(rows.size * rows[0].size) { rows[it / rows[0].size][it % rows[0].size] }
            return Tensor(listOf(rows.size, rows[0].size), values)
        }
    }
}

/**
 * How a model does on examples.
 *
 * @property logLoss mean over all tokens of the answers, eos included, in nats.
 * @property firstLogits [n][V]: after each prompt.
 * @property states of the prompts, and of the answers.
 * @property all [n][D]: mean tapped state over prompt and answer.
 */
internal class Score(val logLoss: Double, val firstLogits: List<FloatArray>, val states: ExampleStates, val all: List<FloatArray>) {
    fun means(part: TextPart): List<FloatArray> =
        when (part) {
            TextPart.PROMPT -> states.prompt
            TextPart.ANSWER -> states.answer
            TextPart.ALL -> all
        }
}

/** Refuses, with InvalidInput, examples that are empty, and their absence. */
internal fun checkExamples(examples: List<Example>) {
    if (examples.isEmpty()) throw InvalidInput("there are no examples", "examples", "give about ten prompts with their answers")
    examples.forEachIndexed { i, example ->
        for ((field, text) in listOf("prompt" to example.prompt, "completion" to example.completion)) {
            if (text.isBlank()) throw InvalidInput("its $field is empty", "example ${i + 1}", "complete it, or leave it out")
        }
    }
}

/**
 * Scores examples; the tokens of one answer continue its prompt in the KV cache, one call each, and each is given all before it.
 *
 * @param adapter null: the base.
 * @throws InvalidInput an example cannot be scored.
 * @throws ContextOverflow one is longer than the context.
 */
internal fun score(engine: Engine, examples: List<Example>, adapter: Adapter?): Score {
    checkExamples(examples)
    val split = examples.mapIndexed { i, example -> split(engine, example, "example ${i + 1}") }
    var total = 0.0
    var count = 0
    val first = ArrayList<FloatArray>()
    val likely = ArrayList<Float>()
    val means = TextPart.entries.associateWith { ArrayList<FloatArray>() }
    engine.session().use { session ->
        for ((head, answer) in split) {
            var logits = session.prefill(head.copyOfRange(session.begin(head, adapter), head.size))!!.logits
            first += logits.copyOf()
            val headSum = session.tapSum
            val targets = answer + engine.tokenizer.info.eos
                .take(1)
            var own = 0.0
            for ((i, target) in targets.withIndex()) {
                own += negativeLogProbability(logits, target)
                if (i < answer.size) logits = session.decode(answer[i]).logits
            }
            total += own
            count += targets.size
            likely += (-own / targets.size).toFloat()
            val both = session.tapSum
            means.getValue(TextPart.PROMPT) += mean(headSum, head.size)
            means.getValue(TextPart.ANSWER) += mean(DoubleArray(both.size) { both[it] - headSum[it] }, answer.size)
            means.getValue(TextPart.ALL) += mean(both, session.length)
        }
    }
    val states = ExampleStates(means.getValue(TextPart.PROMPT), means.getValue(TextPart.ANSWER), likely.toFloatArray())
    return Score(total / count, first, states, means.getValue(TextPart.ALL))
}

/** The prompt's ids, and those of the answer, which are those that the text has after the prompt. */
private fun split(engine: Engine, example: Example, where: String): Pair<IntArray, List<Int>> {
    val backend = engine.backend
    val ids = Prompt.Text(example.prompt + example.completion).ids(engine.tokenizer, backend.vocabSize)
    val start = commonPrefix(ids, ids.size, Prompt.Text(example.prompt).ids(engine.tokenizer, backend.vocabSize))
    if (start !in 1 until ids.size) throw InvalidInput("its prompt or its completion has no tokens of its own", where)
    if (ids.size > backend.contextLength) {
        throw ContextOverflow("it has ${ids.size} tokens; the context holds ${backend.contextLength}", where, "shorten it, or leave it out")
    }
    return ids.copyOf(start) to ids.drop(start)
}

private fun mean(sum: DoubleArray, count: Int) = FloatArray(sum.size) { (sum[it] / count).toFloat() }

private fun negativeLogProbability(logits: FloatArray, token: Int): Double {
    val highest = logits.max()
    var total = 0.0
    for (z in logits) total += exp((z - highest).toDouble())
    return highest - logits[token] + ln(total)
}
