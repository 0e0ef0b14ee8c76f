// Everything that is checked of a bundle without hashing it: at most a few bytes of each file are read, and no weights.
package crayon.runtime.bundle

import crayon.runtime.AdapterManifest
import crayon.runtime.IntegrityError
import crayon.runtime.Manifest
import crayon.runtime.ManifestError
import crayon.runtime.ModelManifest
import crayon.runtime.parseManifest
import java.nio.ByteBuffer
import java.nio.ByteOrder

private const val HEAD = 16

/**
 * The manifest, as bytes and parsed, of a source that is to be copied.
 *
 * @throws crayon.runtime.BundleError the manifest is not valid, or was changed since the folder was installed; or, as far as names, kinds
 *   and sizes tell, the source does not hold exactly what it lists.
 */
internal fun readSource(source: Source): Pair<ByteArray, Manifest> {
    val document = readManifest(source)
    val manifest = parseManifest(document, source.path.resolve(MANIFEST))
    if (source is Folder) checkStampedManifest(source.path, document)
    checkEntries(source, manifest, nothingElse = true)
    return document to manifest
}

/**
 * Checks the sizes of all files, the headers of known formats, and the manifests of the adapters inside.
 *
 * @param nothingElse also refuse files that the manifest does not list.
 */
internal fun checkFolder(folder: Folder, manifest: Manifest, nothingElse: Boolean) {
    checkEntries(folder, manifest, nothingElse)
    for (file in manifest.files) checkHeader(folder, file.path, file.size)
    if (manifest is ModelManifest) manifest.adapters.forEach { checkAdapter(folder, it, manifest) }
}

/** An adapter inside a model: its manifest must not name any file that the model's does not vouch for. */
private fun checkAdapter(folder: Folder, adapter: String, model: ModelManifest) {
    val path = "$adapter/$MANIFEST"
    val where = folder.path.resolve(path)
    val inner = parseManifest(readManifest(folder, path), where)
    val problem = when {
        inner !is AdapterManifest -> {
            "it is not the manifest of an adapter"
        }

        inner.baseFingerprint != model.baseFingerprint -> {
            "the adapter is for another base model"
        }

        !model.files.containsAll(inner.files.map { it.copy(path = "$adapter/${it.path}") }) -> {
            "the adapter's files are not those that the model's manifest lists"
        }

        else -> {
            return
        }
    }
    throw ManifestError(problem, where, "convert the adapter for this model, and export the bundle again")
}

private fun checkHeader(folder: Folder, path: String, size: Long) {
    val suffix = "." + path.substringAfterLast('.')
    val isRight = FORMATS[suffix] ?: return
    if (!isRight(readHead(folder, path, HEAD), size)) {
        throw IntegrityError("$path does not begin as $suffix files do", folder.path, "fetch or export the bundle again")
    }
}

private val FORMATS: Map<String, (ByteArray, Long) -> Boolean> = mapOf(
    // 8 bytes are the length of the JSON that follows.
    ".safetensors" to { head, size -> head.size > 8 && head[8] == '{'.code.toByte() && little(head).getLong(0) in 0..size - 8 },
    // A protobuf message; every writer begins with its first field, `ir_version`, a varint.
    ".onnx" to { head, size -> size > 2 && head[0] == 8.toByte() },
    ".onnx_adapter" to flatbuffer("TORT"),
    ".pte" to flatbuffer("ET12"),
    ".ptd" to flatbuffer("FT01"),
)

/** The offset of its root, and an identifier of four bytes. */
private fun flatbuffer(identifier: String): (ByteArray, Long) -> Boolean =
    { head, size ->
        head.size >= 8 && String(head, 4, 4, Charsets.ISO_8859_1) == identifier && little(head).getInt(0) in 0 until size
    }

private fun little(head: ByteArray): ByteBuffer = ByteBuffer.wrap(head).order(ByteOrder.LITTLE_ENDIAN)
