/*
 * How sure is sure enough: the numbers of a policy, as `crayon route calibrate` has left them beside an adapter, or from nothing but the
 * user's own examples. Calibrating itself is done in Python.
 *
 *     BUNDLE.customized/routing.json    of one adapter, and ignored with another one
 */
package crayon.runtime.routing

import crayon.runtime.ADAPTER
import crayon.runtime.ExampleStates
import crayon.runtime.Malformed
import crayon.runtime.ManifestError
import crayon.runtime.ROUTING
import crayon.runtime.checkVersion
import crayon.runtime.fromJson
import crayon.runtime.parseJson
import crayon.runtime.sha256
import kotlinx.serialization.Serializable
import java.io.IOException
import java.nio.file.NoSuchFileException
import java.nio.file.Path
import kotlin.io.path.fileSize
import kotlin.io.path.readBytes

/** How far below the median of the user's own examples the threshold is, where there is nothing else. */
private const val MARGIN = 2.0

/** The weights where no labels say them. */
private val WORTH = mapOf("log_odds" to 1.0, "examples_nearness" to 0.5, "prompts_nearness" to 0.5)

private val UNCALIBRATED = mapOf(
    "calibrated" to listOf("log_odds", "examples_nearness"),
    "early" to listOf("log_odds", "prompts_nearness"),
    "paper" to listOf("prototypes_mean"),
)

/** Tokens after which `early` decides. */
private const val EARLY = 4
private const val LARGEST = 1L shl 20

/** routing.json, as far as a device reads it; `adapter` is the SHA-256 of the manifest.json of the adapter that it was made with. */
@Serializable
internal data class Calibration(val adapter: String, val policies: List<Policy>)

/**
 * What is kept in a folder for the adapter there; null if there is nothing, or it was made with another adapter.
 *
 * @throws ManifestError it is damaged.
 * @throws crayon.runtime.SchemaTooNew a newer version has written it.
 */
internal fun readCalibration(folder: Path): Calibration? {
    val path = folder.resolve(ROUTING)
    try {
        if (path.fileSize() > LARGEST) throw Malformed("it has more than $LARGEST bytes")
        val raw = parseJson(path.readBytes())
        checkVersion(raw, path)
        val calibration = fromJson(Calibration.serializer(), raw)
        return calibration.takeIf { it.adapter == sha256(folder.resolve(ADAPTER).resolve("manifest.json")) }
    } catch (_: NoSuchFileException) {
        return null
    } catch (e: IOException) {
        throw ManifestError("it cannot be read: ${e.message}", path)
    } catch (e: Malformed) {
        throw ManifestError(e.problem, path, "calibrate again with `crayon route calibrate`")
    } catch (e: crayon.runtime.InvalidInput) {
        // what a policy refuses
        throw ManifestError(e.what, path, "calibrate again with `crayon route calibrate`")
    }
}

/**
 * Policies from nothing but the user's own examples, which the device shall answer: what a device has right after it was customized.
 *
 * @param reference with these examples; each is compared with the others.
 */
internal fun uncalibrated(reference: Reference, examples: ExampleStates): List<Policy> {
    val rows = examples.logProbability.indices.map { row(reference, examples, it) }
    return UNCALIBRATED.mapNotNull { (name, wanted) ->
        val names = wanted.filter { signal -> rows.all { signal in it } }
        if (names.isEmpty()) return@mapNotNull null
        val weights = names.filter { it in WORTH }.associateWith(WORTH::getValue).ifEmpty { names.associateWith { 1.0 } }
        val policy = Policy(name, weights, 0.0, 0.0, EARLY.takeIf { name == "early" })
        val scores = rows.map(policy::score)
        policy.copy(threshold = if (name == "paper") scores.min() else median(scores) - MARGIN)
    }
}

private fun row(reference: Reference, examples: ExampleStates, i: Int): Map<String, Double> =
    buildMap {
        put("log_odds", odds(examples.logProbability[i].toDouble()))
        if (reference.prototypeRows.isNotEmpty()) put("prototypes_mean", reference.prototypesMean(examples.answer[i]))
        if (reference.answers.size > 1) {
            put("examples_nearness", nearness(others(reference.answers, i)))
            put("prompts_nearness", nearness(others(reference.prompts, i)))
        }
    }

private fun others(rows: List<FloatArray>, i: Int): List<Double> = cosines(rows.filterIndexed { j, _ -> j != i }, rows[i])

private fun median(values: List<Double>): Double {
    val sorted = values.sorted()
    return (sorted[(sorted.size - 1) / 2] + sorted[sorted.size / 2]) / 2
}
