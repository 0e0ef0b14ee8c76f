/*
 * Text to token ids and back, also one token at a time.
 *
 * A bundle carries a tokenizer.json. Python has the `tokenizers` library read it; here is a reader of what bundles hold: BPE, over characters
 * with byte tokens (LLaMA, sentencepiece) or over bytes (GPT-2, Llama 3), with the same ids. What it does not know it refuses.
 *
 * Decoding follows UTF-8 alone: only invalid bytes become U+FFFD, and a stream and `decode` always agree.
 */
package crayon.runtime.tokenizer

import crayon.runtime.BundleError
import crayon.runtime.InvalidInput
import crayon.runtime.Malformed
import crayon.runtime.TokenizerInfo
import crayon.runtime.bundle.Bundle
import crayon.runtime.chat.ChatTemplate
import crayon.runtime.chat.ControlTokens
import crayon.runtime.chat.Message
import crayon.runtime.decodeJson
import kotlinx.serialization.json.JsonObject
import java.io.IOException
import java.nio.file.Path
import java.util.concurrent.ConcurrentHashMap
import kotlin.io.path.readBytes

/**
 * The tokenizer of a bundle. Any number of threads may use it.
 *
 * @param info what the manifest says about it.
 * @param path its tokenizer.json.
 * @throws BundleError the file is not a tokenizer, or of a kind that is not supported; the message names what.
 */
class Tokenizer(val info: TokenizerInfo, path: Path) {
    private val normalize: (String) -> String
    private val preTokenize: (Word) -> List<String>
    private val decodeTokens: (List<String>) -> String
    private val decoders: Set<String>
    private val bpe: Bpe
    private val names: Array<String?>
    private val raw: AddedTokens
    private val normalized: AddedTokens
    private val bytes = ConcurrentHashMap<Int, ByteArray>()

    private val controlIds: Map<String, Int>
    private val control by lazy { ControlTokens(controlIds.keys) }
    private val template by lazy { chatTemplate() }

    /** Ids of the control tokens. */
    val specialIds: Set<Int>
    val hasChatTemplate: Boolean get() = info.chatTemplate != null

    init {
        val document = read(path)
        try {
            normalize = readNormalizer(document.normalizer)
            preTokenize = readPreTokenizer(document.preTokenizer)
            decodeTokens = readDecoder(document.decoder)
            decoders = decoderTypes(document.decoder)
            bpe = Bpe(document.model)
            names = names(document)
        } catch (e: IllegalArgumentException) {
            throw BundleError("this tokenizer cannot be used: ${e.message}", path, "export the bundle again")
        } catch (e: NoSuchElementException) {
            throw BundleError("this tokenizer lacks a part: ${e.message}", path, "export the bundle again")
        }
        val added = withControlTokens(document.addedTokens)
        controlIds = added.filter { it.special }.associate { it.content to it.id }
        specialIds = controlIds.values.toSet()
        raw = AddedTokens(added.filter { !it.normalized }.map { it to it.content })
        normalized = AddedTokens(added.filter { it.normalized }.map { it to normalize(it.content) })
    }

    /**
     * The token ids of a text.
     *
     * @param addBos start with the bos token, if this model wants one.
     * @param parseSpecial read the text of control tokens (`</s>`) as those tokens. Never do that with text of others.
     * @throws InvalidInput the text is not valid Unicode.
     */
    fun encode(text: String, addBos: Boolean = true, parseSpecial: Boolean = false): List<Int> {
        checkUnicode(text)
        val ids = ArrayList<Int>()
        var first = true
        for (part in raw.split(text, skipSpecial = !parseSpecial)) {
            if (part.id != null) {
                ids += part.id
            } else {
                for (inner in normalized.split(normalize(part.text), skipSpecial = !parseSpecial)) {
                    if (inner.id != null) ids += inner.id else preTokenize(Word(inner.text, first)).forEach { bpe.encode(it, ids) }
                    first = false
                }
            }
            first = false
        }
        val bos = info.bos
        if (addBos && info.addBos && bos != null && ids.firstOrNull() != bos) ids.add(0, bos)
        return ids
    }

    /**
     * The token ids of a conversation, bos included where the template writes it.
     *
     * Text in a message that imitates a control token is encoded as the plain text that it is.
     *
     * @param tools to tell the model of, in OpenAI's form. A template that knows no tools leaves them out.
     * @param addGenerationPrompt end with what opens the assistant's answer.
     * @throws InvalidInput there is no template, or it refuses these messages.
     * @throws BundleError the template cannot be used.
     */
    fun applyChatTemplate(messages: List<Message>, tools: List<JsonObject>? = null, addGenerationPrompt: Boolean = true): List<Int> {
        if (messages.isEmpty()) throw InvalidInput("there are no messages", "messages", "give at least one")
        val given = messages.map { it.toJson() }
        val marked = given.map { control.mark(it) as JsonObject }
        val markedTools = tools?.map { control.mark(it) as JsonObject }
        val text = template.render(marked, markedTools, addGenerationPrompt)
        // Where nothing imitates anything, the tokenizer knows best how to split.
        if (marked == given && markedTools == tools) return encode(text, addBos = false, parseSpecial = true)
        return control.split(text).flatMap { (piece, isToken) ->
            if (isToken) listOf(controlIds.getValue(piece)) else encode(piece, addBos = false)
        }
    }

    private fun chatTemplate(): ChatTemplate {
        val source = info.chatTemplate ?: throw InvalidInput(
            "this bundle has no chat template",
            advice = "give the prompt as text, or export from a model whose tokenizer_config.json has a chat_template",
        )
        val ids = mapOf("bos_token" to info.bos, "eos_token" to info.eos.firstOrNull(), "pad_token" to info.pad)
        return ChatTemplate(source, ids.filterValues { it != null }.mapValues { (_, id) -> names.getOrNull(id!!).orEmpty() })
    }

    /** The text of token ids; invalid UTF-8 becomes U+FFFD. Ids that the tokenizer does not know have no text. */
    fun decode(ids: Iterable<Int>, skipSpecial: Boolean = true): String {
        val stream = StreamDecoder(this, skipSpecial)
        return ids.joinToString("") { stream.push(it) } + stream.flush()
    }

    /** The UTF-8 bytes that a token stands for; at the start of a text (`first`) some tokenizers drop a space. */
    internal fun tokenBytes(token: Int, first: Boolean): ByteArray {
        if (first) return compute(token, true)
        return bytes.getOrPut(token) { compute(token, false) }
    }

    private fun compute(token: Int, first: Boolean): ByteArray {
        val name = names.getOrNull(token) ?: return ByteArray(0)
        if ("ByteLevel" in decoders) return fromByteLevel(name) ?: name.toByteArray()
        val byte = byteOf(name)
        if (byte != null && byte >= 0x80 && "ByteFallback" in decoders) return byteArrayOf(byte.toByte())
        val alone = decodeTokens(listOf(name))
        // What the token adds after another one: here after itself.
        return (if (first) alone else decodeTokens(listOf(name, name)).substring(alone.length)).toByteArray()
    }

    /** With bos, eos and pad, which are control tokens whatever the file says. */
    private fun withControlTokens(added: List<AddedToken>): List<AddedToken> {
        val control = (listOfNotNull(info.bos, info.pad) + info.eos).toSet()
        val known = added.map { if (it.id in control) it.copy(special = true) else it }
        val more = control.filter { id -> known.none { it.id == id } }.mapNotNull { id ->
            names.getOrNull(id)?.let { AddedToken(id, it, normalized = false, special = true) }
        }
        return known + more
    }

    private companion object {
        private fun read(path: Path): Document =
            try {
                decodeJson(Document.serializer(), path.readBytes())
            } catch (e: IOException) {
                throw BundleError("the tokenizer cannot be read: ${e.message}", path, "fetch the bundle again", e)
            } catch (e: Malformed) {
                throw BundleError("not a readable tokenizer.json: ${e.problem}", path, "export the bundle again")
            }

        private fun names(document: Document): Array<String?> {
            val ids = document.model.vocab.values + document.addedTokens.map { it.id }
            require(ids.isNotEmpty() && ids.min() >= 0 && ids.max() < MOST_TOKENS) { "its token ids are not from 0 on" }
            val names = arrayOfNulls<String>(ids.max() + 1)
            for ((token, id) in document.model.vocab) names[id] = token
            for (token in document.addedTokens) names[token.id] = token.content
            return names
        }

        private const val MOST_TOKENS = 1 shl 24
    }
}

/** The tokenizer of a model. */
fun Tokenizer(bundle: Bundle): Tokenizer = bundle.model.tokenizer.let { Tokenizer(it, bundle.file(it.file)) }

private fun checkUnicode(text: String) {
    val lone = text.indices.firstOrNull { i ->
        (text[i].isHighSurrogate() && text.getOrNull(i + 1)?.isLowSurrogate() != true) ||
            (text[i].isLowSurrogate() && text.getOrNull(i - 1)?.isHighSurrogate() != true)
    } ?: return
    throw InvalidInput("the text is not valid Unicode: character $lone is a lone surrogate", "prompt", "cut it between characters")
}
