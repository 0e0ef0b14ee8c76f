// From the source of a template to its tokens, with Jinja's control of white space: trim_blocks and lstrip_blocks, `-` and `+`.
package crayon.runtime.chat

/** A template cannot be read, or has something that this reader does not know. */
internal class Unreadable(message: String) : Exception(message)

internal enum class Kind { DATA, VARIABLE_BEGIN, VARIABLE_END, BLOCK_BEGIN, BLOCK_END, NAME, STRING, INTEGER, FLOAT, OPERATOR, END }

internal class Token(val kind: Kind, val text: String, val line: Int) {
    fun isOperator(vararg operators: String) = kind == Kind.OPERATOR && text in operators

    fun isName(vararg names: String) = kind == Kind.NAME && text in names
}

private val TAG = Regex("""\{%([-+]?)|\{\{([-+]?)|\{#([-+]?)""")
private val RAW = Regex("""\{%[-+]?(\s*)raw\s*(-%\}|%\})""")
private val RAW_END = Regex("""\{%([-+]?)\s*endraw\s*(\+%\}|-%\}|%\})""")
private val NUMBER = Regex("""\d+(?:(?:\.\d+)?[eE][+-]?\d+|\.\d+)?""")
private val OPERATORS = listOf("//", "**", "==", "!=", ">=", "<=") + "+-/*%~[](){}><=.:|,".map { "$it" }
private val CLOSING = mapOf(")" to "(", "]" to "[", "}" to "{")

/** As Python's `str.isspace`. */
internal fun isSpace(c: Char): Boolean =
    c in '\t'..'\r' || c in '\u001c'..' ' || c == '\u0085' || c == '\u00a0' || c == '\u1680' || c in '\u2000'..'\u200a' ||
        c == '\u2028' || c == '\u2029' || c == '\u202f' || c == '\u205f' || c == '\u3000'

internal class Lexer(template: String) {
    private val source = template.replace("\r\n", "\n").replace('\r', '\n').removeSuffix("\n")
    private val tokens = ArrayList<Token>()
    private var at = 0
    private var line = 1
    private var counted = 0

    /** Whether what was read last ended a line. */
    private var lineStarting = true

    /** Throws [Unreadable]. */
    fun read(): List<Token> {
        while (at < source.length) {
            val tag = TAG.find(source, at)
            if (tag == null) {
                data(source.substring(at))
                at = source.length
                break
            }
            val text = source.substring(at, tag.range.first)
            val sign = tag.groupValues
                .drop(1)
                .firstOrNull { it.isNotEmpty() }
                .orEmpty()
            data(stripped(text, sign, isBlock = !tag.value.startsWith("{{")))
            at = tag.range.first
            when (tag.value.take(2)) {
                "{#" -> comment(tag.value.length)
                "{{" -> expression(Kind.VARIABLE_BEGIN, Kind.VARIABLE_END, "}}", tag.value.length)
                else -> if (!raw()) expression(Kind.BLOCK_BEGIN, Kind.BLOCK_END, "%}", tag.value.length)
            }
        }
        add(Kind.END, "")
        return tokens
    }

    /** What is left of the text before a tag. */
    private fun stripped(text: String, sign: String, isBlock: Boolean): String {
        if (sign == "-") return text.trimEnd(::isSpace)
        if (sign == "+" || !isBlock) return text
        val begin = text.lastIndexOf('\n') + 1
        val blank = begin < text.length && (begin until text.length).all { isSpace(text[it]) }
        return if ((begin > 0 || lineStarting) && blank) text.substring(0, begin) else text
    }

    private fun comment(length: Int) {
        val end = source.indexOf("#}", at + length)
        if (end < 0) throw fail("a comment does not end")
        closed(end, trims = true, isSigned = end > at + length)
    }

    /** Whether there was a raw block; its text is data. */
    private fun raw(): Boolean {
        val begin = RAW.matchAt(source, at) ?: return false
        at = begin.range.last + 1
        if (begin.groupValues[2].startsWith("-")) skipSpace()
        lineStarting = source[at - 1] == '\n'
        val end = RAW_END.find(source, at) ?: throw fail("a raw block does not end")
        data(stripped(source.substring(at, end.range.first), end.groupValues[1], isBlock = true))
        closed(end.range.last - 1, trims = true)
        return true
    }

    /** Goes behind the end of a tag, whose last two characters are at `end`, and what it takes away. */
    private fun closed(end: Int, trims: Boolean, isSigned: Boolean = true) {
        val sign = if (isSigned) source[end - 1] else ' '
        at = end + 2
        when {
            sign == '-' -> skipSpace()
            sign == '+' && trims -> Unit
            trims && at < source.length && source[at] == '\n' -> at++
        }
        lineStarting = source[at - 1] == '\n'
    }

    private fun expression(begin: Kind, end: Kind, mark: String, length: Int) {
        add(begin, "")
        at += length
        val open = ArrayList<String>()
        while (true) {
            while (at < source.length && isSpace(source[at])) at++
            if (at >= source.length) throw fail("a tag does not end")
            if (open.isEmpty()) {
                val signed = source[at] == '-' || (source[at] == '+' && end == Kind.BLOCK_END)
                val close = if (signed) at + 1 else at
                if (source.startsWith(mark, close)) {
                    add(end, "")
                    closed(close, trims = end == Kind.BLOCK_END)
                    return
                }
            }
            token(open)
        }
    }

    private fun token(open: MutableList<String>) {
        val c = source[at]
        if (c == '"' || c == '\'') return string(c)
        if (c in '0'..'9') {
            // After a dot it is an index.
            val number = if (tokens.last().isOperator(".")) Regex("""\d+""").matchAt(source, at)!! else NUMBER.matchAt(source, at)!!
            if (source.getOrNull(number.range.last + 1)?.let { it.isLetterOrDigit() || it == '_' } == true) throw fail("this is no number")
            add(if (number.value.all { it in '0'..'9' }) Kind.INTEGER else Kind.FLOAT, number.value)
            at += number.value.length
            return
        }
        if (c.isLetter() || c == '_') {
            val start = at
            while (at < source.length && (source[at].isLetterOrDigit() || source[at] == '_')) at++
            add(Kind.NAME, source.substring(start, at))
            return
        }
        val operator = OPERATORS.firstOrNull { source.startsWith(it, at) } ?: throw fail("'$c' is not expected here")
        if (operator in CLOSING.values) open += operator
        if (operator in CLOSING && open.removeLastOrNull() != CLOSING[operator]) throw fail("'$operator' closes nothing")
        add(Kind.OPERATOR, operator)
        at += operator.length
    }

    private fun string(quote: Char) {
        val text = StringBuilder()
        val begin = at++
        while (true) {
            val c = source.getOrNull(at++) ?: throw fail("a text does not end")
            if (c == quote) break
            if (c != '\\') text.append(c) else escape(text)
        }
        count(begin)
        tokens += Token(Kind.STRING, text.toString(), line)
    }

    /** As in a Python literal. */
    private fun escape(text: StringBuilder) {
        val c = source.getOrNull(at++) ?: throw fail("a text does not end")
        val plain = ESCAPES[c]
        when {
            plain != null -> text.append(plain)
            c == '\n' -> Unit
            c == 'x' -> text.appendCodePoint(code(2))
            c == 'u' -> text.append(code(4).toChar())
            c == 'U' -> text.appendCodePoint(code(8))
            c in '0'..'7' || c == 'N' -> throw fail("the escape \\$c is not known here")
            else -> text.append('\\').append(c)
        }
    }

    private fun code(digits: Int): Int {
        val hex = source.substring(at, minOf(at + digits, source.length))
        val value = hex.takeIf { it.length == digits && it.all { c -> Character.digit(c, 16) >= 0 } }?.toLong(16)
        if (value == null || value > Character.MAX_CODE_POINT) throw fail("an escape in a text is damaged")
        at += digits
        return value.toInt()
    }

    private fun skipSpace() {
        while (at < source.length && isSpace(source[at])) at++
    }

    private fun data(text: String) {
        if (text.isNotEmpty()) add(Kind.DATA, text)
    }

    private fun add(kind: Kind, text: String) {
        count(at)
        tokens += Token(kind, text, line)
    }

    private fun count(until: Int) {
        while (counted < minOf(until, source.length)) if (source[counted++] == '\n') line++
    }

    private fun fail(what: String): Unreadable {
        count(at)
        return Unreadable("line $line: $what")
    }
}

private val ESCAPES =
    mapOf(
        '\\' to '\\',
        '\'' to '\'',
        '"' to '"',
        'n' to '\n',
        'r' to '\r',
        't' to '\t',
        'b' to '\b',
        'f' to '\u000c',
        'v' to '\u000b',
        'a' to '\u0007',
    )
