/*
 * The calls of this project's phone assistant, read strictly.
 *
 * A user's model writes them in that user's convention: `alarm.set(time=7:30 AM, day=monday)`, `{"fn": "set_alarm", "arg_time": "7:30 AM",
 * "arg_day": "monday"}` or `ALs | $te: 7:30 AM | $dy: monday`. An answer is a call only if writing the call again gives the very same text.
 */
package crayon.app.calls

import kotlinx.serialization.SerializationException
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive

/** What this app can do, by canonical name, and the canonical names of its arguments, in order. */
private val FUNCTIONS = mapOf(
    "alarm.set" to listOf("time", "day"),
    "timer.start" to listOf("n", "unit"),
    "message.send" to listOf("to", "body"),
    "music.play" to listOf("genre", "room"),
    "nav.route" to listOf("to", "by"),
    "calendar.add" to listOf("what", "who", "day", "time"),
)
private const val LONGEST = 1000
private const val FUNCTION_KEY = "fn"

/** A call. @property arguments all of the function's, by canonical name. */
data class Call(val function: String, val arguments: Map<String, String>)

/** How functions and arguments are named. */
private enum class Naming {
    CANONICAL,
    VERB,
    SHORT,
    ;

    fun function(name: String): String {
        val (domain, action) = name.split(".")
        return when (this) {
            CANONICAL -> name
            VERB -> "${action}_$domain"
            SHORT -> "${domain.take(2).uppercase()}${action[0]}"
        }
    }

    fun argument(key: String): String =
        when (this) {
            CANONICAL -> key
            VERB -> "arg_$key"
            SHORT -> "$" + key[0] + if (key.length > 1) "${key.last()}" else ""
        }
}

/** How a call is written. */
private enum class Style {
    CALL,
    JSON,
    PAIRS,
    ;

    fun write(name: String, arguments: List<Pair<String, String>>): String =
        when (this) {
            CALL -> arguments.joinToString(", ", "$name(", ")") { (key, value) -> "$key=$value" }

            JSON -> (listOf("\"$FUNCTION_KEY\": \"$name\"") + arguments.map { (key, value) -> "\"$key\": ${quoted(value)}" })
                .joinToString(", ", "{", "}")

            PAIRS -> (listOf(name) + arguments.map { (key, value) -> "$key: $value" }).joinToString(" | ")
        }

    /** A whole number stands in JSON as it is. */
    private fun quoted(value: String) = if (WHOLE.matches(value)) value else "\"$value\""
}

private val WHOLE = Regex("0|[1-9][0-9]{0,17}")
private val PARENTHESES = Regex("""([\w.]+)\((.*)\)""")

/** The call that an answer is; null: it is none, or none that this app knows. */
fun readCall(text: String): Call? {
    if (text.length > LONGEST || text.any { it.isISOControl() }) return null
    val (style, name, pairs) = split(text) ?: return null
    for (naming in Naming.entries) {
        val (function, keys) = FUNCTIONS.entries.find { naming.function(it.key) == name } ?: continue
        if (pairs.map { it.first } != keys.map(naming::argument) || pairs.any { it.second.isBlank() }) continue
        if (style.write(name, pairs) != text) return null
        return Call(function, keys.zip(pairs.map { it.second }).toMap())
    }
    return null
}

private fun split(text: String): Triple<Style, String, List<Pair<String, String>>>? {
    if (text.startsWith("{")) return splitJson(text)
    PARENTHESES.matchEntire(text)?.let { match ->
        val (name, arguments) = match.destructured
        return Triple(Style.CALL, name, arguments.split(", ").map { it.substringBefore('=') to it.substringAfter('=', "") })
    }
    val parts = text.split(" | ")
    return Triple(Style.PAIRS, parts[0], parts.drop(1).map { it.substringBefore(": ") to it.substringAfter(": ", "") })
}

private fun splitJson(text: String): Triple<Style, String, List<Pair<String, String>>>? {
    val raw = try {
        Json.parseToJsonElement(text) as? JsonObject
    } catch (_: SerializationException) {
        null
    }
    val pairs = raw?.entries?.map { (key, value) -> key to ((value as? JsonPrimitive)?.content ?: return null) } ?: return null
    val (key, name) = pairs.firstOrNull() ?: return null
    return if (key == FUNCTION_KEY) Triple(Style.JSON, name, pairs.drop(1)) else null
}
