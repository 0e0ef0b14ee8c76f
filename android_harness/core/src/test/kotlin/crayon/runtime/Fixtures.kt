// What the Python tests made for these: bundles of the exporter, and what the Python runtime says of them.
package crayon.runtime

import crayon.runtime.routing.Policy
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonObject
import org.junit.jupiter.api.Assumptions.assumeTrue
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.Paths
import kotlin.io.path.readBytes
import kotlin.io.path.readText
import kotlin.io.path.writeBytes
import kotlin.io.path.writeText

/** The folder that `tests/android_harness/expected.py` has filled; a test that needs it is left out where nobody says where it is. */
internal val fixtures: Path
    get() {
        val folder = System.getProperty("crayon.fixtures").orEmpty()
        assumeTrue(folder.isNotEmpty(), "no crayon.fixtures: the Python tests give it")
        return Paths.get(folder)
    }

/** The command of another JVM like this one. @param main the class whose `main` it runs. */
internal fun jvm(main: String, vararg arguments: String): List<String> {
    val java = Paths.get(System.getProperty("java.home"), "bin", "java").toString()
    return listOf(java, "-cp", System.getProperty("java.class.path"), main, *arguments)
}

private val EXPECTED = Json { ignoreUnknownKeys = true }

internal val expected: Expected by lazy { EXPECTED.decodeFromString(fixtures.resolve("expected.json").readText()) }

@Serializable
internal class Expected(
    val tokenizers: List<ExpectedTokenizer>,
    val models: List<ExpectedModel>,
    val sampling: List<ExpectedSampling>,
    val fake: ExpectedFake,
    val chats: List<ExpectedTemplate>,
    @SerialName("chat_ids") val chatIds: List<ExpectedChatIds>,
    val alpha: List<ExpectedAlpha>,
    val routing: List<ExpectedRouting>,
)

@Serializable
internal class ExpectedTokenizer(
    val name: String,
    val file: String,
    val info: TokenizerInfo,
    val texts: List<ExpectedText>,
    val runs: List<ExpectedRun>,
)

@Serializable
internal class ExpectedText(val text: String, val ids: List<Int>, val special: List<Int>)

@Serializable
internal class ExpectedRun(val ids: List<Int>, val text: String, val special: String)

@Serializable
internal class ExpectedModel(
    val name: String,
    val prompt: String,
    val answers: List<ExpectedAnswer>,
    val logits: Map<String, List<Float>>,
    val pairs: List<List<String>>,
    val parts: Map<String, List<List<Float>>>,
)

@Serializable
internal class ExpectedOptions(
    val temperature: Double,
    @SerialName("top_k") val topK: Int = 0,
    @SerialName("top_p") val topP: Double = 1.0,
    @SerialName("min_p") val minP: Double = 0.0,
    @SerialName("repetition_penalty") val repetitionPenalty: Double = 1.0,
) {
    fun sampling(seed: ULong) = SamplingOptions(temperature, topK, topP, minP, repetitionPenalty, seed)
}

@Serializable
internal class ExpectedAnswer(
    val adapter: String?,
    val options: ExpectedOptions,
    val ids: List<Int>,
    val text: String,
    @SerialName("log_probabilities") val logProbabilities: List<Double>,
    @SerialName("prompt_tap") val promptTap: List<Float>,
    @SerialName("answer_tap") val answerTap: List<Float>,
)

@Serializable
internal class ExpectedSampling(
    val seed: Int,
    val options: ExpectedOptions,
    val rows: List<List<Float>>,
    val tokens: List<Int>,
    @SerialName("log_probabilities") val logProbabilities: List<Double>,
    val top: List<List<Int>>,
)

@Serializable
internal class ExpectedFake(
    val ids: List<Int>,
    val logits: List<Float>,
    @SerialName("tap_sum") val tapSum: List<Float>,
    val hidden: List<List<Float>>,
)

@Serializable
internal class ExpectedTemplate(val name: String, val template: String, val names: Map<String, String>, val cases: List<ExpectedChat>)

/** @property text null: it is refused, and Python says `why`. */
@Serializable
internal class ExpectedChat(
    val messages: List<JsonObject>,
    val tools: List<JsonObject>?,
    val prompt: Boolean,
    val text: String?,
    val why: String?,
)

@Serializable
internal class ExpectedChatIds(val file: String, val info: TokenizerInfo, val chats: List<ExpectedChatTokens>)

@Serializable
internal class ExpectedChatTokens(val messages: List<JsonObject>, val ids: List<Int>)

@Serializable
internal class ExpectedAlpha(
    val projection: JsonElement,
    val weighting: JsonElement,
    val prompts: List<List<Float>>,
    val answers: List<List<Float>>,
    val alpha: List<Float>,
)

@Serializable
internal class ExpectedPrototypes(val states: List<List<Float>>, val mean: List<Float>)

@Serializable
internal class ExpectedExamples(
    val prompt: List<List<Float>>,
    val answer: List<List<Float>>,
    @SerialName("log_probability") val logProbability: List<Float>,
)

@Serializable
internal class ExpectedSaid(val prompt: List<Float>, val answer: List<Float>, val likely: List<Double>)

@Serializable
internal class ExpectedRouting(
    val prototypes: ExpectedPrototypes?,
    val examples: ExpectedExamples?,
    val said: List<ExpectedSaid>,
    val signals: List<Map<String, Double>>,
    val policies: List<Policy>,
    val decisions: List<List<String>>,
)

/** A copy of one of the fixtures' folders, to damage. */
internal fun copyOf(name: String, into: Path): Path =
    into.resolve(name).also {
        fixtures.resolve(name).toFile().copyRecursively(it.toFile())
        Files.deleteIfExists(it.resolve(".installed.json"))
    }

/** Changes one byte of a file. */
internal fun flipByte(path: Path, position: Int = -1) {
    val content = path.readBytes()
    val at = if (position < 0) content.size + position else position
    content[at] = (content[at].toInt() xor 1).toByte()
    path.writeBytes(content)
}

/** Changes the text of a file. */
internal fun edit(path: Path, change: (String) -> String) = path.writeText(change(path.readText()))

/** The largest difference of two rows. */
internal fun difference(a: List<Float>, b: FloatArray): Float = a.indices.maxOf { kotlin.math.abs(a[it] - b[it]) }

/** A small tokenizer: `a` to `z` are the ids from 3 on; 1 is bos, 2 is eos. */
internal fun letters(folder: Path): crayon.runtime.tokenizer.Tokenizer {
    val tokens = listOf("<unk>", "<s>", "</s>") + ('a'..'z').map { "$it" } + listOf(" ", "\\n")
    val vocabulary = tokens.mapIndexed { i, token -> "\"$token\": $i" }.joinToString()
    val path = folder.resolve("letters.json")
    path.writeText(
        """{"model": {"type": "BPE", "unk_token": "<unk>", "vocab": {$vocabulary}, "merges": []}, "decoder": {"type": "Fuse"}}""",
    )
    return crayon.runtime.tokenizer.Tokenizer(TokenizerInfo("letters.json", tokens.size, addBos = true, bos = 1, eos = listOf(2)), path)
}
