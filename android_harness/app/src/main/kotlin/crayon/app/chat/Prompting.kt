package crayon.app.chat

import crayon.runtime.Prompt
import crayon.runtime.TokenizerInfo
import crayon.runtime.chat.Message

/** Ends a question, as in the examples that a model without a chat template was trained with. */
const val SEPARATOR = "\n"

/** How a conversation becomes a prompt. */
fun interface Prompting {
    /** @param turns the last of which is the question; fewer are given where the phone is hot. */
    fun prompt(turns: List<Turn>, tokenizer: TokenizerInfo): Prompt

    companion object {
        /** The question alone, on a line of its own: for models that answer requests one by one. */
        val LINE = Prompting { turns, _ -> Prompt.Text(turns.last().question + SEPARATOR) }

        /** The conversation in the model's chat template; [LINE] where it has none. */
        val TEMPLATE = Prompting { turns, tokenizer ->
            if (tokenizer.chatTemplate == null) {
                LINE.prompt(turns, tokenizer)
            } else {
                val answered = turns.dropLast(1).filter { it.answer.isNotEmpty() }
                val before = answered.flatMap { listOf(Message("user", it.question), Message("assistant", it.answer)) }
                Prompt.Chat(before + Message("user", turns.last().question))
            }
        }
    }
}
