/*
 * The values of a template and what Python makes of them: truth, equality, order, and their texts.
 *
 * They are null, Boolean, Long, Double, String, List, Map, and the classes below.
 */
package crayon.runtime.chat

import java.math.BigDecimal
import java.math.MathContext
import java.util.Locale

/** A template refuses what it is given, or asks for something that is not known here. */
internal class Refused(message: String) : Exception(message)

/** What is not there; `what` is its name. It has no text, is false, and holds nothing. */
internal class Undefined(val what: String)

/** What `namespace()` makes: the one value that a template may change. */
internal class Namespace(val values: MutableMap<String, Any?>)

/** A list that is written with parentheses. */
internal class Tuple(private val items: List<Any?>) : AbstractList<Any?>() {
    override val size get() = items.size

    override fun get(index: Int): Any? = items[index]
}

/** A text that was marked `safe`, which matters where texts are escaped; here it can only be written. */
internal class Safe(val text: String)

internal fun interface Callable {
    fun call(arguments: Arguments): Any?
}

/** What a function, a filter or a test was called with. */
internal class Arguments(private val positional: List<Any?>, private val named: Map<String, Any?>) {
    private val taken = HashSet<String>()
    val size get() = positional.size

    /** An argument by its place or its name; `default` if it was not given. */
    operator fun get(index: Int, name: String, default: Any? = null): Any? {
        taken += name
        return if (index in positional.indices) {
            positional[index]
        } else if (name in named) {
            named[name]
        } else {
            default
        }
    }

    fun needed(index: Int, name: String): Any? {
        if (index !in positional.indices && name !in named) throw Refused("the argument '$name' is missing")
        return get(index, name)
    }

    fun from(index: Int): List<Any?> = positional.drop(index)

    fun allNamed(): Map<String, Any?> = named.also { taken += it.keys }

    /** Refuses what nobody has asked for. */
    fun check(most: Int) {
        if (positional.size > most) throw Refused("it takes $most arguments, not ${positional.size}")
        (named.keys - taken).firstOrNull()?.let { throw Refused("it takes no argument '$it'") }
    }
}

/** What Python calls the type of a value. */
internal fun typeName(value: Any?): String =
    when (value) {
        null -> "None"
        is Boolean -> "bool"
        is Long -> "int"
        is Double -> "float"
        is String, is Safe -> "str"
        is Tuple -> "tuple"
        is List<*> -> "list"
        is Map<*, *> -> "dict"
        is Undefined -> "undefined"
        is Namespace -> "namespace"
        else -> "function"
    }

internal fun isTrue(value: Any?): Boolean =
    when (value) {
        null, is Undefined -> false
        is Boolean -> value
        is Long -> value != 0L
        is Double -> value != 0.0
        is String -> value.isNotEmpty()
        is Safe -> value.text.isNotEmpty()
        is List<*> -> value.isNotEmpty()
        is Map<*, *> -> value.isNotEmpty()
        else -> true
    }

/** Long or Double; null: it is no number. */
internal fun number(value: Any?): Number? =
    when (value) {
        is Boolean -> if (value) 1L else 0L
        is Long -> value
        is Double -> value
        else -> null
    }

internal fun areEqual(a: Any?, b: Any?): Boolean {
    val x = number(a)
    val y = number(b)
    return when {
        x != null && y != null -> if (x is Long && y is Long) x == y else x.toDouble() == y.toDouble()
        a is List<*> && b is List<*> -> (a is Tuple) == (b is Tuple) && a.size == b.size && a.indices.all { areEqual(a[it], b[it]) }
        a is Map<*, *> && b is Map<*, *> -> a.size == b.size && a.all { (key, value) -> b.containsKey(key) && areEqual(value, b[key]) }
        a is Undefined || b is Undefined -> a is Undefined && b is Undefined
        a is Safe || b is Safe -> textOf(a) == textOf(b) && typeName(a) == typeName(b)
        else -> a == b
    }
}

/** Negative, 0 or positive; [Refused] if they have no order. */
internal fun compare(a: Any?, b: Any?): Int {
    val x = number(a)
    val y = number(b)
    if (x is Long && y is Long) return x.compareTo(y)
    if (x != null && y != null) return x.toDouble().compareTo(y.toDouble())
    if (a is String && b is String) return compareTexts(a, b)
    if (a is List<*> && b is List<*> && (a is Tuple) == (b is Tuple)) {
        for (i in 0 until minOf(a.size, b.size)) if (!areEqual(a[i], b[i])) return compare(a[i], b[i])
        return a.size.compareTo(b.size)
    }
    throw Refused("${typeName(a)} and ${typeName(b)} have no order")
}

/** By code points, which UTF-16 is not in the order of. */
private fun compareTexts(a: String, b: String): Int {
    val x = a.codePoints().toArray()
    val y = b.codePoints().toArray()
    for (i in 0 until minOf(x.size, y.size)) if (x[i] != y[i]) return x[i].compareTo(y[i])
    return x.size.compareTo(y.size)
}

/** What is in a value, one after the other; [Refused] if nothing can be. */
internal fun items(value: Any?): List<Any?> =
    when (value) {
        is List<*> -> value
        is Map<*, *> -> value.keys.toList()
        is String -> characters(value)
        is Undefined -> emptyList()
        else -> throw Refused("'${typeName(value)}' object is not iterable")
    }

/** Code points, as Python counts. */
internal fun characters(text: String): List<String> = text.codePoints().toArray().map { String(Character.toChars(it)) }

internal fun length(value: Any?): Long =
    when (value) {
        is String -> value.codePointCount(0, value.length).toLong()
        is Safe -> length(value.text)
        is List<*> -> value.size.toLong()
        is Map<*, *> -> value.size.toLong()
        is Undefined -> 0
        else -> throw Refused("object of type '${typeName(value)}' has no len()")
    }

/** As `str(value)`, which is what a template writes. */
internal fun textOf(value: Any?): String =
    when (value) {
        is String -> value
        is Safe -> value.text
        is Undefined -> ""
        else -> repr(value)
    }

internal fun repr(value: Any?): String =
    when (value) {
        null -> "None"
        is Boolean -> if (value) "True" else "False"
        is Long -> value.toString()
        is Double -> floatText(value)
        is String -> quoted(value)
        is Tuple -> value.joinToString(", ", "(", if (value.size == 1) ",)" else ")", transform = ::repr)
        is List<*> -> value.joinToString(", ", "[", "]", transform = ::repr)
        is Map<*, *> -> value.entries.joinToString(", ", "{", "}") { (key, inner) -> "${repr(key)}: ${repr(inner)}" }
        is Undefined -> "Undefined"
        else -> throw Refused("a ${typeName(value)} has no text here")
    }

/** With the fewest digits that are read as the same number. */
internal fun floatText(value: Double): String {
    if (value.isNaN()) return "nan"
    if (value.isInfinite()) return if (value > 0) "inf" else "-inf"
    if (value == 0.0) return if (1 / value < 0) "-0.0" else "0.0"
    val exact = BigDecimal(value)
    val short = (1..17).map { exact.round(MathContext(it)) }.first { it.toDouble() == value }.stripTrailingZeros()
    val digits = short.unscaledValue().abs().toString()
    val exponent = digits.length - short.scale() - 1
    val sign = if (value < 0) "-" else ""
    if (exponent < -4 || exponent >= 16) {
        val fraction = if (digits.length > 1) ".${digits.substring(1)}" else ""
        return "$sign${digits[0]}${fraction}e${if (exponent < 0) '-' else '+'}${Math.abs(exponent).toString().padStart(2, '0')}"
    }
    val plain = short.abs().toPlainString()
    return sign + if ('.' in plain) plain else "$plain.0"
}

private fun quoted(text: String): String {
    val quote = if ('\'' in text && '"' !in text) '"' else '\''
    val out = StringBuilder().append(quote)
    for (code in text.codePoints().toArray()) {
        when {
            code == quote.code || code == '\\'.code -> out.append('\\').appendCodePoint(code)
            code == '\n'.code -> out.append("\\n")
            code == '\r'.code -> out.append("\\r")
            code == '\t'.code -> out.append("\\t")
            code in 0x20..0x7e -> out.appendCodePoint(code)
            isPrintable(code) -> out.appendCodePoint(code)
            code < 0x100 -> out.append("\\x%02x".format(Locale.ROOT, code))
            code < 0x10000 -> out.append("\\u%04x".format(Locale.ROOT, code))
            else -> out.append("\\U%08x".format(Locale.ROOT, code))
        }
    }
    return out.append(quote).toString()
}

private fun isPrintable(code: Int): Boolean =
    when (Character.getType(code).toByte()) {
        Character.CONTROL, Character.FORMAT, Character.SURROGATE, Character.PRIVATE_USE, Character.UNASSIGNED,
        Character.LINE_SEPARATOR, Character.PARAGRAPH_SEPARATOR, Character.SPACE_SEPARATOR,
        -> false

        else -> true
    }

/** As `json.dumps`. */
internal class JsonWriter(
    private val ascii: Boolean,
    private val indent: String?,
    private val comma: String,
    private val colon: String,
    private val sorted: Boolean,
) {
    private val out = StringBuilder()

    fun write(value: Any?): String {
        append(value, "\n")
        return out.toString()
    }

    private fun append(value: Any?, line: String) {
        when (value) {
            null -> {
                out.append("null")
            }

            is Boolean -> {
                out.append(value)
            }

            is Long -> {
                out.append(value)
            }

            is Double -> {
                out.append(
                    if (value.isNaN()) {
                        "NaN"
                    } else if (value.isInfinite()) {
                        (if (value > 0) "Infinity" else "-Infinity")
                    } else {
                        floatText(value)
                    },
                )
            }

            is String -> {
                string(value)
            }

            is Safe -> {
                string(value.text)
            }

            is List<*> -> {
                several(value, '[', ']', line) { item, inner -> append(item, inner) }
            }

            is Map<*, *> -> {
                val entries = if (sorted) value.entries.sortedWith { a, b -> compare(a.key, b.key) } else value.entries.toList()
                several(entries, '{', '}', line) { (key, item), inner ->
                    string(key(key))
                    out.append(colon)
                    append(item, inner)
                }
            }

            else -> {
                throw Refused("Object of type ${typeName(value)} is not JSON serializable")
            }
        }
    }

    private fun <T> several(items: List<T>, open: Char, close: Char, line: String, one: (T, String) -> Unit) {
        out.append(open)
        val inner = if (indent == null) line else line + indent
        items.forEachIndexed { i, item ->
            if (i > 0) out.append(comma)
            if (indent != null) out.append(inner)
            one(item, inner)
        }
        if (indent != null && items.isNotEmpty()) out.append(line)
        out.append(close)
    }

    private fun key(key: Any?): String =
        when (key) {
            is String -> key
            null -> "null"
            is Boolean -> key.toString()
            is Long -> key.toString()
            is Double -> floatText(key)
            else -> throw Refused("keys must be str, int, float, bool or None, not ${typeName(key)}")
        }

    private fun string(text: String) {
        out.append('"')
        for (c in text) {
            when {
                c == '"' || c == '\\' -> out.append('\\').append(c)
                c == '\n' -> out.append("\\n")
                c == '\r' -> out.append("\\r")
                c == '\t' -> out.append("\\t")
                c == '\b' -> out.append("\\b")
                c == '\u000c' -> out.append("\\f")
                c < ' ' || (ascii && c > '~') -> out.append("\\u%04x".format(Locale.ROOT, c.code))
                else -> out.append(c)
            }
        }
        out.append('"')
    }
}
