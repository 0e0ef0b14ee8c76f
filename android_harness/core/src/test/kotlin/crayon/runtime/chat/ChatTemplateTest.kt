package crayon.runtime.chat

import crayon.runtime.BundleError
import crayon.runtime.CrayonError
import crayon.runtime.Engine
import crayon.runtime.GenerateOptions
import crayon.runtime.InvalidInput
import crayon.runtime.Prompt
import crayon.runtime.TokenizerInfo
import crayon.runtime.backends.FakeBackend
import crayon.runtime.backends.Script
import crayon.runtime.expected
import crayon.runtime.fixtures
import crayon.runtime.tokenizer.Tokenizer
import kotlinx.coroutines.runBlocking
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.jsonPrimitive
import org.junit.jupiter.api.DynamicTest
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.TestFactory
import java.time.LocalDateTime
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** What Python's jinja2 writes, and what it refuses. */
class ChatTemplateTest {
    private fun rendered(
        template: String,
        names: Map<String, String> = emptyMap(),
        messages: List<Message> = listOf(Message("user", "a")),
    ) = ChatTemplate(template, names).render(messages)

    @TestFactory
    fun `every template writes what Python's writes, byte for byte`() =
        expected.chats.filter { !it.name.startsWith("piece") }.map { template ->
            DynamicTest.dynamicTest(template.name) {
                val read = ChatTemplate(template.template, template.names)
                var refused = 0
                for ((i, case) in template.cases.withIndex()) {
                    val text = try {
                        read.render(case.messages, case.tools, case.prompt)
                    } catch (_: InvalidInput) {
                        refused++
                        null
                    }
                    assertEquals(case.text, text, "case $i, of which Python says ${case.why}")
                }
                assertTrue(refused < template.cases.size)
            }
        }

    @Test
    fun `every piece of Jinja means what it means in Python`() {
        val wrong = expected.chats.filter { it.name.startsWith("piece") }.mapNotNull { piece ->
            val case = piece.cases.single()
            val text = try {
                ChatTemplate(piece.template, piece.names).render(case.messages, case.tools, case.prompt)
            } catch (e: CrayonError) {
                if (case.text == null) null else "refused: ${e.what}"
            }
            if (text == case.text) null else "${piece.template}\n  here   $text\n  Python ${case.text ?: case.why}"
        }
        assertEquals("", wrong.joinToString("\n"))
    }

    @TestFactory
    fun `token ids of conversations are Python's, also where a text imitates control tokens`() =
        expected.chatIds.map { made ->
            DynamicTest.dynamicTest(made.file) {
                val tokenizer = Tokenizer(made.info, fixtures.resolve(made.file))
                for (chat in made.chats) {
                    val messages = chat.messages.map { message ->
                        Message(
                            message.getValue("role").jsonPrimitive.content,
                            message.getValue("content").jsonPrimitive.content,
                            message - "role" - "content",
                        )
                    }
                    assertEquals(chat.ids, tokenizer.applyChatTemplate(messages))
                }
            }
        }

    @Test
    fun `an engine answers a conversation`() =
        runBlocking {
            val made = expected.chatIds.first()
            val engine = Engine(
                FakeBackend(
                    Script {
                        _,
                        _,
                        _,
                        ->
                        2
                    },
                    vocabSize = made.info.vocabSize,
                ),
                Tokenizer(made.info, fixtures.resolve(made.file)),
            )
            val prompt = Prompt.Chat(listOf(Message("user", "the alarm")))
            assertEquals(
                engine.tokenizer.applyChatTemplate(prompt.messages).size,
                engine.generate(prompt, GenerateOptions(maxNewTokens = 2)).promptTokens,
            )
        }

    @Test
    fun `what is not known is refused when the bundle is read, with its line`() {
        for ((template, said) in listOf(
            "\n\n{% include 'x' %}" to "line 3: the tag 'include' is not known",
            "{{ a | urlize }}" to "the filter 'urlize' is not known",
            "{{ a is escaped }}" to "the test 'escaped' is not known",
            "{{ 2 ** 3 }}" to "'**' is not known",
            "{{ f(*a) }}" to "in a call is not known",
            "{% call f() %}{% endcall %}" to "the tag 'call'",
            "{{ '\\N{DASH}' }}" to "the escape \\N is not known",
            "(".repeat(200).let { "{{ $it }}" } to "line 1",
            "{{ ${"(".repeat(150)}1${")".repeat(150)} }}" to "nested too deep",
        )) {
            assertContains(assertFailsWith<BundleError>(template) { rendered(template) }.message!!, said)
        }
    }

    @Test
    fun `what is not known of a value is refused, not made up`() {
        for (template in listOf(
            "{{ 'a'.zfill(3) }}",
            "{{ {}.copy() }}",
            "{{ strftime_now('%Q') }}",
            "{{ 'a'.split(none, 1) }}",
            "{{ ('a' | safe) + 'b' }}",
            "{{ 'a' | trim(chars='a', other=1) }}",
            "{{ loop.depth }}",
            "{% for i in [1] %}{{ loop.changed(1) }}{% endfor %}",
            "{{ range }}",
            "{{ 9223372036854775807 + 1 }}",
        )) {
            assertFailsWith<InvalidInput>(template) { rendered(template) }
        }
    }

    @Test
    fun `a template that does not end, or writes without end, is stopped`() {
        val rounds = "{% for a in range(99999) %}".repeat(3) + "x" + "{% endfor %}".repeat(3)
        for (template in listOf(
            rounds,
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% set n = namespace(t='aaaaaaaa') %}{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}",
            "{{ 'a' * 99999999999 }}",
        )) {
            assertFailsWith<InvalidInput>(template) { rendered(template) }
        }
    }

    @Test
    fun `dates are written as Python writes them`() {
        val template = ChatTemplate("{{ strftime_now('%Y-%m-%d %y %B %b %A %a %H:%M:%S %I %p %j %%') }}", emptyMap()) {
            LocalDateTime.of(2026, 2, 3, 15, 4, 5)
        }
        assertEquals("2026-02-03 26 February Feb Tuesday Tue 15:04:05 03 PM 034 %", template.render(listOf(Message("user", "a"))))
    }

    @Test
    fun `a bundle without a template says so`() {
        val made = expected.chatIds.first()
        val info = TokenizerInfo("x", made.info.vocabSize, addBos = true, bos = 1, eos = listOf(2))
        val tokenizer = Tokenizer(info, fixtures.resolve(made.file))
        val error = assertFailsWith<InvalidInput> { tokenizer.applyChatTemplate(listOf(Message("user", "a"))) }
        assertContains(error.message!!, "no chat template")
    }

    @Test
    fun `tools reach the template, with their numbers as they are`() {
        val tool = JsonObject(mapOf("n" to JsonPrimitive(1.0), "m" to JsonPrimitive(2), "l" to JsonArray(listOf(JsonPrimitive(true)))))
        val text = ChatTemplate("{{ tools[0] | tojson }}{{ tools[0] }}", emptyMap()).render(listOf(Message("user", "a")), listOf(tool))
        assertEquals("""{"n": 1.0, "m": 2, "l": [true]}{'n': 1.0, 'm': 2, 'l': [True]}""", text)
    }
}
