package crayon.app.chat

import crayon.app.Limits
import crayon.app.Settings
import crayon.app.Thermometer
import crayon.app.model.Model
import crayon.app.said
import crayon.runtime.BackendError
import crayon.runtime.GenerateOptions
import crayon.runtime.routing.AnswerStream
import crayon.runtime.routing.Part
import crayon.runtime.routing.Route
import crayon.runtime.routing.Router
import crayon.runtime.routing.SentLog
import crayon.runtime.routing.ServerLlm
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.flow.takeWhile

/** Answers questions, and writes into the conversation how far it is. */
class Chat(
    private val conversation: Conversation,
    private val model: Model,
    private val settings: Settings,
    private val thermometer: Thermometer,
    private val prompting: Prompting,
    private val sent: SentLog,
) {
    /** Answers one question. Whatever goes wrong is said in its turn. */
    suspend fun answer(question: String) {
        conversation.add(question)
        try {
            answer()
        } catch (e: CancellationException) {
            conversation.change { it.copy(stage = Stage.STOPPED) }
            throw e
        } catch (e: Throwable) {
            conversation.change { it.copy(stage = if (it.answer.isEmpty()) Stage.FAILED else Stage.STOPPED, why = e.said()) }
        }
    }

    private suspend fun answer() {
        val limits = thermometer.limits.value
        if (limits.maxNewTokens == 0) throw tooHot()
        val engine = model.ready()
        val server = settings.server?.let { ServerLlm(it.url, it.key) }
        val turns = conversation.turns.value
        val router = Router(engine, server = server, log = sent)
        val prompt = prompting.prompt(turns.takeLast(limits.turns), engine.tokenizer.info)
        val stream = router.stream(prompt, turns.last().question, GenerateOptions(maxNewTokens = limits.maxNewTokens))
        show(stream)
        val answer = stream.answer
        conversation.change { it.copy(answer = answer.text, source = source(answer.route), why = answer.reason, stage = Stage.DONE) }
    }

    /** Shows an answer while it comes; throws where the phone becomes too hot for it. */
    private suspend fun show(stream: AnswerStream) {
        val shown = Shown()
        var count = 0
        var hot = false
        stream.parts
            .takeWhile { part ->
                if (part.source == Route.DEVICE) count++
                hot = count > thermometer.limits.value.room()
                !hot
            }.collect { part ->
                shown.add(part)
                conversation.change { it.copy(answer = shown.text, source = shown.source?.let(::source)) }
            }
        if (hot) throw tooHot()
    }

    /** Parts of an answer that may come: its tokens, and what was decided to stay of them, once more. */
    private fun Limits.room() = if (maxNewTokens == 0) 0 else maxNewTokens + 1

    private fun source(route: Route) = if (route == Route.DEVICE) Source.PHONE else Source.SERVER

    private fun tooHot() = BackendError("the phone is too hot to go on", advice = "let it cool down, and ask again")
}

/** What a reader sees of an answer that is coming: a draft, until it is known what stays. */
internal class Shown {
    private val draft = StringBuilder()
    private val kept = StringBuilder()

    /** Whose text it is; null while it is a draft. */
    var source: Route? = null
        private set

    val text: String get() = (if (source == null) draft else kept).toString()

    fun add(part: Part) {
        if (part.draft) {
            draft.append(part.text)
            return
        }
        if (source != part.source) kept.clear() // the other one begins anew
        source = part.source
        kept.append(part.text)
    }
}
