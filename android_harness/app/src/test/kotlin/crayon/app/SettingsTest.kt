package crayon.app

import crayon.runtime.routing.SentLog
import org.junit.Test
import org.robolectric.Robolectric
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertNull

class SettingsTest : AppTest() {
    @Test
    fun `addresses are kept, and those that would tell others are refused`() {
        val screen = Robolectric.buildActivity(SettingsActivity::class.java).setup().get()
        screen.type(R.id.service, "https://pool.example:8000")
        screen.type(R.id.service_key, "secret")
        screen.press(R.id.save)
        assertEquals(Endpoint("https://pool.example:8000", "secret"), Settings(app).service)
        assertNull(Settings(app).server)
        screen.type(R.id.server, "http://llm.example")
        screen.press(R.id.save)
        assertContains(screen.shows(R.id.message), "use https")
        assertNull(Settings(app).server)
    }

    @Test
    fun `what was sent can be read`() {
        val screen = {
            Robolectric
                .buildActivity(LeftActivity::class.java)
                .setup()
                .get()
                .shows(R.id.sent)
        }
        assertEquals("Nothing has left this phone.", screen())
        val log = SentLog(folder.resolve("sent.jsonl"))
        log.ended(log.sending("https://llm.example", "who was it", 123), "answered", 123)
        for (text in listOf("https://llm.example", "who was it", "123 bytes", "answered")) assertContains(screen(), text)
    }
}
