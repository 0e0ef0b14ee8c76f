package crayon.runtime

import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import org.junit.jupiter.api.DynamicTest
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.TestFactory
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

@Serializable
private class Arrays(
    val mean: FloatArray,
    val projection: List<FloatArray>,
    val indicators: List<FloatArray>,
    @SerialName("prompt_mean") val promptMean: FloatArray? = null,
    @SerialName("answer_mean") val answerMean: FloatArray? = null,
    val ridge: List<FloatArray>? = null,
)

class AffinityTest {
    @TestFactory
    fun `alpha is Python's`() =
        expected.alpha.mapIndexed { i, of ->
            DynamicTest.dynamicTest("$i ${of.weighting}") {
                val a = fromJson(Arrays.serializer(), of.projection)
                val projection = Projection(a.mean, a.projection, a.indicators, a.promptMean, a.answerMean, a.ridge)
                val weighting = fromJson(Weighting.serializer(), of.weighting)
                val got = alpha(projection, weighting, of.prompts.map { it.toFloatArray() }, of.answers.map { it.toFloatArray() })
                assertTrue(difference(of.alpha, got) < 2e-5, "${of.alpha} and ${got.toList()}")
            }
        }

    @Test
    fun `a state that is no state is refused`() {
        val projection = Projection(FloatArray(2), List(2) { FloatArray(2) }, listOf(floatArrayOf(1f, 0f)))
        assertFailsWith<InvalidInput> { projection.query(null, FloatArray(3)) }
        assertFailsWith<InvalidInput> { projection.query(null, floatArrayOf(Float.NaN, 0f)) }
        assertEquals(listOf(0f), projection.cosines(doubleArrayOf(1.0, 2.0)).toList())
    }

    @Test
    fun `alpha is rounded, and noise does not make it negative`() {
        assertEquals(listOf(0.1235f, 0f), disguise(floatArrayOf(0.12346f, 0f), 4, 0.0, signed = false).toList())
        val noisy = disguise(FloatArray(200), 4, 0.5, signed = false)
        assertTrue(noisy.any { it > 0 } && noisy.all { it >= 0 })
        assertTrue(disguise(FloatArray(200), 4, 0.5, signed = true).any { it < 0 })
    }
}
