// Text as it comes, token by token.
package crayon.runtime.tokenizer

/**
 * Decodes token by token, and never hands out part of a UTF-8 character.
 *
 * All pieces and the flush together are `tokenizer.decode` of all tokens.
 *
 * @param skipSpecial control tokens have no text.
 * @param continues the tokens follow others, so that a space at their beginning is one, which sentencepiece's tokenizers would drop at the
 *   start of a text.
 */
class StreamDecoder(private val tokenizer: Tokenizer, private val skipSpecial: Boolean = true, continues: Boolean = false) {
    private val utf8 = Utf8()
    private var first = !continues

    /** The text that is complete with this token: often its own, empty in the middle of a character. */
    fun push(token: Int): String {
        if (skipSpecial && token in tokenizer.specialIds) return ""
        val bytes = tokenizer.tokenBytes(token, first)
        first = false
        return utf8.decode(bytes)
    }

    /** The end of the text: U+FFFD if it stops in the middle of a character. */
    fun flush(): String = utf8.flush()
}

/**
 * UTF-8 in pieces. Each longest beginning of a character that does not go on becomes one U+FFFD, as Unicode recommends and Python does; the
 * JVM's decoder counts in another way. The algorithm is that of the WHATWG's Encoding Standard.
 */
private class Utf8 {
    private var needed = 0
    private var character = 0
    private var lower = FIRST
    private var upper = LAST

    fun decode(bytes: ByteArray): String {
        val text = StringBuilder(bytes.size)
        for (byte in bytes) next(byte.toInt() and 0xff, text)
        return text.toString()
    }

    fun flush(): String = if (needed > 0) REPLACEMENT.also { reset() } else ""

    private fun next(byte: Int, text: StringBuilder) {
        if (needed == 0) {
            begin(byte, text)
        } else if (byte in lower..upper) {
            lower = FIRST
            upper = LAST
            character = (character shl 6) or (byte and 0x3f)
            if (--needed == 0) text.appendCodePoint(character)
        } else {
            reset()
            text.append(REPLACEMENT)
            begin(byte, text)
        }
    }

    private fun begin(byte: Int, text: StringBuilder) {
        when (byte) {
            in 0..0x7f -> text.append(byte.toChar())
            in 0xc2..0xdf -> expect(1, byte and 0x1f)
            in 0xe0..0xef -> expect(2, byte and 0xf)
            in 0xf0..0xf4 -> expect(3, byte and 0x7)
            else -> text.append(REPLACEMENT)
        }
        // Neither longer than need be, nor a surrogate, nor beyond U+10FFFF.
        when (byte) {
            0xe0 -> lower = 0xa0
            0xed -> upper = 0x9f
            0xf0 -> lower = 0x90
            0xf4 -> upper = 0x8f
        }
    }

    private fun expect(count: Int, bits: Int) {
        needed = count
        character = bits
    }

    private fun reset() {
        needed = 0
        lower = FIRST
        upper = LAST
    }

    private companion object {
        const val FIRST = 0x80
        const val LAST = 0xbf
        const val REPLACEMENT = "\ufffd"
    }
}
