package crayon.runtime.routing

import crayon.runtime.ExampleStates
import crayon.runtime.ExpectedRouting
import crayon.runtime.InvalidInput
import crayon.runtime.Prototypes
import crayon.runtime.expected
import org.junit.jupiter.api.DynamicTest
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.TestFactory
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class RoutingTest {
    private fun rows(values: List<List<Float>>) = values.map { it.toFloatArray() }

    private fun reference(of: ExpectedRouting) = Reference(prototypes(of), examples(of))

    private fun prototypes(of: ExpectedRouting) = of.prototypes?.let { Prototypes(rows(it.states), it.mean.toFloatArray()) }

    private fun examples(of: ExpectedRouting) =
        of.examples?.let { ExampleStates(rows(it.prompt), rows(it.answer), it.logProbability.toFloatArray()) }

    @TestFactory
    fun `signals, scores and decisions are Python's`() =
        expected.routing.mapIndexed { i, of ->
            DynamicTest.dynamicTest("reference $i") {
                val reference = reference(of)
                of.said.forEachIndexed { n, said ->
                    val answer = Said(said.prompt.toFloatArray(), said.answer.toFloatArray(), said.likely)
                    val got = signals(answer, reference, of.signals[n].keys)
                    assertEquals(reference.names, got.keys)
                    for ((name, value) in of.signals[n]) assertEquals(value, got.getValue(name), 1e-5, name)
                    assertEquals(
                        of.decisions[n],
                        of.policies.map {
                            it
                                .decide(got)
                                .route.name
                                .lowercase()
                        },
                    )
                }
            }
        }

    @TestFactory
    fun `policies that are made of examples are Python's`() =
        expected.routing.filter { it.examples != null }.mapIndexed { i, of ->
            DynamicTest.dynamicTest("examples $i") {
                val made = uncalibrated(reference(of), examples(of)!!).associateBy { it.name }
                val wanted = of.policies.filter { it.name in made && (it.name != "paper" || it.threshold != 0.7) }
                assertEquals(made.keys, wanted.map { it.name }.toSet())
                for (policy in wanted) {
                    val got = made.getValue(policy.name)
                    assertEquals(policy.threshold, got.threshold, 1e-5)
                    assertEquals(policy.copy(threshold = 0.0), got.copy(threshold = 0.0))
                }
            }
        }

    @Test
    fun `what cannot be computed goes to the server`() {
        val reference = Reference(null, null)
        val nothing = signals(Said(null, null, emptyList()), reference, listOf("log_probability"))
        assertTrue(nothing.getValue("log_probability").isNaN())
        val decision = Policy.confidence().decide(nothing)
        assertEquals(Route.SERVER, decision.route)
        assertEquals("no usable signal", decision.reason)
    }

    @Test
    fun `a policy or signal that there is not is refused`() {
        assertFailsWith<InvalidInput> { Policy("own", mapOf("taste" to 1.0), 0.0, 0.0) }
        assertFailsWith<InvalidInput> { Policy("own", mapOf("log_odds" to Double.NaN), 0.0, 0.0) }
        assertFailsWith<InvalidInput> { Policy("own", emptyMap(), 0.0, 0.0, after = 1) }
        assertFailsWith<InvalidInput> { Reference(null, null).check(listOf("prototypes_mean")) }
        assertFailsWith<InvalidInput> { Policy.confidence().decide(emptyMap()) }
    }

    @Test
    fun `rules forbid, allow and redact`() {
        val rules = Rules(allow = listOf("^what"), deny = listOf("password"), redact = listOf(Redaction("""\d+""", "N")))
        assertEquals("what is N", rules.outgoing("what is 42").query)
        assertEquals("the rules deny what matches password", rules.outgoing("what is my password").why)
        assertEquals("the rules allow nothing of this kind", rules.outgoing("who").why)
        assertEquals("the hook forbids it", Rules(hook = { null }).outgoing("x").why)
        assertEquals("the rules failed with IllegalStateException", Rules(hook = { error("?") }).outgoing("x").why)
        assertEquals("the rules leave nothing of the query", Rules(redact = listOf(Redaction(".*", ""))).outgoing("x").why)
        assertFailsWith<InvalidInput> { Rules(deny = listOf("(")) }
    }
}
