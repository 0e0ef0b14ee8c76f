// Tokens that are found in a text before anything else: control tokens, and others that were added to a vocabulary.
package crayon.runtime.tokenizer

import kotlin.math.max

/** A part of a text: a token that was found, or (`id` is null) what lies between. */
internal class Part(val text: String, val id: Int?)

/**
 * Finds tokens as the `tokenizers` library does: the leftmost first, of several there the longest.
 *
 * @param tokens what to look for, and as what it is written in the text.
 */
internal class AddedTokens(tokens: List<Pair<AddedToken, String>>) {
    private val byFirst = tokens
        .filter { it.second.isNotEmpty() }
        .groupBy { it.second.first() }
        .mapValues { (_, same) -> same.sortedByDescending { it.second.length } }

    /** The text in parts; with `skipSpecial`, control tokens are text like any other. */
    fun split(text: String, skipSpecial: Boolean): List<Part> {
        if (byFirst.isEmpty()) return if (text.isEmpty()) emptyList() else listOf(Part(text, null))
        val parts = ArrayList<Part>()
        var done = 0
        var at = 0
        while (at < text.length) {
            val found = byFirst[text[at]]?.firstOrNull { text.startsWith(it.second, at) }
            if (found == null) {
                at++
                continue
            }
            val (token, written) = found
            var start = at
            var end = at + written.length
            at = end
            if (skipSpecial && token.special) continue
            if (token.singleWord && (isWord(text, start - 1) || isWord(text, end))) continue
            if (token.lstrip) while (start > 0 && isSpace(text[start - 1])) start--
            if (token.rstrip) while (end < text.length && isSpace(text[end])) end++
            start = max(start, done)
            if (start > done) parts += Part(text.substring(done, start), null)
            parts += Part(text.substring(start, end), token.id)
            done = end
            at = max(at, end)
        }
        if (done < text.length) parts += Part(text.substring(done), null)
        return parts
    }

    private fun isWord(text: String, at: Int): Boolean = text.getOrNull(at)?.let { it.isLetterOrDigit() || it == '_' } == true

    private fun isSpace(c: Char): Boolean = c.isWhitespace() || c == '\u0085'
}
