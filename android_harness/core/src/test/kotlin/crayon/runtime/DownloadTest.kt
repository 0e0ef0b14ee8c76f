package crayon.runtime

import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.async
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.delay
import kotlinx.coroutines.runBlocking
import kotlinx.serialization.builtins.ListSerializer
import kotlinx.serialization.builtins.nullable
import kotlinx.serialization.builtins.serializer
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import java.net.ServerSocket
import java.net.URL
import java.nio.file.Path
import java.util.UUID
import kotlin.io.path.createDirectory
import kotlin.io.path.fileSize
import kotlin.io.path.listDirectoryEntries
import kotlin.io.path.name
import kotlin.io.path.readBytes
import kotlin.io.path.writeText
import kotlin.test.assertContains
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** Against `Files` of servers.py, which cuts, changes and lies. */
class DownloadTest {
    @TempDir
    lateinit var folder: Path
    private val archive = fixtures.resolve("nano.crayon")
    private val hash = sha256(archive)
    private val half = archive.fileSize() / 2
    private val target get() = folder.resolve("a.crayon")
    private val names get() = folder.listDirectoryEntries().map { it.name }.sorted()
    private val cutShort = listOf(".a.crayon.part", ".a.crayon.part.json")

    /** An address that nobody has asked for before. */
    private fun url(kind: String, name: String = "nano.crayon") = "${servers.urls.getValue("files")}/$kind/${UUID.randomUUID()}/$name"

    /** The ranges that were asked for there. */
    private fun asked(url: String): List<String?> {
        val files = servers.urls.getValue("files")
        val content = URL(url.replaceFirst(files, "$files/asked")).readBytes()
        return decodeJson(ListSerializer(String.serializer().nullable), content)
    }

    private fun whole() = assertContentEquals(archive.readBytes(), target.readBytes())

    @Test
    fun `a file comes whole, with its progress, and takes the place of another`() =
        runBlocking {
            target.writeText("old")
            val seen = ArrayList<Pair<Long, Long?>>()
            download(url("plain"), target, DownloadOptions(sha256 = hash)) { done, total -> seen += done to total }
            whole()
            assertEquals(listOf("a.crayon"), names)
            assertEquals(archive.fileSize() to archive.fileSize(), seen.last())
            assertEquals(seen.sortedBy { it.first }, seen)
        }

    @Test
    fun `a connection that is cut is gone on with, at once`() =
        runBlocking {
            val url = url("cut")
            download(url, target)
            whole()
            assertEquals(listOf(null, "bytes=$half-"), asked(url))
        }

    @Test
    fun `a download that failed is gone on with by the next one, in whatever process`() =
        runBlocking {
            val url = url("stops")
            val error = assertFailsWith<ServerError> { download(url, target) }
            assertContains(error.message!!, "cannot answer now")
            assertEquals(cutShort, names)
            assertEquals(half, folder.resolve(".a.crayon.part").fileSize())
            var least = Long.MAX_VALUE
            download(url, target) { done, _ -> least = minOf(least, done) }
            whole()
            assertTrue(least > half)
            assertEquals(listOf(null, "bytes=$half-", "bytes=$half-"), asked(url))
            assertEquals(listOf("a.crayon"), names)
        }

    @Test
    fun `a process that is killed leaves what came`() =
        runBlocking {
            val url = url("plain")
            val child = ProcessBuilder(jvm("crayon.runtime.FetchingKt", url, "$target")).inheritIO().start()
            assertEquals(9, child.waitFor())
            assertEquals(cutShort, names)
            val came = folder.resolve(".a.crayon.part").fileSize()
            assertTrue(came in 100_000 until archive.fileSize())
            download(url, target, DownloadOptions(sha256 = hash))
            whole()
            assertEquals(listOf(null, "bytes=$came-"), asked(url))
        }

    @Test
    fun `a full disk is said, and when there is space again it goes on`() =
        runBlocking {
            val url = url("plain")
            assertContains(filled("download", url, "$target"), "File too large | free some space")
            assertEquals(cutShort, names)
            download(url, target, DownloadOptions(sha256 = hash))
            whole()
            assertContains(asked(url).last().orEmpty(), "bytes=")
        }

    @Test
    fun `what was whole already is not fetched again`() =
        runBlocking {
            val url = url("plain")
            download(url, folder.resolve("b"))
            folder.resolve("b").toFile().renameTo(folder.resolve(".a.crayon.part").toFile())
            folder.resolve(".a.crayon.part.json").writeText("""{"url": "$url", "etag": "\"the file\""}""")
            download(url, target, DownloadOptions(sha256 = hash))
            whole()
            assertEquals(listOf(null, "bytes=${archive.fileSize()}-"), asked(url))
        }

    @Test
    fun `it starts anew where the server has another file now`() =
        runBlocking {
            val url = url("changed")
            assertFailsWith<ServerError> { download(url, target) }
            download(url, target)
            assertContentEquals(archive.readBytes().reversedArray(), target.readBytes())
            assertEquals(listOf(null, "bytes=$half-", "bytes=$half-"), asked(url))
        }

    @Test
    fun `it starts anew where the server sends no parts, no ETag, another part, or is another one`() =
        runBlocking {
            for ((kind, ranges) in listOf(
                "rangeless" to listOf(null, "bytes=$half-"),
                "untagged" to listOf(null, null),
                "misplaced" to listOf(null, "bytes=$half-", null),
            )) {
                val url = url(kind)
                download(url, target, DownloadOptions(sha256 = hash))
                whole()
                assertEquals(ranges, asked(url), kind)
            }
            val url = url("stops")
            assertFailsWith<ServerError> { download(url, target) }
            val other = url("plain")
            download(other, target, DownloadOptions(sha256 = hash))
            assertEquals(listOf<String?>(null), asked(other))
        }

    @Test
    fun `a server that lies about the length, or sends another file, leaves nothing that would be used`() =
        runBlocking {
            val quick = DownloadOptions(sha256 = hash, deadlineMs = 1500)
            assertContains(assertFailsWith<ServerError> { download(url("long"), target, quick) }.message!!, "cut")
            for (kind in listOf("wrong", "short")) {
                val error = assertFailsWith<IntegrityError>(kind) { download(url(kind), target, DownloadOptions(sha256 = hash)) }
                assertContains(error.message!!, "not the file of this SHA-256")
                assertEquals(emptyList(), names, kind)
            }
            val small = DownloadOptions(largest = 1000)
            assertContains(assertFailsWith<IntegrityError> { download(url("plain"), target, small) }.message!!, "1000 are the most")
            Unit
        }

    @Test
    fun `a bundle is installed from an address, and nothing of a damaged one`() =
        runBlocking {
            val model = folder.resolve("model")
            val trusted = TrustedKeys.read(fixtures.resolve("keys.json"))
            val url = url("stops", "signed.crayon")
            val check = { document: ByteArray, signature: ByteArray? -> trusted.verify(document, signature, url).let {} }
            assertFailsWith<ServerError> { installFrom(url, model, check = check) }
            assertEquals(listOf(".model.part", ".model.part.json"), names)
            installFrom(url, model, check = check).verify()
            assertEquals(listOf("model"), names)
            assertContains(assertFailsWith<OutputError> { installFrom(url, model) }.message!!, "exists already")
            for (kind in listOf("wrong", "short")) assertFailsWith<BundleError>(kind) { installFrom(url(kind), model, replace = true) }
            assertFailsWith<SignatureError> { installFrom(url("plain"), model, replace = true, check = check) }
            assertEquals(listOf("model"), names)
            trusted.verify(
                crayon.runtime.bundle.Bundle
                    .open(model, verify = true),
            )
            Unit
        }

    @Test
    fun `two downloads to one place are one too many, and a cancelled one is gone on with`() =
        runBlocking {
            val url = url("slow")
            val first = async(Dispatchers.IO) { download(url, target, DownloadOptions(timeoutMs = 2000)) }
            while (names != cutShort || folder.resolve(".a.crayon.part").fileSize() < 100_000) delay(20)
            val error = assertFailsWith<InvalidInput> { download(url, target) }
            assertContains(error.message!!, "another download to this place is running")
            first.cancelAndJoin()
            val plain = url("plain")
            folder.resolve(".a.crayon.part.json").writeText("""{"url": "$plain", "etag": "\"the file\""}""")
            download(plain, target, DownloadOptions(sha256 = hash))
            assertEquals(listOf<String?>("bytes=100000-"), asked(plain))
        }

    @Test
    fun `a redirect is followed, each time anew, and the key goes to its own server only`() =
        runBlocking {
            val url = url("moved.elsewhere.cut")
            download(url, target, DownloadOptions(sha256 = hash))
            whole()
            val ranges = listOf(null, "bytes=$half-")
            for (passed in listOf("moved.elsewhere.cut", "elsewhere.cut", "cut")) {
                assertEquals(ranges, asked(url.replace("moved.elsewhere.cut", passed)), passed)
            }
            val keyed = DownloadOptions(sha256 = hash, apiKey = "secret")
            download(url("moved.keyed"), target, keyed)
            download(url("elsewhere.keyless"), target, keyed)
            assertContains(assertFailsWith<ServerError> { download(url("moved.keyed"), target) }.message!!, "refuses")
            Unit
        }

    @Test
    fun `a redirect that leads to where nobody should ask is refused`() =
        runBlocking {
            for ((kind, said) in listOf(
                "circles" to "redirects more than 5 times",
                "unencrypted" to "redirects to http://example.org/a: everybody on the way",
                "unfetchable" to "redirects to ftp://example.org/a: this is not the address",
                "nowhere" to "redirects to nowhere",
            )) {
                val error = assertFailsWith<ServerError>(kind) { download(url(kind), target) }
                assertContains(error.message!!, said)
                assertTrue("signed" !in error.message!!)
            }
            assertEquals(emptyList(), names)
        }

    @Test
    fun `what cannot be fetched is said`() =
        runBlocking {
            assertContains(assertFailsWith<ServerError> { download(url("missing"), target) }.message!!, "no such file")
            val free = ServerSocket(0).use { it.localPort }
            val began = System.nanoTime()
            assertContains(assertFailsWith<ServerError> { download("http://127.0.0.1:$free/a", target) }.message!!, "the connection failed")
            assertTrue(seconds(began) < 5)
            assertFailsWith<InvalidInput> { download("http://example.org/a", target) }
            assertFailsWith<InvalidInput> { download("https://example.org/a#b", target) }
            assertFailsWith<InvalidInput> { download(url("plain"), target, DownloadOptions(sha256 = "abc")) }
            target.createDirectory()
            assertFailsWith<OutputError> { download(url("plain"), target) }
            Unit
        }

    @Test
    fun `the query of an address is sent, and not told`() =
        runBlocking {
            download(url("plain") + "?token=secret", target, DownloadOptions(sha256 = hash))
            val error = assertFailsWith<ServerError> { download(url("missing") + "?token=secret", target) }
            assertTrue("secret" !in error.message!!)
        }
}
