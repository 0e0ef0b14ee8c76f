package crayon.app.model

import android.app.Activity
import android.content.Intent
import android.net.Uri
import com.sun.net.httpserver.HttpServer
import crayon.app.AppTest
import crayon.app.Documents
import crayon.app.Kind
import crayon.app.Phone
import crayon.app.R
import crayon.app.bundleFiles
import crayon.app.sha256
import crayon.app.writeArchive
import crayon.runtime.TrustedKeys
import crayon.runtime.bundle.Bundle
import kotlinx.coroutines.runBlocking
import org.junit.Test
import org.robolectric.Robolectric
import org.robolectric.Shadows.shadowOf
import java.net.InetSocketAddress
import java.nio.file.Path
import kotlin.io.path.createDirectories
import kotlin.io.path.listDirectoryEntries
import kotlin.io.path.moveTo
import kotlin.io.path.name
import kotlin.io.path.readBytes
import kotlin.io.path.writeBytes
import kotlin.io.path.writeText
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertIs
import kotlin.test.assertTrue

class ImportTest : AppTest() {
    private val name get() = parts.model.installed.value
        ?.name

    /** What is on the disk of the app, but for archives of the tests. */
    private val kept get() = folder
        .listDirectoryEntries()
        .map { it.name }
        .filter { !it.startsWith("test-") }
        .sorted()

    private fun archive(name: String, files: Map<String, ByteArray> = bundleFiles(name)): Path =
        writeArchive(folder.resolve("test-$name.crayon"), name, files)

    private fun import(uri: Uri): Imported =
        runBlocking {
            parts.importing.document(uri) { _, _ -> }
            parts.importing.imported.value
        }

    private fun refused(uri: Uri): String {
        val before = kept
        val why = assertIs<Imported.Failed>(import(uri)).why
        assertEquals(before, kept)
        return why
    }

    private fun answers(): String {
        ask(chat().get(), "hi")
        untilIdle()
        return last.answer
    }

    @Test
    fun `a document that is picked is installed, and answers`() {
        val screen = Robolectric.buildActivity(ModelActivity::class.java).setup().get()
        assertContains(screen.shows(R.id.installed), "no model")
        screen.press(R.id.pick)
        val picker = shadowOf(screen).nextStartedActivityForResult
        assertEquals(Intent.ACTION_OPEN_DOCUMENT, picker.intent.action)
        val picked = Intent().setData(Documents.of(archive("first")))
        shadowOf(screen).receiveResult(picker.intent, Activity.RESULT_OK, picked)
        startService()
        untilIdle()
        assertEquals("The model is installed.", screen.shows(R.id.message))
        assertContains(screen.shows(R.id.installed), "first")
        assertEquals("hello", answers())
        assertEquals(listOf("conversation.json", "model"), kept)
    }

    @Test
    fun `a bad bundle is refused, and the one before still works`() {
        import(Documents.of(archive("first")))
        val good = bundleFiles("second")
        val flipped = good + ("tokenizer.json" to good.getValue("tokenizer.json").also { it[9] = (it[9] + 1).toByte() })
        val cases = mapOf(
            "flipped" to archive("flipped", flipped),
            "lacking" to archive("lacking", bundleFiles("second") - "model.onnx"),
            "leading out" to archive("out", bundleFiles("second") + ("../evil" to ByteArray(3))),
            "cut" to archive("whole").let { whole -> folder.resolve("test-cut").also { it.writeBytes(whole.readBytes().copyOf(300)) } },
            "no archive" to folder.resolve("test-text").also { it.writeText("hello") },
        )
        for ((case, path) in cases) {
            assertTrue(refused(Documents.of(path)).length > 20, case)
            assertEquals("first", name, case)
        }
        assertContains(refused(Documents.of(folder.resolve("test-absent"))), "cannot be read")
        assertEquals("hello", answers())
    }

    @Test
    fun `what no trusted key has signed is refused`() {
        import(Documents.of(archive("first")))

        fun with(keys: TrustedKeys): String {
            val model = Model(folder, Keys(keys), emptyMap(), { null }) {}
            val importing = Importing(app.contentResolver, folder, model) { Long.MAX_VALUE }
            return runBlocking {
                importing.document(Documents.of(archive("second"))) { _, _ -> }
                assertIs<Imported.Failed>(importing.imported.value).why
            }
        }
        assertContains(with(TrustedKeys(emptyList())), "built without keys")
        val public = ByteArray(32) { it.toByte() }
        val key = crayon.runtime.Key(
            sha256(public).take(16),
            java.util.Base64
                .getEncoder()
                .encodeToString(public),
            "2026-01-01",
        )
        assertContains(with(TrustedKeys(listOf(key))), "not signed")
        runBlocking { parts.model.look() }
        assertEquals("first", name)
    }

    @Test
    fun `an app that was built without keys trusts nobody`() {
        assertEquals(emptyList(), checkNotNull(Keys.of(app).trusted).keys)
    }

    @Test
    fun `without space it says how much is missing, before it copies`() {
        import(Documents.of(archive("first")))
        Phone.freeSpace = 64L shl 20
        assertContains(refused(Documents.of(archive("second"))), "MB are free")
        assertEquals("first", name)
    }

    @Test
    fun `an import that is stopped leaves the earlier bundle and no copy`() {
        import(Documents.of(archive("first")))
        val second = Documents.of(archive("second"))
        for (at in listOf(1, 2, 3)) {
            var steps = 0
            parts.work.begin(Kind.INSTALL) { parts.importing.document(second) { _, _ -> if (++steps == at) parts.work.cancel() } }
            startService()
            untilIdle()
            assertTrue(steps >= at)
            assertEquals(listOf("model"), kept)
            assertEquals(Bundle.open(folder.resolve("model")).manifest.name, name)
            if (at < 3) assertEquals("first", name) // the third are the last bytes
        }
    }

    @Test
    fun `a kill in the middle leaves the earlier bundle and no copy`() {
        import(Documents.of(archive("first")))
        // Where it hurts most: the old bundle is put aside, and the new one not yet in its place.
        folder.resolve("model").moveTo(folder.resolve(".model.replaced-0123abcd"))
        folder.resolve("picked.crayon").writeText("the beginning of a docu")
        folder.resolve(".model.partial-1-0123abcd").createDirectories()
        folder.resolve(".model.partial-1-0123abcd.lock").writeText("")
        parts.start()
        until("it has looked") { kept.none { it == "picked.crayon" } && "model" in kept }
        assertEquals("hello", answers())
        import(Documents.of(archive("second")))
        assertEquals("second", name)
        assertEquals(listOf("conversation.json", "model"), kept)
    }

    @Test
    fun `a download is installed, and one that fails leaves what was there`() {
        val content = archive("first").readBytes()
        val server = HttpServer.create(InetSocketAddress("127.0.0.1", 0), 0)
        server.createContext("/") { exchange ->
            if (exchange.requestURI.path == "/m.crayon") {
                exchange.sendResponseHeaders(200, content.size.toLong())
                exchange.responseBody.use { it.write(content) }
            } else {
                exchange.sendResponseHeaders(404, -1)
                exchange.close()
            }
        }
        server.start()
        try {
            val url = "http://127.0.0.1:${server.address.port}"
            val screen = Robolectric.buildActivity(ModelActivity::class.java).setup().get()
            for ((address, said) in listOf(
                "$url/m.crayon" to "The model is installed.",
                "$url/other" to "There is no such file",
                "http://example.org/m.crayon" to "use https",
                "what" to "not the address",
            )) {
                screen.type(R.id.address, address)
                screen.press(R.id.download)
                startService()
                untilIdle()
                assertContains(screen.shows(R.id.message), said)
                assertEquals("first", name)
            }
        } finally {
            server.stop(0)
        }
        assertEquals(listOf("model"), kept)
    }
}
