// How much memory a model will need, and how much there is: so that it is refused before the system ends the app.
package crayon.runtime

import crayon.runtime.bundle.Bundle
import java.io.IOException
import java.nio.file.Path
import java.nio.file.Paths
import kotlin.io.path.readLines

/**
 * Bytes that a model takes with one sequence: its weights, the KV cache of its whole context, and what one block holds at once for a chunk
 * of a prompt. As `crayon export` estimates it, without the process itself.
 */
fun memoryNeeded(bundle: Bundle): Long {
    val model = bundle.model
    val a = model.architecture
    val weights =
        model.variants.onnx?.let { listOf(it.model) + it.data } ?: model.variants.executorch
            ?.let { listOf(it.program) + it.data }
            .orEmpty()
    val stored = model.files.filter { it.path in weights }.sumOf { it.size }
    val kvCache = 2L * a.passes * a.kvHeads * a.headSize * model.kvDtype.bytes * model.contextLength
    val width = 4L * a.hiddenSize + 3L * a.ffnSize + 2L * (a.heads + a.kvHeads) * a.headSize
    return stored + kvCache + 4 * (PREFILL_CHUNK * width + a.vocabSize)
}

/** Bytes that programs get without swapping, as Linux and Android tell; null where the system does not. */
fun freeMemory(): Long? = freeMemory(Paths.get("/proc/meminfo"))

internal fun freeMemory(meminfo: Path): Long? =
    try {
        meminfo
            .readLines()
            .firstOrNull { it.startsWith("MemAvailable:") }
            ?.split(Regex(" +"))
            ?.get(1)
            ?.toLongOrNull()
            ?.times(1024)
    } catch (_: IOException) {
        null
    }

/** Refuses a model that needs more than there is. */
internal fun checkMemory(bundle: Bundle, available: Long?) {
    val needed = memoryNeeded(bundle)
    if (available == null || needed <= available) return
    throw BackendError(
        "the model needs ${needed / MB} MB of memory; ${available / MB} MB are free",
        bundle.path,
        "end other apps, or export the model smaller: int4, a shorter context, an fp16 KV cache",
    )
}

private const val MB = 1_000_000
