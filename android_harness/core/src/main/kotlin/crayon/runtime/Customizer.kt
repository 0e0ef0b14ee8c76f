/*
 * From about ten examples to an adapter of one's own: alpha is computed on the device, and a service blends LoRAs with it.
 *
 * What is kept stands beside the model, as Python's `crayon_runtime.customized` has it, and is replaced as a whole, so that a device that
 * dies at any moment comes back with the old or the new adapter:
 *
 *     BUNDLE.customized/adapter/                an adapter bundle
 *     BUNDLE.customized/examples.jsonl          the examples; they never leave the device
 *     BUNDLE.customized/examples.safetensors    what the customized model makes of them; neither do these
 *     BUNDLE.customized/state.json              where the adapter comes from
 *     BUNDLE.customized/keys.json               those that a service has to sign with, if any were given
 *
 * A new adapter is proved before it takes the place of the old one: it must change what the model says, and the log-loss of the answers in
 * the examples must not get worse.
 */
package crayon.runtime

import crayon.runtime.backends.Adapter
import crayon.runtime.bundle.Bundle
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.withContext
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.buildJsonArray
import kotlinx.serialization.json.buildJsonObject
import kotlinx.serialization.json.put
import java.io.IOException
import java.nio.file.Files
import java.nio.file.Path
import java.security.SecureRandom
import java.util.Locale
import java.util.Random
import kotlin.io.path.copyTo
import kotlin.io.path.exists
import kotlin.io.path.isRegularFile
import kotlin.io.path.name
import kotlin.io.path.readBytes
import kotlin.io.path.writeBytes
import kotlin.math.abs

internal const val ADAPTER = "adapter"
internal const val STATES = "examples.safetensors"
internal const val ROUTING = "routing.json"
internal const val EXAMPLES = "examples.jsonl"
private const val STATE = "state.json"
private const val KEYS = "keys.json"

/** More digits of alpha are not sent: a service rounds to as many. */
private const val DECIMALS = 4

/** Of its log-loss, relative, may an adapter be worse than what it replaces: less is noise of rounding. */
private const val TOLERANCE = 0.01

/** Of a logit. An adapter of zeros changes none at all. */
private const val SMALLEST_CHANGE = 1e-5f

/** Prototypes that come with an adapter, unless somebody asks for another number. */
private const val PROTOTYPES_ASKED = 64

/** state.json. */
@Serializable
internal data class CustomizedState(
    @SerialName("schema_version") val schemaVersion: String = "1.0",
    @SerialName("base_fingerprint") val baseFingerprint: String,
    @SerialName("pool_name") val poolName: String,
    @SerialName("pool_version") val poolVersion: String,
    @SerialName("newest_serial") val newestSerial: Long,
    val alpha: List<Double>,
    val refined: Boolean = false,
    @SerialName("log_loss") val logLoss: Double,
)

/**
 * What came of a customization.
 *
 * @property installed whether the new adapter is in place; otherwise everything is as it was.
 * @property reason why, in a sentence.
 * @property alpha what was blended.
 * @property sent the body that asks the service for the adapter: all that left the device. It is a fingerprint of the user.
 * @property logLossBase of the answers in the examples, nats per token, with the base model.
 * @property logLossBefore with the adapter that was in place, if it fits this model; otherwise that of the base.
 * @property logLoss with the new adapter.
 * @property logitChange the largest difference to the base of any logit after a prompt.
 */
class Customization internal constructor(
    val installed: Boolean,
    val reason: String,
    val alpha: List<Double>,
    val sent: String,
    val logLossBase: Double,
    val logLossBefore: Double,
    val logLoss: Double,
    val logitChange: Float,
)

/** Where the customized adapter of a bundle is kept: beside it. */
fun stateFolder(bundle: Path): Path = bundle.resolveSibling("${bundle.name}.customized")

/**
 * Customizes the model of an engine by a service.
 *
 * @param engine with a bundle.
 * @param folder where the adapter is kept; null: [stateFolder] of the engine's bundle.
 */
class Customizer(private val engine: Engine, private val client: PoolClient, folder: Path? = null) {
    private val bundle = engine.bundle ?: throw InvalidInput("an engine without a bundle cannot be customized", advice = "load one")
    val folder: Path = folder ?: stateFolder(bundle.path)

    /** Answers with the adapter that is kept, if there is one that fits; whether there is. */
    fun restore(): Boolean {
        recover(folder)
        val (old, _) = readOld()
        if (old == null) return false
        engine.setAdapter(Bundle.open(folder.resolve(ADAPTER)))
        return true
    }

    /**
     * What [customize] would send with these examples: the same body, computed in the same way, and sent to nobody.
     *
     * @throws CrayonError as [customize], before it sends anything.
     */
    suspend fun preview(examples: List<Example>): String =
        withContext(Dispatchers.Default) {
            val base = begin(examples, allowOlder = true)
            COMPACT.encodeToString(JsonObject.serializer(), body(disguise(alphaOf(base), DECIMALS, 0.0, signed()), PROTOTYPES_ASKED))
        }

    /**
     * Customizes the model, and answers with the new adapter from now on if it proved itself.
     *
     * @param examples pairs of a prompt and its answer. They do not leave the device.
     * @param digits of alpha that are sent, at most 4; fewer tell less of the user.
     * @param noise the deviation of normal noise that alpha gets before.
     * @param prototypes how many of the pool's come with the adapter, at most.
     * @param allowOlder take a pool that is older than one accepted before.
     * @throws AdapterError the pool is of another base model, or embeds at another tap.
     * @throws InvalidInput an example or an option cannot be used.
     * @throws ServerError the service cannot be reached, refuses, or offers an older pool. Everything is as it was.
     * @throws BundleError what it sends is damaged, not signed, or not what was asked for. Everything is as it was.
     * @throws OutputError the disk is full, or something else is in the place of the folder.
     */
    suspend fun customize(
        examples: List<Example>,
        digits: Int = DECIMALS,
        noise: Double = 0.0,
        prototypes: Int = PROTOTYPES_ASKED,
        allowOlder: Boolean = false,
    ): Customization =
        withContext(Dispatchers.Default) {
            if (digits !in 0..DECIMALS) throw InvalidInput("digits is $digits; it must be from 0 to $DECIMALS", "digits")
            if (noise !in 0.0..1.0) throw InvalidInput("noise is $noise; it must be from 0 to 1", "noise")
            if (prototypes !in 0..1024) throw InvalidInput("prototypes is $prototypes; it must be from 0 to 1024", "prototypes")
            val base = begin(examples, allowOlder)
            try {
                run(examples, base, digits, noise, prototypes)
            } catch (_: PoolChanged) {
                client.refresh() // it changed between two requests; if that happens again, something else is wrong
                checkPool(allowOlder)
                run(examples, base, digits, noise, prototypes)
            }
        }

    private suspend fun begin(examples: List<Example>, allowOlder: Boolean): Score {
        checkExamples(examples)
        recover(folder)
        checkPool(allowOlder)
        return score(engine, examples, null) // says which example is too long, before anything is sent
    }

    private suspend fun run(examples: List<Example>, base: Score, digits: Int, noise: Double, prototypes: Int): Customization {
        if (folder.exists() && !folder.resolve(STATE).isRegularFile()) {
            throw OutputError("there is something else in the place of the customized adapter", folder)
        }
        val (old, unusable) = readOld()
        val before = if (old != null) score(engine, examples, old).logLoss else base.logLoss
        val alpha = disguise(alphaOf(base), digits, noise, signed())
        val body = body(alpha, prototypes)
        // Beside its place, as it takes a while to come, and is not kept if it does not prove itself.
        val made = Files.createTempDirectory(folder.parent, ".${folder.name}.new-")
        try {
            val adapter = client.adapter(body, prototypes, made.resolve(ADAPTER))
            readPrototypes(adapter, engine.backend.tapSize)
            val now = score(engine, examples, engine.readAdapter(adapter))
            val refusal = refusal(now, base, before, old != null)
            if (refusal == null) {
                keep(adapter, examples, alpha, now)
                engine.setAdapter(Bundle.open(folder.resolve(ADAPTER)))
            }
            val reason = refusal ?: "it changes what the model says, and the log-loss of the examples did not get worse"
            return Customization(
                installed = refusal == null,
                reason = reason + unusable?.let { "; the earlier adapter does not fit this model: $it" }.orEmpty(),
                alpha = numbers(alpha),
                sent = COMPACT.encodeToString(JsonObject.serializer(), body),
                logLossBase = base.logLoss,
                logLossBefore = before,
                logLoss = now.logLoss,
                logitChange = logitChange(now, base),
            )
        } finally {
            remove(made)
        }
    }

    private suspend fun keep(adapter: Bundle, examples: List<Example>, alpha: FloatArray, now: Score) {
        val pool = client.manifest()
        val state = CustomizedState(
            baseFingerprint = pool.baseFingerprint,
            poolName = pool.name,
            poolVersion = pool.version,
            newestSerial = maxOf(newestSerial(), pool.serial),
            alpha = numbers(alpha),
            logLoss = now.logLoss,
        )
        atomicDirectory(folder, replace = true) { new ->
            crayon.runtime.bundle.install(adapter.path, new.resolve(ADAPTER))
            new.resolve(EXAMPLES).writeBytes(
                examples.joinToString("") { COMPACT.encodeToString(Example.serializer(), it) + "\n" }.toByteArray(),
            )
            new.resolve(STATES).writeBytes(now.states.toBytes())
            if (folder.resolve(ROUTING).isRegularFile()) folder.resolve(ROUTING).copyTo(new.resolve(ROUTING))
            client.trusted?.write(new.resolve(KEYS))
            new.resolve(STATE).writeBytes(JSON.encodeToString(CustomizedState.serializer(), state).plus("\n").toByteArray())
        }
    }

    private suspend fun checkPool(allowOlder: Boolean) {
        val pool = client.manifest()
        val newest = newestSerial()
        if (pool.serial < newest && !allowOlder) {
            throw ServerError(
                "the service offers pool ${pool.name} ${pool.version} with serial ${pool.serial}; one with serial $newest was accepted before",
                folder,
                "ask whoever runs the service; if it went back to an older pool on purpose, allow older ones",
            )
        }
        val model = bundle.model
        if (pool.baseFingerprint != model.baseFingerprint) {
            throw AdapterError(
                "pool '${pool.name}' was built for another base model " +
                    "(${pool.baseFingerprint.take(12)}…; this one is ${model.baseFingerprint.take(12)}…)",
                bundle.path,
                "use the pool of this model, or export the model that the pool was built for",
            )
        }
        if (pool.embedding.tapLayer != model.tap.layer) {
            throw AdapterError(
                "pool '${pool.name}' embeds at layer ${pool.embedding.tapLayer}; this bundle's tap is layer ${model.tap.layer}",
                bundle.path,
                "export the model with its tap at layer ${pool.embedding.tapLayer}",
            )
        }
    }

    private suspend fun alphaOf(base: Score): FloatArray {
        val pool = client.manifest()
        val projection = client.projection()
        return alpha(projection, pool.weighting, base.states.prompt, base.means(pool.embedding.part.part))
    }

    private suspend fun signed(): Boolean = client.manifest().weighting.signed

    /** What a service is sent. */
    private suspend fun body(alpha: FloatArray, prototypes: Int): JsonObject =
        buildJsonObject {
            put("base_fingerprint", client.manifest().baseFingerprint)
            put("pool_version", client.manifest().version)
            put("alpha", buildJsonArray { numbers(alpha).forEach { add(JsonPrimitive(it)) } })
            if (prototypes != PROTOTYPES_ASKED) put("prototypes", prototypes)
        }

    /** The adapter in place, or why it cannot be used. */
    private fun readOld(): Pair<Adapter?, String?> {
        val place = folder.resolve(ADAPTER)
        if (!place.exists()) return null to null
        return try {
            engine.readAdapter(Bundle.open(place)) to null
        } catch (e: CrayonError) {
            null to e.what
        }
    }

    /** Of the pools that were accepted from a service; 0 if there was none, or the state is damaged. */
    private fun newestSerial(): Long =
        try {
            decodeJson(CustomizedState.serializer(), folder.resolve(STATE).readBytes()).newestSerial
        } catch (_: IOException) {
            0
        } catch (_: Malformed) {
            0
        }
}

/** Makes alpha less of a fingerprint: adds normal noise, cuts off what is negative (unless it is meant), rounds to decimal `digits`. */
internal fun disguise(alpha: FloatArray, digits: Int, noise: Double, signed: Boolean, random: Random = SecureRandom()): FloatArray {
    val scale = Math.pow(10.0, digits.toDouble())
    return FloatArray(alpha.size) { n ->
        val noisy = alpha[n] + if (noise > 0) noise * random.nextGaussian() else 0.0
        val kept = if (noise > 0 && !signed) maxOf(noisy, 0.0) else noisy
        (Math.rint(kept * scale) / scale).toFloat()
    }
}

/** With as few digits as a float32 needs. */
private fun numbers(alpha: FloatArray): List<Double> = alpha.map { it.toString().toDouble() }

private fun logitChange(now: Score, base: Score): Float =
    now.firstLogits.indices.maxOf { i -> now.firstLogits[i].indices.maxOf { abs(now.firstLogits[i][it] - base.firstLogits[i][it]) } }

/** Why an adapter is not installed; null: it is. */
private fun refusal(now: Score, base: Score, before: Double, customized: Boolean): String? {
    val states = now.states.prompt + now.states.answer + now.all
    return when {
        !now.logLoss.isFinite() -> {
            "the log-loss of the examples is not a number with it"
        }

        states.any { row -> row.any { !it.isFinite() } } -> {
            "the states of the examples are not numbers with it"
        }

        logitChange(now, base) < SMALLEST_CHANGE -> {
            "it does not change what the model says"
        }

        now.logLoss > before * (1 + TOLERANCE) -> {
            val earlier = if (customized) "the earlier adapter's" else "the base model's"
            "the log-loss of the examples is %.4f with it; %s is %.4f".format(Locale.ROOT, now.logLoss, earlier, before)
        }

        else -> {
            null
        }
    }
}
