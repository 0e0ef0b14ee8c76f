/*
 * A customization service, as a device sees it: its pool comes down, alpha goes up, an adapter comes down.
 *
 * Nothing that a service says is believed before it is checked: the pool and the adapter must be signed by a trusted key, of one build, for
 * this base, and no larger than the pool explains.
 */
package crayon.runtime

import crayon.runtime.bundle.Archive
import crayon.runtime.bundle.Bundle
import crayon.runtime.bundle.install
import crayon.runtime.bundle.readSignature
import crayon.runtime.bundle.readSource
import kotlinx.serialization.json.JsonObject
import java.nio.channels.FileChannel
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.StandardOpenOption.CREATE
import java.nio.file.StandardOpenOption.WRITE
import kotlin.io.path.deleteIfExists
import kotlin.io.path.name

private const val LARGEST_POOL = 16L shl 20
private const val LARGEST_SIGNATURE = 4096L
private const val LARGEST_PROJECTION = 512L shl 20
private const val LARGEST_ADAPTER = 2L shl 30 // of an .onnx_adapter file
private const val SLACK = 4L shl 20 // an archive's manifest and headers

/**
 * A service, and the pool that it serves.
 *
 * @param url of the service; https, or http to this machine.
 * @param trusted whose signatures are accepted; null: nothing has to be signed.
 * @param apiKey sent as `Authorization: Bearer`.
 * @param plainHttp allow http to other machines, where everybody on the way can read alpha and the key.
 * @param timeoutMs without a byte, after which a connection counts as cut.
 * @param deadlineMs that one fetch may take in all.
 * @param onSend called with the body that asks for an adapter, before it is sent.
 * @throws InvalidInput the address or the key cannot be used.
 */
class PoolClient(
    url: String,
    val trusted: TrustedKeys?,
    apiKey: String? = null,
    plainHttp: Boolean = false,
    timeoutMs: Int = 30_000,
    deadlineMs: Long = 900_000,
    private val onSend: (ByteArray) -> Unit = {},
    private val onBytes: (Int) -> Unit = {},
) {
    val url = checkedUrl(url, plainHttp, "alpha is a fingerprint of the user, and everybody on the way could read it")
    private val connection = Connection(this.url, checkedKey(apiKey), timeoutMs, deadlineMs)
    private var manifest: PoolManifest? = null
    private var projection: Projection? = null

    /** Of all requests' bodies so far, and of all answers'. */
    val sentBytes: Long get() = connection.sentBytes
    val receivedBytes: Long get() = connection.receivedBytes

    /**
     * The pool's manifest; fetched when it is first asked for.
     *
     * @throws ServerError the service cannot be reached, or has no pool.
     * @throws SignatureError no trusted key has signed it.
     * @throws ManifestError it cannot be used.
     */
    suspend fun manifest(): PoolManifest = manifest ?: fetchManifest().also { manifest = it }

    /** What alpha is computed with; fetched when it is first asked for. Throws as [manifest]. */
    suspend fun projection(): Projection = projection ?: fetchProjection(manifest()).also { projection = it }

    /** Forgets the pool, so that it is fetched again. */
    fun refresh() {
        manifest = null
        projection = null
    }

    /**
     * Asks for an adapter, checks it, and unpacks it to `out`. While it comes it lies beside that.
     *
     * @param body `base_fingerprint`, `pool_version`, `alpha`, and what else the service takes.
     * @param prototypes the most that may come along.
     * @throws PoolChanged the service has another pool now.
     * @throws ServerError it refuses, cannot be reached any more, or sends something else.
     * @throws SignatureError no trusted key has signed the adapter.
     * @throws BundleError, AdapterError it is damaged, or was not made for this base of this pool.
     */
    internal suspend fun adapter(body: JsonObject, prototypes: Int, out: Path): Bundle {
        val pool = manifest()
        val content = COMPACT.encodeToString(JsonObject.serializer(), body).toByteArray()
        val most = minOf(prototypes, pool.prototypes?.count ?: 0)
        val largest = largestAdapter(pool) + if (most > 0) pool.file(PROTOTYPES)!!.size else 0
        onSend(content)
        val archive = out.resolveSibling("${out.name}.crayon")
        try {
            toFile(archive) { connection.fetch("v1/customizations", largest, it, content) { count, _ -> onBytes(count) } }
            check(archive, pool, largest, most)
            return install(archive, out)
        } finally {
            archive.deleteIfExists()
        }
    }

    private suspend fun fetchManifest(): PoolManifest {
        val document =
            fetchSmall("v1/pool", LARGEST_POOL) ?: throw ServerError("there is no customization service here", url, "check the address")
        if (trusted != null) {
            val signature = fetchSmall("v1/pool/signature", LARGEST_SIGNATURE)
                ?: throw SignatureError("the service does not sign its pool", url, "ask whoever runs it to serve with keys")
            trusted.verify(document, signature, url)
        }
        return parsePool(document, "$url/v1/pool")
    }

    private suspend fun fetchSmall(path: String, largest: Long): ByteArray? {
        val content = InMemory()
        val status = connection.fetch(path, largest, content)
        return content.content.takeIf { status == 200 }
    }

    private suspend fun fetchProjection(pool: PoolManifest): Projection {
        val wanted = pool.file(PROJECTION)!!
        if (wanted.size > LARGEST_PROJECTION) throw IntegrityError("its projection has ${wanted.size} bytes, which is too much", url)
        val path = Files.createTempFile("crayon-", ".safetensors")
        try {
            toFile(path) { connection.fetch("v1/pool/projection", wanted.size, it) }
            if (sha256(path) != wanted.sha256) {
                throw IntegrityError(
                    "its projection is not the one that its pool.json describes",
                    url,
                    "try again; the service may just have changed its pool",
                )
            }
            return readProjection(path, pool)
        } finally {
            path.deleteIfExists()
        }
    }

    /** Refuses an archive that is not an adapter of this pool, before anything of it is unpacked. */
    private fun check(archive: Path, pool: PoolManifest, largest: Long, prototypes: Int) {
        val (document, manifest, signature) = Archive(archive).use { source ->
            readSource(source).let { (bytes, parsed) -> Triple(bytes, parsed, readSignature(source)) }
        }
        trusted?.verify(document, signature, url)
        if (manifest !is AdapterManifest) throw ManifestError("the service sent a model, not an adapter", url)
        if (manifest.baseFingerprint != pool.baseFingerprint) {
            throw AdapterError("the service sent an adapter of another base model (${manifest.baseFingerprint.take(12)}…)", url)
        }
        if (manifest.pool != pool.origin) {
            throw AdapterError(
                "the service sent an adapter of pool ${manifest.pool?.name} ${manifest.pool?.version}, not of ${pool.name} ${pool.version}",
                url,
                "try again; the service may just have changed its pool",
            )
        }
        val sent = manifest.prototypes?.count ?: 0
        if (sent > prototypes) throw AdapterError("the service sent $sent prototypes; $prototypes could be asked for", url)
        if (manifest.files.sumOf { it.size } > largest) throw IntegrityError("the adapter unpacks to more than $largest bytes", url)
    }

    /** Bytes that an adapter of a pool can have: in float32, while the pool may be float16; of N ranks, if it is concatenated. */
    private fun largestAdapter(pool: PoolManifest): Long {
        val largest = pool.files.filter { it.path.endsWith("/$LORA_FILE") }.maxOf { it.size }
        val ranks = if (pool.blend == "concat") pool.adapters else 1
        return minOf(2.0 * largest * ranks, LARGEST_ADAPTER.toDouble()).toLong() + SLACK
    }
}

/** A file that is of no use to another process: it is to be removed when the fetch has failed. */
private class OpenFile(private val channel: FileChannel) : Destination {
    override val length: Long get() = channel.size()
    override var etag: String? = null
        private set

    override fun restart(etag: String?) {
        channel.truncate(0)
        this.etag = etag
    }

    override fun write(buffer: ByteArray, count: Int) = channel.writeFully(buffer, count)
}

private suspend fun <T> toFile(path: Path, fetch: suspend (Destination) -> T): T =
    FileChannel.open(path, CREATE, WRITE).use { fetch(OpenFile(it)) }
