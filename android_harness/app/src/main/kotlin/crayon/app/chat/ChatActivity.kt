package crayon.app.chat

import android.Manifest
import android.content.pm.PackageManager
import android.os.Build
import android.os.Bundle
import android.view.Menu
import android.widget.Button
import android.widget.EditText
import android.widget.ListView
import android.widget.TextView
import crayon.app.Kind
import crayon.app.R
import crayon.app.Screen
import crayon.app.calls.confirm
import crayon.app.model.Installed
import crayon.app.parts
import crayon.app.view
import crayon.runtime.EngineState

/** The conversation. */
class ChatActivity : Screen() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.chat)
        setTitle(R.string.chat)
        val turns = TurnAdapter(this) { action -> confirm(action) }
        view<ListView>(R.id.turns).adapter = turns
        view<Button>(R.id.send).setOnClickListener { send() }
        view<Button>(R.id.stop).setOnClickListener { parts.work.cancel() }
        watch(parts.conversation.turns) { turns.show(it) }
        watch(parts.work.running) { running ->
            view<Button>(R.id.send).isEnabled = running == null
            view<Button>(R.id.stop).isEnabled = running?.kind == Kind.ANSWER
        }
        watch(parts.model.installed) { showStatus(it, parts.model.state.value) }
        watch(parts.model.state) { showStatus(parts.model.installed.value, it) }
        if (savedInstanceState == null) askForNotifications()
    }

    override fun onCreateOptionsMenu(menu: Menu): Boolean {
        menu.add(R.string.clear).setOnMenuItemClickListener {
            parts.conversation.clear()
            true
        }
        return super.onCreateOptionsMenu(menu)
    }

    private fun send() {
        val field = view<EditText>(R.id.question)
        val question = field.text.toString().trim()
        if (question.isEmpty()) return
        val chat = parts.chat
        if (begin(Kind.ANSWER) { chat.answer(question) }) field.text.clear()
    }

    private fun showStatus(installed: Installed?, state: EngineState) {
        view<TextView>(R.id.status).text = when {
            installed == null -> getString(R.string.no_model)
            state == EngineState.Loading -> getString(R.string.loading, installed.name)
            else -> installed.name
        }
    }

    /** So that the notification of a running task can be seen; the task runs without it too. */
    private fun askForNotifications() {
        if (Build.VERSION.SDK_INT < Build.VERSION_CODES.TIRAMISU) return
        val permission = Manifest.permission.POST_NOTIFICATIONS
        if (checkSelfPermission(permission) != PackageManager.PERMISSION_GRANTED) requestPermissions(arrayOf(permission), 0)
    }
}
