// The second step of tokenizing: the words that merges do not cross.
package crayon.runtime.tokenizer

import kotlinx.serialization.json.JsonElement
import java.util.regex.Pattern

/** A part of a text; `first`: nothing of the text comes before it. */
internal class Word(val text: String, val first: Boolean)

private typealias Splitter = (Word) -> List<String>

private val GPT2 = """'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

/** Reads the `pre_tokenizer` of a tokenizer.json. Throws [IllegalArgumentException]: it has a step that nobody here knows. */
internal fun readPreTokenizer(preTokenizer: JsonElement?): (Word) -> List<String> {
    val steps = steps(preTokenizer, "pretokenizers").map(::preTokenizerStep)
    return { word ->
        steps
            .fold(listOf(word)) { words, step ->
                words.flatMap { each -> step(each).mapIndexed { i, text -> Word(text, each.first && i == 0) } }
            }.map { it.text }
    }
}

private fun preTokenizerStep(step: JsonElement): Splitter =
    when (val type = step.type) {
        "Split" -> {
            val pattern = sought(step)
            val behavior = step.string("behavior") ?: "Isolated"
            val invert = step.flag("invert", false);
            { word: Word -> split(word.text, pattern, behavior, invert) }
        }

        "ByteLevel" -> {
            val prefix = step.flag("add_prefix_space", true)
            val pattern = if (step.flag("use_regex", true)) onigPattern(GPT2) else null;
            { word: Word ->
                val text = if (prefix && !word.text.startsWith(" ")) " ${word.text}" else word.text
                val words = if (pattern == null) listOf(text) else split(text, pattern, "Isolated", invert = false)
                words.map(::toByteLevel)
            }
        }

        "Digits" -> {
            val behavior = if (step.flag("individual_digits", false)) "Isolated" else "Contiguous"
            val digit = onigPattern("""\p{N}""");
            { word: Word -> split(word.text, digit, behavior, invert = false) }
        }

        "Metaspace" -> {
            metaspace(step)
        }

        "WhitespaceSplit" -> {
            val space = onigPattern("""\s""");
            { word: Word -> split(word.text, space, "Removed", invert = false) }
        }

        else -> {
            throw IllegalArgumentException("the pre-tokenizer $type is not supported")
        }
    }

private fun metaspace(step: JsonElement): Splitter {
    val mark = step.string("replacement") ?: "\u2581"
    val scheme = step.string("prepend_scheme") ?: "always"
    val splits = step.flag("split", true)
    val pattern = Pattern.compile(Pattern.quote(mark))
    return { word ->
        val marked = word.text.replace(" ", mark)
        val prepends = (scheme == "always" || (scheme == "first" && word.first)) && !marked.startsWith(mark)
        val text = if (prepends) mark + marked else marked
        if (splits) split(text, pattern, "MergedWithNext", invert = false) else listOf(text)
    }
}

/** As `NormalizedString::split` of the `tokenizers` library. */
private fun split(text: String, pattern: Pattern, behavior: String, invert: Boolean): List<String> {
    val parts = ArrayList<Pair<String, Boolean>>()
    val matcher = pattern.matcher(text)
    var end = 0
    while (matcher.find()) {
        if (matcher.start() > end) parts += text.substring(end, matcher.start()) to invert
        if (matcher.end() > matcher.start()) parts += matcher.group() to !invert
        end = matcher.end()
    }
    if (end < text.length) parts += text.substring(end) to invert
    return when (behavior) {
        "Isolated" -> parts.map { it.first }
        "Removed" -> parts.filterNot { it.second }.map { it.first }
        "Contiguous" -> joined(parts) { before, now -> before == now }
        "MergedWithPrevious" -> joined(parts) { before, now -> now && !before }
        "MergedWithNext" -> joined(parts) { before, now -> before && !now }
        else -> throw IllegalArgumentException("the behavior $behavior of a split is not supported")
    }
}

/** Appends a part to the one before it where `joins` says so of the two: whether each is a match. */
private fun joined(parts: List<Pair<String, Boolean>>, joins: (Boolean, Boolean) -> Boolean): List<String> {
    val done = ArrayList<String>()
    parts.forEachIndexed { i, (text, match) ->
        if (i > 0 && joins(parts[i - 1].second, match)) done[done.lastIndex] += text else done += text
    }
    return done
}

private val PRINTABLE = ('!'.code..'~'.code) + ('¡'.code..'¬'.code) + ('®'.code..'ÿ'.code)

/** GPT-2's printable character for each byte: printable Latin-1 stands for itself, the others follow from U+0100 on. */
private val BYTE_LEVEL: CharArray = CharArray(256).also { alphabet ->
    var next = 256
    for (byte in 0..255) alphabet[byte] = (if (byte in PRINTABLE) byte else next++).toChar()
}

private val FROM_BYTE_LEVEL: Map<Char, Byte> = BYTE_LEVEL.indices.associate { BYTE_LEVEL[it] to it.toByte() }

private fun toByteLevel(text: String): String {
    val bytes = text.toByteArray()
    return String(CharArray(bytes.size) { BYTE_LEVEL[bytes[it].toInt() and 0xff] })
}

/** The bytes that a token of a byte-level vocabulary stands for; null: it is not of its alphabet, but an added token. */
internal fun fromByteLevel(token: String): ByteArray? {
    val bytes = token.map { FROM_BYTE_LEVEL[it] ?: return null }
    return bytes.toByteArray()
}
