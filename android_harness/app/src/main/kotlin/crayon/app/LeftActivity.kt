package crayon.app

import android.os.Bundle
import android.widget.TextView
import java.text.DateFormat
import java.util.Date

/** What has left this phone, as it was sent: queries to a server LLM, and requests for customizations. */
class LeftActivity : Screen() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.left)
        setTitle(R.string.left)
    }

    override fun onStart() {
        super.onStart()
        val lines = parts.sent.read().asReversed().map {
            val time = DateFormat.getDateTimeInstance().format(Date(it.time))
            getString(R.string.left_line, time, it.server, it.query, it.bytes, it.outcome ?: getString(R.string.left_unknown))
        }
        view<TextView>(R.id.sent).text = lines.joinToString("\n\n").ifEmpty { getString(R.string.left_nothing) }
    }
}
