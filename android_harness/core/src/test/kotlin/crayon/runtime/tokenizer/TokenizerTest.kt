package crayon.runtime.tokenizer

import crayon.runtime.BundleError
import crayon.runtime.ExpectedTokenizer
import crayon.runtime.InvalidInput
import crayon.runtime.TokenizerInfo
import crayon.runtime.expected
import crayon.runtime.fixtures
import org.junit.jupiter.api.DynamicTest
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.TestFactory
import org.junit.jupiter.api.io.TempDir
import java.nio.file.Path
import kotlin.io.path.writeText
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

class TokenizerTest {
    @TestFactory
    fun `every kind of tokenizer gives the ids and the text of Python's`() =
        expected.tokenizers.map { of ->
            DynamicTest.dynamicTest(of.name) { check(of) }
        }

    private fun check(of: ExpectedTokenizer) {
        val tokenizer = Tokenizer(of.info, fixtures.resolve(of.file))
        for (text in of.texts) {
            assertEquals(text.ids, tokenizer.encode(text.text), "ids of '${text.text}'")
            assertEquals(text.special, tokenizer.encode(text.text, addBos = false, parseSpecial = true), "special ids of '${text.text}'")
        }
        for (run in of.runs) {
            assertEquals(run.text, tokenizer.decode(run.ids), "text of ${run.ids}")
            assertEquals(run.special, tokenizer.decode(run.ids, skipSpecial = false), "text of ${run.ids} with control tokens")
        }
    }

    @Test
    fun `a stream and decode agree, and no piece splits a character`() {
        val of = expected.tokenizers.first { it.name == "llama3" }
        val tokenizer = Tokenizer(of.info, fixtures.resolve(of.file))
        val ids = tokenizer.encode("👩‍👩‍👧 naïve 漢字", addBos = false)
        val stream = StreamDecoder(tokenizer)
        val pieces = ids.map(stream::push) + stream.flush()
        assertEquals("👩‍👩‍👧 naïve 漢字", pieces.joinToString(""))
        assertEquals(emptyList(), pieces.filter { '\ufffd' in it })
    }

    @Test
    fun `a lone surrogate is no text`() {
        val of = expected.tokenizers.first()
        val tokenizer = Tokenizer(of.info, fixtures.resolve(of.file))
        assertContains(assertFailsWith<InvalidInput> { tokenizer.encode("ab\ud83d") }.message!!, "character 2")
    }

    @Test
    fun `what is not supported is named`(
        @TempDir folder: Path,
    ) {
        for ((document, named) in listOf(
            """{"model": {"type": "Unigram", "vocab": {}}}""" to "Unigram",
            """{"model": {"vocab": {"a": 0}}, "normalizer": {"type": "Precompiled"}}""" to "Precompiled",
            """{"model": {"vocab": {"a": 0}}, "pre_tokenizer": {"type": "UnicodeScripts"}}""" to "UnicodeScripts",
            """{"model": {"vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}}""" to "WordPiece",
            """{"model": {"vocab": {"a": 0}, "merges": [["a", "b"]]}}""" to "'b'",
            """{"model": {"vocab": {"a": -1}}}""" to "ids",
            """{"model": """ to "tokenizer.json",
        )) {
            val path = folder.resolve("tokenizer.json")
            path.writeText(document)
            val info = TokenizerInfo("tokenizer.json", 1, addBos = false, bos = null, eos = emptyList())
            assertContains(assertFailsWith<BundleError>(document) { Tokenizer(info, path) }.message!!, named)
        }
    }
}
