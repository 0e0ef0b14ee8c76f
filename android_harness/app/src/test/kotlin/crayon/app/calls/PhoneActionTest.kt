package crayon.app.calls

import android.app.SearchManager
import android.content.Intent
import android.provider.AlarmClock
import android.provider.CalendarContract
import android.provider.MediaStore
import crayon.app.AppTest
import org.junit.Test
import java.time.LocalDateTime
import java.time.ZoneId
import java.util.Calendar
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertNotNull
import kotlin.test.assertNull

class PhoneActionTest : AppTest() {
    /** A Wednesday. */
    private val now = LocalDateTime.of(2026, 7, 1, 9, 0)

    private fun asked(text: String): PhoneAction? = action(assertNotNull(readCall(text), text), now)

    private fun intent(text: String): Intent = assertNotNull(asked(text), text).intents.first()

    @Suppress("DEPRECATION") // its successors need to know what they will find
    private val Intent.all: Map<String, Any?> get() = extras?.keySet().orEmpty().associateWith { extras?.get(it) }

    @Test
    fun `an alarm that rings at the next such time`() {
        for (text in listOf("alarm.set(time=7:30 AM, day=tomorrow)", "alarm.set(time=07:30, day=thursday)")) {
            val intent = intent(text)
            assertEquals(AlarmClock.ACTION_SET_ALARM, intent.action)
            val wanted = mapOf(AlarmClock.EXTRA_HOUR to 7, AlarmClock.EXTRA_MINUTES to 30, AlarmClock.EXTRA_SKIP_UI to false)
            assertEquals<Map<String, Any?>>(wanted, intent.all, text)
        }
        assertEquals(19, intent("alarm.set(time=7:15 PM, day=today)").all[AlarmClock.EXTRA_HOUR])
        assertEquals(0, intent("alarm.set(time=12:15 AM, day=tomorrow)").all[AlarmClock.EXTRA_HOUR])
    }

    @Test
    fun `an alarm of later is one of every week, and says so`() {
        for ((day, number) in listOf("monday" to Calendar.MONDAY, "sunday" to Calendar.SUNDAY, "wednesday" to Calendar.WEDNESDAY)) {
            val action = assertNotNull(asked("alarm.set(time=9:15 AM, day=$day)"))
            assertEquals(arrayListOf(number), action.intents.single().getIntegerArrayListExtra(AlarmClock.EXTRA_DAYS), day)
            assertContains(action.title(app), "every")
        }
        assertNotNull(asked("alarm.set(time=10:00 AM, day=tomorrow)")?.intents?.single()?.getIntegerArrayListExtra(AlarmClock.EXTRA_DAYS))
    }

    @Test
    fun `a timer`() {
        val intent = intent("timer.start(n=5, unit=min)")
        assertEquals(AlarmClock.ACTION_SET_TIMER, intent.action)
        assertEquals<Map<String, Any?>>(mapOf(AlarmClock.EXTRA_LENGTH to 300, AlarmClock.EXTRA_SKIP_UI to false), intent.all)
        assertEquals(20, intent("timer.start(n=20, unit=sec)").all[AlarmClock.EXTRA_LENGTH])
    }

    @Test
    fun `a message, to a number or to whom the user picks`() {
        val intent = intent("message.send(to=anna, body=i am late & sorry)")
        assertEquals(listOf(Intent.ACTION_SENDTO, "smsto:"), listOf(intent.action, intent.dataString))
        assertEquals<Map<String, Any?>>(mapOf("sms_body" to "i am late & sorry"), intent.all)
        assertEquals("smsto:%2B4912345", intent("message.send(to=+4912345, body=hi)").dataString)
        assertContains(assertNotNull(asked("message.send(to=anna, body=hi)")).title(app), "anna")
    }

    @Test
    fun `the way, as navigation and as a map`() {
        val action = assertNotNull(asked("nav.route(to=main station & more, by=bike)"))
        val wanted = listOf("google.navigation:q=main%20station%20%26%20more&mode=b", "geo:0,0?q=main%20station%20%26%20more")
        assertEquals<List<String?>>(wanted, action.intents.map { it.dataString })
        assertEquals<List<String?>>(listOf("geo:0,0?q=park"), asked("nav.route(to=park, by=bus)")?.intents?.map { it.dataString }.orEmpty())
    }

    @Test
    fun `an event`() {
        val intent = intent("calendar.add(what=lunch, who=anna, day=friday, time=1:15 PM)")
        assertEquals(listOf(Intent.ACTION_INSERT, CalendarContract.Events.CONTENT_URI), listOf(intent.action, intent.data))
        val begin = LocalDateTime
            .of(2026, 7, 3, 13, 15)
            .atZone(ZoneId.systemDefault())
            .toInstant()
            .toEpochMilli()
        val wanted = mapOf(CalendarContract.Events.TITLE to "lunch – anna", CalendarContract.EXTRA_EVENT_BEGIN_TIME to begin)
        assertEquals<Map<String, Any?>>(wanted, intent.all)
    }

    @Test
    fun music() {
        val intent = intent("music.play(genre=jazz, room=kitchen)")
        assertEquals(MediaStore.INTENT_ACTION_MEDIA_PLAY_FROM_SEARCH, intent.action)
        val wanted = mapOf(
            MediaStore.EXTRA_MEDIA_FOCUS to "vnd.android.cursor.item/genre",
            MediaStore.EXTRA_MEDIA_GENRE to "jazz",
            SearchManager.QUERY to "jazz",
        )
        assertEquals<Map<String, Any?>>(wanted, intent.all)
    }

    @Test
    fun `values that mean nothing here stay text`() {
        for (text in listOf(
            "alarm.set(time=25:00, day=monday)",
            "alarm.set(time=7:30, day=monday)",
            "alarm.set(time=13:00 PM, day=monday)",
            "alarm.set(time=7:30 AM, day=ranin)",
            "alarm.set(time=7:30 AM, day=Monday)",
            "alarm.set(time=8:30 AM, day=today)",
            "timer.start(n=five, unit=min)",
            "timer.start(n=0, unit=min)",
            "timer.start(n=99999, unit=min)",
            "timer.start(n=5, unit=hours)",
            "nav.route(to=park, by=rocket)",
            "calendar.add(what=lunch, who=anna, day=someday, time=1:15 PM)",
        )) {
            assertNull(asked(text), text)
        }
    }
}
