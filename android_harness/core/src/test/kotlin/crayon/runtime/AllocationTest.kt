package crayon.runtime

import com.sun.management.ThreadMXBean
import kotlinx.coroutines.runBlocking
import org.junit.jupiter.api.Test
import java.lang.management.ManagementFactory
import kotlin.test.assertTrue

/** What a token of an answer leaves to the garbage collector: bytes, mean over a stretch of an answer. */
class AllocationTest {
    private val bean = ManagementFactory.getThreadMXBean() as ThreadMXBean

    /** Over tokens `from` to `until` of an answer by the whole engine, in this thread. */
    private fun perToken(name: String, sampling: SamplingOptions, vararg stretches: IntRange): List<Long> =
        runBlocking {
            Engine.load(fixtures.resolve(name), threads = 1).use { engine ->
                val options = GenerateOptions(maxNewTokens = stretches.last().last + 1, sampling = sampling, ignoreEos = true)
                engine.answering(Prompt.Tokens(listOf(1, 20, 30)), options).use { answer ->
                    var token = 0
                    stretches.map { stretch ->
                        while (token < stretch.first) token += answer.next { false }.let { 1 }
                        val before = bean.getThreadAllocatedBytes(Thread.currentThread().id)
                        while (token < stretch.last) token += answer.next { false }.let { 1 }
                        (bean.getThreadAllocatedBytes(Thread.currentThread().id) - before) / (stretch.last - stretch.first)
                    }
                }
            }
        }

    private val sampled = SamplingOptions(temperature = 0.8, topK = 40, topP = 0.95, repetitionPenalty = 1.1, seed = 1u)

    @Test
    fun `nothing grows with the vocabulary`() {
        for (sampling in listOf(SamplingOptions(), sampled, SamplingOptions(temperature = 1.0, seed = 1u))) {
            val (small) = perToken("small", sampling, 60..110)
            val (wide) = perToken("wide", sampling, 60..110)
            println("a token allocates $small bytes with a vocabulary of 320, $wide with one of 20,000: $sampling")
            assertTrue(wide < small + 256, "$small and $wide bytes")
        }
    }

    @Test
    fun `nothing grows with the context, nor with what is in it`() {
        val (small) = perToken("small", sampled, 60..110)
        val (early, late) = perToken("long", sampled, 60..110, 900..1000)
        println("a token allocates $small bytes in a context of 128; $early in one of 1,024, and $late behind 900 others")
        assertTrue(maxOf(early, late) < small + 256, "$small, $early and $late bytes")
    }
}
