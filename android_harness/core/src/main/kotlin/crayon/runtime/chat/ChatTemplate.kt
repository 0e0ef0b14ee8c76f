/*
 * Chat templates: from messages to the text that a model was trained on.
 *
 * A template is a program in Jinja that comes with a model. Here is an interpreter of that part of Jinja which chat templates use, with the
 * conventions of transformers: trim_blocks, lstrip_blocks, `raise_exception`, `strftime_now`, an unescaped `tojson`, loop controls. What it
 * writes is what Python's jinja2 writes; what it does not know it refuses. It cannot reach anything but what it is given, and its steps and
 * its text are bounded, as the template is foreign code.
 */
package crayon.runtime.chat

import crayon.runtime.BundleError
import crayon.runtime.InvalidInput
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonNull
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import java.time.LocalDateTime

/**
 * One message of a conversation.
 *
 * @property more what else the template reads of it, as `tool_calls`.
 */
data class Message(val role: String, val content: String, val more: Map<String, JsonElement> = emptyMap()) {
    internal fun toJson() = JsonObject(mapOf("role" to JsonPrimitive(role), "content" to JsonPrimitive(content)) + more)
}

/**
 * One template.
 *
 * @param source Jinja.
 * @param names texts that the template knows by name: `bos_token`, `eos_token`, `pad_token`.
 * @throws BundleError it is not valid, or has something that is not known here; the message says what, and in which line.
 */
class ChatTemplate internal constructor(source: String, private val names: Map<String, String>, private val now: () -> LocalDateTime) {
    constructor(source: String, names: Map<String, String>) : this(source, names, LocalDateTime::now)

    private val body = try {
        Parser(source).parse()
    } catch (e: Unreadable) {
        throw BundleError(
            "the chat template cannot be used: ${e.message}",
            "manifest.json: tokenizer.chat_template",
            "correct it in the source model's tokenizer_config.json and export again",
        )
    }

    /**
     * The text of a conversation.
     *
     * @param tools to tell the model of, in OpenAI's form. A template that knows no tools leaves them out.
     * @param addGenerationPrompt end with what opens the assistant's answer.
     * @throws InvalidInput the template refuses it.
     */
    fun render(messages: List<Message>, tools: List<JsonObject>? = null, addGenerationPrompt: Boolean = true): String =
        render(messages.map { it.toJson() }, tools, addGenerationPrompt)

    @JvmName("renderJson")
    internal fun render(messages: List<JsonObject>, tools: List<JsonObject>?, addGenerationPrompt: Boolean): String {
        val scope = Scope(null)
        functions(now).forEach { (name, function) -> scope[name] = function }
        names.forEach { (name, text) -> scope[name] = text }
        try {
            scope["messages"] = messages.map(::fromJson)
            scope["tools"] = tools?.map(::fromJson)
            scope["documents"] = null
            scope["add_generation_prompt"] = addGenerationPrompt
            return Evaluation(scope).run(body)
        } catch (e: Refused) {
            throw refused(e.message)
        } catch (_: StackOverflowError) {
            throw refused("it goes too deep")
        } catch (_: OutOfMemoryError) {
            throw refused("it takes more memory than there is")
        }
    }

    private fun refused(why: String?) =
        InvalidInput(
            "the chat template refuses these messages: $why",
            "messages",
            "most templates want user and assistant in turn, with an optional system message before them",
        )
}

private fun fromJson(element: JsonElement): Any? =
    when (element) {
        is JsonNull -> null

        is JsonObject -> element.entries.associateTo(LinkedHashMap<Any?, Any?>()) { (key, value) -> key to fromJson(value) }

        is JsonArray -> element.map(::fromJson)

        is JsonPrimitive -> when {
            element.isString -> element.content
            element.content == "true" || element.content == "false" -> element.content == "true"
            element.content.any { it in ".eE" } -> element.content.toDouble()
            else -> element.content.toLongOrNull() ?: throw Refused("${element.content} is too large")
        }
    }

/**
 * Tells the control tokens that a template wrote from text in a message that only looks like them.
 *
 * Such imitations are wrapped into a pair of private-use characters before rendering (as transformers does it, and with the same characters),
 * so that they can be told apart whatever the template does around them.
 */
internal class ControlTokens(texts: Collection<String>) {
    private val either = texts
        .filter {
            it.isNotEmpty()
        }.sortedByDescending { it.length }
        .joinToString("|") { Regex.escape(it) }
        .ifEmpty { "(?!)" }
    private val token = Regex(either)
    private val markedOrToken = Regex("$START(?:$either)$END|($either)")

    /** A copy in which every imitation is marked. Marks that were there before are taken out. */
    fun mark(element: JsonElement): JsonElement =
        when (element) {
            is JsonObject -> JsonObject(element.entries.associate { (key, value) -> mark(key) to mark(value) })
            is JsonArray -> JsonArray(element.map(::mark))
            is JsonPrimitive -> if (element.isString) JsonPrimitive(mark(element.content)) else element
        }

    private fun mark(text: String): String = token.replace(unmark(text)) { "$START${it.value}$END" }

    private fun unmark(text: String): String = text.replace(START, "").replace(END, "")

    /** Cuts at the template's own control tokens: texts without marks, and whether each is such a token. */
    fun split(rendered: String): List<Pair<String, Boolean>> {
        val parts = ArrayList<Pair<String, Boolean>>()
        var start = 0
        for (match in markedOrToken.findAll(rendered)) {
            val own = match.groups[1]?.value ?: continue
            parts += unmark(rendered.substring(start, match.range.first)) to false
            parts += own to true
            start = match.range.last + 1
        }
        parts += unmark(rendered.substring(start)) to false
        return parts
    }

    private companion object {
        val START = String(Character.toChars(0xf0000))
        val END = String(Character.toChars(0xf0001))
    }
}
