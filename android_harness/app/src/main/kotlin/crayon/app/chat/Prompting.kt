package crayon.app.chat

import crayon.runtime.Prompt
import crayon.runtime.TokenizerInfo

/** Ends a question, as in the examples that a model was trained with. */
const val SEPARATOR = "\n"

/** How a conversation becomes a prompt. */
fun interface Prompting {
    /** @param turns the last of which is the question; fewer are given where the phone is hot. */
    fun prompt(turns: List<Turn>, tokenizer: TokenizerInfo): Prompt

    companion object {
        /** The question alone, on a line of its own: for models that answer requests one by one. */
        val LINE = Prompting { turns, _ -> Prompt.Text(turns.last().question + SEPARATOR) }
    }
}
