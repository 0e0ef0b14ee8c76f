// A bundle that is small and right, but for its weights: the tests have a scripted model in their place.
package crayon.app

import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.buildJsonObject
import kotlinx.serialization.json.put
import kotlinx.serialization.json.putJsonObject
import java.nio.file.Path
import java.security.MessageDigest
import java.util.zip.CRC32
import java.util.zip.ZipEntry
import java.util.zip.ZipOutputStream
import kotlin.io.path.outputStream

const val EOS = 2
private val CHARACTERS = (' '..'~').map { "$it" } + "\n"
val VOCABULARY = 3 + CHARACTERS.size
val FINGERPRINT = "a".repeat(64)

/** The ids of a text: one a character. */
fun letters(text: String): List<Int> = text.map { 3 + CHARACTERS.indexOf("$it") }

fun sha256(content: ByteArray): String = MessageDigest.getInstance("SHA-256").digest(content).joinToString("") { "%02x".format(it) }

/** The files of the bundle, by name. */
fun bundleFiles(name: String = "letters"): Map<String, ByteArray> {
    val tokens = listOf("<unk>", "<s>", "</s>") + CHARACTERS
    val tokenizer = buildJsonObject {
        putJsonObject("model") {
            put("type", "BPE")
            put("unk_token", "<unk>")
            put("vocab", JsonObject(tokens.mapIndexed { i, token -> token to JsonPrimitive(i) }.toMap()))
            put("merges", kotlinx.serialization.json.JsonArray(emptyList()))
        }
        putJsonObject("decoder") { put("type", "Fuse") }
    }
    val files = mapOf("tokenizer.json" to tokenizer.toString().toByteArray(), "model.onnx" to byteArrayOf(8, 0, 0, 0))
    val listed = files.map { (path, content) -> """{"path": "$path", "size": ${content.size}, "sha256": "${sha256(content)}"}""" }
    val manifest = """{"kind": "model", "schema_version": "1.0", "name": "$name", "base_fingerprint": "$FINGERPRINT",
        "producer": {"name": "test", "version": "1"},
        "architecture": {"model_type": "llama", "layers": 1, "hidden_size": 4, "heads": 1, "kv_heads": 1, "head_size": 4, "ffn_size": 4,
            "vocab_size": $VOCABULARY},
        "context_length": 512, "kv_dtype": "fp32",
        "tokenizer": {"file": "tokenizer.json", "vocab_size": $VOCABULARY, "add_bos": true, "bos": 1, "eos": [$EOS]},
        "variants": {"onnx": {"model": "model.onnx", "data": []}}, "adapter_slots": null, "tap": {"layer": 1, "size": 4}, "golden": null,
        "files": [${listed.joinToString()}]}"""
    return files + ("manifest.json" to manifest.toByteArray())
}

/** Packs files into a `.crayon` archive. */
fun writeArchive(path: Path, name: String = "letters", files: Map<String, ByteArray> = bundleFiles(name)): Path {
    ZipOutputStream(path.outputStream()).use { zip ->
        zip.setMethod(ZipOutputStream.STORED)
        for ((file, content) in files) {
            val entry = ZipEntry(file)
            entry.size = content.size.toLong()
            entry.crc = CRC32().apply { update(content) }.value
            zip.putNextEntry(entry)
            zip.write(content)
        }
    }
    return path
}
