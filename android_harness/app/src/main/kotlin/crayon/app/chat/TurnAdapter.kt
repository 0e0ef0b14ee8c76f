package crayon.app.chat

import android.content.Context
import android.view.LayoutInflater
import android.view.View
import android.view.ViewGroup
import android.widget.BaseAdapter
import android.widget.Button
import android.widget.TextView
import crayon.app.R
import crayon.app.calls.PhoneAction
import crayon.app.calls.action
import crayon.app.calls.readCall
import crayon.app.view
import java.time.LocalDateTime

/** The turns of a conversation as rows of a list. @param onAction called with what an answer asks the phone to do, when its button is pressed. */
class TurnAdapter(private val context: Context, private val onAction: (PhoneAction) -> Unit) : BaseAdapter() {
    private var turns = emptyList<Turn>()

    fun show(turns: List<Turn>) {
        this.turns = turns
        notifyDataSetChanged()
    }

    override fun getCount() = turns.size

    override fun getItem(position: Int) = turns[position]

    override fun getItemId(position: Int) = position.toLong()

    override fun getView(position: Int, convertView: View?, parent: ViewGroup?): View {
        val row = convertView ?: LayoutInflater.from(context).inflate(R.layout.turn, parent, false)
        val turn = turns[position]
        row.view<TextView>(R.id.asked).text = turn.question
        row.view<TextView>(R.id.answer).text = turn.answer
        row.view<TextView>(R.id.badge).text = badge(turn)
        showAction(row.view(R.id.act), turn)
        return row
    }

    private fun badge(turn: Turn): String {
        val parts = listOf(
            when (turn.source) {
                Source.PHONE -> context.getString(R.string.badge_phone)
                Source.SERVER -> context.getString(R.string.badge_server)
                null -> ""
            },
            when (turn.stage) {
                Stage.RUNNING -> context.getString(R.string.stage_running)
                Stage.STOPPED -> context.getString(R.string.stage_stopped)
                Stage.FAILED -> context.getString(R.string.stage_failed)
                Stage.DONE -> ""
            },
            turn.why,
        )
        return parts.filter { it.isNotEmpty() }.joinToString(" · ")
    }

    /** Only a whole answer that is exactly a call has a button; all else is text. */
    private fun showAction(button: Button, turn: Turn) {
        val action = turn.takeIf { it.stage == Stage.DONE }?.let { readCall(it.answer.trim()) }?.let { action(it, LocalDateTime.now()) }
        button.visibility = if (action == null) View.GONE else View.VISIBLE
        button.text = action?.title(context).orEmpty()
        button.setOnClickListener { action?.let(onAction) }
    }
}
