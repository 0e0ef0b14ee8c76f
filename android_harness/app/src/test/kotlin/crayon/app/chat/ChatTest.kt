package crayon.app.chat

import android.content.ComponentCallbacks2
import android.os.PowerManager
import android.view.View
import android.widget.Button
import android.widget.EditText
import crayon.app.AppTest
import crayon.app.EOS
import crayon.app.Endpoint
import crayon.app.Phone
import crayon.app.R
import crayon.app.WorkService
import crayon.app.letters
import crayon.app.says
import crayon.app.view
import crayon.runtime.EngineState
import crayon.runtime.backends.Script
import org.junit.Test
import org.robolectric.Robolectric
import org.robolectric.Shadows.shadowOf
import java.util.concurrent.CountDownLatch
import kotlin.io.path.readText
import kotlin.io.path.writeText
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertTrue

class ChatTest : AppTest() {
    /** A model that goes on and on, as slowly as it is let to. */
    private val gate = CountDownLatch(1)
    private val endless = Script { _, said, _ ->
        if (said > 3) gate.await()
        if (said > 4) Thread.sleep(5)
        letters("a").single()
    }

    @Test
    fun `an answer comes from this phone, and says so`() {
        install()
        val screen = chat().get()
        ask(screen, "hi")
        untilIdle()
        assertEquals(Turn("hi", "hello", Source.PHONE, last.why, Stage.DONE), last)
        val row = row(screen)
        assertEquals(listOf("hi", "hello"), listOf(row.shows(R.id.asked), row.shows(R.id.answer)))
        assertContains(row.shows(R.id.badge), "this phone")
        assertEquals(View.GONE, row.view<Button>(R.id.act).visibility)
        assertEquals("", screen.view<EditText>(R.id.question).text.toString())
    }

    @Test
    fun `a server that cannot be reached is a reason for the phone's answer`() {
        install()
        Phone.script = Script { _, said, _ -> if (said == 0) letters("x").single() else EOS }
        parts.settings.server = Endpoint("http://127.0.0.1:1", null)
        ask(chat().get(), "hi")
        untilIdle()
        assertEquals(listOf("x", Source.PHONE), listOf(last.answer, last.source))
    }

    @Test
    fun `without a model it says so`() {
        ask(chat().get(), "hi")
        untilIdle()
        assertEquals(Stage.FAILED, last.stage)
        assertContains(last.why, "There is no model on this phone yet")
    }

    @Test
    fun `stopping keeps what came`() {
        install()
        Phone.script = endless
        val screen = chat().get()
        ask(screen, "hi")
        until("it says something") { last.answer.length >= 3 }
        assertFalse(screen.view<Button>(R.id.send).isEnabled)
        screen.press(R.id.stop)
        gate.countDown()
        untilIdle()
        assertEquals(Stage.STOPPED, last.stage)
        assertContains(last.answer, "aaa")
        assertTrue(screen.view<Button>(R.id.send).isEnabled)
    }

    @Test
    fun `the notification can stop it`() {
        install()
        Phone.script = endless
        ask(chat().get(), "hi")
        until("it says something") { last.answer.isNotEmpty() }
        val stop = android.content.Intent(app, WorkService::class.java).setAction(WorkService.STOP)
        Robolectric.buildService(WorkService::class.java, stop).create().startCommand(0, 2)
        gate.countDown()
        untilIdle()
        assertEquals(Stage.STOPPED, last.stage)
    }

    @Test
    fun `a rotation loses neither the conversation nor what is being typed`() {
        install()
        val controller = chat()
        ask(controller.get(), "hi")
        untilIdle()
        controller.get().type(R.id.question, "and th")
        controller.recreate()
        until("it is shown again") {
            controller
                .get()
                .view<android.widget.ListView>(R.id.turns)
                .adapter.count == 1
        }
        assertEquals("hello", row(controller.get()).shows(R.id.answer))
        assertEquals(
            "and th",
            controller
                .get()
                .view<EditText>(R.id.question)
                .text
                .toString(),
        )
    }

    @Test
    fun `a process that dies in the middle of an answer leaves what came`() {
        val path = folder.resolve("c.json")
        val before = Conversation(path)
        before.add("first")
        before.change { it.copy(answer = "done", source = Source.PHONE, stage = Stage.DONE) }
        before.add("second")
        val turns = Conversation(path).turns.value
        assertEquals(listOf(Stage.DONE, Stage.STOPPED), turns.map { it.stage })
        assertEquals(listOf("done", ""), turns.map { it.answer })
        path.writeText(path.readText().take(20))
        assertEquals(emptyList(), Conversation(path).turns.value)
    }

    @Test
    fun `short of memory, the model is put away, and loaded again for the next question`() {
        install()
        ask(chat().get(), "hi")
        untilIdle()
        assertEquals(EngineState.Ready, parts.model.state.value)
        app.onTrimMemory(ComponentCallbacks2.TRIM_MEMORY_UI_HIDDEN)
        assertEquals(EngineState.Ready, parts.model.state.value)
        app.onTrimMemory(ComponentCallbacks2.TRIM_MEMORY_BACKGROUND)
        until("it is put away") { parts.model.state.value == EngineState.Empty }
        ask(chat().get(), "again")
        untilIdle()
        assertEquals("hello", last.answer)
    }

    @Test
    fun `an answer that is running when memory is short says what happened`() {
        install()
        Phone.script = endless
        ask(chat().get(), "hi")
        until("it says something") { last.answer.isNotEmpty() }
        app.onTrimMemory(ComponentCallbacks2.TRIM_MEMORY_BACKGROUND)
        gate.countDown()
        untilIdle()
        assertEquals(Stage.STOPPED, last.stage)
        assertContains(last.why, "The phone needed the memory")
        assertContains(last.answer, "a")
        until("it is put away") { parts.model.state.value == EngineState.Empty }
    }

    @Test
    fun `a model that is larger than the free memory is refused before it is loaded`() {
        install()
        Phone.freeMemory = 10
        ask(chat().get(), "hi")
        untilIdle()
        assertContains(last.why, "of memory")
        Phone.freeMemory = null
        ask(chat().get(), "hi")
        untilIdle()
        assertEquals("hello", last.answer)
    }

    @Test
    fun `a hot phone answers shortly, and one that is too hot not at all`() {
        install()
        Phone.script = says("a".repeat(200))
        val power = shadowOf(app.getSystemService(PowerManager::class.java))
        val lengths = listOf(
            PowerManager.THERMAL_STATUS_NONE,
            PowerManager.THERMAL_STATUS_MODERATE,
            PowerManager.THERMAL_STATUS_SEVERE,
            PowerManager.THERMAL_STATUS_CRITICAL,
        ).map { status ->
            power.setCurrentThermalStatus(status)
            ask(chat().get(), "hi")
            untilIdle()
            last.answer.length
        }
        assertEquals(listOf(200, 128, 48, 0), lengths)
        assertContains(last.why, "too hot")
    }
}
