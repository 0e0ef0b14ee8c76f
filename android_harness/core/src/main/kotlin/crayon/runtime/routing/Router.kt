/*
 * Answers from the device or from the server LLM, whichever should.
 *
 * The server is asked for what the policy does not leave to the device, and is sent the query's text and nothing else. Whatever is wrong with
 * it, there is the device's answer. While the server is asked, a device that was stopped early waits, and goes on if it has to.
 */
package crayon.runtime.routing

import crayon.runtime.ADAPTER
import crayon.runtime.Answering
import crayon.runtime.ContextOverflow
import crayon.runtime.CrayonError
import crayon.runtime.Engine
import crayon.runtime.ExampleStates
import crayon.runtime.FinishReason
import crayon.runtime.GenerateOptions
import crayon.runtime.Generation
import crayon.runtime.InvalidInput
import crayon.runtime.Prompt
import crayon.runtime.ROUTING
import crayon.runtime.STATES
import crayon.runtime.StopStrings
import crayon.runtime.readPrototypes
import crayon.runtime.seconds
import crayon.runtime.stateFolder
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.FlowCollector
import kotlinx.coroutines.flow.buffer
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.flow.takeWhile
import kotlinx.coroutines.isActive
import java.nio.file.Files
import java.nio.file.Path
import kotlin.io.path.exists

/**
 * A piece of an answer's text while it comes.
 *
 * @property draft whether it may still be dropped. Everything that stays of it comes again, as a part that is no draft. These together are the
 *   answer; where their source changes from the server to the device, because the server broke off, the answer starts anew there.
 */
data class Part(val text: String, val source: Route, val draft: Boolean)

/**
 * An answer, and where it comes from. It is complete when its parts were collected.
 *
 * @property policy the name of the policy that decided.
 * @property reason why, in a sentence.
 * @property fallback whether the server should have given it, and could not.
 * @property score higher: rather the device. NaN if there was no usable signal, or nothing was decided.
 * @property signals those that the policy weighs, by name; empty if it did not come to that.
 * @property generation the device's answer, whole or as far as it came; null if the device did not begin.
 * @property sentBytes that left the device: of the bodies of requests.
 */
class Answer internal constructor(val policy: String, val threshold: Double) {
    var text = ""
        internal set
    var route = Route.DEVICE
        internal set
    var reason = ""
        internal set
    var fallback = false
        internal set
    var score = Double.NaN
        internal set
    var signals: Map<String, Double> = emptyMap()
        internal set
    var generation: Generation? = null
        internal set
    var sentBytes = 0L
        internal set

    /** Of the device's prompt and tokens; 0 if it did not begin. */
    val deviceSeconds: Double get() = generation?.let { it.firstTokenSeconds + it.decodeSeconds } ?: 0.0

    /** Of judging the device's answer; 0 if it was not judged. */
    var scoreSeconds = 0.0
        internal set

    /** Of all: prompt, tokens, signals, and the server. */
    var totalSeconds = 0.0
        internal set
}

/** A running answer. Nothing is computed or sent until its parts are collected, once. */
class AnswerStream internal constructor(val parts: Flow<Part>, val answer: Answer)

/** What there is to judge the answers of one adapter with. */
internal class Known(val reference: Reference, val policies: Map<String, Policy>) {
    /** The policy of a name, or the best there is for null: `calibrated`, otherwise `confidence`. */
    fun policy(wanted: String?): Policy {
        val name = wanted ?: if ("calibrated" in policies) "calibrated" else "confidence"
        val weighed =
            WEIGHED[name] ?: throw InvalidInput("there is no policy '$name'", "policy", "choose of ${WEIGHED.keys.joinToString()}")
        return policies[name] ?: run {
            reference.check(weighed)
            throw InvalidInput(
                "nobody knows the threshold of the policy '$name' for this adapter",
                "policy",
                "customize on this device; or choose the policy 'confidence'",
            )
        }
    }
}

/**
 * Decides for each answer of an engine who gives it. Any number of coroutines may use it.
 *
 * @param engine answers on the device.
 * @param policy a name: paper, confidence, calibrated, early, always, never; null: `calibrated` if there is a calibration or the user's own
 *   examples, otherwise `confidence`.
 * @param own a policy of one's own, in the place of that.
 * @param server what is asked; null: nothing ever leaves the device, and answers that should have say so.
 * @param rules what may leave the device, and how it is changed before; null: any query as it is.
 * @param log where what is sent is written down before; null: nowhere.
 * @param folder where the customized adapter is kept, with its examples and its calibration; null: [stateFolder] of the engine's bundle.
 * @throws InvalidInput there is no such policy, or the engine's present adapter lacks what it needs.
 */
class Router(
    private val engine: Engine,
    private val policy: String? = null,
    private val own: Policy? = null,
    private val server: Server? = null,
    private val rules: Rules? = null,
    private val log: SentLog? = null,
    folder: Path? = null,
    private val dispatcher: CoroutineDispatcher = Dispatchers.Default,
) {
    private val folder = folder ?: engine.bundle?.let { stateFolder(it.path) }
    private var kept: Triple<Any?, Long, Known>? = null

    init {
        chosen(known())
    }

    /**
     * Answers a prompt.
     *
     * @param query what the server is asked, if it is; null: the prompt, if that is text.
     * @param options for the device; `maxNewTokens` and `stop` hold for the server's answer too.
     * @throws CrayonError of the device; but a prompt that is too long for it goes to the server, and is refused only if that fails. Nothing of
     *   the server: that is a reason for the device's answer.
     */
    suspend fun answer(prompt: Prompt, query: String? = null, options: GenerateOptions = GenerateOptions()): Answer {
        val stream = stream(prompt, query, options)
        stream.parts.collect {}
        return stream.answer
    }

    suspend fun answer(prompt: String, query: String? = null, options: GenerateOptions = GenerateOptions()): Answer =
        answer(Prompt.Text(prompt), query, options)

    /** Answers a prompt piece by piece: as [answer], whose result the stream has at its end. */
    fun stream(prompt: Prompt, query: String? = null, options: GenerateOptions = GenerateOptions()): AnswerStream {
        val known = known()
        val chosen = chosen(known)
        val answer = Answer(chosen.name, chosen.threshold)
        var overflow: ContextOverflow? = null
        val device = try {
            engine.answering(prompt, options)
        } catch (e: ContextOverflow) {
            if (server == null || chosen.name == "never") throw e
            overflow = e
            null
        }
        val asked = query ?: (prompt as? Prompt.Text)?.text?.trim().orEmpty()
        val work = Work(answer, device, overflow, chosen, known.reference, asked, options)
        return AnswerStream(flow { work.parts(this) }.flowOn(dispatcher).buffer(0), answer)
    }

    private fun chosen(known: Known): Policy {
        val chosen = own ?: known.policy(policy)
        known.reference.check(chosen.weights.keys)
        return chosen
    }

    /** What there is for the engine's present adapter; read once for each, and again after it was calibrated. */
    @Synchronized
    private fun known(): Known {
        val adapter = engine.presentAdapter
        val calibrated = folder?.resolve(ROUTING)?.takeIf { it.exists() }?.let { Files.getLastModifiedTime(it).toMillis() } ?: 0
        kept?.let { (of, at, known) -> if (of === adapter && at == calibrated) return known }
        val bundle = adapter?.let(engine::bundleOf)
        val place = folder?.takeIf { bundle != null && it.resolve(ADAPTER).exists() && bundle.path == it.resolve(ADAPTER).toRealPath() }
        val size = engine.backend.tapSize
        val examples: ExampleStates? = place?.let { ExampleStates.read(it.resolve(STATES)) }
        val reference = Reference(bundle?.let { readPrototypes(it, size) }, examples)
        if (reference.size != null && reference.size != size) {
            throw InvalidInput(
                "the examples' states are of ${reference.size}; this model's are of $size",
                place,
                "customize the model again",
            )
        }
        val calibration = place?.let(::readCalibration)
        val learnt = calibration?.policies ?: examples?.let { uncalibrated(reference, it) }.orEmpty()
        val plain = listOf(Policy.confidence(), Policy.always(), Policy.never())
        return Known(reference, (plain + learnt).associateBy { it.name }).also { kept = Triple(adapter, calibrated, it) }
    }

    /** One answer. */
    private inner class Work(
        private val answer: Answer,
        private val device: Answering?,
        private val overflow: ContextOverflow?,
        private val policy: Policy,
        private val reference: Reference,
        private val query: String,
        private val options: GenerateOptions,
    ) {
        private val given = StringBuilder()

        /** Emits the parts; fills in the answer. */
        suspend fun parts(out: FlowCollector<Part>) {
            val started = System.nanoTime()
            try {
                if (overflow != null || policy.weights.isEmpty()) constant(out) else weighed(out)
            } finally {
                device?.close()
                answer.generation = device?.generation?.takeIf { it.firstTokenSeconds > 0 }
                answer.text = given.toString()
                answer.totalSeconds = seconds(started)
            }
        }

        /** A policy that needs no signals has decided already, and so has a prompt that is too long for the device. */
        private suspend fun constant(out: FlowCollector<Part>) {
            val decision = overflow?.let { Decision(Route.SERVER, Double.NaN, policy.threshold, it.what) } ?: policy.decide(emptyMap())
            take(decision)
            if (decision.route == Route.SERVER && askServer(out)) return
            if (overflow != null) throw overflow
            val context = currentCoroutineContext()
            while (true) {
                val piece = device!!.next { !context.isActive } ?: break
                if (piece.text.isNotEmpty()) say(out, piece.text)
            }
        }

        private suspend fun weighed(out: FlowCollector<Part>) {
            val context = currentCoroutineContext()
            val generation = device!!.generation
            val drafts = StringBuilder()
            var decided = false
            while (true) {
                val piece = device.next { !context.isActive } ?: break
                if (piece.text.isNotEmpty()) {
                    if (decided) {
                        say(out, piece.text)
                    } else {
                        drafts.append(piece.text)
                        out.emit(Part(piece.text, Route.DEVICE, draft = true))
                    }
                }
                if (!decided && generation.generatedTokens == policy.after) {
                    decided = true
                    if (decide(out, drafts)) return
                }
            }
            if (decided) return
            if (generation.finishReason == FinishReason.CANCELLED) answer.reason = "it was cancelled" else decide(out, drafts)
        }

        /** Decides with what the device has said so far, and asks the server if need be; whether it has answered. */
        private suspend fun decide(out: FlowCollector<Part>, drafts: StringBuilder): Boolean {
            val generation = device!!.generation
            val started = System.nanoTime()
            val said = Said(generation.promptTap, generation.answerTap, generation.logProbabilities)
            answer.signals = signals(said, reference, policy.weights.keys)
            val decision = policy.decide(answer.signals)
            answer.scoreSeconds = seconds(started)
            take(decision)
            if (decision.route == Route.SERVER && askServer(out)) return true
            if (drafts.isNotEmpty()) say(out, drafts.toString())
            return false
        }

        private fun take(decision: Decision) {
            answer.score = decision.score
            answer.reason = decision.reason
        }

        private suspend fun say(out: FlowCollector<Part>, text: String, source: Route = Route.DEVICE) {
            given.append(text)
            out.emit(Part(text, source, draft = false))
        }

        /** Asks the server; whether it has answered. Otherwise the answer is a fallback, and says why. */
        private suspend fun askServer(out: FlowCollector<Part>): Boolean {
            answer.route = Route.SERVER // if the reader stops in the middle, too
            val why = ask(out) ?: return true
            answer.route = Route.DEVICE
            answer.fallback = true
            answer.reason = "${answer.reason}, but $why"
            given.clear()
            return false
        }

        /** Asks the server; why it did not answer, null if it did. */
        private suspend fun ask(out: FlowCollector<Part>): String? {
            if (server == null) return "there is no server to ask"
            if (query.isEmpty()) return "there is no text to ask the server for"
            val allowed = rules?.outgoing(query) ?: Outgoing(query, null)
            val text = allowed.query ?: return allowed.why ?: "the rules forbid it"
            var entry: String? = null
            var why: String? = "it was cancelled" // if the reader leaves in the middle
            try {
                val size = server.request(text, options.maxNewTokens).size.toLong()
                entry = log?.sending(server.url, text, size)
                answer.sentBytes = size
                why = read(out, server.ask(text, options.maxNewTokens))
            } catch (e: Left) {
                throw e.left
            } catch (e: CancellationException) {
                throw e
            } catch (e: Exception) {
                // whatever is wrong with a server or the log, the device has an answer
                why = if (e is CrayonError) e.what else "asking the server failed with ${e.javaClass.simpleName}"
            } finally {
                if (entry != null) log?.ended(entry, why ?: "answered", answer.sentBytes)
            }
            return why
        }

        /** Passes on what the server says; why it cannot be used, null if it can. */
        private suspend fun read(out: FlowCollector<Part>, reply: Flow<String>): String? {
            val stops = StopStrings(options.stop)
            reply
                .takeWhile { piece ->
                    pass(out, stops.push(piece))
                    stops.found == null
                }.collect {}
            pass(out, stops.flush())
            return if (given.isBlank()) "the server's answer is empty" else null
        }

        /** What the reader of the answer throws is not the server's fault. */
        private suspend fun pass(out: FlowCollector<Part>, text: String) {
            if (text.isEmpty()) return
            try {
                say(out, text, Route.SERVER)
            } catch (e: Throwable) {
                throw if (e is CancellationException) e else Left(e)
            }
        }
    }
}

private class Left(val left: Throwable) : RuntimeException(left)
