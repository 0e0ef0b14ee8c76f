// Reading JSON that somebody else wrote: unknown fields are ignored, all else that is wrong is one exception.
package crayon.runtime

import kotlinx.serialization.DeserializationStrategy
import kotlinx.serialization.SerializationException
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException
import java.nio.charset.CodingErrorAction

/** Unknown fields are ignored, so that minor versions may add some. */
internal val JSON = Json {
    ignoreUnknownKeys = true
    explicitNulls = true
    prettyPrint = true
    encodeDefaults = true
}

/** The same on one line. */
internal val COMPACT = Json(JSON) { prettyPrint = false }

/** What is wrong with a document; whoever reads it says where and what to do. */
internal class Malformed(val problem: String) : Exception(problem)

/** Bytes as JSON. Throws [Malformed]: they are not, or not UTF-8. */
internal fun parseJson(document: ByteArray): JsonElement = guarded { JSON.parseToJsonElement(utf8(document)) }

/** A parsed document as a class. Throws [Malformed]: it is something else, or refuses a value. */
internal fun <T> fromJson(type: DeserializationStrategy<T>, raw: JsonElement): T = guarded { JSON.decodeFromJsonElement(type, raw) }

/** Bytes as text. Throws [Malformed]: they are not UTF-8. */
internal fun utf8(document: ByteArray): String {
    val decoder = Charsets.UTF_8
        .newDecoder()
        .onMalformedInput(CodingErrorAction.REPORT)
        .onUnmappableCharacter(CodingErrorAction.REPORT)
    try {
        return decoder.decode(ByteBuffer.wrap(document)).toString()
    } catch (_: CharacterCodingException) {
        throw Malformed("it is not UTF-8")
    }
}

/** Bytes as a class, without a tree of all that is in them. Throws [Malformed] as the others. */
internal fun <T> decodeJson(type: DeserializationStrategy<T>, document: ByteArray): T =
    guarded { JSON.decodeFromString(type, utf8(document)) }

/** A text field of an object; null if it is no object, or has no such text. */
internal fun JsonElement?.text(name: String): String? =
    ((this as? JsonObject)?.get(name) as? JsonPrimitive)?.takeIf { it.isString }?.content

private fun <T> guarded(read: () -> T): T =
    try {
        read()
    } catch (e: SerializationException) {
        throw Malformed(
            e.message
                .orEmpty()
                .lineSequence()
                .first(),
        )
    } catch (e: IllegalArgumentException) {
        throw Malformed(
            e.message
                .orEmpty()
                .lineSequence()
                .first(),
        )
    } catch (_: StackOverflowError) {
        throw Malformed("it is nested too deep")
    }
