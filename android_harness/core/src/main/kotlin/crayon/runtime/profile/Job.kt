// What the measuring program is asked: one JSON object, the same as for Python's `crayon_runtime.profile.worker`.
@file:OptIn(kotlinx.serialization.ExperimentalSerializationApi::class)

package crayon.runtime.profile

import crayon.runtime.InvalidInput
import crayon.runtime.Malformed
import crayon.runtime.decodeJson
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.JsonClassDiscriminator

/** What a process does. */
@Serializable
@JsonClassDiscriminator("work")
sealed interface Work {
    /** Load the model, and say what there is: a [Header]. */
    @Serializable
    @SerialName("describe")
    data object Describe : Work

    /** Load the model after the system has forgotten the bundle's files. */
    @Serializable
    @SerialName("load")
    data class Load(val first: Boolean) : Work

    /**
     * Load the model, and run every test.
     *
     * @property prompts tokens of each prefill, from position 0.
     * @property depths positions at which decodes begin.
     * @property generate tokens of each decode.
     * @property rounds samples of a test, after one that warms up.
     * @property more also what has to be known once only: adapters, examples, routing.
     */
    @Serializable
    @SerialName("measure")
    data class Measure(val prompts: List<Int>, val depths: List<Int>, val generate: Int, val rounds: Int, val more: Boolean) : Work

    /** The time of each operator of a decode. */
    @Serializable
    @SerialName("trace")
    data class Trace(val depth: Int, val generate: Int) : Work

    /** Decode for so many seconds, and watch the machine. */
    @Serializable
    @SerialName("long")
    data class Long(val seconds: Double) : Work
}

/**
 * One process of the measuring program.
 *
 * @property bundle a path on this device.
 * @property backend the key of a manifest's `variants`, or "auto".
 * @property adapter the name of one inside the bundle, or a path; null: the base.
 * @property threads cores to compute on; null: the backend chooses.
 * @property cpus cores to hold it on; null: all.
 * @property process its number.
 */
@Serializable
data class Job(
    val bundle: String,
    val backend: String,
    val adapter: String?,
    val threads: Int?,
    val cpus: List<Int>?,
    val process: Int,
    val work: Work,
)

/** Reads a job; [InvalidInput] if it is none. */
fun readJob(document: ByteArray): Job {
    val job = try {
        decodeJson(Job.serializer(), document)
    } catch (e: Malformed) {
        throw InvalidInput("this is no job: ${e.problem}", "job", "let `crayon profile` of the same version ask")
    }
    val work = job.work
    if (work is Work.Measure) {
        val sizes = work.prompts + work.generate + work.rounds
        if (sizes.any { it < 1 } || work.depths.any { it < 0 }) throw InvalidInput("a size or a number of rounds is not at least 1", "job")
    }
    return job
}
