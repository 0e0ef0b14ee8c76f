package crayon.app.chat

import crayon.runtime.Prompt
import crayon.runtime.TokenizerInfo
import crayon.runtime.chat.Message
import org.junit.Test
import kotlin.test.assertEquals

class PromptingTest {
    private val turns = listOf(Turn("one", "1"), Turn("stopped at once"), Turn("two"))

    private fun info(template: String?) =
        TokenizerInfo(file = "tokenizer.json", vocabSize = 10, addBos = true, bos = 1, eos = listOf(2), chatTemplate = template)

    @Test
    fun `a model without a template is asked the question alone`() {
        assertEquals(Prompt.Text("two\n"), Prompting.TEMPLATE.prompt(turns, info(null)))
    }

    @Test
    fun `a model with a template is given the turns that were answered`() {
        val messages = listOf(Message("user", "one"), Message("assistant", "1"), Message("user", "two"))
        assertEquals(Prompt.Chat(messages), Prompting.TEMPLATE.prompt(turns, info("{{ messages }}")))
    }
}
