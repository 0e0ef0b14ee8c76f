package crayon.runtime

import crayon.runtime.backends.FakeBackend
import crayon.runtime.backends.OnnxBackend
import crayon.runtime.bundle.Bundle
import kotlinx.coroutines.runBlocking
import org.junit.jupiter.api.DynamicTest
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.TestFactory
import org.junit.jupiter.api.io.TempDir
import java.nio.file.Path
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** Bundles that the exporter just made, in ONNX Runtime: its golden cases, and what the Python engine says. */
class GoldenTest {
    private fun each(test: (ExpectedModel, Bundle) -> Unit) =
        expected.models.map { model ->
            DynamicTest.dynamicTest(model.name) { test(model, Bundle.open(fixtures.resolve(model.name))) }
        }

    @TestFactory
    fun `all golden cases pass, with and without adapters`() =
        each { _, bundle ->
            OnnxBackend.load(bundle, threads = 1).use { backend ->
                val results = replay(bundle, backend)
                assertTrue(results.map { it.adapter }.toSet().size == 3, "base, alice and bob")
                assertEquals(emptyList(), results.filter { it.problem != null })
            }
        }

    @TestFactory
    fun `greedy and sampled answers are Python's, token by token`() =
        each { model, bundle ->
            runBlocking {
                Engine.load(bundle.path, threads = 1).use { engine ->
                    for (answer in model.answers) {
                        engine.setAdapter(answer.adapter)
                        val options = GenerateOptions(maxNewTokens = 24, sampling = answer.options.sampling(7u), ignoreEos = true)
                        val got = engine.generate(model.prompt, options)
                        assertEquals(answer.ids, got.tokenIds, "adapter ${answer.adapter}")
                        assertEquals(answer.text, got.text)
                        answer.logProbabilities.zip(got.logProbabilities) { wanted, is_ -> assertEquals(wanted, is_, 2e-3) }
                        assertTrue(difference(answer.promptTap, got.promptTap!!) < 2e-3)
                        assertTrue(difference(answer.answerTap, got.answerTap!!) < 2e-3)
                    }
                }
            }
        }

    @TestFactory
    fun `logits are Python's, with adapters in every dtype`() =
        each { model, bundle ->
            OnnxBackend.load(bundle, threads = 1).use { backend ->
                val ids = crayon.runtime.tokenizer
                    .Tokenizer(bundle)
                    .encode(model.prompt)
                    .toIntArray()
                for ((name, logits) in model.logits) {
                    val adapter = when (name) {
                        "None" -> null
                        in bundle.adapterNames -> backend.readAdapter(bundle.adapter(name))
                        else -> backend.readAdapter(Bundle.open(fixtures.resolve(name)))
                    }
                    val off = backend.newCache(adapter).use { difference(logits, it.prefill(ids).logits) }
                    assertTrue(off < 1e-4, "$name: $off")
                }
                assertTrue(
                    model.logits.values
                        .toSet()
                        .size == model.logits.size,
                    "each adapter changes the logits",
                )
            }
        }

    @TestFactory
    fun `embeddings are Python's`() =
        each { model, bundle ->
            runBlocking {
                Engine.load(bundle.path, threads = 1).use { engine ->
                    val texts = model.pairs.map { (prompt, answer) -> Text(prompt, answer) }
                    for (part in TextPart.entries) {
                        val got = engine.embed(texts, part)
                        model.parts.getValue(part.name.lowercase()).zip(got) { wanted, row -> assertTrue(difference(wanted, row) < 1e-3) }
                    }
                }
            }
        }

    @Test
    fun `the fake says what Python's says`() {
        val backend = FakeBackend()
        val step = backend.newCache().prefill(expected.fake.ids.toIntArray())
        assertEquals(expected.fake.logits, step.logits.toList())
        assertEquals(expected.fake.tapSum, step.tapSum.toList())
        assertEquals(expected.fake.hidden, backend.hidden(expected.fake.ids, "bob").map { it.toList() })
    }

    @Test
    fun `an adapter of another base is refused`() {
        OnnxBackend.load(Bundle.open(fixtures.resolve("nano"))).use { backend ->
            val error = assertFailsWith<AdapterError> { backend.readAdapter(Bundle.open(fixtures.resolve("foreign"))) }
            assertContains(error.message!!, "another base model")
        }
    }

    @Test
    fun `a golden case that the model does not answer fails`(
        @TempDir folder: Path,
    ) {
        val path = copyOf("nano", folder)
        val bundle = Bundle.open(path)
        edit(bundle.file("golden.json")) { it.replace(Regex(""""logits": ?[0-9.e-]+"""), "\"logits\":1e-12") }
        OnnxBackend.load(bundle).use { backend -> assertContains(replay(bundle, backend).first().problem!!, "allowed are 1.0E-12") }
    }
}
