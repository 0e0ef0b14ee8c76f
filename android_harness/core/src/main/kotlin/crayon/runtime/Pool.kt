// What a device knows of a pool of adapters: its manifest, and where its clusters lie.
package crayon.runtime

import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import java.nio.file.Path

internal const val PROJECTION = "projection.safetensors"
internal const val PROTOTYPES = "prototypes.safetensors"
internal const val LORA_FILE = "adapter_model.safetensors"

/** What of a text is embedded, always with the un-customized base. */
@Serializable
data class PoolEmbedding(
    @SerialName("tap_layer") val tapLayer: Int,
    val part: PoolPart,
    val residual: Boolean,
)

@Serializable
enum class PoolPart(internal val part: TextPart) {
    @SerialName("answer")
    ANSWER(TextPart.ANSWER),

    @SerialName("all")
    ALL(TextPart.ALL),

    @SerialName("prompt")
    PROMPT(TextPart.PROMPT),
}

@Serializable
data class PoolPrototypes(val model: String, val count: Int)

/** pool.json, as far as a device reads it. */
@Serializable
data class PoolManifest(
    val kind: String,
    val name: String,
    val version: String,
    val serial: Long = 0,
    @SerialName("base_fingerprint") val baseFingerprint: String,
    val adapters: Int,
    val embedding: PoolEmbedding,
    val dimensions: Int,
    val weighting: Weighting,
    val blend: String,
    val prototypes: PoolPrototypes? = null,
    val files: List<BundleFile>,
) {
    /** What an adapter that is blended from this pool says of it. */
    val origin: BlendedFrom get() = BlendedFrom(name, version, serial)

    internal fun file(name: String): BundleFile? = files.find { it.path == name }
}

/**
 * Reads a pool.json.
 *
 * @throws ManifestError it is not JSON, breaks the schema, or lacks a file.
 * @throws SchemaTooNew a newer version has written it.
 */
internal fun parsePool(document: ByteArray, where: String): PoolManifest {
    val manifest = try {
        val raw = parseJson(document)
        checkVersion(raw, where)
        fromJson(PoolManifest.serializer(), raw)
    } catch (e: Malformed) {
        throw ManifestError(e.problem, where, "fetch the pool again")
    }
    manifest.files.forEach { checkRelative(it.path, where) }
    val wanted = listOf(PROJECTION) + List(manifest.adapters) { "adapters/${it.toString().padStart(3, '0')}/$LORA_FILE" } +
        listOfNotNull(PROTOTYPES.takeIf { manifest.prototypes != null })
    val missing = wanted.filter { manifest.file(it) == null }
    val problem = when {
        manifest.kind != "pool" -> "it is not a pool"

        missing.isNotEmpty() -> "`files` does not list ${missing.first()}"

        manifest.adapters < 1 || manifest.dimensions < 1 || manifest.serial < 0 || manifest.files.any {
            it.size < 0
        } -> "a number is out of range"

        !(manifest.weighting.temperature > 0) -> "its temperature is not above 0"

        else -> return manifest
    }
    throw ManifestError(problem, where, "fetch the pool again")
}

/** Reads a projection.safetensors; [IntegrityError] if it is not what its pool's manifest asks for. */
internal fun readProjection(path: Path, manifest: PoolManifest): Projection {
    val found = Safetensors.read(path).tensors
    val (d, k) = found["projection"]?.shape?.takeIf { it.size == 2 } ?: listOf(0, 0)
    val plain = mapOf("mean" to listOf(d), "projection" to listOf(d, manifest.dimensions), "indicators" to listOf(manifest.adapters, k))
    val residual = mapOf("prompt_mean" to listOf(d), "answer_mean" to listOf(d), "ridge" to listOf(d, d))
    val shapes = found.mapValues { it.value.shape }
    val wanted = if (manifest.embedding.residual) plain + residual else plain
    val problem = when {
        shapes != wanted -> "it holds $shapes"
        found.values.any { tensor -> tensor.values.any { !it.isFinite() } } -> "it holds NaN or infinity"
        !areUnits(found.getValue("indicators").rows) -> "its indicators are not of unit length"
        else -> null
    }
    if (problem != null) throw IntegrityError("$problem, which is not what its pool asks for", path, "fetch the pool again")
    return Projection(
        found.getValue("mean").values,
        found.getValue("projection").rows,
        found.getValue("indicators").rows,
        found["prompt_mean"]?.values,
        found["answer_mean"]?.values,
        found["ridge"]?.rows,
    )
}
