// The last step the other way round: from the names of tokens to text.
package crayon.runtime.tokenizer

import kotlinx.serialization.json.JsonElement

private typealias Step = (List<String>) -> List<String>

private val BYTE_TOKEN = Regex("<0x([0-9A-Fa-f]{2})>")

/** The byte that a token like `<0x0A>` stands for. */
internal fun byteOf(token: String): Int? =
    BYTE_TOKEN
        .matchEntire(token)
        ?.groupValues
        ?.get(1)
        ?.toInt(16)

/** Reads the `decoder` of a tokenizer.json. Throws [IllegalArgumentException]: it has a step that nobody here knows. */
internal fun readDecoder(decoder: JsonElement?): (List<String>) -> String {
    val steps = steps(decoder, "decoders").map(::decoderStep)
    if (steps.isEmpty()) return { it.joinToString(" ") }
    return { tokens -> steps.fold(tokens) { done, step -> step(done) }.joinToString("") }
}

/** The steps of a decoder, by type. */
internal fun decoderTypes(decoder: JsonElement?): Set<String> = steps(decoder, "decoders").mapNotNull { it.type }.toSet()

private fun decoderStep(step: JsonElement): Step =
    when (val type = step.type) {
        "Replace" -> {
            val replace = replacing(step);
            { tokens: List<String> -> tokens.map(replace) }
        }

        "ByteFallback" -> {
            ::byteFallback
        }

        "Fuse" -> {
            { tokens: List<String> -> listOf(tokens.joinToString("")) }
        }

        "Strip" -> {
            val content = step.string("content").orEmpty()
            val start = step.number("start")
            val stop = step.number("stop");
            { tokens: List<String> -> tokens.map { strip(it, content, start, stop) } }
        }

        "Metaspace" -> {
            val mark = step.string("replacement") ?: "\u2581"
            val drops = (step.string("prepend_scheme") ?: "always") != "never";
            { tokens: List<String> -> tokens.mapIndexed { i, token -> token.replace(mark, if (i == 0 && drops) "" else " ") } }
        }

        // `Tokenizer` takes the bytes of such tokens from their alphabet.
        "ByteLevel" -> {
            { tokens: List<String> -> tokens }
        }

        else -> {
            throw IllegalArgumentException("the decoder $type is not supported")
        }
    }

/** A run of byte tokens becomes the text that it is in UTF-8, or U+FFFD for each. */
private fun byteFallback(tokens: List<String>): List<String> {
    val done = ArrayList<String>()
    val run = ArrayList<Byte>()

    fun endRun() {
        if (run.isEmpty()) return
        val text = runCatching { run.toByteArray().decodeToString(throwOnInvalidSequence = true) }
        done += text.getOrElse { "\ufffd".repeat(run.size) }
        run.clear()
    }
    for (token in tokens) {
        val byte = byteOf(token)
        if (byte != null) {
            run += byte.toByte()
        } else {
            endRun()
            done += token
        }
    }
    endRun()
    return done
}

private fun strip(token: String, content: String, start: Int, stop: Int): String {
    var from = 0
    var to = token.length
    repeat(start) { if (content.isNotEmpty() && token.startsWith(content, from)) from += content.length }
    repeat(stop) {
        if (content.isNotEmpty() && to - content.length >= from &&
            token.startsWith(content, to - content.length)
        ) {
            to -= content.length
        }
    }
    return token.substring(from, to)
}
