// What is read of a tokenizer.json, in the form of the `tokenizers` library.
package crayon.runtime.tokenizer

import kotlinx.serialization.KSerializer
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.descriptors.SerialDescriptor
import kotlinx.serialization.encoding.Decoder
import kotlinx.serialization.encoding.Encoder
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonDecoder
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.boolean
import kotlinx.serialization.json.int
import kotlinx.serialization.json.jsonPrimitive
import java.util.regex.Matcher
import java.util.regex.Pattern

@Serializable
internal class Document(
    @SerialName("added_tokens") val addedTokens: List<AddedToken> = emptyList(),
    val normalizer: JsonElement? = null,
    @SerialName("pre_tokenizer") val preTokenizer: JsonElement? = null,
    val decoder: JsonElement? = null,
    val model: Model,
)

@Serializable
internal data class AddedToken(
    val id: Int,
    val content: String,
    @SerialName("single_word") val singleWord: Boolean = false,
    val lstrip: Boolean = false,
    val rstrip: Boolean = false,
    val normalized: Boolean = true,
    val special: Boolean = false,
)

@Serializable
internal class Model(
    val type: String = "BPE",
    val dropout: Double? = null,
    @SerialName("unk_token") val unkToken: String? = null,
    @SerialName("continuing_subword_prefix") val continuingSubwordPrefix: String? = null,
    @SerialName("end_of_word_suffix") val endOfWordSuffix: String? = null,
    @SerialName("fuse_unk") val fuseUnk: Boolean = false,
    @SerialName("byte_fallback") val byteFallback: Boolean = false,
    @SerialName("ignore_merges") val ignoreMerges: Boolean = false,
    val vocab: Map<String, Int>,
    val merges: List<Merge> = emptyList(),
)

/** Two tokens that become one: `["a", "b"]`, in older files `"a b"`. */
@Serializable(with = MergeSerializer::class)
internal class Merge(val left: String, val right: String)

internal object MergeSerializer : KSerializer<Merge> {
    override val descriptor: SerialDescriptor = JsonElement.serializer().descriptor

    override fun deserialize(decoder: Decoder): Merge =
        when (val element = (decoder as JsonDecoder).decodeJsonElement()) {
            is JsonArray -> Merge(element[0].jsonPrimitive.content, element[1].jsonPrimitive.content)
            is JsonPrimitive -> Merge(element.content.substringBefore(' '), element.content.substringAfter(' '))
            else -> throw IllegalArgumentException("a merge is not a pair of tokens")
        }

    override fun serialize(encoder: Encoder, value: Merge) = throw UnsupportedOperationException("tokenizers are only read")
}

/** The type of a step, and the steps of a sequence. */
internal val JsonElement?.type: String? get() = string("type")

internal fun JsonElement?.string(name: String): String? =
    ((this as? JsonObject)?.get(name) as? JsonPrimitive)?.takeIf { it.isString }?.content

internal fun JsonElement.flag(name: String, default: Boolean): Boolean =
    ((this as? JsonObject)?.get(name) as? JsonPrimitive)?.boolean ?: default

internal fun JsonElement.number(name: String): Int = ((this as JsonObject).getValue(name) as JsonPrimitive).int

/** The steps of a sequence, or the one step itself; none for null. */
internal fun steps(step: JsonElement?, key: String): List<JsonElement> =
    when (step.type) {
        null -> emptyList()
        "Sequence" -> ((step as JsonObject).getValue(key) as JsonArray).flatMap { steps(it, key) }
        else -> listOf(step!!)
    }

/** What a step seeks: `{"String": …}` or `{"Regex": …}`. */
internal fun sought(step: JsonElement): Pattern {
    val pattern = (step as JsonObject)["pattern"]
    pattern.string("String")?.let { return Pattern.compile(Pattern.quote(it)) }
    return onigPattern(pattern.string("Regex") ?: throw IllegalArgumentException("a pattern is neither a String nor a Regex"))
}

/** What a `Replace` does to a text. */
internal fun replacing(step: JsonElement): (String) -> String {
    val pattern = sought(step)
    val content = Matcher.quoteReplacement(step.string("content").orEmpty())
    return { pattern.matcher(it).replaceAll(content) }
}
