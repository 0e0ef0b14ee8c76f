package crayon.runtime

import crayon.runtime.backends.FakeBackend
import crayon.runtime.backends.Script
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.async
import kotlinx.coroutines.awaitAll
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.first
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking
import kotlinx.coroutines.withTimeout
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import java.nio.file.Path
import java.util.concurrent.CountDownLatch
import java.util.concurrent.TimeUnit
import kotlin.test.BeforeTest
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertIs
import kotlin.test.assertTrue

class EngineTest {
    @TempDir
    lateinit var folder: Path
    private lateinit var backend: FakeBackend
    private lateinit var engine: Engine

    /** The ids of letters. */
    private fun ids(text: String) = text.map { it - 'a' + 3 }.toIntArray()

    @BeforeTest
    fun start() = say(FakeBackend(*ids("hello"), 2))

    private fun say(backend: FakeBackend) {
        this.backend = backend
        engine = Engine(backend, letters(folder))
    }

    @Test
    fun `it says what its model says, and stops at eos`() =
        runBlocking {
            val answer = engine.generate("hi")
            assertEquals("hello", answer.text)
            assertEquals(FinishReason.STOP, answer.finishReason)
            assertEquals(ids("hello").toList() + 2, answer.tokenIds)
            assertEquals(3, answer.promptTokens)
            assertTrue(answer.firstTokenSeconds > 0 && answer.decodeSeconds > 0)
        }

    @Test
    fun `pieces come one by one, and together are the text`() =
        runBlocking {
            val stream = engine.stream("hi", GenerateOptions(topLogProbabilities = 2))
            assertFailsWith<InvalidInput> { stream.generation }
            val pieces = stream.pieces.toList()
            assertEquals(listOf("h", "e", "l", "l", "o", ""), pieces.map { it.text })
            assertEquals(pieces[0].tokenId, pieces[0].topLogProbabilities[0].first)
            assertEquals("hello", stream.generation.text)
            assertFailsWith<InvalidInput> { stream.pieces.toList() }
            Unit
        }

    @Test
    fun `it stops at a stop string, which may come in pieces`() =
        runBlocking {
            val answer = engine.generate("hi", GenerateOptions(stop = listOf("lo", "xyz")))
            assertEquals("hel", answer.text)
            assertEquals("lo", answer.stop)
        }

    @Test
    fun `it stops at the most tokens, and at the end of the context`() =
        runBlocking {
            assertEquals(FinishReason.LENGTH, engine.generate("hi", GenerateOptions(maxNewTokens = 2)).finishReason)
            say(FakeBackend(Script { _, _, _ -> 3 }, contextLength = 8))
            assertEquals(5, engine.generate("hi").generatedTokens)
            val sliding = engine.generate("hi", GenerateOptions(maxNewTokens = 20, overflow = Overflow.SLIDE))
            assertEquals(20, sliding.generatedTokens)
            assertFailsWith<ContextOverflow> { engine.generate("abcdefgh") }
            assertEquals(3, engine.generate("abcdefghijkl", GenerateOptions(maxNewTokens = 3, overflow = Overflow.SLIDE)).generatedTokens)
        }

    @Test
    fun `what cannot be asked is refused before anything is computed`() {
        for (options in listOf(
            GenerateOptions(maxNewTokens = 0),
            GenerateOptions(stop = listOf("")),
            GenerateOptions(topLogProbabilities = 21),
            GenerateOptions(keep = 1000),
        )) {
            assertFailsWith<InvalidInput> { engine.stream("hi", options) }
        }
        assertFailsWith<InvalidInput> { engine.stream("") }
        assertFailsWith<InvalidInput> { engine.stream(Prompt.Tokens(listOf(512))) }
        assertEquals(emptyMap(), backend.calls)
    }

    @Test
    fun `a prompt that continues the last one is not computed again`() =
        runBlocking {
            engine.generate("abc", GenerateOptions(maxNewTokens = 1))
            val again = engine.generate("abcdef", GenerateOptions(maxNewTokens = 1))
            assertEquals(4, again.reusedTokens)
            assertEquals(listOf(4, 3), backend.prefilled)
            assertEquals(1, backend.openCaches)
            val fresh = FakeBackend()
            say(fresh)
            val once = engine.generate("abcdef", GenerateOptions(maxNewTokens = 8, ignoreEos = true))
            engine.generate("abcxyz", GenerateOptions(maxNewTokens = 8))
            val back = engine.generate("abcdef", GenerateOptions(maxNewTokens = 8, ignoreEos = true))
            assertEquals(once.tokenIds, back.tokenIds)
            assertEquals(once.promptTap!!.toList(), back.promptTap!!.toList())
        }

    @Test
    fun `means of hidden states are exact`() =
        runBlocking {
            say(FakeBackend())
            val answer = engine.generate(Prompt.Tokens(listOf(1, 5, 6)), GenerateOptions(maxNewTokens = 5, ignoreEos = true))
            val hidden = backend.hidden(listOf(1, 5, 6) + answer.tokenIds)

            fun mean(rows: List<FloatArray>) = List(4) { i -> (rows.sumOf { it[i].toDouble() } / rows.size).toFloat() }
            assertEquals(mean(hidden.take(3)), answer.promptTap!!.toList())
            assertEquals(mean(hidden.subList(3, 7)), answer.answerTap!!.toList())
        }

    @Test
    fun `its state tells what it does`() =
        runBlocking {
            val looked = CountDownLatch(1)
            say(
                FakeBackend(
                    Script { _, said, _ ->
                        if (said > 0) assertTrue(looked.await(10, TimeUnit.SECONDS))
                        if (said < 3) 3 else 2
                    },
                ),
            )
            assertEquals(EngineState.Ready, engine.state.value)
            val seen = ArrayList<EngineState>()
            engine.stream("hi").pieces.collect {
                seen += engine.state.value
                looked.countDown()
            }
            assertEquals(EngineState.Answering(1), seen.first())
            assertEquals(EngineState.Ready, engine.state.value)
            engine.unload()
            assertEquals(EngineState.Empty, engine.state.value)
            assertFailsWith<EngineClosed> { engine.generate("hi") }
            assertFailsWith<BundleError> { engine.load(folder.resolve("nothing")) }
            assertIs<EngineState.Failed>(engine.state.value)
            engine.close()
            assertEquals(EngineState.Closed, engine.state.value)
            assertFailsWith<EngineClosed> { engine.load(folder) }
            Unit
        }

    @Test
    fun `leaving a stream frees its session, and what came is the answer`() =
        runBlocking {
            say(FakeBackend(Script { _, _, _ -> 3 }))
            val stream = engine.stream("hi")
            assertEquals(
                3,
                stream.pieces
                    .take(3)
                    .toList()
                    .size,
            )
            withTimeout(5000) { engine.state.first { it == EngineState.Ready } }
            assertEquals(FinishReason.CANCELLED, stream.generation.finishReason)
            assertEquals(1, backend.openCaches)
        }

    @Test
    fun `cancelling a coroutine ends a long prompt between chunks`() =
        runBlocking {
            val slow = FakeBackend(
                Script { _, _, _ ->
                    Thread.sleep(30)
                    3
                },
                contextLength = 100_000,
            )
            say(slow)
            val job = launch(Dispatchers.Default) { engine.generate(Prompt.Tokens(List(50_000) { 5 })) }
            engine.state.first { it is EngineState.Answering }
            delay(100)
            job.cancelAndJoin()
            assertTrue(slow.prefilled.size < 50, "${slow.prefilled.size} chunks of 196")
            assertEquals(EngineState.Ready, engine.state.value)
        }

    @Test
    fun `answers at once take turns, each in a session of its own`() =
        runBlocking {
            say(FakeBackend())
            val alone =
                List(
                    6,
                ) { i -> engine.generate(Prompt.Tokens(listOf(1, 10 + i)), GenerateOptions(maxNewTokens = 20, ignoreEos = true)).tokenIds }
            val together = List(6) { i ->
                async(Dispatchers.Default) {
                    engine.generate(Prompt.Tokens(listOf(1, 10 + i)), GenerateOptions(maxNewTokens = 20, ignoreEos = true)).tokenIds
                }
            }.awaitAll()
            assertEquals(alone, together)
            assertEquals(1, backend.openCaches)
        }

    @Test
    fun `a session is its owner's alone`() =
        runBlocking {
            say(FakeBackend(Script { _, _, _ -> 3 }))
            engine.session().use { session ->
                engine.stream("hi", GenerateOptions(session = session)).pieces.take(2).collect {
                    val error = assertFailsWith<InvalidInput> { engine.generate("ho", GenerateOptions(session = session)) }
                    assertContains(error.message!!, "another answer is running")
                }
            }
            val closed = engine.session().also { it.close() }
            assertFailsWith<InvalidInput> { engine.generate("hi", GenerateOptions(session = closed)) }
            Unit
        }

    @Test
    fun `a model that is unloaded while it answers ends the answer`() =
        runBlocking {
            say(FakeBackend(Script { _, _, _ -> 3 }))
            assertFailsWith<EngineClosed> { engine.stream("hi").pieces.collect { engine.unload() } }
            assertEquals(EngineState.Empty, engine.state.value)
        }

    @Test
    fun `whoever unloads from another thread comes next, not after the answer`() =
        runBlocking {
            val second = CountDownLatch(1)
            say(FakeBackend(Script { _, said, _ -> 3.also { if (said > 1) second.countDown() }.also { Thread.sleep(20) } }))
            var came = 0
            val unloading = launch(Dispatchers.IO) {
                second.await()
                engine.unload()
            }
            assertFailsWith<EngineClosed> { engine.stream("hi").pieces.collect { came++ } }
            unloading.join()
            assertTrue(came < 20, "$came tokens came")
        }

    @Test
    fun `a backend that fails is heard of, and the next answer starts anew`() =
        runBlocking {
            var broken = true
            say(FakeBackend(Script { _, _, _ -> if (broken) throw BackendError("no power") else 3 }))
            assertFailsWith<BackendError> { engine.generate("hi") }
            broken = false
            assertEquals(2, engine.generate("hi", GenerateOptions(maxNewTokens = 2)).generatedTokens)
            assertEquals(EngineState.Ready, engine.state.value)
        }
}
