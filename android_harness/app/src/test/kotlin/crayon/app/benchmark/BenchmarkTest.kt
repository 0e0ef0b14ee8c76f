package crayon.app.benchmark

import android.content.Intent
import android.util.Log
import crayon.app.AppTest
import crayon.app.Kind
import crayon.app.R
import crayon.app.writeArchive
import crayon.runtime.bundle.install
import kotlinx.coroutines.awaitCancellation
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonObject
import kotlinx.serialization.json.jsonPrimitive
import org.junit.Test
import org.robolectric.Robolectric
import org.robolectric.shadows.ShadowLog
import java.nio.file.Path
import kotlin.io.path.exists
import kotlin.io.path.listDirectoryEntries
import kotlin.io.path.readLines
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertTrue

class BenchmarkTest : AppTest() {
    private val results: Path get() = checkNotNull(app.getExternalFilesDir("benchmarks")).toPath()

    /** As `am start` does it. */
    private fun start(vararg extras: Pair<String, String>) {
        val intent = Intent(app, HeadlessBenchmarkActivity::class.java)
        extras.forEach { (name, value) -> intent.putExtra(name, value) }
        val activity = Robolectric.buildActivity(HeadlessBenchmarkActivity::class.java, intent).create().get()
        assertTrue(activity.isFinishing)
    }

    private fun run(vararg extras: Pair<String, String>): List<JsonObject> {
        start(*extras)
        startService()
        untilIdle()
        val name = extras.toMap()["name"] ?: "benchmark.jsonl"
        return results.resolve(name).readLines().map { Json.parseToJsonElement(it).jsonObject }
    }

    private fun JsonObject.text(name: String) = getValue(name).jsonPrimitive.content

    private val JsonObject.what get() = getValue("error").jsonObject.text("what")

    @Test
    fun `it writes its lines to a file, and says where`() {
        install()
        val lines = run("job" to """{"prompt": [8, 16], "decode": [4], "repetitions": 2}""", "name" to "run1.jsonl")
        assertEquals(listOf("pp8", "pp16", "tg4"), lines.map { it.text("test") })
        for (line in lines) {
            assertEquals(2, line.getValue("samples_ts").jsonArray.size)
            assertTrue(line.text("avg_ts").toDouble() > 0)
        }
        assertEquals(listOf(results.resolve("run1.jsonl")), results.listDirectoryEntries())
        assertContains(ShadowLog.getLogsForTag(Benchmark.TAG).map { it.msg }, "benchmark written: ${results.resolve("run1.jsonl")}")
    }

    @Test
    fun `a bundle that a computer has pushed is measured in the place of the installed one`() {
        install(writeArchive(folder.resolve("pushed.crayon"), "pushed"), results.resolve("pushed"))
        assertEquals("pp128", run("bundle" to "pushed").first().text("test"))
    }

    @Test
    fun `what goes wrong is the last line`() {
        assertContains(run().single().what, "no bundle here")
        install()
        assertContains(run("job" to "{").single().what, "the job cannot be read")
        assertContains(run("job" to """{"repetitions": 0}""").single().what, "out of range")
        assertContains(run("bundle" to "../../secret").single().what, "leads out")
        val lines = run("job" to """{"prompt": [8, 4000]}""")
        assertEquals("pp8", lines.first().text("test"))
        assertContains(lines.last().what, "4000 tokens")
    }

    @Test
    fun `a name that leads out of the folder is refused`() {
        install()
        start("name" to "../evil.jsonl")
        startService()
        untilIdle()
        assertTrue(!results.resolve("../evil.jsonl").exists())
        assertContains(ShadowLog.getLogsForTag(Benchmark.TAG).last { it.type == Log.ERROR }.msg, "no name of a file")
    }

    @Test
    fun `while something else runs it says so`() {
        parts.work.begin(Kind.INSTALL) { awaitCancellation() }
        start()
        assertContains(ShadowLog.getLogsForTag(Benchmark.TAG).last().msg, "something else is running")
    }

    @Test
    fun `the screen shows the lines`() {
        install()
        val screen = Robolectric.buildActivity(BenchmarkActivity::class.java).setup().get()
        screen.press(R.id.start)
        startService()
        untilIdle()
        assertContains(screen.shows(R.id.lines), "pp128")
    }
}
