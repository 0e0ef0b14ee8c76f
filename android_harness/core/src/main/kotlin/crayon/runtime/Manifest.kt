/*
 * manifest.json: what a bundle says about itself.
 *
 * The classes below are those of Python's `crayon_runtime.manifest`, whose `manifest.schema.json` says what each field means. A reader refuses
 * a larger major version, and ignores fields it does not know.
 */
package crayon.runtime

import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.JsonClassDiscriminator
import kotlinx.serialization.json.JsonElement

internal const val SCHEMA_MAJOR = 1

/** A file of a bundle: its path relative to the bundle, its bytes, and their SHA-256 in lower-case hex. */
@Serializable
data class BundleFile(val path: String, val size: Long, val sha256: String)

/** What wrote a bundle. */
@Serializable
data class Producer(val name: String, val version: String)

/** The shape of a LLaMA-style decoder. */
@Serializable
data class Architecture(
    @SerialName("model_type") val modelType: String,
    val layers: Int,
    @SerialName("hidden_size") val hiddenSize: Int,
    val heads: Int,
    @SerialName("kv_heads") val kvHeads: Int,
    @SerialName("head_size") val headSize: Int,
    @SerialName("ffn_size") val ffnSize: Int,
    @SerialName("vocab_size") val vocabSize: Int,
    @SerialName("layer_repeats") val layerRepeats: Int = 1,
    @SerialName("tied_embeddings") val tiedEmbeddings: Boolean = false,
) {
    /** Computations of a block for each token; each has a slot of the KV cache. */
    val passes: Int get() = layers * layerRepeats

    /** Features in and out of a linear layer that an adapter may target; null: there is no layer of this name. */
    fun features(target: String): Pair<Int, Int>? =
        when (target) {
            "q_proj" -> hiddenSize to heads * headSize
            "k_proj", "v_proj" -> hiddenSize to kvHeads * headSize
            "o_proj" -> heads * headSize to hiddenSize
            "gate_proj", "up_proj" -> hiddenSize to ffnSize
            "down_proj" -> ffnSize to hiddenSize
            else -> null
        }
}

/** How the weights of the linear layers and of the embedding are stored. */
@Serializable
data class Quantization(
    val weights: String,
    @SerialName("group_size") val groupSize: Int,
    val embedding: String,
)

/** The tokenizer of a model: its file, the ids of its control tokens, its chat template. */
@Serializable
data class TokenizerInfo(
    val file: String,
    @SerialName("vocab_size") val vocabSize: Int,
    @SerialName("add_bos") val addBos: Boolean,
    val bos: Int?,
    val eos: List<Int>,
    val pad: Int? = null,
    @SerialName("chat_template") val chatTemplate: String? = null,
)

/** A graph for ONNX Runtime. */
@Serializable
data class OnnxVariant(val model: String, val data: List<String>)

/** Of the slots of a program only where it is: this reader has no ExecuTorch. */
@Serializable
data class ExecutorchSlots(val program: String)

/** A program for ExecuTorch, with its weights. */
@Serializable
data class ExecutorchVariant(val program: String, val data: List<String>, val slots: ExecutorchSlots? = null)

/** The same model for each backend that the bundle serves. */
@Serializable
data class Variants(val onnx: OnnxVariant? = null, val executorch: ExecutorchVariant? = null)

/** Where a LoRA may be attached while the model runs. */
@Serializable
data class AdapterSlots(
    val targets: List<String>,
    @SerialName("rank_limit") val rankLimit: Int?,
)

/** The hidden state that the model returns beside its logits: its index into transformers' hidden_states, and its width. */
@Serializable
data class Tap(val layer: Int, val size: Int)

/** The files of the golden cases. */
@Serializable
data class GoldenFiles(val cases: String, val tensors: String)

/** One linear layer that an adapter changes. */
@Serializable
data class AdapterTarget(val module: String, val rank: Int)

/** How the tensors of an `.onnx_adapter` file are stored. */
@Serializable
enum class AdapterDtype {
    @SerialName("fp32")
    FP32,

    @SerialName("fp16")
    FP16,

    @SerialName("int8")
    INT8,
}

/** What the KV cache is kept in. */
@Serializable
enum class KvDtype(internal val bytes: Int) {
    @SerialName("fp32")
    FP32(4),

    @SerialName("fp16")
    FP16(2),

    @SerialName("int8")
    INT8(1),
}

@Serializable
data class OnnxAdapterVariant(val file: String, val dtype: AdapterDtype = AdapterDtype.FP32)

@Serializable
data class ExecutorchAdapterVariant(val data: List<String>, val program: String? = null, val slots: JsonElement? = null)

/** The same adapter for each backend that it was made for. */
@Serializable
data class AdapterVariants(val onnx: OnnxAdapterVariant? = null, val executorch: ExecutorchAdapterVariant? = null)

/** The pool that an adapter was blended from; a newer build has a larger serial. */
@Serializable
data class BlendedFrom(val name: String, val version: String, val serial: Long)

/** The prototypes that travel with an adapter. */
@Serializable
data class AdapterPrototypes(val file: String, val count: Int, val model: String)

/** Either kind of manifest. */
@Serializable
@JsonClassDiscriminator("kind")
sealed interface Manifest {
    val name: String
    val baseFingerprint: String
    val files: List<BundleFile>
}

@Serializable
@SerialName("model")
data class ModelManifest(
    @SerialName("schema_version") val schemaVersion: String,
    override val name: String,
    @SerialName("base_fingerprint") override val baseFingerprint: String,
    val producer: Producer,
    val architecture: Architecture,
    @SerialName("context_length") val contextLength: Int,
    @SerialName("kv_dtype") val kvDtype: KvDtype,
    val tokenizer: TokenizerInfo,
    val variants: Variants,
    @SerialName("adapter_slots") val adapterSlots: AdapterSlots?,
    val tap: Tap,
    val golden: GoldenFiles?,
    val adapters: List<String> = emptyList(),
    override val files: List<BundleFile>,
    val quantization: Quantization? = null,
) : Manifest

@Serializable
@SerialName("adapter")
data class AdapterManifest(
    @SerialName("schema_version") val schemaVersion: String,
    override val name: String,
    @SerialName("base_fingerprint") override val baseFingerprint: String,
    val producer: Producer,
    val targets: List<AdapterTarget>,
    val variants: AdapterVariants,
    val pool: BlendedFrom? = null,
    val prototypes: AdapterPrototypes? = null,
    override val files: List<BundleFile>,
) : Manifest

/**
 * Reads a manifest, and checks everything about it that can be checked without its files.
 *
 * @throws SchemaTooNew its major version is larger than ours.
 * @throws ManifestError it is not JSON, breaks the schema, or names a path that it must not.
 */
fun parseManifest(document: ByteArray, where: Any = "manifest.json"): Manifest {
    val raw = try {
        parseJson(document)
    } catch (e: Malformed) {
        throw ManifestError("not JSON: ${e.problem}", where, "fetch or export the bundle again")
    }
    checkVersion(raw, where)
    val manifest = try {
        fromJson(Manifest.serializer(), raw)
    } catch (e: Malformed) {
        throw ManifestError(e.problem, where, "see manifest.schema.json")
    }
    checkManifest(manifest, where)
    return manifest
}

/** Refuses a document of a larger major version, or without one. */
internal fun checkVersion(raw: JsonElement, where: Any) {
    val version = raw.text("schema_version")
    val match = version?.let { Regex("""(\d{1,4})\.(\d{1,4})""").matchEntire(it) }
        ?: throw ManifestError("it has no schema_version of the form MAJOR.MINOR", where)
    if (match.groupValues[1].toInt() > SCHEMA_MAJOR) {
        throw SchemaTooNew(
            "the bundle has schema version $version; this crayon reads up to $SCHEMA_MAJOR.x",
            where,
            "upgrade the app, or export the bundle with an older crayon-edge",
        )
    }
}
