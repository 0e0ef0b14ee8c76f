package crayon.runtime.bundle

import crayon.runtime.BackendError
import crayon.runtime.BundleError
import crayon.runtime.Engine
import crayon.runtime.IntegrityError
import crayon.runtime.ManifestError
import crayon.runtime.OutputError
import crayon.runtime.SchemaTooNew
import crayon.runtime.SignatureError
import crayon.runtime.TrustedKeys
import crayon.runtime.copyOf
import crayon.runtime.edit
import crayon.runtime.filled
import crayon.runtime.fixtures
import crayon.runtime.flipByte
import crayon.runtime.jvm
import crayon.runtime.memoryNeeded
import kotlinx.coroutines.runBlocking
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import java.io.RandomAccessFile
import java.nio.file.Files
import java.nio.file.Path
import kotlin.io.path.copyTo
import kotlin.io.path.deleteExisting
import kotlin.io.path.exists
import kotlin.io.path.fileSize
import kotlin.io.path.listDirectoryEntries
import kotlin.io.path.moveTo
import kotlin.io.path.name
import kotlin.io.path.readBytes
import kotlin.io.path.writeBytes
import kotlin.io.path.writeText
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertFalse
import kotlin.test.assertTrue

class BundleTest {
    @TempDir
    lateinit var folder: Path

    private inline fun <reified E : Throwable> fails(vararg said: String, run: () -> Unit) {
        val error = assertFailsWith<E> { run() }
        for (text in said) assertContains(error.message.orEmpty(), text)
    }

    private fun names(path: Path) = path.listDirectoryEntries().map { it.name }.sorted()

    @Test
    fun `a bundle is opened, and hashed once`() {
        val path = copyOf("nano", folder)
        var hashed = 0L
        val bundle = Bundle.open(path) { hashed += it }
        assertEquals(bundle.size, hashed)
        assertEquals(listOf("alice", "bob"), bundle.adapterNames)
        assertEquals("alice", bundle.adapter("alice").asAdapter.name)
        Bundle.open(path) { throw AssertionError("hashed again") }
        assertTrue(bundle.read("tokenizer.json").contentEquals(path.resolve("tokenizer.json").readBytes()))
    }

    @Test
    fun `a stamp of Python's holds here`() {
        Bundle.open(fixtures.resolve("nano")) { throw AssertionError("hashed again") }
    }

    @Test
    fun `an archive is installed, and is the same bundle`() {
        val bundle = install(fixtures.resolve("nano.crayon"), folder.resolve("new"))
        for (file in bundle.manifest.files) {
            assertTrue(bundle.file(file.path).readBytes().contentEquals(fixtures.resolve("nano").resolve(file.path).readBytes()), file.path)
        }
        bundle.verify()
        assertEquals(listOf("new"), names(folder))
    }

    @Test
    fun `a bundle with fields of a newer minor version is read`() {
        assertEquals("tiny", Bundle.open(fixtures.resolve("fields")).manifest.name)
    }

    @Test
    fun `a newer major version is refused`() {
        val path = copyOf("nano", folder)
        edit(path.resolve("manifest.json")) { it.replace(Regex(""""schema_version": ?"1"""), "\"schema_version\":\"2") }
        fails<SchemaTooNew>("schema version 2.0") { Bundle.open(path) }
    }

    @Test
    fun `what is no manifest is refused`() {
        val path = copyOf("nano", folder)
        for ((document, said) in listOf(
            "{" to "not JSON",
            "[".repeat(100_000) to "not JSON",
            "{}" to "schema_version",
            """{"schema_version": "1.0", "kind": "other"}""" to "other",
            """{"schema_version": "1.0", "kind": "model"}""" to "required",
        )) {
            path.resolve("manifest.json").writeText(document)
            fails<ManifestError>(said) { Bundle.open(path) }
        }
        path.resolve("manifest.json").writeBytes(byteArrayOf(0x22, -1, 0x22))
        fails<ManifestError>("UTF-8") { Bundle.open(path) }
        path.resolve("manifest.json").deleteExisting()
        fails<ManifestError>("not a bundle") { Bundle.open(path) }
        fails<BundleError>("no bundle here") { Bundle.open(folder.resolve("nothing")) }
    }

    @Test
    fun `a path that leaves the bundle is refused`() {
        val path = copyOf("nano", folder)
        val manifest = path.resolve("manifest.json").readBytes().decodeToString()
        for (bad in listOf(
            "../evil",
            "a/../../evil",
            "/etc/passwd",
            "a//b",
            "./a",
            "a/",
            "C:evil",
            "a\\\\b",
            "manifest.json",
            "x/.installed.json",
            "a\\u0000b",
            "\\ud800",
        )) {
            path.resolve("manifest.json").writeText(manifest.replace("\"tokenizer_config.json\"", "\"$bad\""))
            fails<ManifestError>("not a plain relative path") { Bundle.open(path) }
        }
        path.resolve("manifest.json").writeText(manifest.replace("\"tokenizer_config.json\"", "\"TOKENIZER.json\""))
        fails<ManifestError>("differ in case") { Bundle.open(path) }
    }

    @Test
    fun `a byte that changed is found`() {
        val path = copyOf("nano", folder)
        Bundle.open(path)
        val before = Files.getLastModifiedTime(path.resolve("model.onnx.data"))
        flipByte(path.resolve("model.onnx.data"))
        Files.setLastModifiedTime(path.resolve("model.onnx.data"), before)
        fails<IntegrityError>("model.onnx.data is damaged") { Bundle.open(path) }
    }

    @Test
    fun `a manifest that changed after it was installed is found`() {
        val path = install(fixtures.resolve("nano"), folder.resolve("new")).path
        edit(path.resolve("manifest.json")) { it.replaceFirst("\"name\"", " \"name\"") }
        fails<IntegrityError>("not the one that was installed") { Bundle.open(path) }
    }

    @Test
    fun `a file that is missing, truncated, foreign or a link is found`() {
        val path = copyOf("nano", folder)
        val data = path.resolve("model.onnx.data")
        path.resolve("extra").writeText("?")
        fails<IntegrityError>("extra is not listed") { Bundle.open(path, verify = true) }
        path.resolve("extra").deleteExisting()
        RandomAccessFile(data.toFile(), "rw").use { it.setLength(10) }
        fails<IntegrityError>("has 10 bytes") { Bundle.open(path) }
        data.deleteExisting()
        fails<IntegrityError>("is missing") { Bundle.open(path) }
        Files.createSymbolicLink(data, fixtures.resolve("nano/model.onnx.data"))
        fails<IntegrityError>("symbolic link") { Bundle.open(path) }
    }

    @Test
    fun `a file that is not of its kind is found`() {
        val path = copyOf("nano", folder)
        flipByte(path.resolve("golden.safetensors"), 8)
        fails<IntegrityError>("does not begin as .safetensors files do") { Bundle.open(path) }
    }

    @Test
    fun `an archive that is damaged or truncated installs nothing`() {
        val archive = fixtures.resolve("nano.crayon").copyTo(folder.resolve("a.crayon"))
        val whole = archive.readBytes()
        for (end in listOf(0, 10, 1000, whole.size / 2, whole.size - 1)) {
            archive.writeBytes(whole.copyOf(end))
            fails<BundleError> { install(archive, folder.resolve("new")) }
        }
        archive.writeBytes(whole.also { it[whole.size / 2] = (it[whole.size / 2] + 1).toByte() })
        fails<IntegrityError>("damaged") { install(archive, folder.resolve("new")) }
        assertEquals(listOf("a.crayon"), names(folder))
    }

    @Test
    fun `an archive with compressed, repeated or linked entries is refused`() {
        for ((name, said) in listOf(
            "compressed" to "is compressed",
            "twice" to "more than once",
            "linked" to "symbolic link",
            "outside" to "../evil",
        )) {
            val archive = fixtures.resolve("$name.crayon")
            fails<BundleError>(said) { install(archive, folder.resolve("new")) }
        }
        assertEquals(emptyList(), names(folder))
    }

    @Test
    fun `an existing bundle is replaced only if asked for`() {
        val target = folder.resolve("model")
        install(fixtures.resolve("nano.crayon"), target)
        fails<OutputError>("exists already") { install(fixtures.resolve("fields"), target) }
        assertEquals("tiny", install(fixtures.resolve("fields"), target, replace = true).manifest.name)
        assertEquals(listOf("model"), names(folder))
    }

    @Test
    fun `an installation that fails leaves the bundle that was there`() {
        val target = folder.resolve("model")
        val name = install(fixtures.resolve("nano.crayon"), target).manifest.name
        assertFailsWith<IllegalStateException> {
            install(fixtures.resolve("fields"), target, replace = true, onBytes = { error("out of battery") })
        }
        assertEquals(name, Bundle.open(target, verify = true).manifest.name)
        assertEquals(listOf("model"), names(folder))
    }

    @Test
    fun `a full disk is said, and leaves the bundle that was there`() {
        val target = folder.resolve("model")
        val name = install(fixtures.resolve("nano.crayon"), target).manifest.name
        assertContains(filled("install", "${fixtures.resolve("signed.crayon")}", "$target"), "File too large | free some space")
        assertEquals(name, Bundle.open(target, verify = true).manifest.name)
        assertEquals(listOf("model"), names(folder))
    }

    @Test
    fun `a process that is killed in the middle of an installation leaves the bundle that was there`() {
        val target = folder.resolve("model")
        val name = install(fixtures.resolve("nano.crayon"), target).manifest.name
        val dying = jvm("crayon.runtime.bundle.DyingKt", "${fixtures.resolve("signed.crayon")}", "$target")
        val child = ProcessBuilder(dying).inheritIO().start()
        assertEquals(9, child.waitFor())
        assertTrue(names(folder).any { ".partial-" in it }, "it was in the middle")
        assertEquals(name, Bundle.open(target, verify = true).manifest.name)
        install(fixtures.resolve("signed.crayon"), target, replace = true)
        assertEquals(listOf("model"), names(folder), "the next one tidies up")
    }

    @Test
    fun `a bundle that was moved aside when the process died comes back`() {
        val target = folder.resolve("model")
        val name = install(fixtures.resolve("nano.crayon"), target).manifest.name
        target.moveTo(folder.resolve(".model.replaced-0123abcd"))
        assertEquals(name, Bundle.open(target).manifest.name)
        assertEquals(listOf("model"), names(folder))
    }

    @Test
    fun `two writers of one target do not tidy up each other`() {
        val target = folder.resolve("model")
        install(fixtures.resolve("fields"), target, replace = true, onBytes = {
            if (!target.exists()) install(fixtures.resolve("nano.crayon"), target)
        })
        assertEquals("tiny", Bundle.open(target, verify = true).manifest.name)
        assertEquals(listOf("model"), names(folder))
    }

    @Test
    fun `signatures are checked against the keys that are trusted`() {
        val trusted = TrustedKeys.read(fixtures.resolve("keys.json"))
        val signed = install(fixtures.resolve("signed.crayon"), folder.resolve("signed"), check = { document, signature ->
            trusted.verify(document, signature, "signed.crayon")
        })
        assertEquals(trusted.keys.single().id, trusted.verify(signed).id)
        fails<SignatureError>("not signed") { trusted.verify(Bundle.open(fixtures.resolve("nano"))) }
        fails<SignatureError>("not signed") {
            install(fixtures.resolve("nano.crayon"), folder.resolve("unsigned"), check = { document, signature ->
                trusted.verify(document, signature, "nano.crayon")
            })
        }
        assertFalse(folder.resolve("unsigned").exists())
        fails<SignatureError>("not a key that is trusted") { TrustedKeys.read(fixtures.resolve("revoked.json")).verify(signed) }
        fails<SignatureError>(
            "was revoked on 20",
        ) { TrustedKeys(trusted.keys.map { it.copy(revoked = "2026-01-02T03:04:05Z") }).verify(signed) }
        val signature = signed.path.resolve("signature.json")
        val whole = signature.readBytes()
        for ((bad, said) in listOf(
            whole.decodeToString().replace("ed25519", "rsa") to "algorithm",
            whole.decodeToString().replace(Regex("""("signature": ?")...."""), "$1AAAA") to "not what",
            "{" to "malformed",
        )) {
            signature.writeText(bad)
            fails<SignatureError>(said) { trusted.verify(signed) }
        }
        signature.writeBytes(whole)
        edit(signed.path.resolve("manifest.json")) { "$it " }
        fails<SignatureError>("changed since") { trusted.verify(signed) }
    }

    @Test
    fun `a bundle for another backend is refused`() {
        val path = copyOf("nano", folder)
        edit(path.resolve("manifest.json")) {
            it.replace(
                Regex(""""variants": ?\{\s*"onnx": ?\{.*?}\s*}""", RegexOption.DOT_MATCHES_ALL),
                "\"variants\": {\"executorch\": {\"program\": \"model.onnx\", \"data\": []}}",
            )
        }
        runBlocking { fails<BackendError>("the bundle is for executorch; here there is onnx") { Engine.load(path) } }
    }

    @Test
    fun `a model that needs more memory than there is is refused before it is loaded`() {
        val path = fixtures.resolve("nano")
        val needed = memoryNeeded(Bundle.open(path))
        assertTrue(needed > path.resolve("model.onnx.data").fileSize())
        runBlocking {
            fails<BackendError>("MB of memory") { Engine.load(path, availableBytes = needed - 1) }
            Engine.load(path, availableBytes = needed, threads = 1).close()
        }
    }
}
