package crayon.app.model

import android.content.Intent
import android.net.Uri
import android.os.Bundle
import android.text.format.Formatter
import android.view.View
import android.widget.Button
import android.widget.EditText
import android.widget.ProgressBar
import android.widget.TextView
import crayon.app.Kind
import crayon.app.R
import crayon.app.Screen
import crayon.app.parts
import crayon.app.view

/** What is installed, and how another model comes here. */
class ModelActivity : Screen() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.model)
        setTitle(R.string.model)
        view<Button>(R.id.pick).setOnClickListener { pick() }
        view<Button>(R.id.download).setOnClickListener { download() }
        view<Button>(R.id.stop).setOnClickListener { parts.work.cancel() }
        watch(parts.model.installed) { view<TextView>(R.id.installed).text = shown(it) }
        watch(parts.importing.imported) { view<TextView>(R.id.message).text = shown(it) }
        watch(parts.work.running) { running ->
            val percent = running?.takeIf { it.kind == Kind.INSTALL }
            val bar = view<ProgressBar>(R.id.progress)
            bar.visibility = if (percent == null) View.GONE else View.VISIBLE
            bar.isIndeterminate = percent?.percent == null
            bar.progress = percent?.percent ?: 0
            view<Button>(R.id.stop).visibility = bar.visibility
            view<Button>(R.id.pick).isEnabled = running == null
            view<Button>(R.id.download).isEnabled = running == null
        }
    }

    /** The system's own picker: it gives this app the one document, so no permission for the storage is needed. */
    private fun pick() {
        val intent = Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("*/*")
        @Suppress("DEPRECATION") // its successor is in a library that this app does without
        startActivityForResult(intent, PICK)
    }

    @Deprecated("Deprecated in Java")
    override fun onActivityResult(requestCode: Int, resultCode: Int, data: Intent?) {
        val picked: Uri = data?.data ?: return
        if (requestCode == PICK && resultCode == RESULT_OK) begin(Kind.INSTALL) { parts.importing.document(picked, it) }
    }

    private fun download() {
        val url = view<EditText>(R.id.address).text.toString().trim()
        begin(Kind.INSTALL) { parts.importing.address(url, it) }
    }

    private fun shown(installed: Installed?): String =
        if (installed == null) {
            getString(R.string.no_model)
        } else {
            val size = Formatter.formatShortFileSize(this, installed.bytes)
            getString(R.string.installed, installed.name, size, installed.contextLength)
        }

    private fun shown(imported: Imported): String =
        when (imported) {
            Imported.Nothing -> ""
            Imported.Done -> getString(R.string.import_done)
            is Imported.Failed -> getString(R.string.import_failed, imported.why)
        }

    private companion object {
        const val PICK = 1
    }
}
