package crayon.app.benchmark

import crayon.runtime.Engine
import crayon.runtime.GenerateOptions
import crayon.runtime.Generation
import crayon.runtime.InvalidInput
import crayon.runtime.Overflow
import crayon.runtime.Prompt
import crayon.runtime.backends.BackendLoader
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.SerializationException
import kotlinx.serialization.json.Json
import java.nio.file.Path
import kotlin.math.sqrt

/** What a benchmark measures. */
fun interface Measuring {
    /**
     * Measures a bundle.
     *
     * @param job what to measure, as JSON.
     * @return results as lines of JSON, as they come.
     */
    fun lines(bundle: Path, job: String): Flow<String>
}

private val JSON = Json {
    ignoreUnknownKeys = true
    encodeDefaults = true
}

/** A job of [TokensPerSecond]: each size by itself, after a warm-up. */
@Serializable
internal data class Job(
    val prompt: List<Int> = listOf(128),
    val decode: List<Int> = listOf(64),
    val repetitions: Int = 5,
    val threads: Int? = null,
)

/** One line: names of llama-bench. */
@Serializable
internal data class Line(
    val test: String,
    @SerialName("n_prompt") val prompt: Int,
    @SerialName("n_gen") val generated: Int,
    @SerialName("avg_ts") val average: Double,
    @SerialName("stddev_ts") val deviation: Double,
    @SerialName("samples_ts") val samples: List<Double>,
)

/** Prefill and decode, tokens a second, as llama-bench has them. */
class TokensPerSecond(private val loaders: Map<String, BackendLoader>) : Measuring {
    override fun lines(bundle: Path, job: String): Flow<String> {
        val wanted = try {
            JSON.decodeFromString<Job>(job)
        } catch (e: SerializationException) {
            throw InvalidInput("the job cannot be read: ${e.message?.lineSequence()?.first()}", "job")
        }
        if (wanted.repetitions !in 1..1000 || (wanted.prompt + wanted.decode).any { it < 2 }) {
            throw InvalidInput("a number of the job is out of range", "job", "ask for 1 to 1000 repetitions, and for sizes from 2")
        }
        return flow {
            Engine.load(bundle, loaders, wanted.threads).use { engine ->
                for (size in wanted.prompt) emit(line("pp$size", size, 0, samples(engine, size, 1, wanted) { it.promptTokensPerSecond }))
                for (size in wanted.decode) emit(line("tg$size", 0, size, samples(engine, 1, size, wanted) { it.decodeTokensPerSecond }))
            }
        }
    }

    private suspend fun samples(engine: Engine, prompt: Int, generated: Int, job: Job, value: (Generation) -> Double): List<Double> {
        val tokens = Prompt.Tokens(List(prompt) { 1 + it % (engine.backend.vocabSize - 1) })
        val measured = List(job.repetitions + 1) {
            engine.session().use { session ->
                val options =
                    GenerateOptions(maxNewTokens = generated, ignoreEos = true, base = true, session = session, overflow = Overflow.ERROR)
                value(engine.generate(tokens, options))
            }
        }
        return measured.drop(1)
    }

    private fun line(test: String, prompt: Int, generated: Int, samples: List<Double>): String {
        val mean = samples.average()
        val squares = samples.sumOf { (it - mean) * (it - mean) }
        val deviation = if (samples.size > 1) sqrt(squares / (samples.size - 1)) else 0.0
        return JSON.encodeToString(Line(test, prompt, generated, mean, deviation, samples))
    }
}
