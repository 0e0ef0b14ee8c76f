package crayon.runtime

import crayon.runtime.bundle.install
import kotlinx.coroutines.runBlocking
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.float
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonPrimitive
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import java.net.ServerSocket
import java.nio.file.Path
import kotlin.io.path.createDirectory
import kotlin.io.path.listDirectoryEntries
import kotlin.io.path.name
import kotlin.io.path.readText
import kotlin.test.AfterTest
import kotlin.test.BeforeTest
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertFalse
import kotlin.test.assertNull
import kotlin.test.assertTrue

class CustomizerTest {
    @TempDir
    lateinit var folder: Path
    private lateinit var engine: Engine
    private val trusted = TrustedKeys.read(fixtures.resolve("keys.json"))
    private val examples = servers.examples

    @BeforeTest
    fun load() =
        runBlocking {
            val bundle = install(fixtures.resolve("nano.crayon"), folder.resolve("nano"))
            engine = Engine.load(bundle.path, threads = 1)
        }

    @AfterTest
    fun close() = engine.close()

    private fun client(name: String, trusted: TrustedKeys? = this.trusted, sent: MutableList<String> = ArrayList()) =
        PoolClient(servers.urls.getValue(name), trusted, deadlineMs = 20_000, onSend = { sent += it.decodeToString() })

    private val kept: List<String> get() = folder.listDirectoryEntries().map { it.name }.sorted()

    @Test
    fun `alpha that would be sent is Python's, and nothing is sent for it`() =
        runBlocking {
            val sent = ArrayList<String>()
            val body = parseJson(Customizer(engine, client("real", sent = sent)).preview(examples).toByteArray()) as JsonObject
            assertEquals(servers.alpha, body.getValue("alpha").jsonArray.map { it.jsonPrimitive.float })
            assertEquals(setOf("base_fingerprint", "pool_version", "alpha"), body.keys)
            assertEquals(emptyList(), sent)
        }

    @Test
    fun `an adapter comes from the real service, proves itself, and is there after a restart`() =
        runBlocking {
            val sent = ArrayList<String>()
            val customizer = Customizer(engine, client("real", sent = sent))
            assertFalse(customizer.restore())
            val before = engine.generate("set an alarm for six\n")
            val made = customizer.customize(examples)
            assertTrue(made.installed, made.reason)
            assertTrue(made.logLoss.isFinite() && made.logitChange > 0)
            assertEquals(listOf(made.sent), sent)
            assertFalse(examples.any { it.completion in made.sent })
            assertEquals(listOf("nano", "nano.customized"), kept)
            val state = folder.resolve("nano.customized/state.json").readText()
            assertContains(state, "\"pool_name\": \"random\"")
            val after = engine.generate("set an alarm for six\n")
            assertTrue(before.logProbabilities != after.logProbabilities)
            Engine.load(folder.resolve("nano"), threads = 1).use { again ->
                assertTrue(Customizer(again, client("real")).restore())
                assertEquals(after.tokenIds, again.generate("set an alarm for six\n").tokenIds)
                assertEquals(
                    listOf(
                        "adapter",
                        "examples.jsonl",
                        "examples.safetensors",
                        "keys.json",
                        "state.json",
                    ),
                    folder
                        .resolve("nano.customized")
                        .listDirectoryEntries()
                        .map {
                            it.name
                        }.sorted(),
                )
            }
            val second = customizer.customize(examples, digits = 2)
            assertTrue(second.installed, second.reason)
            assertTrue(second.alpha.all { (it * 100).rem(1.0) < 1e-4 || (it * 100).rem(1.0) > 1 - 1e-4 })
        }

    @Test
    fun `an adapter that makes the model worse is not installed`() =
        runBlocking {
            val made = Customizer(engine, client("worse")).customize(examples)
            assertFalse(made.installed)
            assertContains(made.reason, "the log-loss of the examples is")
            assertNull(engine.adapter)
            assertEquals(listOf("nano"), kept)
        }

    @Test
    fun `a service that lies, breaks or refuses changes nothing`() =
        runBlocking {
            Customizer(engine, client("real")).customize(examples)
            val before = engine.adapter
            for ((name, said) in listOf(
                "unsigned" to "does not sign its pool",
                "other_base" to "another base model",
                "changed" to "another pool",
                "busy" to "cannot answer now",
                "elsewhere" to "redirects to https://evil.example",
                "nonsense" to "not a readable .crayon archive",
                "endless" to "the most that this can be",
            )) {
                val error = assertFailsWith<CrayonError>(name) { Customizer(engine, client(name)).customize(examples) }
                assertContains(error.message!!, said)
                assertEquals(before, engine.adapter)
                assertEquals(listOf("nano", "nano.customized"), kept, name)
            }
            assertTrue(Customizer(engine, client("real")).restore())
        }

    @Test
    fun `a connection that is cut is gone on with`() =
        runBlocking {
            val client = client("cut")
            assertTrue(Customizer(engine, client).customize(examples).installed)
            val whole = client("cut").also { Customizer(engine, it).customize(examples) }
            assertTrue(client.receivedBytes < whole.receivedBytes + 1000, "the rest came, and not all of it again")
        }

    @Test
    fun `keys of others are not trusted`() =
        runBlocking {
            val others = TrustedKeys.read(fixtures.resolve("revoked.json"))
            assertFailsWith<SignatureError> { Customizer(engine, client("real", others)).customize(examples) }
            Unit
        }

    @Test
    fun `without a network it says so`() =
        runBlocking {
            val free = ServerSocket(0).use { it.localPort }
            val nobody = PoolClient("http://127.0.0.1:$free", trusted, deadlineMs = 1000)
            assertContains(
                assertFailsWith<ServerError> { Customizer(engine, nobody).customize(examples) }.message!!,
                "the connection failed",
            )
        }

    @Test
    fun `what is no example, or no place of ours, is refused before anything is sent`() =
        runBlocking {
            val sent = ArrayList<String>()
            val customizer = Customizer(engine, client("real", sent = sent))
            assertFailsWith<InvalidInput> { customizer.customize(emptyList()) }
            assertFailsWith<InvalidInput> { customizer.customize(listOf(Example("a", " "))) }
            assertFailsWith<InvalidInput> { customizer.customize(examples, noise = 2.0) }
            assertFailsWith<ContextOverflow> { customizer.customize(listOf(Example("a ".repeat(2000), "b"))) }
            folder.resolve("nano.customized").createDirectory()
            assertContains(assertFailsWith<OutputError> { customizer.customize(examples) }.message!!, "something else")
            assertEquals(emptyList(), sent)
        }

    @Test
    fun `an address that would tell others is refused`() {
        for (url in listOf(
            "http://example.org",
            "ftp://example.org",
            "https://user@example.org",
            "https://example.org/?q",
            "https://",
            "x y",
        )) {
            assertFailsWith<InvalidInput>(url) { PoolClient(url, trusted) }
        }
        PoolClient("http://example.org", trusted, plainHttp = true)
        assertFailsWith<InvalidInput> { PoolClient("https://example.org", trusted, apiKey = "two\nlines") }
    }
}
