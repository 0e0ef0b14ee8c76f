/*
 * The measurements themselves: an engine goes in, samples come out. All of them are of one process, with Python's names, sizes and order.
 *
 * Prefill and decode are those of the backend, as llama-bench measures: pseudo-random tokens, nothing is sampled. TTFT is that of the whole
 * engine. Every test runs once to warm up, apart, and then `rounds` times.
 */
package crayon.runtime.profile

import crayon.runtime.ADAPTER
import crayon.runtime.CrayonError
import crayon.runtime.EXAMPLES
import crayon.runtime.Engine
import crayon.runtime.Example
import crayon.runtime.GenerateOptions
import crayon.runtime.PREFILL_CHUNK
import crayon.runtime.Prompt
import crayon.runtime.backends.Adapter
import crayon.runtime.backends.Cache
import crayon.runtime.bundle.Bundle
import crayon.runtime.decodeJson
import crayon.runtime.routing.Answer
import crayon.runtime.routing.Router
import crayon.runtime.score
import java.nio.file.Path
import java.util.concurrent.Callable
import java.util.concurrent.Executors
import kotlin.io.path.exists
import kotlin.io.path.readLines
import kotlin.math.max
import kotlin.math.min

private const val ANSWER = 16 // tokens of the answers whose routing is timed
private const val TEN = 10 // examples that a customization is made of
private const val MATRIX = 512
private const val WINDOW_S = 1.0 // between two looks at the machine in a long run
private const val BUFFER = 1L shl 30 // bytes, many times any cache
private const val LEAST = 64L shl 20 // bytes of one sample, so that starting the threads does not count
private const val SMALLEST = 1L shl 20

/** Looks at the process and the machine, between measurements and never during one. */
internal class Watch(val sensors: Sensors, private val folder: Path, private val process: Int) {
    private val began = System.nanoTime()

    fun sample(phase: String, avgTs: Double? = null): Sample {
        val memory = memoryUse(folder)
        return Sample(
            process,
            phase,
            System.nanoTime() - began,
            memory.rss,
            memory.pss,
            memory.mapped,
            memory.peak,
            sensors.frequency(),
            sensors.temperature(),
            sensors.throttled(),
            sensors.energy(),
            sensors.power(),
            avgTs,
        )
    }
}

internal class Measuring(private val engine: Engine, private val watch: Watch, private val emit: (Record) -> Unit) {
    private val backend = engine.backend
    private val adapter = engine.presentAdapter

    /**
     * Every test of a job. The cache is filled once: decodes begin at the greatest depth, and go back to the next.
     *
     * @param folder where the model's customization is kept, if there is one.
     */
    suspend fun measure(work: Work.Measure, folder: Path) {
        emit(watch.sample("loaded"))
        emit(observed("first_token", listOf(firstTokenNs(listOf(1))), emptyList(), adapter, nPrompt = 1))
        backend.newCache(adapter).use { cache ->
            for (n in work.prompts) emit(prefill(cache, n, work.rounds))
            emit(watch.sample("prefill"))
            cache.rewind(0)
            feed(cache, tokenIds(work.depths.maxOrNull() ?: 0))
            for (depth in work.depths.sortedDescending()) emit(decode(cache, depth, work.generate, work.rounds))
            emit(watch.sample("decode"))
        }
        for (n in work.prompts) {
            val times = List(1 + work.rounds) { firstTokenNs(tokenIds(n, 1 + it).toList()) }
            emit(observed("ttft", times.drop(1), times.take(1), adapter, nPrompt = n, nGen = 1))
        }
        if (work.more) {
            swaps(work.rounds)
            customized(folder, work.rounds)
        }
        emit(watch.sample("end"))
    }

    /** Decode without a pause, and look at the machine once a second. */
    fun longRun(seconds: Double) {
        val windows = ArrayList<Pair<Int, Double>>()
        val used = HashMap<String, Double>()
        val first = watch.sample("long")
        var last = first
        emit(first)
        val began = System.nanoTime()
        backend.newCache(adapter).use { cache ->
            while (crayon.runtime.seconds(began) < seconds) {
                val window = System.nanoTime()
                var count = 0
                var spent: Double
                while (true) {
                    spent = crayon.runtime.seconds(window)
                    if (spent >= min(WINDOW_S, seconds)) break
                    if (cache.length == backend.contextLength) cache.rewind(0)
                    cache.decode((cache.length * 7919L % backend.vocabSize).toInt())
                    count++
                }
                windows += count to spent
                for ((name, watts) in watch.sensors.power()) used[name] = (used[name] ?: 0.0) + watts * spent
                last = watch.sample("long", count / spent)
                emit(last)
            }
        }
        val tenth = max(1, windows.size / 10)
        emit(
            LongRun(
                seconds = crayon.runtime.seconds(began),
                nGen = windows.sumOf { it.first },
                firstTs = speed(windows.take(tenth)),
                lastTs = speed(windows.takeLast(tenth)),
                energyJ = used + last.energyJ.mapNotNull { (name, now) -> first.energyJ[name]?.let { name to now - it } },
                throttled = last.throttled.mapNotNull { (name, now) -> first.throttled[name]?.let { name to now - it } }.toMap(),
            ),
        )
    }

    private fun speed(windows: List<Pair<Int, Double>>) =
        if (windows.isEmpty()) {
            0.0
        } else {
            windows.sumOf { it.first } /
                windows.sumOf { it.second }
        }

    /** Tokens that are in no order, the same ones every time, as crayon-bench feeds. */
    private fun tokenIds(n: Int, start: Int = 0) = IntArray(n) { ((start + it) * 7919L % backend.vocabSize).toInt() }

    /** Appends tokens, in the chunks that the engine feeds. */
    private fun feed(cache: Cache, ids: IntArray) {
        for (start in ids.indices step PREFILL_CHUNK) cache.prefill(ids.copyOfRange(start, min(start + PREFILL_CHUNK, ids.size)))
    }

    /** Feeding `n` tokens from position 0. */
    private fun prefill(cache: Cache, n: Int, rounds: Int): Observation {
        val ids = tokenIds(n)
        val times = List(1 + rounds) {
            cache.rewind(0)
            timed { feed(cache, ids) }
        }
        return observed("prefill", times.drop(1), times.take(1), adapter, nPrompt = n)
    }

    /** Feeding `n` tokens one by one from position `depth`, which the cache has reached; the time of each of them is kept. */
    private fun decode(cache: Cache, depth: Int, n: Int, rounds: Int): Observation {
        val tokens = tokenIds(n, depth)
        val all = List(1 + rounds) {
            cache.rewind(depth)
            val times = LongArray(n + 1)
            times[0] = System.nanoTime()
            for (i in 0 until n) {
                cache.decode(tokens[i])
                times[i + 1] = System.nanoTime()
            }
            times
        }
        val totals = all.map { it.last() - it.first() }
        val each = all.drop(1).map { times -> List(n) { times[it + 1] - times[it] } }
        return observed("decode", totals.drop(1), totals.take(1), adapter, nGen = n, nDepth = depth).copy(tokenNs = each)
    }

    private suspend fun firstTokenNs(ids: List<Int>): Long {
        val answer = engine.generate(Prompt.Tokens(ids), GenerateOptions(maxNewTokens = 1, ignoreEos = true))
        return nanoseconds(answer.firstTokenSeconds)
    }

    /** The time until the first token: with the base as before, after a swap to an adapter that was read, and from its file. */
    private suspend fun swaps(rounds: Int) {
        val bundle = engine.bundle
        val name = bundle?.adapterNames?.firstOrNull()
        if (bundle == null || name == null) return emit(Absent("adapter swap", "there are no adapters in the bundle"))
        val inside = bundle.adapter(name)
        val known = engine.findAdapter(inside)
        val tests = mapOf<String, () -> Adapter?>(
            "swap_none" to { null },
            "swap_read" to { known },
            "swap_file" to { engine.readAdapter(inside) },
        )
        val one = Prompt.Tokens(listOf(1))
        for ((test, select) in tests) {
            val times = List(1 + rounds) {
                engine.setAdapter(null as Adapter?)
                engine.generate(one, GenerateOptions(maxNewTokens = 1))
                timed {
                    engine.setAdapter(select())
                    engine.generate(one, GenerateOptions(maxNewTokens = 1))
                }
            }
            emit(observed(test, times.drop(1), times.take(1), known, nPrompt = 1, nGen = 1))
        }
        engine.setAdapter(adapter)
    }

    /** What a customized model does beside answering: the forward passes of the affinity of ten of its examples, and routing. */
    private suspend fun customized(folder: Path, rounds: Int) {
        if (!folder.resolve(EXAMPLES).exists()) {
            for (what in listOf("affinity of ten examples", "routing overhead")) {
                emit(Absent(what, "the model is not customized here: see `crayon customize`"))
            }
            return
        }
        try {
            val examples = folder
                .resolve(EXAMPLES)
                .readLines()
                .filter { it.isNotBlank() }
                .map { decodeJson(Example.serializer(), it.toByteArray()) }
                .take(TEN)
            val times = List(1 + rounds) { timed { score(engine, examples, null) } }
            emit(observed("affinity", times.drop(1), times.take(1)))
            engine.setAdapter(Bundle.open(folder.resolve(ADAPTER)))
            val own = engine.presentAdapter
            val router = Router(engine, folder = folder)
            val answers = List(1 + rounds) {
                router.answer(examples[it % examples.size].prompt, options = GenerateOptions(maxNewTokens = ANSWER, ignoreEos = true))
            }
            for ((test, part) in mapOf<String, (Answer) -> Double>(
                "routing_answer" to { it.deviceSeconds },
                "routing_score" to { it.scoreSeconds },
            )) {
                val ns = answers.map { nanoseconds(part(it)) }
                if (ns.drop(1).min() > 0) {
                    emit(observed(test, ns.drop(1), ns.take(1), own, nGen = ANSWER))
                } else {
                    emit(Absent("routing overhead", "an answer was not judged"))
                }
            }
        } catch (e: CrayonError) {
            emit(Absent("affinity of ten examples, and routing overhead", e.what))
        } finally {
            engine.setAdapter(adapter)
        }
    }
}

/**
 * The machine without any model, which tells whether it was as fast as at another time: reading memory, and multiplying matrices, as a loop of this
 * JVM does it.
 *
 * @param readBytes of the model's weights; it takes as much memory (of a small heap a quarter), so the model is closed before.
 */
internal fun controls(readBytes: Long, threads: Int?, rounds: Int, emit: (Record) -> Unit) {
    val count = threads ?: Runtime.getRuntime().availableProcessors()
    emit(Observation("control_read", nbytes = readBytes, samplesNs = readTimes(readBytes, count, rounds)))
    val a = FloatArray(MATRIX * MATRIX) { 1f }
    val out = FloatArray(MATRIX * MATRIX)
    val times = List(1 + rounds) { timed { multiply(a, a, out) } }
    check(out.last() == MATRIX.toFloat())
    emit(Observation("control_matmul", nbytes = 2L * MATRIX * MATRIX * MATRIX, warmupNs = times.take(1), samplesNs = times.drop(1)))
}

private fun readTimes(bytes: Long, threads: Int, rounds: Int): List<Long> {
    val room = min(BUFFER, Runtime.getRuntime().maxMemory() / 4)
    val size = bytes.coerceIn(SMALLEST, max(SMALLEST, room))
    val parts = List(threads) { IntArray((size / 4 / threads).toInt()) { 1 } }
    val passes = ((max(bytes, LEAST) + size - 1) / size).toInt()
    val pool = Executors.newFixedThreadPool(threads)
    try {
        val once = {
            val tasks = parts.map { part -> Callable { (1..passes).maxOf { largest(part) } } }
            timed { check(pool.invokeAll(tasks).all { it.get() == 1 }) }
        }
        once()
        return List(rounds) { max(1L, (once().toDouble() * bytes / (passes.toDouble() * size)).toLong()) }
    } finally {
        pool.shutdown()
    }
}

private fun largest(values: IntArray): Int {
    var best = Int.MIN_VALUE
    for (value in values) best = max(best, value)
    return best
}

private fun multiply(a: FloatArray, b: FloatArray, out: FloatArray) {
    out.fill(0f)
    for (i in 0 until MATRIX) {
        for (k in 0 until MATRIX) {
            val scale = a[i * MATRIX + k]
            for (j in 0 until MATRIX) out[i * MATRIX + j] += scale * b[k * MATRIX + j]
        }
    }
}

private fun observed(
    test: String,
    samples: List<Long>,
    warm: List<Long>,
    adapter: Adapter? = null,
    nPrompt: Int = 0,
    nGen: Int = 0,
    nDepth: Int = 0,
) = Observation(test, nPrompt, nGen, nDepth, adapter?.name, 0, warm, samples)

private fun nanoseconds(seconds: Double): Long = Math.round(seconds * 1e9)

internal inline fun timed(run: () -> Unit): Long {
    val began = System.nanoTime()
    run()
    return System.nanoTime() - began
}
