// A scripted stand-in for a model: no weights, no files, microseconds a token. For tests, yours too.
package crayon.runtime.backends

import crayon.runtime.BackendError
import crayon.runtime.SplitMix64
import crayon.runtime.bundle.Bundle
import java.util.concurrent.ConcurrentHashMap
import java.util.concurrent.locks.ReentrantLock
import java.util.zip.CRC32

/** An adapter that is nothing but its name. */
data class FakeAdapter(override val name: String) : Adapter

/** What a [FakeBackend] says; `null` in its place: deterministic noise, which depends on every token before and on the adapter. */
fun interface Script {
    /** The next token, given all tokens so far, how many were decoded since the last prefill, and the name of the adapter. */
    fun next(tokens: List<Int>, said: Int, adapter: String?): Int
}

/**
 * A model whose answers are scripted.
 *
 *     Engine(FakeBackend(7, 8, 9, 2), tokenizer)   // every answer is the tokens 7, 8, 9, 2
 *     Engine(FakeBackend(), tokenizer)             // deterministic noise, the same as Python's
 *
 * The tapped hidden states are those of [hidden], whatever the script.
 */
class FakeBackend(
    private val script: Script?,
    override val vocabSize: Int = 512,
    override val contextLength: Int = 128,
    override val tapSize: Int = 4,
) : Backend {
    /** Says these tokens, one after the other, after every prompt; the last one again and again. None: noise. */
    constructor(vararg tokens: Int) : this(if (tokens.isEmpty()) null else Script { _, said, _ -> tokens[minOf(said, tokens.lastIndex)] })

    override val name = "fake"

    /** How often each method was called, of the backend and of its caches, by name. */
    val calls: Map<String, Int> get() = counted

    /** How many tokens each prefill fed. */
    val prefilled: List<Int> get() = fed
    var openCaches = 0
        internal set
    private val counted = ConcurrentHashMap<String, Int>()
    private val fed = ArrayList<Int>()
    private val running = ReentrantLock()
    private var closed = false

    override fun readAdapter(bundle: Bundle): Adapter = call("readAdapter") { FakeAdapter(bundle.asAdapter.name) }

    override fun newCache(adapter: Adapter?): Cache =
        call("newCache") {
            openCaches++
            FakeCache(this, adapter)
        }

    override fun close() = call("close") { closed = true }

    /** The hidden states after each of `ids`: multiples of 1/64, so that sums of them are exact. */
    fun hidden(ids: List<Int>, adapter: String? = null): List<FloatArray> {
        var state = seed(adapter)
        return ids.map { token ->
            state = advance(state, token)
            FloatArray(tapSize).also { writeHidden(state, it) }
        }
    }

    internal fun prefilled(tokens: Int) {
        fed += tokens
    }

    internal fun speak(logits: FloatArray, tokens: List<Int>, said: Int, adapter: String?, state: ULong) {
        logits.fill(0f)
        if (script != null) {
            logits[script.next(tokens, said, adapter)] = 10f
            return
        }
        val random = SplitMix64(state)
        for (height in 1..8) logits[(random.next() % logits.size.toULong()).toInt()] = height / 2f
    }

    /** Counts a call; [BackendError] if it comes while another one runs, or after `close`. */
    internal fun <T> call(method: String, body: () -> T): T {
        if (!running.tryLock()) throw BackendError("$method was called while another call was running")
        try {
            if (closed) throw BackendError("$method was called after close")
            counted.merge(method, 1, Int::plus)
            return body()
        } finally {
            running.unlock()
        }
    }
}

private class FakeCache(private val backend: FakeBackend, override var adapter: Adapter?) : Cache {
    private val tokens = ArrayList<Int>()
    private val states = arrayListOf(seed(adapter?.name))
    private var said = 0
    private var closed = false
    private val step = Step(FloatArray(backend.vocabSize), FloatArray(backend.tapSize), FloatArray(backend.tapSize))

    override val length get() = tokens.size

    override fun prefill(ids: IntArray): Step =
        backend.call("prefill") {
            backend.prefilled(ids.size)
            said = 0
            feed(ids)
        }

    override fun decode(token: Int): Step =
        backend.call("decode") {
            said++
            feed(intArrayOf(token))
        }

    override fun rewind(length: Int) =
        backend.call("rewind") {
            if (length !in 0..tokens.size) throw BackendError("cannot rewind a cache of ${tokens.size} tokens to $length")
            while (tokens.size > length) {
                tokens.removeAt(tokens.lastIndex)
                states.removeAt(states.lastIndex)
            }
        }

    override fun reset(adapter: Adapter?) =
        backend.call("reset") {
            this.adapter = adapter
            tokens.clear()
            states.clear()
            states += seed(adapter?.name)
        }

    override fun close() =
        backend.call("closeCache") {
            if (!closed) backend.openCaches--
            closed = true
        }

    private fun feed(ids: IntArray): Step {
        if (closed || ids.isEmpty() || length + ids.size > backend.contextLength) {
            throw BackendError("${ids.size} tokens in a cache with $length (closed: $closed)")
        }
        step.tapSum.fill(0f)
        for (token in ids) {
            tokens += token
            states += advance(states.last(), token)
            writeHidden(states.last(), step.tapLast)
            for (i in step.tapSum.indices) step.tapSum[i] += step.tapLast[i]
        }
        backend.speak(step.logits, tokens, said, adapter?.name, states.last())
        return step
    }
}

/** The state before the first token. */
private fun seed(adapter: String?): ULong = CRC32().apply { update(adapter.orEmpty().toByteArray()) }.value.toULong()

/** The state after one more token. */
private fun advance(state: ULong, token: Int): ULong = SplitMix64(state xor (token + 1).toULong()).next()

private fun writeHidden(state: ULong, row: FloatArray) {
    val random = SplitMix64(state)
    for (i in row.indices) row[i] = ((random.next() % 256u).toInt() - 128) / 64f
}
