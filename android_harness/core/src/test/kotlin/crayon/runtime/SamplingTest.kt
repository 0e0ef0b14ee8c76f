package crayon.runtime

import org.junit.jupiter.api.DynamicTest
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.TestFactory
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

class SamplingTest {
    @Test
    fun `the generator is the one of the specification`() {
        val zero = SplitMix64(0u)
        assertEquals(listOf(0xE220A8397B1DCDAFu, 0x6E789E6AA1B965F4u, 0x06C45D188009454Fu), List(3) { zero.next() })
        val uniform = SplitMix64(0u)
        assertEquals(listOf(0.8833108082136426, 0.43152799704850997, 0.026433771592597743), List(3) { uniform.uniform() })
        assertEquals(6457827717110365317u, SplitMix64(1234567u).next())
    }

    @TestFactory
    fun `the same logits and seed give Python's tokens`() =
        expected.sampling.map { of ->
            DynamicTest.dynamicTest("seed ${of.seed}") {
                val rows = of.rows.map { row -> FloatArray(row.size) { if (row[it] < -1e38f) Float.NEGATIVE_INFINITY else row[it] } }
                val sampler = Sampler(of.options.sampling(of.seed.toULong()), rows[0].size)
                sampler.observe(intArrayOf(1, 2, 3, 299))
                val chosen = rows.mapIndexed { i, row ->
                    val token = sampler.sample(row)
                    assertEquals(of.logProbabilities[i], sampler.logProbability, 1e-4)
                    assertEquals(of.top[i], sampler.mostLikely(row, 5).map { it.first })
                    token
                }
                assertEquals(of.tokens, chosen)
            }
        }

    @Test
    fun `logits that are no numbers are an error of the backend`() {
        val sampler = Sampler(SamplingOptions(), 3)
        for (bad in listOf(Float.NaN, Float.POSITIVE_INFINITY)) {
            assertFailsWith<BackendError> { sampler.sample(floatArrayOf(0f, bad, 1f)) }
        }
        assertFailsWith<BackendError> { sampler.sample(FloatArray(3) { Float.NEGATIVE_INFINITY }) }
    }

    @Test
    fun `an option out of range is named`() {
        for (make in listOf(
            { SamplingOptions(temperature = -1.0) },
            { SamplingOptions(topP = 1.5) },
            { SamplingOptions(minP = Double.NaN) },
        )) {
            assertFailsWith<InvalidInput> { make() }
        }
    }
}
