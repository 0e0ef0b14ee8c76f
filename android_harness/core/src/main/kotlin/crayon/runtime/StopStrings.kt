// Stop strings in streamed text: found across pieces, never shown, and nothing held back that cannot become one.
package crayon.runtime

/**
 * Holds back the end of the text while it may still become a stop string.
 *
 * Where the text is cut does not depend on how it comes in pieces: it stops at the first character that completes a stop string, and of
 * several that it completes the longest counts.
 */
internal class StopStrings(private val strings: List<String>) {
    private var held = ""

    /** The stop string that ended the text. */
    var found: String? = null
        private set

    /** Appends a piece; returns what can be shown. Once `found` is set, that is all there is. */
    fun push(piece: String): String {
        if (strings.isEmpty()) return piece
        val text = held + piece
        val hit = strings
            .mapNotNull { s -> text.indexOf(s).takeIf { it >= 0 }?.let { it to s } }
            .minWithOrNull(compareBy({ it.first + it.second.length }, { it.first }))
        if (hit != null) {
            found = hit.second
            held = ""
            return text.substring(0, hit.first)
        }
        val longest = minOf(text.length, strings.maxOf { it.length } - 1)
        val count = (longest downTo 1).firstOrNull { n -> strings.any { it.startsWith(text.substring(text.length - n)) } } ?: 0
        held = text.takeLast(count)
        return text.dropLast(count)
    }

    /** What was held back, when the text ends without a stop string. */
    fun flush(): String = held.also { held = "" }
}
