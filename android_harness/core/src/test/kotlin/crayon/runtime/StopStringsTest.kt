package crayon.runtime

import org.junit.jupiter.api.Test
import kotlin.test.assertEquals
import kotlin.test.assertNull

class StopStringsTest {
    private fun cut(text: String, strings: List<String>, size: Int): Pair<String, String?> {
        val stops = StopStrings(strings)
        val shown = StringBuilder()
        for (piece in text.chunked(size)) {
            shown.append(stops.push(piece))
            if (stops.found != null) break
        }
        if (stops.found == null) shown.append(stops.flush())
        return shown.toString() to stops.found
    }

    @Test
    fun `where the text is cut does not depend on how it comes`() {
        for ((text, wanted) in listOf(
            "one STOP two" to ("one " to "STOP"),
            "aab aabb" to ("aab " to "aabb"),
            "nothing ST" to ("nothing ST" to null),
            "xENDSTOP" to ("x" to "END"),
        )) {
            for (size in 1..text.length) assertEquals(wanted, cut(text, listOf("STOP", "aabb", "END"), size), "$text in $size")
        }
    }

    @Test
    fun `nothing is held back that cannot become a stop string`() {
        val stops = StopStrings(listOf("STOP"))
        assertEquals("abc", stops.push("abcS"))
        assertEquals("SX", stops.push("X"))
        assertNull(stops.found)
    }
}
