// Regular expressions of a tokenizer.json, which are Oniguruma's, for the JVM's and for Android's engine.
package crayon.runtime.tokenizer

import java.util.regex.Pattern
import java.util.regex.PatternSyntaxException

/*
 * Oniguruma's classes are Unicode's. The JVM's are ASCII's, unless a flag asks for more, which Android refuses; so they are spelt out.
 */
private val CLASSES = mapOf(
    's' to """\t-\r\x85\p{Z}""",
    'd' to """\p{Nd}""",
    'w' to """\p{L}\p{M}\p{N}\p{Pc}""",
    'h' to """0-9A-Fa-f""",
)

/** Compiles a pattern of a tokenizer.json. Throws [IllegalArgumentException] where the engine does not know what it says. */
internal fun onigPattern(pattern: String): Pattern {
    val written = StringBuilder()
    var depth = 0
    var i = 0
    while (i < pattern.length) {
        val c = pattern[i]
        if (c == '\\' && i + 1 < pattern.length) {
            val escaped = pattern[i + 1]
            val members = CLASSES[escaped.lowercaseChar()]
            when {
                members == null -> written.append(c).append(escaped)
                escaped.isUpperCase() -> written.append("[^").append(members).append(']')
                depth > 0 -> written.append(members)
                else -> written.append('[').append(members).append(']')
            }
            i += 2
            continue
        }
        if (c == '[') depth++
        if (c == ']' && depth > 0) depth--
        written.append(c)
        i++
    }
    try {
        return Pattern.compile(written.toString(), Pattern.UNICODE_CASE)
    } catch (e: PatternSyntaxException) {
        throw IllegalArgumentException("the pattern '$pattern' cannot be read: ${e.description}")
    }
}
