package crayon.app.calls

import kotlinx.serialization.Serializable
import kotlinx.serialization.json.Json
import org.junit.Assume.assumeTrue
import org.junit.Test
import java.nio.file.Path
import kotlin.io.path.readText
import kotlin.test.assertEquals
import kotlin.test.assertNull

/** What the Python side reads in a text. @property function null: no call. */
@Serializable
private class ExpectedCall(val text: String, val function: String?, val arguments: Map<String, String>)

class CallTest {
    private val alarm = Call("alarm.set", mapOf("time" to "7:30 AM", "day" to "monday"))

    @Test
    fun `the same call in every style and naming`() {
        for (text in listOf(
            "alarm.set(time=7:30 AM, day=monday)",
            "set_alarm(arg_time=7:30 AM, arg_day=monday)",
            "ALs(\$te=7:30 AM, \$dy=monday)",
            """{"fn": "alarm.set", "time": "7:30 AM", "day": "monday"}""",
            """{"fn": "ALs", "${'$'}te": "7:30 AM", "${'$'}dy": "monday"}""",
            "set_alarm | arg_time: 7:30 AM | arg_day: monday",
        )) {
            assertEquals(alarm, readCall(text), text)
        }
        assertEquals(Call("timer.start", mapOf("n" to "5", "unit" to "min")), readCall("""{"fn": "timer.start", "n": 5, "unit": "min"}"""))
    }

    @Test
    fun `what is not exactly a call is none`() {
        for (text in listOf(
            "",
            "hello",
            "alarm.set",
            "alarm.set()",
            "alarm.set(time=7:30 AM)",
            "alarm.set(day=monday, time=7:30 AM)",
            "alarm.set(time=7:30 AM, day=monday, day=sunday)",
            "alarm.set(time=7:30 AM, day=)",
            "alarm.set(time=7:30 AM,day=monday)",
            "alarm.set(time=7:30 AM, arg_day=monday)",
            "alarm.set(time=7:30 AM, day=monday) and more",
            " alarm.set(time=7:30 AM, day=monday)",
            "alarm.set(time=7:30 AM, day=monday)\n",
            "alarm.delete(time=7:30 AM, day=monday)",
            "weather.get(city=rome, day=today, deg=F)",
            "{\"fn\": \"alarm.set\", \"time\": \"7:30 AM\", \"day\": \"monday\"",
            """{"fn":"alarm.set","time":"7:30 AM","day":"monday"}""",
            """{"fn": "alarm.set", "time": "7:30 AM", "time": "8:30 AM", "day": "monday"}""",
            """{"fn": "timer.start", "n": "5", "unit": "min"}""",
            """{"fn": "timer.start", "n": true, "unit": "min"}""",
            """{"fn": "timer.start", "n": null, "unit": "min"}""",
            """{"fn": "timer.start", "n": [5], "unit": "min"}""",
            """["fn", "alarm.set"]""",
            "message.send(to=anna, body=" + "a".repeat(2000) + ")",
            "message.send(to=anna, body=a\u0000b)",
        )) {
            assertNull(readCall(text), text.take(80))
        }
    }

    @Test
    fun `it reads what the Python side reads`() {
        val fixtures = System.getProperty("crayon.fixtures").orEmpty()
        assumeTrue("no crayon.fixtures: the Python tests give it", fixtures.isNotEmpty())
        val expected = Json.decodeFromString<List<ExpectedCall>>(Path.of(fixtures, "calls.json").readText())
        for (case in expected) {
            val wanted = case.function?.let { Call(it, case.arguments) }
            assertEquals(wanted, readCall(case.text), case.text)
        }
    }
}
