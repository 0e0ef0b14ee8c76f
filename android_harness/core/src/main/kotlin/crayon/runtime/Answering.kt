// The loop: one piece and one backend call a token.
package crayon.runtime

import crayon.runtime.backends.Adapter
import crayon.runtime.backends.Step
import crayon.runtime.tokenizer.StreamDecoder

/** One answer. Call [next] until it is null, then [close]; it fills in `generation`. */
internal class Answering(
    private val engine: Engine,
    private val model: LoadedModel,
    private val request: Request,
    private val adapter: Adapter?,
    val generation: Generation,
) : AutoCloseable {
    private val started = System.nanoTime()
    private val options = request.options
    private val backend = model.backend
    private val endTokens = if (options.ignoreEos) emptyList() else model.tokenizer.info.eos
    private val sampler = Sampler(options.sampling, backend.vocabSize).also { it.observe(request.ids) }
    private val decoder = StreamDecoder(model.tokenizer, continues = true)
    private val stops = StopStrings(options.stop)
    private val text = StringBuilder()
    private val answerSum = DoubleArray(backend.tapSize).also { generation.answerSum = it }
    private var session: Session? = null
    private var token = 0
    private var ended = false

    /** The next piece; null: there is none any more, or `cancelled` became true. */
    fun next(cancelled: () -> Boolean): Piece? {
        if (ended) return null
        val resumed = System.nanoTime()
        val step = if (session == null) begin(resumed, cancelled) else advance(cancelled)
        if (step == null) {
            ended = true
            return null
        }
        return say(step, resumed)
    }

    /** Frees the session, and completes `generation`. */
    override fun close() {
        ended = true
        session?.let {
            it.checkpoint()
            engine.giveBack(it, model, idle = options.session == null)
        }
        session = null
        generation.text = text.toString()
    }

    private fun begin(resumed: Long, cancelled: () -> Boolean): Step? {
        val own = engine.borrow(options.session, model).also { session = it }
        generation.reusedTokens = own.begin(request.ids, adapter)
        val step = own.prefill(request.ids.copyOfRange(generation.reusedTokens, request.ids.size), cancelled) ?: return null
        generation.promptSeconds = seconds(resumed)
        generation.promptTap = own.tapSum.let { sum -> FloatArray(sum.size) { (sum[it] / request.ids.size).toFloat() } }
        return step
    }

    private fun advance(cancelled: () -> Boolean): Step? {
        if (cancelled()) return null
        val own = session ?: return null
        val step = if (own.length < backend.contextLength) {
            own.decode(token)
        } else {
            val ids = slide(own.tokens + token, request.keep, backend.contextLength - 1)
            own.prefill(ids.copyOfRange(own.begin(ids, adapter), ids.size), cancelled) ?: return null
        }
        for (i in answerSum.indices) answerSum[i] += step.tapLast[i].toDouble()
        generation.answerFed++
        return step
    }

    private fun say(step: Step, resumed: Long): Piece {
        token = sampler.sample(step.logits)
        generation.ids += token
        generation.likely += sampler.logProbability
        val top = sampler.mostLikely(step.logits, options.topLogProbabilities)
        val isEnd = token in endTokens
        ended = isEnd || generation.generatedTokens == request.limit
        var shown = if (isEnd) "" else stops.push(decoder.push(token))
        if (ended && stops.found == null) {
            shown += stops.push(decoder.flush()) + stops.flush()
            generation.finishReason = if (isEnd) FinishReason.STOP else FinishReason.LENGTH
        }
        stops.found?.let {
            ended = true
            generation.finishReason = FinishReason.STOP
            generation.stop = it
        }
        text.append(shown)
        if (generation.generatedTokens ==
            1
        ) {
            generation.firstTokenSeconds = seconds(started)
        } else {
            generation.decodeSeconds += seconds(resumed)
        }
        return Piece(shown, token, sampler.logProbability, top)
    }
}

/** Seconds since a moment of [System.nanoTime]. */
internal fun seconds(since: Long): Double = (System.nanoTime() - since) / 1e9
