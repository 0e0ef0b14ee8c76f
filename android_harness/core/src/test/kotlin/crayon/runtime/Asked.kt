// An engine that answers one line of JSON to each line: the other half of benchmarks/kotlin.py.
package crayon.runtime

import com.sun.management.ThreadMXBean
import kotlinx.coroutines.runBlocking
import kotlinx.serialization.builtins.ListSerializer
import kotlinx.serialization.builtins.serializer
import java.lang.management.ManagementFactory
import java.nio.file.Paths

private const val WARM = 16

fun main(arguments: Array<String>) =
    runBlocking {
        Engine.load(Paths.get(arguments[0]), threads = arguments[1].toInt()).use { engine ->
            for (line in generateSequence(::readlnOrNull)) println(answer(engine, line.substringBefore(' '), line.substringAfter(' ')))
        }
    }

private suspend fun answer(engine: Engine, command: String, rest: String): String =
    when (command) {
        "version" -> {
            "\"${engine.backend.versions.getValue("onnxruntime")}\""
        }

        "decode" -> {
            val options = GenerateOptions(maxNewTokens = rest.toInt(), ignoreEos = true)
            "${engine.generate(Prompt.Tokens(listOf(1)), options).decodeSeconds}"
        }

        "allocated" -> {
            "${allocated(engine)}"
        }

        "golden" -> {
            val results = replay(engine.bundle!!, engine.backend)
            val failed = results.filter { it.problem != null }.joinToString { "\"${it.name}\"" }
            "{\"cases\": ${results.size}, \"failed\": [$failed]}"
        }

        else -> {
            answers(engine, decodeJson(ListSerializer(String.serializer()), rest.toByteArray())).toString()
        }
    }

private suspend fun answers(engine: Engine, prompts: List<String>): List<List<Int>> =
    (listOf(null) + engine.bundle!!.adapterNames).flatMap { adapter ->
        engine.setAdapter(adapter)
        prompts.flatMap { prompt ->
            listOf(0.0, 0.8).map { temperature ->
                val sampling = SamplingOptions(temperature, seed = 7u)
                engine.generate(prompt, GenerateOptions(maxNewTokens = 24, sampling = sampling, ignoreEos = true)).tokenIds
            }
        }
    }

/** Bytes that a token of an answer allocates, in this thread. */
private fun allocated(engine: Engine): Long {
    val bean = ManagementFactory.getThreadMXBean() as ThreadMXBean
    val thread = Thread.currentThread().id
    val options = GenerateOptions(maxNewTokens = 2 * WARM + 1, ignoreEos = true)
    return engine.answering(Prompt.Tokens(listOf(1)), options).use { answer ->
        repeat(WARM) { answer.next { false } }
        val before = bean.getThreadAllocatedBytes(thread)
        repeat(WARM) { answer.next { false } }
        (bean.getThreadAllocatedBytes(thread) - before) / WARM
    }
}
