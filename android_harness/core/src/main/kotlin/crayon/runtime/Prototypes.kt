// Prototypes S: embeddings of what the server LLM answers, for a device to compare its own answers with. They travel with an adapter.
package crayon.runtime

import crayon.runtime.bundle.Bundle
import kotlin.io.path.fileSize

private const val HEADER = 4096

/**
 * S of one user.
 *
 * @property states [M][D]: mean tapped states over the tokens of an answer, as they are.
 * @property mean [D]: of all prototypes of the pool.
 */
class Prototypes(val states: List<FloatArray>, val mean: FloatArray)

/**
 * S that came with an adapter; null if none did.
 *
 * @param size D, of the model's tapped state.
 * @throws AdapterError they are of another base, of another version of the pool, or of another size.
 * @throws IntegrityError they hold NaN or infinity, or the file is damaged.
 */
internal fun readPrototypes(adapter: Bundle, size: Int): Prototypes? {
    val manifest = adapter.asAdapter
    val info = manifest.prototypes ?: return null
    val path = adapter.file(info.file)
    if (path.fileSize() > 2L * size * info.count + 4L * size + HEADER) {
        throw AdapterError("${info.count} prototypes of states of $size take less room than this", path, "customize again")
    }
    val file = Safetensors.read(path)
    val origin = listOfNotNull(manifest.baseFingerprint, manifest.pool?.version).joinToString(" ")
    if (file.metadata["origin"] != origin) {
        throw AdapterError("the prototypes are of another base, or of another version of the pool", path, "customize again")
    }
    val shapes = file.tensors.mapValues { it.value.shape }
    if (shapes != mapOf("states" to listOf(info.count, size), "mean" to listOf(size))) {
        throw AdapterError("the prototypes are $shapes", path, "use prototypes that were made for this model, at its tap")
    }
    if (file.tensors.values.any { tensor -> tensor.values.any { !it.isFinite() } }) {
        throw IntegrityError("the prototypes hold NaN or infinity", path, "make them again")
    }
    return Prototypes(file.tensors.getValue("states").rows, file.tensors.getValue("mean").values)
}
