package crayon.app.customize

import android.os.Bundle
import android.view.View
import android.widget.EditText
import android.widget.LinearLayout
import crayon.app.AppTest
import crayon.app.EOS
import crayon.app.Endpoint
import crayon.app.Phone
import crayon.app.R
import crayon.app.view
import crayon.runtime.backends.Script
import org.junit.After
import org.junit.Before
import org.junit.Test
import org.robolectric.Robolectric
import org.robolectric.android.controller.ActivityController
import java.util.concurrent.CountDownLatch
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFalse

class CustomizeTest : AppTest() {
    private val service = FakeService()

    @Before
    fun start() {
        install()
        parts.settings.service = Endpoint(service.url, null)
    }

    @After
    fun stop() = service.close()

    private fun screen(): ActivityController<CustomizeActivity> = Robolectric.buildActivity(CustomizeActivity::class.java).setup()

    private fun CustomizeActivity.example(row: Int, question: String, answer: String) {
        val example = view<LinearLayout>(R.id.examples).getChildAt(row)!!
        example.view<EditText>(R.id.question).setText(question)
        example.view<EditText>(R.id.answer).setText(answer)
    }

    private fun CustomizeActivity.preview() {
        press(R.id.preview)
        startService()
        untilIdle()
    }

    private fun CustomizeActivity.send() {
        press(R.id.send)
        startService()
        untilIdle()
    }

    private val CustomizeActivity.canSend get() = view<View>(R.id.send).visibility == View.VISIBLE

    @Test
    fun `what is shown is sent, byte for byte, and only when the user says so`() {
        val screen = screen().get()
        screen.example(0, "wake me at seven", "alarm.set(time=7:00 AM, day=tomorrow)")
        screen.example(1, "wake me at six", "alarm.set(time=6:00 AM, day=tomorrow)")
        assertFalse(screen.canSend)
        screen.preview()
        assertEquals(emptyList(), service.sent)
        val body = screen.shows(R.id.body)
        assertContains(body, "\"alpha\":[")
        assertFalse("wake" in body || "alarm" in body)
        assertContains(screen.shows(R.id.message), "These ${body.toByteArray().size} bytes")
        assertContains(screen.shows(R.id.message), service.url)
        screen.send()
        assertEquals(listOf(body), service.sent)
        val written = parts.sent.read().single()
        assertEquals(listOf(service.url, body), listOf(written.server, written.query))
        assertContains(written.outcome.orEmpty(), "archive")
        assertContains(screen.shows(R.id.message), "The model was not customized.")
        ask(chat().get(), "hi")
        untilIdle()
        assertEquals("hello", last.answer)
    }

    @Test
    fun `after a change of the examples it has to be looked at again`() {
        val screen = screen().get()
        screen.example(0, "wake me at seven", "alarm.set(time=7:00 AM, day=tomorrow)")
        screen.preview()
        assertEquals(true, screen.canSend)
        screen.example(0, "wake me at eight", "alarm.set(time=8:00 AM, day=tomorrow)")
        until("it is gone") { !screen.canSend }
        assertEquals("", screen.shows(R.id.body))
        val gate = CountDownLatch(1)
        Phone.script = Script { _, _, _ ->
            gate.await()
            EOS
        }
        screen.press(R.id.preview)
        startService()
        screen.example(0, "wake me at nine", "alarm.set(time=9:00 AM, day=tomorrow)")
        gate.countDown()
        untilIdle()
        assertFalse(screen.canSend)
        screen.press(R.id.preview)
        screen.example(0, "wake me at ten", "alarm.set(time=10:00 AM, day=tomorrow)") // before the task begins
        startService()
        untilIdle()
        assertFalse(screen.canSend)
        screen.preview()
        assertEquals(true, screen.canSend)
    }

    @Test
    fun `a pool that changes between looking and sending is not sent what nobody saw`() {
        val screen = screen().get()
        screen.example(0, "wake me at seven", "alarm.set(time=7:00 AM, day=tomorrow)")
        screen.preview()
        service.version = "fedcba9876543210"
        screen.send()
        assertEquals(emptyList(), service.sent)
        assertEquals(emptyList(), parts.sent.read())
        assertContains(screen.shows(R.id.message), "another pool now")
    }

    @Test
    fun `bad examples, no service and no network are said`() {
        val screen = screen().get()
        screen.preview()
        assertContains(screen.shows(R.id.message), "There are no examples")
        screen.example(1, "wake me at seven", "")
        screen.preview()
        assertContains(screen.shows(R.id.message), "completion is empty")
        screen.example(1, "wake me at seven", "x")
        parts.settings.service = null
        screen.preview()
        assertContains(screen.shows(R.id.message), "No customization service is set")
        service.close()
        parts.settings.service = Endpoint(service.url, null)
        screen.preview()
        assertContains(screen.shows(R.id.message), "he connection failed")
        assertFalse(screen.canSend)
    }

    @Test
    fun `what was typed outlives a rotation and the process`() {
        val first = screen()
        first.get().press(R.id.more)
        first.get().example(3, "wake me", "alarm")
        val kept = Bundle()
        first.saveInstanceState(kept)
        val second = Robolectric.buildActivity(CustomizeActivity::class.java).setup(kept).get()
        val row = second.view<LinearLayout>(R.id.examples).getChildAt(3)!!
        assertEquals(listOf("wake me", "alarm"), listOf(row.shows(R.id.question), row.shows(R.id.answer)))
    }
}
