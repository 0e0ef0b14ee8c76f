package crayon.app

import android.app.Activity
import android.content.Intent
import android.view.Menu
import android.view.MenuItem
import android.widget.Toast
import crayon.app.benchmark.BenchmarkActivity
import crayon.app.chat.ChatActivity
import crayon.app.customize.CustomizeActivity
import crayon.app.model.ModelActivity
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.SupervisorJob
import kotlinx.coroutines.cancel
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.launch

/** What the screens have in common: they show flows while they are visible, and a menu leads from each to the others. */
abstract class Screen : Activity() {
    private val watches = ArrayList<suspend () -> Unit>()
    private var visible: CoroutineScope? = null

    /** Shows each value of a flow while the screen is visible; for `onCreate`. */
    protected fun <T> watch(flow: Flow<T>, show: (T) -> Unit) {
        watches += { flow.collect { show(it) } }
    }

    /** Begins a task; says so where that is not possible. */
    protected fun begin(kind: Kind, body: suspend (OnProgress) -> Unit): Boolean =
        parts.work.begin(kind, body).also { if (!it) toast(R.string.busy) }

    protected fun toast(text: Int) = Toast.makeText(this, text, Toast.LENGTH_LONG).show()

    override fun onStart() {
        super.onStart()
        val scope = CoroutineScope(SupervisorJob() + Dispatchers.Main.immediate)
        visible = scope
        watches.forEach { scope.launch { it() } }
    }

    override fun onStop() {
        visible?.cancel()
        super.onStop()
    }

    override fun onCreateOptionsMenu(menu: Menu): Boolean {
        for ((title, screen) in SCREENS) {
            if (screen != javaClass) menu.add(title).intent = Intent(this, screen)
        }
        return true
    }

    override fun onOptionsItemSelected(item: MenuItem): Boolean {
        item.intent?.let { startActivity(it.addFlags(Intent.FLAG_ACTIVITY_CLEAR_TOP)) }
        return item.intent != null
    }

    private companion object {
        val SCREENS = listOf(
            R.string.chat to ChatActivity::class.java,
            R.string.model to ModelActivity::class.java,
            R.string.customize to CustomizeActivity::class.java,
            R.string.left to LeftActivity::class.java,
            R.string.settings to SettingsActivity::class.java,
            R.string.benchmark to BenchmarkActivity::class.java,
        )
    }
}
