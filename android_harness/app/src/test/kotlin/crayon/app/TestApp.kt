// The app with a model that says what a test wants, on a phone that has what a test wants.
package crayon.app

import android.Manifest
import android.app.Activity
import android.content.Intent
import android.os.Looper
import android.view.View
import android.widget.Button
import android.widget.EditText
import android.widget.ListView
import android.widget.TextView
import crayon.app.chat.ChatActivity
import crayon.app.chat.Turn
import crayon.app.model.Keys
import crayon.runtime.backends.BackendLoader
import crayon.runtime.backends.FakeBackend
import crayon.runtime.backends.Script
import kotlinx.coroutines.runBlocking
import org.junit.After
import org.junit.Before
import org.junit.runner.RunWith
import org.robolectric.Robolectric
import org.robolectric.RobolectricTestRunner
import org.robolectric.RuntimeEnvironment
import org.robolectric.Shadows.shadowOf
import org.robolectric.android.controller.ActivityController
import java.nio.file.Path
import kotlin.test.assertNotNull
import kotlin.test.assertTrue

/** What the phone has, and what its model says. */
object Phone {
    var script = says("hello")
    var freeMemory: Long? = null
    var freeSpace = Long.MAX_VALUE

    fun reset() {
        script = says("hello")
        freeMemory = null
        freeSpace = Long.MAX_VALUE
    }
}

class TestApp : CrayonApp() {
    override fun makeParts(): Parts {
        val loaders = mapOf("onnx" to BackendLoader { _, _ -> FakeBackend({ t, s, a -> Phone.script.next(t, s, a) }, VOCABULARY, 512) })
        return Parts(this, loaders, keys = Keys(null), freeMemory = { Phone.freeMemory }, freeSpace = { Phone.freeSpace })
    }
}

/** A model that says a text and ends. */
fun says(text: String): Script {
    val ids = letters(text) + EOS
    return Script { _, said, _ -> ids[minOf(said, ids.lastIndex)] }
}

@RunWith(RobolectricTestRunner::class)
abstract class AppTest {
    protected val app get() = RuntimeEnvironment.getApplication() as TestApp
    protected val parts get() = app.parts
    protected val folder: Path get() = app.noBackupFilesDir.toPath()

    @Before
    fun grant() = shadowOf(app).grantPermissions(Manifest.permission.POST_NOTIFICATIONS)

    @After
    fun reset() {
        parts.work.cancel()
        Phone.reset()
    }

    /** Installs the small bundle. */
    protected fun install(name: String = "letters") =
        runBlocking {
            val archive = writeArchive(folder.resolve("$name.crayon"), name)
            parts.importing.document(Documents.of(archive)) { _, _ -> }
            Unit
        }

    /** Waits, while the main thread does what it has to. */
    protected fun until(what: String, holds: () -> Boolean) {
        val end = System.nanoTime() + 30_000_000_000
        while (!holds()) {
            assertTrue(System.nanoTime() < end, "not in time: $what")
            shadowOf(Looper.getMainLooper()).idle()
            Thread.sleep(5)
        }
        shadowOf(Looper.getMainLooper()).idle()
    }

    /** Starts the service that the app has asked for, as the system would. */
    protected fun startService(): Intent {
        val intent = assertNotNull(shadowOf(app).nextStartedService)
        Robolectric.buildService(WorkService::class.java, intent).create().startCommand(0, 1)
        return intent
    }

    protected fun untilIdle() = until("the task ends") { parts.work.running.value == null }

    protected fun chat(): ActivityController<ChatActivity> = Robolectric.buildActivity(ChatActivity::class.java).setup()

    /** Types a question and presses the button. */
    protected fun ask(screen: Activity, question: String) {
        screen.type(R.id.question, question)
        screen.press(R.id.send)
        startService()
    }

    /** The last turn; an empty one before there is any. */
    protected val last: Turn get() = parts.conversation.turns.value
        .lastOrNull() ?: Turn("")

    protected fun row(screen: Activity): View {
        val list = screen.view<ListView>(R.id.turns)
        return list.adapter.getView(list.adapter.count - 1, null, list)
    }

    protected fun Activity.type(id: Int, text: String) = view<EditText>(id).setText(text)

    /** Presses a button, as soon as that can be done. */
    protected fun Activity.press(id: Int) {
        val button = view<Button>(id)
        until("it can be pressed") { button.isEnabled }
        assertTrue(button.performClick())
    }

    protected fun Activity.shows(id: Int): String = view<TextView>(id).text.toString()

    protected fun View.shows(id: Int): String = view<TextView>(id).text.toString()
}
