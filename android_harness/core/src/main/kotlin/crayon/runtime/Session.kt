// What is kept of a sequence between two answers: its KV cache, the tokens in it, and the sums of their tapped hidden states.
package crayon.runtime

import crayon.runtime.backends.Adapter
import crayon.runtime.backends.Cache
import crayon.runtime.backends.Step
import java.util.concurrent.locks.ReentrantLock
import kotlin.concurrent.withLock

/** The most tokens that one backend call feeds, so that a long prompt can be cancelled and other answers get their turn. */
internal const val PREFILL_CHUNK = 256

/** Decoded tokens between two checkpoints. */
private const val CHECKPOINT_EVERY = 32

/**
 * A sequence of tokens that the next prompt may continue: what the two have in common is not computed again.
 *
 * Made by [Engine.session]; it runs one answer at a time. To keep the means of hidden states exact, it goes back only to a checkpoint, which
 * is a length whose sum it knows: the end of each prefilled chunk, of each answer, and some between.
 *
 * @param lock the engine's: one backend call at a time.
 */
class Session internal constructor(
    cache: Cache,
    private val lock: ReentrantLock,
    contextLength: Int,
    tapSize: Int,
    private val onClose: (Session) -> Unit,
) : AutoCloseable {
    private class Checkpoint(val length: Int, val tapSum: DoubleArray)

    private var cache: Cache? = cache
    private val ids = IntArray(contextLength)
    private val sum = DoubleArray(tapSize)
    private val checkpoints = ArrayList<Checkpoint>()

    /** Whether an answer is running in it. */
    @Volatile
    var busy = false
        internal set

    /** How many tokens are in the cache. */
    var length = 0
        private set

    /** The ids in the cache. */
    val tokens: IntArray get() = ids.copyOf(length)

    /** [D]: the tapped hidden states, summed over the tokens in the cache. A copy. */
    val tapSum: DoubleArray get() = sum.copyOf()

    /**
     * Goes back to the last checkpoint at which `ids` still agrees and has a token left to feed; returns its length. With another adapter
     * than before that is 0.
     */
    internal fun begin(ids: IntArray, adapter: Adapter?): Int =
        calling { cache ->
            val common = if (cache.adapter === adapter) commonPrefix(this.ids, length, ids) else 0
            while (checkpoints.isNotEmpty() &&
                checkpoints.last().length > minOf(common, ids.size - 1)
            ) {
                checkpoints.removeAt(checkpoints.lastIndex)
            }
            val last = checkpoints.lastOrNull() ?: Checkpoint(0, DoubleArray(sum.size))
            if (last.length == 0) {
                cache.reset(adapter)
            } else if (last.length < length) {
                cache.rewind(last.length)
            }
            length = last.length
            last.tapSum.copyInto(sum)
            length
        }

    /** Appends tokens, chunk by chunk; null if `cancelled` became true before the last of them was fed, or there were none. */
    internal fun prefill(ids: IntArray, cancelled: () -> Boolean = { false }): Step? {
        var step: Step? = null
        for (start in ids.indices step PREFILL_CHUNK) {
            if (cancelled()) return null
            val chunk = ids.copyOfRange(start, minOf(start + PREFILL_CHUNK, ids.size))
            step = calling { cache -> cache.prefill(chunk).also { append(chunk, it) } }
            checkpoint()
        }
        return step
    }

    /** Appends one token. */
    internal fun decode(token: Int): Step {
        val step = calling { cache ->
            cache.decode(token).also {
                ids[length++] = token
                add(it)
            }
        }
        if (length % CHECKPOINT_EVERY == 0) checkpoint()
        return step
    }

    /** Makes the present length one to go back to. */
    internal fun checkpoint() {
        if (length > (checkpoints.lastOrNull()?.length ?: 0)) checkpoints += Checkpoint(length, tapSum)
    }

    /** Frees the cache. An answer that is still running in it ends with [EngineClosed]. */
    override fun close() =
        lock.withLock {
            cache?.close()
            cache = null
            forget()
            onClose(this)
        }

    private inline fun <T> calling(call: (Cache) -> T): T =
        lock.withLock {
            val open = cache
                ?: throw EngineClosed("the session was closed, or its engine", advice = "close the engine when the last answer has ended")
            try {
                call(open)
            } catch (e: Throwable) {
                // nobody knows what the cache holds now
                forget()
                throw e
            }
        }

    private fun append(chunk: IntArray, step: Step) {
        chunk.copyInto(ids, length)
        length += chunk.size
        add(step)
    }

    private fun add(step: Step) {
        for (i in sum.indices) sum[i] += step.tapSum[i].toDouble()
    }

    private fun forget() {
        length = 0
        checkpoints.clear()
    }
}

/** How many tokens two sequences have in common at their beginning; of `a` only the first `length` count. */
internal fun commonPrefix(a: IntArray, length: Int, b: IntArray): Int {
    val n = minOf(length, b.size)
    return (0 until n).firstOrNull { a[it] != b[it] } ?: n
}
