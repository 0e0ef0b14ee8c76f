// The filters, tests, methods and functions that chat templates use, as Jinja and Python have them.
package crayon.runtime.chat

import java.time.LocalDateTime
import java.time.format.TextStyle
import java.util.Locale

internal val FILTERS: Map<String, (Any?, Arguments) -> Any?> = buildMap {
    fun filter(vararg names: String, most: Int = 0, run: (Any?, Arguments) -> Any?) {
        for (name in names) put(name) { value, arguments -> run(value, arguments).also { arguments.check(most) } }
    }
    filter("trim", most = 1) { value, a -> stripped(plain(value), a[0, "chars"], start = true, end = true) }
    filter("upper") { value, _ -> plain(value).uppercase(Locale.ROOT) }
    filter("lower") { value, _ -> plain(value).lowercase(Locale.ROOT) }
    filter("capitalize") { value, _ -> capitalized(plain(value)) }
    filter("title") { value, _ -> Regex("""[^-\s({\[<]+""").replace(plain(value)) { capitalized(it.value) } }
    filter("string") { value, _ -> value as? Safe ?: textOf(value) }
    filter("safe") { value, _ -> Safe(textOf(value)) }
    filter("length", "count") { value, _ -> length(value) }
    filter("list") { value, _ -> items(value).toList() }
    filter("first") { value, _ -> items(value).let { if (it.isEmpty()) Undefined("the first item of nothing") else it.first() } }
    filter("last") { value, _ -> items(value).let { if (it.isEmpty()) Undefined("the last item of nothing") else it.last() } }
    filter("reverse") { value, _ -> if (value is String) characters(value).reversed().joinToString("") else items(value).reversed() }
    filter("abs") { value, _ ->
        when (val number = number(value)) {
            is Long -> Math.abs(number)
            is Double -> Math.abs(number)
            else -> throw Refused("bad operand type for abs(): '${typeName(value)}'")
        }
    }
    filter("int", most = 1) { value, a -> integer(value) ?: a[0, "default", 0L] }
    filter("float", most = 1) { value, a -> (number(value) ?: (value as? String)?.let(::float))?.toDouble() ?: a[0, "default", 0.0] }
    filter("default", "d", most = 2) { value, a ->
        val default = a[0, "default_value", ""]
        if (value is Undefined || (isTrue(a[1, "boolean", false]) && !isTrue(value))) default else value
    }
    filter("join", most = 2) { value, a ->
        val attribute = a[1, "attribute"]
        items(value).joinToString(textOf(a[0, "d", ""])) { textOf(if (attribute == null) it else path(it, attribute)) }
    }
    filter("replace", most = 3) { value, a -> replaced(plain(value), plain(a.needed(0, "old")), plain(a.needed(1, "new")), a[2, "count"]) }
    filter("items") { value, _ ->
        when (value) {
            is Undefined -> emptyList<Any?>()
            is Map<*, *> -> pairs(value)
            else -> throw Refused("Can only get item pairs from a mapping.")
        }
    }
    filter("dictsort", most = 3) { value, a ->
        if (value !is Map<*, *>) throw Refused("'${typeName(value)}' cannot be sorted as a dict")
        val sensitive = isTrue(a[0, "case_sensitive", false])
        val by = if (a[1, "by", "key"] == "value") 1 else 0
        sorted(pairs(value), isTrue(a[2, "reverse", false])) { folded((it as Tuple)[by], sensitive) }
    }
    filter("sort", most = 3) { value, a ->
        val reverse = isTrue(a[0, "reverse", false])
        val sensitive = isTrue(a[1, "case_sensitive", false])
        val attribute = a[2, "attribute"]
        sorted(items(value), reverse) { folded(if (attribute == null) it else path(it, attribute), sensitive) }
    }
    filter("unique", most = 2) { value, a ->
        val sensitive = isTrue(a[0, "case_sensitive", false])
        val attribute = a[1, "attribute"]
        val seen = ArrayList<Any?>()
        items(value).filter { item ->
            val key = folded(if (attribute == null) item else path(item, attribute), sensitive)
            seen.none { areEqual(it, key) }.also { if (it) seen += key }
        }
    }
    filter("map", most = Int.MAX_VALUE) { value, a ->
        val attribute = a[Int.MAX_VALUE, "attribute"]
        if (attribute != null) {
            val default = a[Int.MAX_VALUE, "default", Undefined("$attribute")]
            items(value).map { item -> path(item, attribute).let { if (it is Undefined) default else it } }
        } else {
            val name = textOf(a.needed(0, "filter"))
            val run = FILTERS[name] ?: throw Refused("No filter named '$name'.")
            items(value).map { run(it, Arguments(a.from(1), a.allNamed())) }
        }
    }
    for ((name, kept) in listOf("select" to true, "reject" to false)) {
        filter(name, most = Int.MAX_VALUE) { value, a -> items(value).filter { selected(it, a, 0) == kept } }
        filter("${name}attr", most = Int.MAX_VALUE) { value, a ->
            items(value).filter { selected(path(it, a.needed(0, "attribute")), a, 1) == kept }
        }
    }
    filter(
        "indent",
        most = 3,
    ) { value, a -> indented(plain(value), a[0, "width", 4L], isTrue(a[1, "first", false]), isTrue(a[2, "blank", false])) }
    filter("tojson", most = 1) { value, a ->
        val ascii = isTrue(a[0, "ensure_ascii", false])
        val indent = when (val given = a[9, "indent"]) {
            null -> null
            is String -> given
            else -> " ".repeat((number(given) as? Long ?: throw Refused("an indent is a whole number")).coerceIn(0, 100).toInt())
        }
        val separators = a[9, "separators"]?.let { items(it).map(::textOf) } ?: listOf(if (indent == null) ", " else ",", ": ")
        if (separators.size != 2) throw Refused("there are two separators")
        JsonWriter(ascii, indent, separators[0], separators[1], isTrue(a[9, "sort_keys", false])).write(value)
    }
}

internal val TESTS: Map<String, (Any?, Arguments) -> Boolean> = buildMap {
    fun test(vararg names: String, most: Int = 0, run: (Any?, Arguments) -> Boolean) {
        for (name in names) put(name) { value, arguments -> run(value, arguments).also { arguments.check(most) } }
    }
    test("defined") { value, _ -> value !is Undefined }
    test("undefined") { value, _ -> value is Undefined }
    test("none") { value, _ -> value == null }
    test("boolean") { value, _ -> value is Boolean }
    test("true") { value, _ -> value == true }
    test("false") { value, _ -> value == false }
    test("integer") { value, _ -> value is Long }
    test("float") { value, _ -> value is Double }
    test("number") { value, _ -> number(value) != null }
    test("string") { value, _ -> value is String || value is Safe }
    test("mapping") { value, _ -> value is Map<*, *> }
    test("sequence") { value, _ -> value is String || value is Safe || value is List<*> || value is Map<*, *> || value is Undefined }
    test("iterable") { value, _ -> value is String || value is Safe || value is List<*> || value is Map<*, *> || value is Undefined }
    test("callable") { value, _ -> value is Callable }
    test("odd") { value, _ -> arithmetic("%", value, 2L) == 1L }
    test("even") { value, _ -> arithmetic("%", value, 2L) == 0L }
    test("divisibleby", most = 1) { value, a -> arithmetic("%", value, a.needed(0, "num")) == 0L }
    test("lower") { value, _ -> isCased(textOf(value)) { Character.isLowerCase(it) } }
    test("upper") { value, _ -> isCased(textOf(value)) { Character.isUpperCase(it) } }
    test("in", most = 1) { value, a -> contains(a.needed(0, "seq"), value) }
    test("eq", "equalto", "==", most = 1) { value, a -> areEqual(value, a.needed(0, "other")) }
    test("ne", "!=", most = 1) { value, a -> !areEqual(value, a.needed(0, "other")) }
    test("lt", "lessthan", "<", most = 1) { value, a -> compare(value, a.needed(0, "other")) < 0 }
    test("le", "<=", most = 1) { value, a -> compare(value, a.needed(0, "other")) <= 0 }
    test("gt", "greaterthan", ">", most = 1) { value, a -> compare(value, a.needed(0, "other")) > 0 }
    test("ge", ">=", most = 1) { value, a -> compare(value, a.needed(0, "other")) >= 0 }
}

internal fun test(name: String, value: Any?, arguments: Arguments): Boolean = TESTS.getValue(name)(value, arguments)

/** What a template knows besides what it is given. */
internal fun functions(now: () -> LocalDateTime): Map<String, Callable> =
    mapOf(
        "raise_exception" to Callable { throw Refused(textOf(it.needed(0, "message"))) },
        "strftime_now" to Callable { formatted(now(), plain(it.needed(0, "format"))) },
        "namespace" to Callable { a ->
            val from = if (a.size >
                0
            ) {
                a[0, "from"] as? Map<*, *> ?: throw Refused("a namespace is made of a dict")
            } else {
                emptyMap<Any, Any>()
            }
            Namespace((from.mapKeys { textOf(it.key) } + a.allNamed()).toMutableMap())
        },
        "dict" to Callable { a ->
            val from = if (a.size >
                0
            ) {
                a[0, "from"] as? Map<*, *> ?: throw Refused("a dict is made of a dict here")
            } else {
                emptyMap<Any, Any>()
            }
            LinkedHashMap<Any?, Any?>(from).apply { putAll(a.allNamed()) }.also { a.check(1) }
        },
        "range" to Callable { a ->
            val numbers = a.from(0).map { number(it) as? Long ?: throw Refused("range() takes integers") }
            a.check(3)
            val (start, stop) = if (numbers.size == 1) listOf(0L, numbers[0]) else numbers
            val step = numbers.getOrElse(2) { 1L }
            val range = if (step >
                0
            ) {
                start until stop step step
            } else if (step < 0) {
                start downTo stop + 1 step -step
            } else {
                throw Refused("range() of step 0")
            }
            if (stop - start > MOST_RANGE || start - stop > MOST_RANGE) throw Refused("range too big")
            range.toList()
        },
    )

private const val MOST_RANGE = 100_000

/** A method of a value's type; null: the type has none of this name. [Refused]: it has one that is not known here. */
internal fun method(value: Any?, name: String): Callable? =
    when (value) {
        is String -> if (name in TEXT_METHODS) Callable { a -> textMethod(value, name, a) } else unknown(value, name, OTHER_TEXT_METHODS)

        is Map<*, *> -> when (name) {
            "items" -> Callable { pairs(value) }
            "keys" -> Callable { value.keys.toList() }
            "values" -> Callable { value.values.toList() }
            "get" -> Callable { a -> a.needed(0, "key").let { if (value.containsKey(it)) value[it] else a[1, "default"] } }
            else -> unknown(value, name, OTHER_DICT_METHODS)
        }

        is List<*> -> when (name) {
            "index" -> Callable { a ->
                value.indexOfFirst { areEqual(it, a.needed(0, "value")) }.toLong().also {
                    if (it <
                        0
                    ) {
                        throw Refused("it is not in list")
                    }
                }
            }

            "count" -> Callable { a -> value.count { areEqual(it, a.needed(0, "value")) }.toLong() }

            else -> unknown(value, name, OTHER_LIST_METHODS)
        }

        is Safe -> throw Refused("methods of a text that was marked safe are not known here")

        else -> null
    }

private val TEXT_METHODS = setOf(
    "strip",
    "lstrip",
    "rstrip",
    "split",
    "rsplit",
    "splitlines",
    "upper",
    "lower",
    "title",
    "capitalize",
    "startswith",
    "endswith",
    "replace",
    "find",
    "rfind",
    "index",
    "count",
    "join",
    "removeprefix",
    "removesuffix",
    "isspace",
    "isdigit",
)
private val OTHER_TEXT_METHODS = setOf(
    "casefold",
    "center",
    "encode",
    "expandtabs",
    "format",
    "format_map",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "istitle",
    "isupper",
    "ljust",
    "maketrans",
    "partition",
    "rindex",
    "rjust",
    "rpartition",
    "swapcase",
    "translate",
    "zfill",
)
private val OTHER_DICT_METHODS = setOf("clear", "copy", "fromkeys", "pop", "popitem", "setdefault", "update")
private val OTHER_LIST_METHODS = setOf("append", "clear", "copy", "extend", "insert", "pop", "remove", "reverse", "sort")

private fun unknown(value: Any, name: String, others: Set<String>): Callable? =
    if (name in others) throw Refused("'$name' of a ${typeName(value)} is not allowed, or not known here") else null

private fun textMethod(text: String, name: String, a: Arguments): Any? =
    when (name) {
        "strip" -> stripped(text, a[0, "chars"], start = true, end = true)
        "lstrip" -> stripped(text, a[0, "chars"], start = true, end = false)
        "rstrip" -> stripped(text, a[0, "chars"], start = false, end = true)
        "split" -> split(text, a[0, "sep"], a[1, "maxsplit", -1L], fromRight = false)
        "rsplit" -> split(text, a[0, "sep"], a[1, "maxsplit", -1L], fromRight = true)
        "splitlines" -> lines(text, isTrue(a[0, "keepends", false]))
        "upper" -> text.uppercase(Locale.ROOT)
        "lower" -> text.lowercase(Locale.ROOT)
        "title" -> Regex("""\p{L}+""").replace(text) { capitalized(it.value) }
        "capitalize" -> capitalized(text)
        "startswith" -> choices(a.needed(0, "prefix")).any { text.startsWith(it) }
        "endswith" -> choices(a.needed(0, "suffix")).any { text.endsWith(it) }
        "replace" -> replaced(text, plain(a.needed(0, "old")), plain(a.needed(1, "new")), a[2, "count"])
        "find" -> place(text, text.indexOf(plain(a.needed(0, "sub"))))
        "rfind" -> place(text, text.lastIndexOf(plain(a.needed(0, "sub"))))
        "index" -> place(text, text.indexOf(plain(a.needed(0, "sub")))).also { if (it < 0) throw Refused("substring not found") }
        "count" -> occurrences(text, plain(a.needed(0, "sub")))
        "join" -> items(a.needed(0, "iterable")).joinToString(text) { plain(it) }
        "removeprefix" -> text.removePrefix(plain(a.needed(0, "prefix")))
        "removesuffix" -> text.removeSuffix(plain(a.needed(0, "suffix")))
        "isspace" -> text.isNotEmpty() && text.all(::isSpace)
        else -> text.isNotEmpty() && text.all { it.isDigit() }
    }.also { a.check(3) }

private fun choices(value: Any?): List<String> = if (value is Tuple) value.map(::plain) else listOf(plain(value))

private fun place(text: String, index: Int): Long = if (index < 0) -1 else text.codePointCount(0, index).toLong()

private fun occurrences(text: String, part: String): Long = if (part.isEmpty()) length(text) + 1 else text.split(part).size - 1L

/** A value as the text that it has to be; what is not there is an empty one, as Jinja has it. */
private fun plain(value: Any?): String =
    when (value) {
        is String -> value
        is Undefined -> ""
        is Safe -> throw Refused("a text that was marked safe can only be written here")
        null, is Boolean, is Long, is Double, is List<*>, is Map<*, *> -> textOf(value)
        else -> throw Refused("a ${typeName(value)} is no text")
    }

private fun stripped(text: String, characters: Any?, start: Boolean, end: Boolean): String {
    val drop: (Char) -> Boolean = if (characters == null) ::isSpace else plain(characters).let { set -> { it in set } }
    val begun = if (start) text.trimStart(drop) else text
    return if (end) begun.trimEnd(drop) else begun
}

private fun split(text: String, separator: Any?, most: Any?, fromRight: Boolean): List<String> {
    val limit = (number(most) as? Long ?: throw Refused("maxsplit is a whole number")).let {
        if (it <
            0
        ) {
            Int.MAX_VALUE
        } else {
            it.coerceAtMost(Int.MAX_VALUE - 1L).toInt()
        }
    }
    if (separator == null) {
        if (limit != Int.MAX_VALUE) throw Refused("maxsplit without a separator is not known here")
        return text.split(Regex("[" + SPACES + "]+")).filter { it.isNotEmpty() }
    }
    val by = plain(separator)
    if (by.isEmpty()) throw Refused("empty separator")
    val parts = text.split(by)
    if (parts.size - 1 <= limit) return parts
    return if (fromRight) {
        listOf(parts.dropLast(limit).joinToString(by)) + parts.takeLast(limit)
    } else {
        parts.take(limit) + parts.drop(limit).joinToString(by)
    }
}

private val SPACES = (Char.MIN_VALUE..'\u3000').filter(::isSpace).joinToString("") { "\\u%04x".format(Locale.ROOT, it.code) }

private fun lines(text: String, keepEnds: Boolean): List<String> {
    val found = ArrayList<String>()
    var start = 0
    var i = 0
    while (i < text.length) {
        val c = text[i]
        if (c !in '\n'..'\r' && c !in '\u001c'..'\u001e' && c != '\u0085' && c != '\u2028' && c != '\u2029') {
            i++
            continue
        }
        val end = if (c == '\r' && text.getOrNull(i + 1) == '\n') i + 2 else i + 1
        found += text.substring(start, if (keepEnds) end else i)
        start = end
        i = end
    }
    if (start < text.length) found += text.substring(start)
    return found
}

private fun indented(text: String, width: Any?, first: Boolean, blank: Boolean): String {
    val by = if (width is String) {
        width
    } else {
        " ".repeat(
            (number(width) as? Long ?: throw Refused("a width is a whole number")).coerceIn(0, 1000).toInt(),
        )
    }
    val lines = lines("$text\n", keepEnds = false)
    val rest = lines.drop(1).joinToString("") { "\n" + if (blank || it.isNotEmpty()) by + it else it }
    return (if (first) by else "") + lines[0] + rest
}

private fun replaced(text: String, old: String, new: String, count: Any?): String {
    val most = count?.let { number(it) as? Long ?: throw Refused("a count is a whole number") } ?: -1
    if (most < 0) return if (old.isEmpty()) throw Refused("replacing nothing is not known here") else text.replace(old, new)
    val parts = text.split(old)
    return parts.foldIndexed("") { i, done, part -> if (i == 0) part else done + (if (i <= most) new else old) + part }
}

private fun capitalized(text: String): String {
    if (text.isEmpty()) return text
    val first = text.offsetByCodePoints(0, 1)
    return text.substring(0, first).uppercase(Locale.ROOT) + text.substring(first).lowercase(Locale.ROOT)
}

private fun isCased(text: String, holds: (Int) -> Boolean): Boolean {
    val cased = text.codePoints().toArray().filter { Character.isLowerCase(it) || Character.isUpperCase(it) || Character.isTitleCase(it) }
    return cased.isNotEmpty() && cased.all(holds)
}

private fun integer(value: Any?): Long? =
    when (val number = number(value) ?: (value as? String)?.trim(::isSpace)?.let { it.toLongOrNull() ?: float(it) }) {
        is Long -> number
        is Double -> if (number.isFinite() && Math.abs(number) < 1e18) number.toLong() else null
        else -> null
    }

private fun float(text: String): Double? =
    text.trim(::isSpace).takeIf { Regex("""[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?""").matches(it) }?.toDouble()

private fun pairs(map: Map<*, *>): List<Any?> = map.entries.map { Tuple(listOf(it.key, it.value)) }

private fun folded(value: Any?, sensitive: Boolean): Any? = if (value is String && !sensitive) value.lowercase(Locale.ROOT) else value

private fun sorted(items: List<Any?>, reverse: Boolean, key: (Any?) -> Any?): List<Any?> {
    val order = Comparator<Pair<Any?, Any?>> { a, b -> compare(a.first, b.first) }
    return items.map { key(it) to it }.sortedWith(if (reverse) order.reversed() else order).map { it.second }
}

/** `a.b.0` of a value. */
private fun path(value: Any?, attribute: Any?): Any? {
    if (attribute is Long) return item(value, attribute)
    return textOf(attribute).split('.').fold(value) { of, part -> item(of, part.toLongOrNull() ?: part) }
}

private fun selected(value: Any?, a: Arguments, from: Int): Boolean {
    if (a.size <= from) return isTrue(value)
    val name = textOf(a.from(from)[0])
    val run = TESTS[name] ?: throw Refused("No test named '$name'.")
    return run(value, Arguments(a.from(from + 1), a.allNamed()))
}

private fun formatted(time: LocalDateTime, format: String): String {
    val out = StringBuilder()
    var i = 0
    while (i < format.length) {
        val c = format[i++]
        if (c != '%') {
            out.append(c)
            continue
        }
        out.append(directive(time, format.getOrNull(i++) ?: throw Refused("a date's form ends with %")))
    }
    return out.toString()
}

/** In English, as Python has it without a locale. */
private fun directive(time: LocalDateTime, directive: Char): String {
    fun padded(number: Int, digits: Int = 2) = number.toString().padStart(digits, '0')
    return when (directive) {
        'Y' -> "${time.year}"
        'y' -> padded(time.year % 100)
        'm' -> padded(time.monthValue)
        'd' -> padded(time.dayOfMonth)
        'H' -> padded(time.hour)
        'I' -> padded((time.hour + 11) % 12 + 1)
        'M' -> padded(time.minute)
        'S' -> padded(time.second)
        'j' -> padded(time.dayOfYear, 3)
        'p' -> if (time.hour < 12) "AM" else "PM"
        'B' -> time.month.getDisplayName(TextStyle.FULL, Locale.ENGLISH)
        'b', 'h' -> time.month.getDisplayName(TextStyle.FULL, Locale.ENGLISH).take(3)
        'A' -> time.dayOfWeek.getDisplayName(TextStyle.FULL, Locale.ENGLISH)
        'a' -> time.dayOfWeek.getDisplayName(TextStyle.FULL, Locale.ENGLISH).take(3)
        '%' -> "%"
        else -> throw Refused("%$directive in a date's form is not known here")
    }
}
