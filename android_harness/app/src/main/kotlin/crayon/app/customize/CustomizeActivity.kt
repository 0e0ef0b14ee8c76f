package crayon.app.customize

import android.os.Bundle
import android.text.Editable
import android.text.TextWatcher
import android.view.View
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.TextView
import crayon.app.Kind
import crayon.app.R
import crayon.app.Screen
import crayon.app.chat.SEPARATOR
import crayon.app.parts
import crayon.app.view
import crayon.runtime.Example

/** Examples are typed, what would leave the phone is shown, and sent when the user says so. */
class CustomizeActivity : Screen() {
    private lateinit var rows: LinearLayout

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.customize)
        setTitle(R.string.customize)
        rows = view(R.id.examples)
        val questions = savedInstanceState?.getStringArrayList(QUESTIONS).orEmpty()
        val answers = savedInstanceState?.getStringArrayList(ANSWERS).orEmpty()
        if (questions.isEmpty()) repeat(FIRST) { add("", "") } else questions.zip(answers).forEach { (q, a) -> add(q, a) }
        view<Button>(R.id.more).setOnClickListener { add("", "") }
        view<Button>(R.id.preview).setOnClickListener { preview() }
        view<Button>(R.id.send).setOnClickListener { send() }
        watch(parts.customizing.state) { show(it) }
        watch(parts.work.running) { view<View>(R.id.preview).isEnabled = it == null }
    }

    override fun onSaveInstanceState(outState: Bundle) {
        super.onSaveInstanceState(outState)
        outState.putStringArrayList(QUESTIONS, ArrayList(texts(R.id.question)))
        outState.putStringArrayList(ANSWERS, ArrayList(texts(R.id.answer)))
    }

    private fun preview() {
        val examples = texts(R.id.question)
            .zip(texts(R.id.answer))
            .filter { (question, answer) -> question.isNotBlank() || answer.isNotBlank() }
            .map { (question, answer) -> Example(question.trim().let { if (it.isEmpty()) it else it + SEPARATOR }, answer.trim()) }
        val task = parts.customizing.preview(examples)
        begin(Kind.CUSTOMIZE) { task() }
    }

    private fun send() {
        val customizing = parts.customizing
        val shown = customizing.state.value as? Customized.Preview ?: return
        begin(Kind.CUSTOMIZE) { customizing.send(shown) }
    }

    private fun show(state: Customized) {
        view<TextView>(R.id.message).text = when (state) {
            Customized.Idle -> ""
            Customized.Working -> getString(R.string.working)
            is Customized.Preview -> getString(R.string.leaves, state.bytes, state.url)
            is Customized.Done -> getString(if (state.installed) R.string.customized else R.string.not_customized, state.reason)
            is Customized.Failed -> getString(R.string.customize_failed, state.why)
        }
        view<TextView>(R.id.body).text = (state as? Customized.Preview)?.body.orEmpty()
        view<View>(R.id.send).visibility = if (state is Customized.Preview) View.VISIBLE else View.GONE
    }

    private fun add(question: String, answer: String) {
        val row = layoutInflater.inflate(R.layout.example, rows, false)
        for ((id, text) in listOf(R.id.question to question, R.id.answer to answer)) {
            row.view<EditText>(id).apply {
                isSaveEnabled = false // all rows have the same ids
                setText(text)
                addTextChangedListener(changed)
            }
        }
        rows.addView(row)
    }

    private fun texts(id: Int): List<String> =
        List(rows.childCount) {
            rows
                .getChildAt(it)!!
                .view<EditText>(id)
                .text
                .toString()
        }

    private val changed = object : TextWatcher {
        override fun beforeTextChanged(s: CharSequence?, start: Int, count: Int, after: Int) = Unit

        override fun onTextChanged(s: CharSequence?, start: Int, before: Int, count: Int) = Unit

        override fun afterTextChanged(s: Editable?) = parts.customizing.forget()
    }

    private companion object {
        const val QUESTIONS = "questions"
        const val ANSWERS = "answers"
        const val FIRST = 3
    }
}
