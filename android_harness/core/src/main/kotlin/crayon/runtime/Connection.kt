/*
 * Fetching files over HTTP from a server that may be broken, slow or hostile.
 *
 * What is read is bounded by its caller, and every fetch has a deadline. Nothing is decompressed; redirects are followed only where the caller
 * checks their addresses, and without the key where they lead to another server. Where a connection is cut, the rest is fetched, if the server
 * says by its ETag that the file is still the same; otherwise all of it.
 */
package crayon.runtime

import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.delay
import kotlinx.coroutines.ensureActive
import kotlinx.serialization.json.JsonObject
import java.io.ByteArrayOutputStream
import java.io.IOException
import java.net.HttpURLConnection
import java.net.MalformedURLException
import java.net.SocketTimeoutException
import java.net.URL
import kotlin.math.max
import kotlin.math.min

private const val RETRIES = 4 // without getting any further
private const val BACK_OFF_MS = 500L
private const val LONGEST_WAIT_MS = 60_000L
private const val CONNECT_MS = 10_000
private const val LARGEST_ERROR = 4096
private const val MOST_REDIRECTS = 5
private val REDIRECTS = setOf(301, 302, 303, 307, 308)
private val TRANSIENT = setOf(408, 425, 429, 500, 502, 503, 504)
private val NOT_ANY_MORE = setOf(404, 410, 412, 416) // said of the rest of a file
private val RANGE = Regex("""bytes (?:(\d{1,18})-\d{1,18}|\*)/(?:(\d{1,18})|\*)""")

/** Where a file goes that is fetched: it holds what came so far. */
internal interface Destination {
    val length: Long

    /** The ETag of the file whose beginning it holds; null: that cannot be continued. */
    val etag: String?

    /** Forgets what came: from now on it holds the beginning of a file with this ETag. */
    fun restart(etag: String?)

    /** Appends the first `count` bytes of a buffer. */
    fun write(buffer: ByteArray, count: Int)
}

/** A small file, in memory. */
internal class InMemory : Destination {
    private val stream = ByteArrayOutputStream()
    val content: ByteArray get() = stream.toByteArray()
    override val length get() = stream.size().toLong()
    override var etag: String? = null
        private set

    override fun restart(etag: String?) {
        stream.reset()
        this.etag = etag
    }

    override fun write(buffer: ByteArray, count: Int) = stream.write(buffer, 0, count)
}

/**
 * To one server.
 *
 * @param apiKey sent as `Authorization: Bearer`.
 * @param timeoutMs without a byte, after which a connection counts as cut.
 * @param deadlineMs that one fetch may take in all, retries included.
 * @param checkRedirect throws InvalidInput if a redirect of a file to this address, without its query, is not to be followed; null: none is.
 */
internal class Connection(
    val url: String,
    private val apiKey: String?,
    private val timeoutMs: Int,
    private val deadlineMs: Long,
    private val checkRedirect: ((String) -> Unit)? = null,
) {
    /** Of the bodies of requests, and of answers, retries included. */
    var sentBytes = 0L
        private set
    var receivedBytes = 0L
        private set
    private var answered = false

    /**
     * Fetches one file.
     *
     * @param path relative to the server's address.
     * @param largest bytes; more is refused, whatever the server announces.
     * @param into what it holds already is continued, if it says of what; it is whole only when the status is 200.
     * @param body JSON to post, which is the same however often it is posted; null: get.
     * @param onBytes called with the number of bytes that came since the last call, and with the length of the file, if that is known.
     * @return the status: 200 or 404.
     * @throws PoolChanged status 409.
     * @throws ServerError the server cannot be reached, refuses, or did not get to the end within the deadline.
     * @throws IntegrityError there is more than `largest`.
     * @throws OutputError what came cannot be written.
     */
    suspend fun fetch(
        path: String,
        largest: Long,
        into: Destination,
        body: ByteArray? = null,
        onBytes: (Int, Long?) -> Unit = { _, _ -> },
    ): Int {
        val context = currentCoroutineContext()
        val end = System.nanoTime() + deadlineMs * 1_000_000
        val transfer = Transfer(path, largest, into, body, end, onBytes) { context.ensureActive() }
        var tries = 0
        var furthest = into.length
        while (true) {
            try {
                return transfer.attempt()
            } catch (cut: Cut) {
                val further = transfer.start > 0 && into.length > furthest
                furthest = max(furthest, into.length)
                tries = if (further) 0 else tries + 1
                val pause = cut.waitMs ?: (BACK_OFF_MS shl max(tries - 1, 0))
                val left = (end - System.nanoTime()) / 1_000_000
                if (tries > RETRIES || !answered || pause > min(LONGEST_WAIT_MS, left)) throw ServerError(cut.problem, url, cut.advice, cut)
                delay(pause)
            }
        }
    }

    /** One file on its way, over as many requests as it takes. */
    private inner class Transfer(
        private val path: String,
        private val largest: Long,
        private val into: Destination,
        private val body: ByteArray?,
        private val end: Long,
        private val onBytes: (Int, Long?) -> Unit,
        private val checkActive: () -> Unit,
    ) {
        /** Where the same file can be got again. */
        private var again: String? = path.takeIf { body == null }

        /** What the next request leaves out, because it is there. */
        val start: Long get() = if (again != null && into.etag != null) into.length else 0

        /** Fetches what is missing; returns the status. */
        fun attempt(): Int {
            val from = start
            var at = URL(address(if (from > 0) again!! else path))
            repeat(1 + MOST_REDIRECTS) {
                checkActive()
                val connection = at.openConnection() as HttpURLConnection
                try {
                    ask(connection, from)
                    val status = connection.responseCode
                    answered = true
                    if (checkRedirect == null || body != null || status !in REDIRECTS) return take(connection, status, from)
                    at = redirected(connection, checkRedirect)
                } catch (e: SocketTimeoutException) {
                    throw Cut("the service did not answer for ${timeoutMs / 1000.0} s", "try again later", cause = e)
                } catch (e: OutputFailed) {
                    throw OutputError(e.cause.said(), advice = "free some space", cause = e.cause)
                } catch (e: IOException) {
                    throw Cut("the connection failed: ${plain(e.message ?: "$e")}", "check the address and the network", cause = e)
                } finally {
                    connection.disconnect()
                }
            }
            throw ServerError("the service redirects more than $MOST_REDIRECTS times", url, "check the address")
        }

        /** What an answer brings; returns the status. */
        private fun take(connection: HttpURLConnection, status: Int, from: Long): Int {
            if (from > 0 && status in NOT_ANY_MORE) {
                if (status == 416 && ends(connection) == from) return 200 // it was whole
                into.restart(null)
                throw Cut("the service does not have the rest of what it sent", "try again later")
            }
            if (status == 404 && body == null) return status
            if (status == 206 && from > 0) {
                checkPart(connection, from)
            } else if (status != 200) {
                throw refusal(connection, status)
            }
            if ((connection.contentEncoding ?: "identity") != "identity") throw ServerError("the service sends compressed data", url)
            if (status == 200) {
                into.restart(connection.getHeaderField("ETag")?.takeIf { it.startsWith('"') })
                again = again ?: name(connection.getHeaderField("Content-Location").orEmpty())
            }
            read(connection)
            return 200
        }

        /** Where a redirect leads: to an address that `check` lets pass, and not from an encrypted connection to one that is none. */
        private fun redirected(connection: HttpURLConnection, check: (String) -> Unit): URL {
            val location = connection.getHeaderField("Location") ?: throw ServerError("the service redirects to nowhere", url)
            try {
                val to = URL(connection.url, location)
                check("$to".substringBefore('?'))
                if ("$to".any { it !in '!'..'~' }) throw InvalidInput("it is no address")
                if (connection.url.protocol == "https" && to.protocol != "https") throw InvalidInput("it is not encrypted")
                return to
            } catch (e: MalformedURLException) {
                throw refusedRedirect(location, "it is no address", e)
            } catch (e: InvalidInput) {
                throw refusedRedirect(location, e.what, e)
            }
        }

        private fun refusedRedirect(location: String, why: String, cause: Exception) =
            ServerError("the service redirects to ${plain(location.substringBefore('?'))}: $why", url, "do not use it", cause)

        private fun ask(connection: HttpURLConnection, from: Long) {
            connection.connectTimeout = min(CONNECT_MS, timeoutMs)
            connection.readTimeout = timeoutMs
            connection.instanceFollowRedirects = false
            connection.useCaches = false
            connection.setRequestProperty("Accept-Encoding", "identity")
            connection.setRequestProperty("User-Agent", "crayon-edge-android")
            if (apiKey != null && ownServer(connection.url)) connection.setRequestProperty("Authorization", "Bearer $apiKey")
            if (from > 0) {
                connection.setRequestProperty("Range", "bytes=$from-")
                connection.setRequestProperty("If-Range", into.etag)
            } else if (body != null) {
                connection.doOutput = true
                connection.setRequestProperty("Content-Type", "application/json")
                sentBytes += body.size
                connection.outputStream.use { it.write(body) }
            }
        }

        private fun checkPart(connection: HttpURLConnection, from: Long) {
            val etag = connection.getHeaderField("ETag")
            val begins = RANGE.matchEntire(connection.getHeaderField("Content-Range").orEmpty())?.groupValues?.get(1)
            if (begins == "$from" && (etag == null || etag == into.etag)) return
            into.restart(null)
            throw Cut("the service sends another part than it was asked for", "try again later")
        }

        private fun read(connection: HttpURLConnection) {
            val announced = connection.getHeaderFieldLong("Content-Length", -1)
            val total = if (announced >= 0) into.length + announced else null
            if (total != null && (total > largest || total < announced)) throw tooLarge("$announced")
            val buffer = ByteArray(1 shl 16)
            connection.inputStream.use { stream ->
                while (true) {
                    checkActive()
                    val count = stream.read(buffer)
                    if (count < 0) break
                    receivedBytes += count
                    if (into.length + count > largest) throw tooLarge("more")
                    if (System.nanoTime() > end) {
                        throw Cut("the service did not get to the end in time", "try again when the network is better")
                    }
                    try {
                        into.write(buffer, count)
                    } catch (e: IOException) {
                        throw OutputFailed(e)
                    }
                    onBytes(count, total)
                }
            }
            if (total != null && into.length < total) throw Cut("the connection was cut", "try again later")
        }

        /** A Content-Location, which must be below the path that was posted to, as a path relative to the server's address. */
        private fun name(location: String): String? =
            Regex("(?:^|/)(${Regex.escape(path)}/[0-9A-Za-z_-]{1,128})$").find(location)?.groupValues?.get(1)

        private fun tooLarge(announced: String) =
            IntegrityError(
                "the service sends $announced bytes; $largest are the most that this can be",
                address(path).substringBefore('?'),
                "do not use this service; it is broken or hostile",
            )
    }

    /** Whether it is the server that the key is for. */
    private fun ownServer(other: URL): Boolean = origin(URL(url)) == origin(other)

    private fun origin(of: URL) = Triple(of.protocol, of.host, if (of.port < 0) of.defaultPort else of.port)

    /** Nothing, and a query, belong to the server's address itself. */
    private fun address(path: String): String = if (path.isEmpty() || path.startsWith('?')) "$url$path" else "$url/$path"

    /** The length of a file of which a part was asked for that it does not have. */
    private fun ends(connection: HttpURLConnection): Long? =
        RANGE
            .matchEntire(connection.getHeaderField("Content-Range").orEmpty())
            ?.groupValues
            ?.get(2)
            ?.toLongOrNull()

    private fun refusal(connection: HttpURLConnection, status: Int): Exception {
        val (what, advice) = said(connection, status)
        return when (status) {
            in TRANSIENT -> {
                val wait = connection.getHeaderField("Retry-After")?.toLongOrNull()?.times(1000)
                Cut("the service cannot answer now: $what", "try again later", waitMs = wait)
            }

            409 -> {
                PoolChanged("the service refuses: $what", url, advice ?: "customize again")
            }

            401, 403 -> {
                ServerError("the service refuses: $what", url, "give the key of this service")
            }

            404, 405 -> {
                ServerError("there is no such service here: $what", url, "check the address")
            }

            in 300..399 -> {
                val to = plain(connection.getHeaderField("Location") ?: "elsewhere")
                ServerError("the service redirects to $to", url, "give that address, if you trust it")
            }

            else -> {
                ServerError("the service refuses: $what", url, advice)
            }
        }
    }

    /** What an error page says in the form of this project, or else the status. */
    private fun said(connection: HttpURLConnection, status: Int): Pair<String, String?> {
        val page = ByteArray(LARGEST_ERROR)
        val count = runCatching { connection.errorStream?.use { it.read(page) } }.getOrNull() ?: 0
        val error = runCatching { (parseJson(page.copyOf(maxOf(count, 0))) as JsonObject)["error"] }.getOrNull()
        return (error.text("what")?.let { "${plain(it)} ($status)" } ?: "HTTP status $status") to error.text("do")?.let(::plain)
    }
}

/** An attempt that failed in a way that another one may not. */
private class Cut(val problem: String, val advice: String, val waitMs: Long? = null, cause: Throwable? = null) : Exception(problem, cause)

private class OutputFailed(override val cause: IOException) : RuntimeException(cause)
