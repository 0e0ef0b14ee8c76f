// What may be sent to a server, and how it is changed before: the user's rules.
package crayon.runtime.routing

import crayon.runtime.InvalidInput
import java.util.regex.PatternSyntaxException

/** What becomes of a query: one of the two is null. */
class Outgoing internal constructor(val query: String?, val why: String?)

/** A pattern, and what takes the place of each match. */
class Redaction(val pattern: String, val replacement: String)

/**
 * What may leave the device. `allow` and `deny` look at the query as the user wrote it; then it is redacted, from the first rule to the last.
 *
 * @param allow patterns, of which one must be found in the query; null: none is asked for. An empty list allows nothing.
 * @param deny patterns, of which none may be found.
 * @param hook called at the end with the redacted query; returns what to send, or null to send nothing. Where it throws, nothing is sent.
 * @throws InvalidInput a pattern is no regular expression.
 */
class Rules(
    allow: List<String>? = null,
    deny: List<String> = emptyList(),
    redact: List<Redaction> = emptyList(),
    private val hook: (String) -> String? = { it },
) {
    private val allow = allow?.map { compiled(it, "allow") }
    private val deny = deny.map { compiled(it, "deny") }
    private val redact = redact.map { compiled(it.pattern, "redact") to it.replacement }

    /** What may be sent of a query. It never throws. */
    fun outgoing(query: String): Outgoing {
        deny.firstOrNull { it.containsMatchIn(query) }?.let { return Outgoing(null, "the rules deny what matches ${it.pattern.take(60)}") }
        if (allow != null && allow.none { it.containsMatchIn(query) }) return Outgoing(null, "the rules allow nothing of this kind")
        return try {
            val redacted = redact.fold(query) { text, (pattern, replacement) -> pattern.replace(text, replacement) }
            val hooked = hook(redacted)
            when {
                hooked == null -> Outgoing(null, "the hook forbids it")
                hooked.isBlank() -> Outgoing(null, "the rules leave nothing of the query")
                else -> Outgoing(hooked, null)
            }
        } catch (e: Exception) {
            // whatever goes wrong, nothing may be sent
            Outgoing(null, "the rules failed with ${e.javaClass.simpleName}")
        }
    }

    private fun compiled(pattern: String, name: String): Regex =
        try {
            Regex(pattern)
        } catch (e: PatternSyntaxException) {
            throw InvalidInput("this is not a regular expression: ${e.description}", name)
        }
}
