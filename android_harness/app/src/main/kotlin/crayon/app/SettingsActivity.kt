package crayon.app

import android.os.Bundle
import android.widget.Button
import android.widget.EditText
import android.widget.TextView
import crayon.runtime.InvalidInput

/** Which services this app may talk to. */
class SettingsActivity : Screen() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.settings)
        setTitle(R.string.settings)
        if (savedInstanceState == null) {
            show(R.id.service, R.id.service_key, parts.settings.service)
            show(R.id.server, R.id.server_key, parts.settings.server)
        }
        view<Button>(R.id.save).setOnClickListener { save() }
    }

    private fun save() {
        val service = read(R.id.service, R.id.service_key)
        val server = read(R.id.server, R.id.server_key)
        try {
            parts.settings.check(service, server)
        } catch (e: InvalidInput) {
            view<TextView>(R.id.message).text = e.said()
            return
        }
        parts.settings.service = service
        parts.settings.server = server
        view<TextView>(R.id.message).setText(R.string.saved)
    }

    private fun show(url: Int, key: Int, endpoint: Endpoint?) {
        view<EditText>(url).setText(endpoint?.url)
        view<EditText>(key).setText(endpoint?.key)
    }

    private fun read(url: Int, key: Int): Endpoint? = text(url)?.let { Endpoint(it, text(key)) }

    private fun text(id: Int): String? =
        view<EditText>(id)
            .text
            .toString()
            .trim()
            .ifEmpty { null }
}
