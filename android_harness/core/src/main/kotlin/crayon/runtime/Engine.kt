/*
 * The engine: a prompt goes in, tokens come out.
 *
 * One answer, from top to bottom:
 *
 *     Engine.generate     collects a stream
 *     Engine.stream       checks what was asked for, and captures the adapter of this moment
 *     Answering           takes a session, feeds it the prompt, then samples and decodes, token by token
 *     Session             a KV cache that knows its tokens: what the prompt has in common with them is not computed again
 *     Backend             multiplies the matrices
 *
 * Any number of coroutines may call one engine: each answer has a session of its own, and only single backend calls exclude each other, so
 * that answers take turns token by token.
 */
package crayon.runtime

import crayon.runtime.backends.Adapter
import crayon.runtime.backends.Backend
import crayon.runtime.backends.BackendLoader
import crayon.runtime.backends.LOADERS
import crayon.runtime.backends.load
import crayon.runtime.bundle.Bundle
import crayon.runtime.tokenizer.Tokenizer
import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.channels.Channel
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.buffer
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.isActive
import kotlinx.coroutines.withContext
import java.nio.file.Path
import java.util.concurrent.locks.ReentrantLock
import kotlin.concurrent.withLock

/** What an engine is doing. */
sealed interface EngineState {
    /** There is no model. */
    data object Empty : EngineState

    /** A model is being checked and loaded. */
    data object Loading : EngineState

    /** It can be asked. */
    data object Ready : EngineState

    /** So many answers are running; it can be asked for more. */
    data class Answering(val answers: Int) : EngineState

    /** The model could not be loaded; another one can be. */
    data class Failed(val error: CrayonError) : EngineState

    /** It was closed for good. */
    data object Closed : EngineState
}

/** Which tokens to average over. */
enum class TextPart {
    ALL,
    PROMPT,
    ANSWER,
}

/** A prompt, and the answer that continues it, which may be empty. */
data class Text(val prompt: String, val answer: String = "")

/** What an engine has loaded. */
internal class LoadedModel(val backend: Backend, val tokenizer: Tokenizer, val bundle: Bundle?) {
    val sessions = HashSet<Session>()
    var idle: Session? = null
    var adapter: Adapter? = null
    val adapters = HashMap<Path, Pair<Bundle, Adapter>>()
}

/**
 * Answers with a model, which [load] loads and [unload] frees, for example when the system is short of memory.
 *
 * @param dispatcher where answers are computed.
 */
class Engine(private val dispatcher: CoroutineDispatcher = Dispatchers.Default) : AutoCloseable {
    /** An engine with a model. It closes the backend. `bundle` is where both came from: adapters inside it can be set by name. */
    constructor(backend: Backend, tokenizer: Tokenizer, bundle: Bundle? = null, dispatcher: CoroutineDispatcher = Dispatchers.Default) :
        this(dispatcher) {
        loaded = LoadedModel(backend, tokenizer, bundle)
        told.value = EngineState.Ready
    }

    private val lock = ReentrantLock(true) // fair: whoever unloads is next, and does not wait for the end of an answer
    private val told = MutableStateFlow<EngineState>(EngineState.Empty)
    private var loaded: LoadedModel? = null

    /** What it is doing now. */
    val state: StateFlow<EngineState> = told.asStateFlow()

    val backend: Backend get() = model().backend
    val tokenizer: Tokenizer get() = model().tokenizer
    val bundle: Bundle? get() = lock.withLock { loaded?.bundle }

    /**
     * Loads a bundle, in the place of what was loaded before. While that runs, `state` is [EngineState.Loading].
     *
     * @param loaders by the keys of a manifest's `variants`: the first one that serves the bundle is taken.
     * @param threads cores to compute on; null: the backend chooses.
     * @param availableBytes of memory; a model that needs more is refused. Null: it is tried.
     * @throws BundleError, BackendError the bundle is damaged, or does not run here. `state` is then [EngineState.Failed].
     */
    suspend fun load(
        path: Path,
        loaders: Map<String, BackendLoader> = LOADERS,
        threads: Int? = null,
        availableBytes: Long? = freeMemory(),
    ) {
        unload()
        change(EngineState.Loading)
        try {
            val model = withContext(dispatcher) {
                val bundle = Bundle.open(path)
                val tokenizer = Tokenizer(bundle)
                checkMemory(bundle, availableBytes)
                LoadedModel(load(bundle, loaders, threads), tokenizer, bundle)
            }
            lock.withLock {
                if (told.value != EngineState.Loading) {
                    model.backend.close()
                    throw EngineClosed("the engine was closed while it loaded a model")
                }
                loaded = model
                told.value = EngineState.Ready
            }
        } catch (e: Throwable) {
            lock.withLock {
                if (told.value == EngineState.Loading) told.value = if (e is CrayonError) EngineState.Failed(e) else EngineState.Empty
            }
            throw e
        }
    }

    /** Frees the model and all sessions; another one can be loaded. Answers that are still running end with [EngineClosed]. */
    fun unload() =
        lock.withLock {
            loaded?.let { model ->
                model.sessions.toList().forEach { it.close() }
                model.backend.close()
            }
            loaded = null
            if (told.value != EngineState.Closed) told.value = EngineState.Empty
        }

    /** As [unload], and for good. */
    override fun close() =
        lock.withLock {
            unload()
            told.value = EngineState.Closed
        }

    /**
     * Answers a prompt.
     *
     * @throws InvalidInput the prompt or an option cannot be served.
     * @throws ContextOverflow the prompt leaves no room for an answer.
     * @throws BackendError the backend failed.
     */
    suspend fun generate(prompt: String, options: GenerateOptions = GenerateOptions()): Generation = generate(Prompt.Text(prompt), options)

    suspend fun generate(prompt: Prompt, options: GenerateOptions = GenerateOptions()): Generation {
        val stream = stream(prompt, options)
        stream.pieces.collect {}
        return stream.generation
    }

    /** Answers a prompt piece by piece: as [generate], whose result the stream has at its end. */
    fun stream(prompt: String, options: GenerateOptions = GenerateOptions()): Stream = stream(Prompt.Text(prompt), options)

    fun stream(prompt: Prompt, options: GenerateOptions = GenerateOptions()): Stream {
        val answer = answering(prompt, options)
        var begun = false
        var ended = false
        val pieces = flow {
            if (begun) throw InvalidInput("a stream is collected once", advice = "ask again for another answer")
            begun = true
            val context = currentCoroutineContext()
            try {
                answer.use { while (true) emit(it.next { !context.isActive } ?: break) }
            } finally {
                ended = true
            }
        }
        return Stream(pieces.flowOn(dispatcher).buffer(Channel.RENDEZVOUS), answer.generation) { ended }
    }

    /** The loop of one answer, for who steps through it: a router. */
    internal fun answering(prompt: Prompt, options: GenerateOptions): Answering {
        val model = model()
        val request = request(model.tokenizer, model.backend.vocabSize, model.backend.contextLength, prompt, options)
        val adapter = if (options.base) null else options.adapter ?: model.adapter
        return Answering(this, model, request, adapter, Generation(request.ids.size))
    }

    /**
     * The tapped hidden state of each text, mean over its tokens: [D] each.
     *
     * @param part which tokens to average over. The bos token is one of the prompt's; a token that holds the end of the prompt and the
     *   beginning of the answer is one of the answer's.
     * @param base compute with the un-customized model, whatever the present adapter is.
     * @throws InvalidInput that part of a text has no tokens.
     * @throws ContextOverflow a text is longer than the context.
     */
    suspend fun embed(texts: List<Text>, part: TextPart = TextPart.ALL, base: Boolean = false): List<FloatArray> =
        withContext(dispatcher) {
            val model = model()
            val session = borrow(null, model)
            try {
                texts.mapIndexed { i, text -> meanTap(model, session, if (base) null else model.adapter, text, part, "text $i") }
            } finally {
                giveBack(session, model, idle = true)
            }
        }

    /** A KV cache of one's own, for a conversation whose turns should stay fast whatever else the engine does. */
    fun session(): Session = session(model())

    /** The name of the adapter that the next request is answered with; null: the base model. */
    val adapter: String? get() = lock.withLock { loaded?.adapter?.name }

    /** What the next request is answered with; null: the base model. */
    internal val presentAdapter: Adapter? get() = lock.withLock { loaded?.adapter }

    /**
     * Answers all further requests with an adapter inside the bundle, by name; null: with the base model. Answers that are running keep
     * theirs.
     *
     * @throws AdapterError it does not fit this model.
     * @throws InvalidInput there is no such adapter.
     */
    fun setAdapter(name: String?) = setAdapter(name?.let { find(it) })

    /** The same with an adapter bundle of its own. */
    fun setAdapter(bundle: Bundle) = setAdapter(findAdapter(bundle))

    internal fun setAdapter(adapter: Adapter?) = lock.withLock { model().adapter = adapter }

    /** Reads an adapter bundle, to answer single requests with it. What was read stays in memory, to be found again at once. */
    fun findAdapter(bundle: Bundle): Adapter =
        lock.withLock {
            val model = model()
            val known = model.adapters[bundle.path]?.takeIf { it.first.document.contentEquals(bundle.document) }
            known?.second ?: model.backend.readAdapter(bundle).also { model.adapters[bundle.path] = bundle to it }
        }

    /** Reads an adapter bundle without keeping it. */
    internal fun readAdapter(bundle: Bundle): Adapter = lock.withLock { model().backend.readAdapter(bundle) }

    /** The bundle that an adapter of this engine was read from; null if it did not keep it. */
    internal fun bundleOf(adapter: Adapter): Bundle? =
        lock.withLock {
            loaded
                ?.adapters
                ?.values
                ?.find { it.second === adapter }
                ?.first
        }

    private fun find(name: String): Adapter {
        val bundle = model().bundle ?: throw AdapterError("there is no adapter '$name'", advice = "give an adapter bundle")
        return findAdapter(bundle.adapter(name))
    }

    internal fun session(model: LoadedModel): Session =
        lock.withLock {
            checkStill(model)
            val backend = model.backend
            Session(backend.newCache(model.adapter), lock, backend.contextLength, backend.tapSize) { model.sessions -= it }.also {
                model.sessions +=
                    it
            }
        }

    /** A session for one answer: the one that is wanted, the idle one, or a new one. */
    internal fun borrow(wanted: Session?, model: LoadedModel): Session =
        lock.withLock {
            checkStill(model)
            if (wanted != null && (wanted !in model.sessions || wanted.busy)) {
                throw InvalidInput(
                    if (wanted.busy) "another answer is running in this session" else "this session is another engine's, or closed",
                    "session",
                    "make one for each conversation, with `engine.session()`",
                )
            }
            val session = wanted ?: model.idle ?: session(model)
            if (wanted == null) model.idle = null
            session.busy = true
            count(1)
            session
        }

    /** One idle session is kept, the latest: a second KV cache would be memory that nobody asked for. */
    internal fun giveBack(session: Session, model: LoadedModel, idle: Boolean) =
        lock.withLock {
            session.busy = false
            if (model === loaded) {
                if (idle) {
                    model.idle?.close()
                    model.idle = session
                }
                count(-1)
            }
        }

    private fun count(change: Int) {
        val running = ((told.value as? EngineState.Answering)?.answers ?: 0) + change
        told.value = if (running > 0) EngineState.Answering(running) else EngineState.Ready
    }

    private fun model(): LoadedModel =
        lock.withLock {
            loaded ?: throw EngineClosed(
                if (told.value == EngineState.Closed) "the engine is closed" else "no model is loaded",
                advice = "load one, or close it later",
            )
        }

    private fun checkStill(model: LoadedModel) {
        if (model !== loaded) throw EngineClosed("the model was unloaded", advice = "load it again")
    }

    private fun change(state: EngineState) =
        lock.withLock {
            if (told.value == EngineState.Closed) throw EngineClosed("the engine is closed")
            told.value = state
        }

    private fun meanTap(model: LoadedModel, session: Session, adapter: Adapter?, text: Text, part: TextPart, where: String): FloatArray {
        if (part == TextPart.ANSWER && text.answer.isEmpty()) {
            throw InvalidInput("there is no answer to embed", where, "pass pairs of a prompt and its answer")
        }
        // The answer's tokens are those that it has after the prompt; alone it might be split in another way.
        val ids = Prompt.Text(text.prompt + text.answer).ids(model.tokenizer, model.backend.vocabSize)
        val prompt = Prompt.Text(text.prompt).ids(model.tokenizer, model.backend.vocabSize)
        val split = commonPrefix(ids, ids.size, prompt)
        val head = ids.copyOf(split)
        val tail = if (part == TextPart.PROMPT) IntArray(0) else ids.copyOfRange(split, ids.size)
        val length = head.size + tail.size
        if (length > model.backend.contextLength) {
            throw ContextOverflow("the text has $length tokens; the context holds ${model.backend.contextLength}", where, "shorten it")
        }
        session.prefill(head.copyOfRange(session.begin(head, adapter), head.size))
        val headSum = session.tapSum
        session.prefill(tail)
        val sum = session.tapSum
        return FloatArray(sum.size) { i ->
            (if (part == TextPart.ANSWER) (sum[i] - headSum[i]) / tail.size else sum[i] / length).toFloat()
        }
    }

    companion object {
        /** An engine with a bundle: see the [load] of an instance. Close it. */
        suspend fun load(
            path: Path,
            loaders: Map<String, BackendLoader> = LOADERS,
            threads: Int? = null,
            availableBytes: Long? = freeMemory(),
        ): Engine = Engine().apply { load(path, loaders, threads, availableBytes) }
    }
}
