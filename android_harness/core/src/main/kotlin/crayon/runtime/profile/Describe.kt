// What is measured, and on what: the first line of a profile.
package crayon.runtime.profile

import crayon.runtime.Architecture
import crayon.runtime.Engine
import crayon.runtime.KvDtype
import crayon.runtime.ModelManifest
import crayon.runtime.bundle.Bundle
import java.time.Instant
import java.time.temporal.ChronoUnit
import kotlin.io.path.name

/** Of crayon-edge. */
internal const val VERSION = "0.1.0"

internal fun describe(engine: Engine, bundle: Bundle, sensors: Sensors): Header {
    val model = bundle.model
    val kv = model.kvDtype.name.lowercase()
    return Header(
        testTime = Instant.now().truncatedTo(ChronoUnit.SECONDS).toString(),
        crayonVersion = VERSION,
        versions =
            mapOf("kotlin" to KotlinVersion.CURRENT.toString(), "java" to System.getProperty("java.version")) + engine.backend.versions,
        system = sensors.system,
        cpuInfo = sensors.processor,
        cores = sensors.cores(),
        memoryBytes = sensors.memory,
        modelFilename = bundle.path.name,
        modelName = model.name,
        modelType = "${model.architecture.modelType} ${model.quantization?.weights ?: "none"}",
        modelSize = bundle.size,
        baseFingerprint = model.baseFingerprint,
        contextLength = engine.backend.contextLength,
        typeK = kv,
        typeV = kv,
        backends = engine.backend.name,
        adapter = engine.adapter,
        adapters = bundle.adapterNames,
        readBytes = readBytes(model),
        kvBytes = kvBytes(model.architecture, model.kvDtype),
        operations = operations(model.architecture),
    )
}

/**
 * Bytes of weights and their scales, one of four bytes a group, that decoding a token reads: all linear layers, the output layer, and norms. Of the
 * embedding it is one row. A block that is repeated counts once.
 */
internal fun readBytes(model: ModelManifest): Long {
    val a = model.architecture
    val q = model.quantization
    val scale = if (q != null && q.groupSize > 0) 4.0 / q.groupSize else 0.0
    val weight = (WEIGHT_BYTES[q?.weights] ?: 4.0) + scale
    val shared = a.tiedEmbeddings && q != null && q.weights != "none" && q.embedding == "int8" // one tensor, as the embedding is stored
    val head = a.vocabSize.toLong() * a.hiddenSize * (if (shared) 1 + scale else weight)
    val norms = 4L * (2 * a.layers + 1) * a.hiddenSize
    return Math.rint(a.layers * blockWeights(a) * weight + head + norms).toLong()
}

/** Weights of the linear layers of one block. */
private fun blockWeights(a: Architecture): Long = a.hiddenSize.toLong() * (a.headSize * (2 * a.heads + 2 * a.kvHeads) + 3 * a.ffnSize)

/** Keys and values of one token, in all passes. */
private fun kvBytes(a: Architecture, dtype: KvDtype): Long = a.passes * 2L * a.kvHeads * a.headSize * dtype.bytes

/** Multiplications and additions of all linear layers and the output layer, for one token. */
private fun operations(a: Architecture): Long = 2 * (a.passes * blockWeights(a) + a.vocabSize.toLong() * a.hiddenSize)

private val WEIGHT_BYTES = mapOf("int4" to 0.5, "int8" to 1.0, "none" to 4.0)
