package crayon.app.calls

import android.app.AlertDialog
import android.content.Intent
import android.provider.AlarmClock
import android.view.View
import android.widget.Button
import crayon.app.AppTest
import crayon.app.Phone
import crayon.app.R
import crayon.app.says
import crayon.app.view
import org.junit.Test
import org.robolectric.Shadows.shadowOf
import org.robolectric.shadows.ShadowAlertDialog
import org.robolectric.shadows.ShadowToast
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertNotNull
import kotlin.test.assertNull

class ConfirmTest : AppTest() {
    private val screen by lazy { chat().get() }

    private fun said(answer: String): Button {
        install()
        Phone.script = says(answer)
        ask(screen, "do it")
        untilIdle()
        assertEquals(answer, last.answer)
        return row(screen).view(R.id.act)
    }

    private val started: Intent? get() = shadowOf(app).nextStartedActivity

    @Test
    fun `nothing is started before the user says yes, and then exactly what was shown`() {
        val button = said("timer.start(n=5, unit=min)")
        assertEquals(View.VISIBLE, button.visibility)
        assertNull(started)
        button.performClick()
        assertNull(started)
        val dialog = ShadowAlertDialog.getLatestDialog() as AlertDialog
        assertEquals("Start a timer of 5 min", shadowOf(dialog).message.toString())
        dialog.getButton(AlertDialog.BUTTON_POSITIVE).performClick()
        until("it is started") { shadowOf(app).peekNextStartedActivity() != null }
        val intent = assertNotNull(started)
        assertEquals(AlarmClock.ACTION_SET_TIMER, intent.action)
        assertEquals(300, intent.getIntExtra(AlarmClock.EXTRA_LENGTH, 0))
        assertNull(started)
    }

    @Test
    fun `a no starts nothing`() {
        said("message.send(to=anna, body=i am late)").performClick()
        (ShadowAlertDialog.getLatestDialog() as AlertDialog).getButton(AlertDialog.BUTTON_NEGATIVE).performClick()
        until("the dialog is gone") { !ShadowAlertDialog.getLatestDialog().isShowing }
        assertNull(started)
    }

    @Test
    fun `unknown and malformed calls are text`() {
        for (answer in listOf(
            "phone.wipe(all=yes)",
            "timer.start(n=5, unit=min",
            "timer.start(n=5, unit=years)",
            "weather.get(city=rome)",
        )) {
            assertEquals(View.GONE, said(answer).visibility, answer)
        }
        assertNull(started)
        assertNull(ShadowAlertDialog.getLatestDialog())
    }

    @Test
    fun `where no app does it, the map is tried, and else it is said`() {
        shadowOf(app).checkActivities(true)
        said("nav.route(to=park, by=car)").performClick()
        (ShadowAlertDialog.getLatestDialog() as AlertDialog).getButton(AlertDialog.BUTTON_POSITIVE).performClick()
        until("it is said") { ShadowToast.getTextOfLatestToast() != null }
        assertContains(ShadowToast.getTextOfLatestToast(), "No app on this phone")
    }
}
