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
import kotlinx.serialization.json.long
import org.junit.Test
import org.robolectric.Robolectric
import org.robolectric.shadows.ShadowLog
import java.nio.file.Path
import kotlin.io.path.exists
import kotlin.io.path.listDirectoryEntries
import kotlin.io.path.readLines
import kotlin.io.path.readText
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

    private fun measure(vararg prompts: Int, rounds: Int = 2) =
        """{"bundle": "", "backend": "auto", "adapter": null, "threads": null, "cpus": null, "process": 0, "work": {"work": "measure",
            "prompts": ${prompts.toList()}, "depths": [0], "generate": 4, "rounds": $rounds, "more": false}}"""

    private fun List<JsonObject>.tests() =
        filter { it.text("type") == "observation" }.associate { line ->
            "${line.text("test")} ${line["n_prompt"] ?: ""}" to line.getValue("samples_ns").jsonArray.map { it.jsonPrimitive.long }
        }

    private fun JsonObject.text(name: String) = getValue(name).jsonPrimitive.content

    private val JsonObject.what get() = text("what").also { assertEquals("failure", text("type")) }

    @Test
    fun `it writes its lines to a file, and says where`() {
        install()
        val tests = run("job" to measure(8, 16), "name" to "run1.jsonl").tests()
        for (test in listOf("prefill 8", "prefill 16")) {
            assertEquals(2, tests.getValue(test).size)
            assertTrue(tests.getValue(test).all { it > 0 })
        }
        assertTrue(tests.keys.any { it.startsWith("decode") } && tests.keys.any { it.startsWith("load_warm") })
        assertEquals(listOf(results.resolve("run1.jsonl")), results.listDirectoryEntries())
        assertContains(ShadowLog.getLogsForTag(Benchmark.TAG).map { it.msg }, "benchmark written: ${results.resolve("run1.jsonl")}")
    }

    @Test
    fun `a bundle that a computer has pushed is measured in the place of the installed one`() {
        install(writeArchive(folder.resolve("pushed.crayon"), "pushed"), results.resolve("pushed"))
        assertEquals("pushed", run("bundle" to "pushed").first { it.text("type") == "profile" }.text("model_name"))
        assertEquals("InvalidInput", run("bundle" to "/data/local/tmp/../secret").single().text("error"))
        assertEquals("BundleError", run("bundle" to "/data/local/tmp/none").single().text("error"))
    }

    @Test
    fun `what goes wrong is the last line`() {
        assertContains(run().single().what, "no bundle here")
        install()
        assertContains(run("job" to "{").single().what, "this is no job")
        assertContains(run("job" to measure(8, rounds = 0)).single().what, "not at least 1")
        assertContains(run("bundle" to "../../secret").single().what, "leads out")
        val lines = run("job" to measure(8, 4000))
        assertContains(lines.dropLast(1).tests().keys, "prefill 8")
        assertContains(lines.last().what, "512")
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
        start("name" to "run2.jsonl")
        assertContains(Json.parseToJsonElement(results.resolve("run2.jsonl").readText()).jsonObject.what, "something else is running")
    }

    @Test
    fun `the screen shows the lines`() {
        install()
        val screen = Robolectric.buildActivity(BenchmarkActivity::class.java).setup().get()
        screen.press(R.id.start)
        startService()
        untilIdle()
        assertContains(screen.shows(R.id.lines), "\"n_prompt\":128")
    }
}
