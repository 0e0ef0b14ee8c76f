// What an answer is: its options, its pieces while it runs, and the whole at its end.
package crayon.runtime

import crayon.runtime.backends.Adapter
import crayon.runtime.chat.Message
import crayon.runtime.tokenizer.Tokenizer
import kotlinx.coroutines.flow.Flow
import kotlinx.serialization.json.JsonObject

/** When the context is full. */
enum class Overflow {
    /** A prompt that leaves no room is a [ContextOverflow], and an answer ends there with `LENGTH`. */
    ERROR,

    /** The first `keep` tokens stay, the older half of the others is forgotten, and what is left is computed again. */
    SLIDE,
}

/**
 * How to answer.
 *
 * @property maxNewTokens the most tokens to answer with.
 * @property stop texts that end the answer, and are not part of it.
 * @property session where to run, and what to continue; null: an idle session of the engine, or a new one.
 * @property adapter answer this one request with an adapter; null: with the engine's present one.
 * @property base answer this one request with the base model.
 * @property keep of [Overflow.SLIDE]; null: the bos token, if the model wants one.
 * @property parseSpecial read the text of control tokens in the prompt as those tokens. Never do that with text of others.
 * @property ignoreEos go on past eos tokens, which then have no text: for measurements of a fixed length.
 * @property topLogProbabilities of so many most likely tokens, at each step, the log-probabilities too; at most 20.
 */
data class GenerateOptions(
    val maxNewTokens: Int = 256,
    val sampling: SamplingOptions = SamplingOptions(),
    val stop: List<String> = emptyList(),
    val session: Session? = null,
    val adapter: Adapter? = null,
    val base: Boolean = false,
    val overflow: Overflow = Overflow.ERROR,
    val keep: Int? = null,
    val parseSpecial: Boolean = false,
    val ignoreEos: Boolean = false,
    val topLogProbabilities: Int = 0,
)

/**
 * One token of a stream.
 *
 * @property text what can be shown with this token: nothing in the middle of a character, or of what may become a stop string.
 * @property logProbability natural logarithm of its probability, before any sampling option.
 * @property topLogProbabilities ids and log-probabilities of the most likely tokens in its place, the most likely first.
 */
data class Piece(
    val text: String,
    val tokenId: Int,
    val logProbability: Double,
    val topLogProbabilities: List<Pair<Int, Double>> = emptyList(),
)

/** Why an answer ended. */
enum class FinishReason {
    /** An eos token or a stop string. */
    STOP,

    /** `maxNewTokens`, or the end of the context. */
    LENGTH,

    /** It was interrupted. */
    CANCELLED,
}

/** An answer. */
class Generation internal constructor(val promptTokens: Int) {
    /** Tokens of the prompt that were still in the KV cache. */
    var reusedTokens = 0
        internal set

    /** What was said, without control tokens and stop string. Of a cancelled one, what was handed out. */
    var text = ""
        internal set

    /** Every token that was sampled, also the eos token or the tokens of the stop string that ended it. */
    val tokenIds: List<Int> get() = ids

    /** Of each of them: the natural logarithm of its probability, before any sampling option. */
    val logProbabilities: List<Double> get() = likely
    var finishReason = FinishReason.CANCELLED
        internal set

    /** The stop string that ended it. */
    var stop: String? = null
        internal set

    /** [D]: the tapped hidden state, mean over the prompt's tokens. Null if they were not all fed. */
    var promptTap: FloatArray? = null
        internal set

    /** Feeding the prompt. */
    var promptSeconds = 0.0
        internal set

    /** From the start until the first token was there (TTFT). */
    var firstTokenSeconds = 0.0
        internal set

    /** All further tokens, without the time that the reader of the stream took. */
    var decodeSeconds = 0.0
        internal set

    internal val ids = ArrayList<Int>()
    internal val likely = ArrayList<Double>()
    internal var answerSum: DoubleArray? = null
    internal var answerFed = 0

    /** [D]: the tapped hidden state, mean over those tokens of the answer that were fed: all but the last. Null if there are none. */
    val answerTap: FloatArray?
        get() = answerSum?.takeIf { answerFed > 0 }?.let { sum -> FloatArray(sum.size) { (sum[it] / answerFed).toFloat() } }

    val generatedTokens: Int get() = ids.size

    /** Of the tokens that were fed. */
    val promptTokensPerSecond: Double get() = if (promptSeconds > 0) (promptTokens - reusedTokens) / promptSeconds else 0.0

    /** Without the first token, which the prompt gave. */
    val decodeTokensPerSecond: Double get() = if (decodeSeconds > 0) (generatedTokens - 1) / decodeSeconds else 0.0
}

/**
 * A running answer. Nothing is computed until its pieces are collected, once; cancelling the collector ends it.
 *
 * @property pieces of text, as they come.
 * @property soFar the answer as far as it is there, at any moment. Its text and its finish reason come with its end.
 */
class Stream internal constructor(val pieces: Flow<Piece>, val soFar: Generation, private val ended: () -> Boolean) {
    /** The whole answer; [InvalidInput] before the stream has ended. */
    val generation: Generation
        get() = if (ended()) soFar else throw InvalidInput("the stream has not ended", advice = "collect its pieces first")
}

/** One answer to give, checked before anything is computed. */
internal class Request(val ids: IntArray, val options: GenerateOptions, val limit: Int, val keep: Int)

private const val MOST_TOP = 20

/**
 * Checks what an engine is asked for.
 *
 * @throws InvalidInput the prompt or an option cannot be served.
 * @throws ContextOverflow the prompt leaves no room for an answer.
 */
internal fun request(tokenizer: Tokenizer, vocabSize: Int, contextLength: Int, prompt: Prompt, options: GenerateOptions): Request {
    val o = options
    if (o.maxNewTokens < 1) throw InvalidInput("maxNewTokens is ${o.maxNewTokens}; it must be a whole number from 1", "maxNewTokens")
    if (o.stop.any { it.isEmpty() }) throw InvalidInput("a stop string must be a text that is not empty", "stop")
    if (o.topLogProbabilities !in 0..MOST_TOP) {
        throw InvalidInput("topLogProbabilities is ${o.topLogProbabilities}; it must be from 0 to $MOST_TOP", "topLogProbabilities")
    }
    if (o.base && o.adapter != null) throw InvalidInput("either an adapter or the base model can answer", "adapter")
    val keep = o.keep ?: if (tokenizer.info.addBos) 1 else 0
    if (keep !in 0..contextLength - 2) throw InvalidInput("keep is $keep; it must be from 0 to ${contextLength - 2}", "keep")
    val ids = prompt.ids(tokenizer, vocabSize, o.parseSpecial)
    if (o.overflow == Overflow.SLIDE) return Request(slide(ids, keep, contextLength - 1), o, o.maxNewTokens, keep)
    if (ids.size >= contextLength) {
        throw ContextOverflow(
            "the prompt has ${ids.size} tokens; the context holds $contextLength, and the answer needs one of them",
            "prompt",
            "shorten the prompt, or let the engine forget its beginning: Overflow.SLIDE",
        )
    }
    return Request(ids, o, minOf(o.maxNewTokens, contextLength - ids.size), keep)
}

/** A prompt: text, token ids, which are fed as they are, or a conversation, in the model's chat template. */
sealed interface Prompt {
    data class Text(val text: String) : Prompt

    /** @property tools to tell the model of, in OpenAI's form. */
    data class Chat(val messages: List<Message>, val tools: List<JsonObject>? = null) : Prompt

    data class Tokens(val ids: List<Int>) : Prompt
}

/** At least one id; [InvalidInput] if there are none, or one is not in the vocabulary. */
internal fun Prompt.ids(tokenizer: Tokenizer, vocabSize: Int, parseSpecial: Boolean = false): IntArray {
    val ids = when (this) {
        is Prompt.Text -> if (text.isEmpty()) emptyList() else tokenizer.encode(text, parseSpecial = parseSpecial)
        is Prompt.Chat -> tokenizer.applyChatTemplate(messages, tools)
        is Prompt.Tokens -> ids
    }
    if (ids.isEmpty()) throw InvalidInput("the prompt is empty", "prompt", "to start from nothing, pass the id of the bos token")
    val wrong = ids.indexOfFirst { it !in 0 until vocabSize }
    if (wrong >= 0) {
        val said = "token $wrong is ${ids[wrong]}; ids are whole numbers from 0 to ${vocabSize - 1} in this model"
        throw InvalidInput(said, "prompt")
    }
    return ids.toIntArray()
}

/** Until there are at most `limit` tokens: leave the first `keep`, forget the older half of the others. */
internal fun slide(ids: IntArray, keep: Int, limit: Int): IntArray {
    var left = ids
    while (left.size > limit) {
        val forgotten = (left.size - keep + 1) / 2
        left = left.copyOf(keep) + left.copyOfRange(keep + forgotten, left.size)
    }
    return left
}
