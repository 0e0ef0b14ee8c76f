package crayon.runtime.routing

import crayon.runtime.ContextOverflow
import crayon.runtime.Engine
import crayon.runtime.GenerateOptions
import crayon.runtime.InvalidInput
import crayon.runtime.Prompt
import crayon.runtime.ServerError
import crayon.runtime.backends.FakeBackend
import crayon.runtime.letters
import crayon.runtime.servers
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import java.nio.file.Path
import kotlin.io.path.createDirectory
import kotlin.math.ln
import kotlin.test.BeforeTest
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNull
import kotlin.test.assertTrue

private class Scripted(private vararg val pieces: String, private val error: Exception? = null) : Server {
    override val url = "https://server.example"
    val asked = ArrayList<String>()

    override fun request(query: String, maxTokens: Int?) = query.toByteArray()

    override fun ask(query: String, maxTokens: Int?): Flow<String> =
        flow {
            asked += query
            pieces.forEach { emit(it) }
            error?.let { throw it }
        }
}

class RouterTest {
    @TempDir
    lateinit var folder: Path
    private lateinit var engine: Engine
    private val server = Scripted("from ", "the server")

    /** Asks whatever the device says. */
    private val asks = Policy("own", mapOf("log_probability" to 1.0), 0.0, 0.1)
    private val early = asks.copy(after = 2)

    @BeforeTest
    fun start() {
        engine = Engine(FakeBackend(*"hello".map { it - 'a' + 3 }.toIntArray(), 2), letters(folder))
    }

    @Test
    fun `the device answers if it is sure`() =
        runBlocking {
            val answer = Router(engine, own = asks.copy(threshold = ln(1e-9)), server = server).answer("hi")
            assertEquals("hello", answer.text)
            assertEquals(Route.DEVICE, answer.route)
            assertContains(answer.reason, "is not below the threshold")
            assertEquals(emptyList(), server.asked)
            assertEquals(0, answer.sentBytes)
        }

    @Test
    fun `the server answers if the device is not sure`() =
        runBlocking {
            val answer = Router(engine, own = asks, server = server).answer(" hi ")
            assertEquals("from the server", answer.text)
            assertEquals(Route.SERVER, answer.route)
            assertContains(answer.reason, "is below the threshold")
            assertEquals(listOf("hi"), server.asked)
            assertEquals(2, answer.sentBytes)
            assertEquals("hello", answer.generation!!.text)
        }

    @Test
    fun `an early decision stops the device, and drafts are told from what stays`() =
        runBlocking {
            val stream = Router(engine, own = early, server = server).stream(Prompt.Text("hi"))
            val parts = stream.parts.toList()
            assertEquals(listOf("h", "e"), parts.filter { it.draft }.map { it.text })
            assertEquals("from the server", parts.filterNot { it.draft }.joinToString("") { it.text })
            assertEquals(2, stream.answer.generation!!.generatedTokens)
        }

    @Test
    fun `a server that breaks off is no reason to have no answer`() =
        runBlocking {
            for (policy in listOf(asks, early, Policy.always())) {
                val breaks = Scripted("from ", error = ServerError("the answer was cut off"))
                val answer = Router(engine, own = policy, server = breaks).answer("hi")
                assertEquals("hello", answer.text)
                assertTrue(answer.fallback)
                assertContains(answer.reason, ", but the answer was cut off")
            }
            val fails = Router(engine, own = asks, server = Scripted(error = IllegalStateException("secret"))).answer("hi")
            assertContains(fails.reason, "asking the server failed with IllegalStateException")
            assertContains(Router(engine, own = asks).answer("hi").reason, "there is no server to ask")
        }

    @Test
    fun `what a policy always or never does`() =
        runBlocking {
            assertEquals("from the server", Router(engine, policy = "always", server = server).answer("hi").text)
            assertEquals("hello", Router(engine, policy = "never", server = server).answer("hi").text)
            assertFailsWith<InvalidInput> { Router(engine, policy = "paper") }
            assertFailsWith<InvalidInput> { Router(engine, policy = "sometimes") }
            Unit
        }

    @Test
    fun `a prompt that is too long for the device goes to the server`() =
        runBlocking {
            val long = "a".repeat(200)
            assertEquals("from the server", Router(engine, server = server).answer(long, query = "short").text)
            assertFailsWith<ContextOverflow> { Router(engine).answer(long) }
            assertFailsWith<ContextOverflow> { Router(engine, server = Scripted(error = ServerError("down"))).answer(long) }
            Unit
        }

    @Test
    fun `the server's answer ends at a stop string too`() =
        runBlocking {
            val answer = Router(engine, own = asks, server = server).answer("hi", options = GenerateOptions(stop = listOf("the")))
            assertEquals("from ", answer.text)
        }

    @Test
    fun `only what the rules leave is sent, and it is written down before`() =
        runBlocking {
            val log = SentLog(folder.resolve("sent.jsonl"))
            val rules = Rules(deny = listOf("secret"), redact = listOf(Redaction("b+", "B")))
            val router = Router(engine, own = asks, server = server, rules = rules, log = log)
            router.answer("abba")
            assertContains(router.answer("my secret").reason, "the rules deny")
            assertEquals(listOf("aBa"), server.asked)
            val sent = log.read().single()
            assertEquals(listOf("aBa", "answered", server.url), listOf(sent.query, sent.outcome, sent.server))
            folder.resolve("log").createDirectory()
            val unwritable = Router(engine, own = asks, server = server, log = SentLog(folder.resolve("log")))
            assertContains(unwritable.answer("hi").reason, "cannot be written")
            assertEquals(1, server.asked.size)
        }

    @Test
    fun `leaving in the middle ends it`() =
        runBlocking {
            val log = SentLog(folder.resolve("sent.jsonl"))
            val stream = Router(engine, own = Policy.always(), server = server, log = log).stream(Prompt.Text("hi"))
            assertEquals(
                1,
                stream.parts
                    .take(1)
                    .toList()
                    .size,
            )
            assertTrue(stream.answer.text.startsWith("from "))
            assertEquals("it was cancelled", log.read().single().outcome)
        }

    @Test
    fun `a real server is asked over HTTP`() =
        runBlocking {
            for ((name, text) in listOf("answers" to "from the server", "whole" to "all at once")) {
                val answer = Router(engine, own = asks, server = ServerLlm(servers.urls.getValue(name))).answer("hi")
                assertEquals(text, answer.text)
                assertEquals(Route.SERVER, answer.route)
            }
        }

    @Test
    fun `a server that lies, floods or stalls is a reason for the device's answer`() =
        runBlocking {
            for ((name, said) in listOf(
                "breaks" to "cut off|connection failed",
                "refuses" to "no key",
                "mumbles" to "nonsense",
                "html" to "text/html",
                "empty" to "empty",
                "floods" to "more than",
                "slow" to "did not get to the end",
            )) {
                val llm = ServerLlm(servers.urls.getValue(name), idleMs = 5000, deadlineMs = 2500)
                val answer = Router(engine, own = asks, server = llm).answer("hi")
                assertEquals("hello", answer.text, name)
                assertTrue(answer.fallback, name)
                assertTrue(Regex(said).containsMatchIn(answer.reason), "$name: ${answer.reason}")
            }
            val nobody = Router(engine, own = asks, server = ServerLlm("http://127.0.0.1:1", connectMs = 500)).answer("hi")
            assertContains(nobody.reason, "the connection failed")
            assertNull(engine.adapter)
        }
}
