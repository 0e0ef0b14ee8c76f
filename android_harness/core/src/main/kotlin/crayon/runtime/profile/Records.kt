// What a profile says, one JSON object a line: the records of Python's `crayon_runtime.profile`, which docs/profile.md describes.
@file:OptIn(kotlinx.serialization.ExperimentalSerializationApi::class)

package crayon.runtime.profile

import crayon.runtime.COMPACT
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.JsonClassDiscriminator

/** A line. Times are in nanoseconds, sizes in bytes; null is what the system does not tell. */
@Serializable
@JsonClassDiscriminator("type")
sealed interface Record {
    /** This record as a line, without its end. */
    fun toJson(): String = COMPACT.encodeToString(serializer(), this)
}

/** A core. `capacity` is of 1024, which is the fastest core's. */
@Serializable
data class Core(
    val cpu: Int,
    val capacity: Int?,
    @SerialName("max_hz") val maxHz: Long?,
)

/** What was measured, and on what. */
@Serializable
@SerialName("profile")
data class Header(
    @SerialName("schema_version") val schemaVersion: String = "1.0",
    @SerialName("test_time") val testTime: String,
    @SerialName("crayon_version") val crayonVersion: String,
    val versions: Map<String, String?>,
    val system: String,
    @SerialName("cpu_info") val cpuInfo: String,
    val cores: List<Core>,
    @SerialName("memory_bytes") val memoryBytes: Long?,
    @SerialName("model_filename") val modelFilename: String,
    @SerialName("model_name") val modelName: String,
    @SerialName("model_type") val modelType: String,
    @SerialName("model_size") val modelSize: Long,
    @SerialName("base_fingerprint") val baseFingerprint: String,
    @SerialName("context_length") val contextLength: Int,
    @SerialName("type_k") val typeK: String,
    @SerialName("type_v") val typeV: String,
    val backends: String,
    val adapter: String?,
    val adapters: List<String>,
    @SerialName("read_bytes") val readBytes: Long,
    @SerialName("kv_bytes") val kvBytes: Long,
    val operations: Long,
) : Record

/** What one process measured of a test; `test` is a name of docs/profile.md. */
@Serializable
@SerialName("observation")
data class Observation(
    val test: String,
    @SerialName("n_prompt") val nPrompt: Int = 0,
    @SerialName("n_gen") val nGen: Int = 0,
    @SerialName("n_depth") val nDepth: Int = 0,
    val adapter: String? = null,
    val nbytes: Long = 0,
    @SerialName("warmup_ns") val warmupNs: List<Long> = emptyList(),
    @SerialName("samples_ns") val samplesNs: List<Long>,
    @SerialName("token_ns") val tokenNs: List<List<Long>> = emptyList(),
) : Record

/** The process and the machine at one moment, `tNs` after it began to measure. */
@Serializable
@SerialName("sample")
data class Sample(
    val process: Int,
    val phase: String,
    @SerialName("t_ns") val tNs: Long,
    @SerialName("rss_bytes") val rssBytes: Long?,
    @SerialName("pss_bytes") val pssBytes: Long?,
    @SerialName("mapped_bytes") val mappedBytes: Long?,
    @SerialName("peak_rss_bytes") val peakRssBytes: Long?,
    @SerialName("frequency_hz") val frequencyHz: List<Long>,
    @SerialName("temperature_c") val temperatureC: Map<String, Double>,
    val throttled: Map<String, Long>,
    @SerialName("energy_j") val energyJ: Map<String, Double>,
    @SerialName("power_w") val powerW: Map<String, Double>,
    @SerialName("avg_ts") val avgTs: Double? = null,
) : Record

/** A long run as a whole: tokens a second in its first and its last tenth, and what it used. */
@Serializable
@SerialName("long")
data class LongRun(
    val seconds: Double,
    @SerialName("n_gen") val nGen: Int,
    @SerialName("first_ts") val firstTs: Double,
    @SerialName("last_ts") val lastTs: Double,
    @SerialName("energy_j") val energyJ: Map<String, Double>,
    val throttled: Map<String, Long>,
) : Record

/** What this profile lacks, and why. */
@Serializable
@SerialName("absent")
data class Absent(val what: String, val reason: String) : Record

/** Why a process could not measure: the parts of a [crayon.runtime.CrayonError]. */
@Serializable
@SerialName("failure")
data class Failure(
    val error: String,
    val what: String,
    val where: String?,
    @SerialName("do") val advice: String?,
) : Record
