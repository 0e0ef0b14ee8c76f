package crayon.executorch

import crayon.runtime.AdapterError
import crayon.runtime.BackendError
import crayon.runtime.Engine
import crayon.runtime.GenerateOptions
import crayon.runtime.Prompt
import crayon.runtime.SamplingOptions
import crayon.runtime.backends.FakeAdapter
import crayon.runtime.backends.FakeBackend
import crayon.runtime.bundle.Bundle
import kotlinx.coroutines.runBlocking
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import org.pytorch.executorch.Module
import java.nio.file.Path
import java.security.MessageDigest
import kotlin.io.path.createDirectories
import kotlin.io.path.writeBytes
import kotlin.io.path.writeText
import kotlin.test.BeforeTest
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

private val TOKENIZER =
    """{"model": {"type": "BPE", "unk_token": "u", "vocab": {"u": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, "merges": []}, "decoder": {"type": "Fuse"}}"""

/** Over a scripted `Module`, which stands in the place of the AAR's. */
class ExecuTorchBackendTest {
    @TempDir
    lateinit var folder: Path
    private val calling = GenerateOptions(maxNewTokens = 20, ignoreEos = true, sampling = SamplingOptions(temperature = 0.8, seed = 3u))

    @BeforeTest
    fun script() {
        Module.constants = mapOf("get_max_seq_len" to 8L, "get_max_context_len" to 128L, "get_tap_size" to 4L, "get_vocab_size" to 512L)
        Module.methods = listOf("forward_tap")
        Module.missing = 0
        Module.broken = false
        listOf(Module.open, Module.calls, Module.loaded).forEach { it.clear() }
    }

    /** A bundle as the exporter writes it, with a file in the place of its program. */
    private fun bundle(data: String = "", kv: String = "fp32"): Bundle {
        val path = folder.resolve("model").also { it.toFile().deleteRecursively() }.createDirectories()
        val program = byteArrayOf(8, 0, 0, 0) + "ET12".toByteArray() + ByteArray(24)
        val weights = byteArrayOf(8, 0, 0, 0) + "FT01".toByteArray() + ByteArray(24)
        val files = mapOf("model.pte" to program, "model.ptd" to weights, "tokenizer.json" to TOKENIZER.toByteArray())
        val listed = files.entries.joinToString { (name, content) ->
            path.resolve(name).writeBytes(content)
            val hash = MessageDigest.getInstance("SHA-256").digest(content).joinToString("") { "%02x".format(it) }
            """{"path": "$name", "size": ${content.size}, "sha256": "$hash"}"""
        }
        path.resolve("manifest.json").writeText(
            """
            {"kind": "model", "schema_version": "1.0", "name": "tiny", "base_fingerprint": "${"a".repeat(64)}",
             "producer": {"name": "test", "version": "0"}, "context_length": 128, "kv_dtype": "$kv",
             "architecture": {"model_type": "llama", "layers": 1, "hidden_size": 4, "heads": 1, "kv_heads": 1, "head_size": 4, "ffn_size": 4,
                              "vocab_size": 512},
             "tokenizer": {"file": "tokenizer.json", "vocab_size": 5, "add_bos": true, "bos": 1, "eos": [2]},
             "variants": {"executorch": {"program": "model.pte", "data": [$data]}}, "adapter_slots": null,
             "tap": {"layer": 1, "size": 4}, "golden": null, "files": [$listed]}
            """.trimIndent(),
        )
        return Bundle.open(path)
    }

    @Test
    fun `it computes what the program computes, prompt by chunks and token by token`() =
        runBlocking {
            Engine.load(bundle().path, WITH_EXECUTORCH, threads = 3).use { engine ->
                val fake = Engine(FakeBackend(), engine.tokenizer)
                for (prompt in listOf(List(21) { 5 + it }, listOf(1), List(20) { 9 })) {
                    val wanted = fake.generate(Prompt.Tokens(prompt), calling)
                    val got = engine.generate(Prompt.Tokens(prompt), calling)
                    assertEquals(wanted.tokenIds, got.tokenIds)
                    assertEquals(wanted.promptTap!!.toList(), got.promptTap!!.toList())
                    assertEquals(wanted.answerTap!!.toList(), got.answerTap!!.toList())
                }
                assertEquals(listOf(8, 8, 5) + List(19) { 1 }, Module.calls.take(22))
                assertEquals(listOf(Triple("${engine.bundle!!.path.resolve("model.pte")}", Module.LOAD_MODE_MMAP, 3)), Module.loaded)
            }
            assertEquals(0, Module.open.size)
        }

    @Test
    fun `each cache has a module of its own, and one is kept for the next`() {
        val backend = ExecuTorchBackend.load(bundle())
        val first = backend.newCache()
        val second = backend.newCache()
        first.prefill(intArrayOf(5, 6, 7))
        second.prefill(intArrayOf(9))
        first.rewind(1)
        val again = first.decode(6).logits.toList()
        assertEquals(
            FakeBackend()
                .newCache()
                .prefill(intArrayOf(5, 6))
                .logits
                .toList(),
            again,
        )
        assertEquals(2, Module.open.size)
        first.close()
        second.close()
        assertEquals(1, Module.open.size)
        backend.newCache().use { assertEquals(2, Module.loaded.size) }
        backend.close()
        assertEquals(0, Module.open.size)
    }

    @Test
    fun `adapters are refused, with what to do`() {
        val backend = ExecuTorchBackend.load(bundle())
        assertContains(assertFailsWith<AdapterError> { backend.newCache(FakeAdapter("alice")) }.message!!, "--merge --single-file")
        backend.newCache().use { cache -> assertFailsWith<AdapterError> { cache.reset(FakeAdapter("alice")) } }
    }

    @Test
    fun `a bundle that the AAR cannot run is refused`() {
        assertContains(assertFailsWith<BackendError> { ExecuTorchBackend.load(bundle("\"model.ptd\"")) }.message!!, "--single-file")
        assertContains(assertFailsWith<BackendError> { ExecuTorchBackend.load(bundle(kv = "fp16")) }.message!!, "fp16")
        for (wrong in listOf("get_tap_size", "get_vocab_size", "get_max_context_len")) {
            script()
            Module.constants += wrong to 7L
            assertContains(assertFailsWith<BackendError> { ExecuTorchBackend.load(bundle()) }.message!!, "not the one that the manifest")
            assertEquals(0, Module.open.size)
        }
        script()
        Module.methods = emptyList()
        assertFailsWith<BackendError> { ExecuTorchBackend.load(bundle()) }
    }

    @Test
    fun `a program that fails, or returns something else, is heard of`() {
        ExecuTorchBackend.load(bundle()).newCache().use { cache ->
            Module.broken = true
            assertContains(assertFailsWith<BackendError> { cache.decode(3) }.message!!, "no power")
            Module.broken = false
            Module.missing = 1
            assertContains(assertFailsWith<BackendError> { cache.prefill(intArrayOf(3)) }.message!!, "511")
            Module.missing = 0
            assertFailsWith<BackendError> { cache.prefill(IntArray(129) { 3 }) }
            assertFailsWith<BackendError> { cache.rewind(5) }
            assertTrue(cache.prefill(IntArray(128) { 3 }).logits.any { it != 0f })
        }
    }
}
