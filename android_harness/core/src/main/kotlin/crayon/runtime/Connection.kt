/*
 * Fetching files over HTTP from a server that may be broken, slow or hostile.
 *
 * What is read is bounded by its caller, and every fetch has a deadline. Redirects are not followed, nothing is decompressed. A fetch that
 * fails in a way that another one may not is tried again, from its beginning.
 */
package crayon.runtime

import kotlinx.coroutines.delay
import kotlinx.serialization.json.JsonObject
import java.io.IOException
import java.io.OutputStream
import java.net.HttpURLConnection
import java.net.SocketTimeoutException
import java.net.URL
import kotlin.math.min

private const val RETRIES = 4
private const val BACK_OFF_MS = 500L
private const val LONGEST_WAIT_MS = 60_000L
private const val CONNECT_MS = 10_000
private const val LARGEST_ERROR = 4096
private val TRANSIENT = setOf(408, 425, 429, 500, 502, 503, 504)

/**
 * To one server.
 *
 * @param apiKey sent as `Authorization: Bearer`.
 * @param timeoutMs without a byte, after which a connection counts as cut.
 * @param deadlineMs that one fetch may take in all, retries included.
 */
internal class Connection(private val url: String, private val apiKey: String?, private val timeoutMs: Int, private val deadlineMs: Long) {
    /** Of the bodies of requests, and of answers, retries included. */
    var sentBytes = 0L
        private set
    var receivedBytes = 0L
        private set

    /**
     * Fetches one file.
     *
     * @param path relative to the server's address.
     * @param largest bytes; more is refused, whatever the server announces.
     * @param body JSON to post, which is the same however often it is posted; null: get.
     * @param restart gives an empty stream to write to, for each attempt.
     * @return the status: 200 or 404.
     * @throws PoolChanged status 409.
     * @throws ServerError the server cannot be reached, refuses, or did not get to the end within the deadline.
     * @throws IntegrityError there is more than `largest`.
     */
    suspend fun fetch(path: String, largest: Long, body: ByteArray? = null, onBytes: (Int) -> Unit = {}, restart: () -> OutputStream): Int {
        val end = System.nanoTime() + deadlineMs * 1_000_000
        var tries = 0
        while (true) {
            try {
                return restart().use { attempt(path, largest, body, it, end, onBytes) }
            } catch (cut: Cut) {
                val pause = cut.waitMs ?: (BACK_OFF_MS shl tries)
                val left = (end - System.nanoTime()) / 1_000_000
                if (tries++ == RETRIES || pause > min(LONGEST_WAIT_MS, left)) throw ServerError(cut.problem, url, cut.advice, cut)
                delay(pause)
            }
        }
    }

    private fun attempt(path: String, largest: Long, body: ByteArray?, out: OutputStream, end: Long, onBytes: (Int) -> Unit): Int {
        val connection = URL("$url/$path").openConnection() as HttpURLConnection
        try {
            connection.connectTimeout = min(CONNECT_MS, timeoutMs)
            connection.readTimeout = timeoutMs
            connection.instanceFollowRedirects = false
            connection.useCaches = false
            connection.setRequestProperty("Accept-Encoding", "identity")
            connection.setRequestProperty("User-Agent", "crayon-edge-android")
            if (apiKey != null) connection.setRequestProperty("Authorization", "Bearer $apiKey")
            if (body != null) {
                connection.doOutput = true
                connection.setRequestProperty("Content-Type", "application/json")
                sentBytes += body.size
                connection.outputStream.use { it.write(body) }
            }
            val status = connection.responseCode
            if (status == 404 && body == null) return status
            if (status != 200) throw refusal(connection, status)
            if ((connection.contentEncoding ?: "identity") != "identity") throw ServerError("the service sends compressed data", url)
            read(connection, path, largest, out, end, onBytes)
            return status
        } catch (e: SocketTimeoutException) {
            throw Cut("the service did not answer for ${timeoutMs / 1000.0} s", "try again later", cause = e)
        } catch (e: OutputFailed) {
            throw OutputError("it cannot be written: ${e.cause?.message}", advice = "free some space", cause = e.cause)
        } catch (e: IOException) {
            throw Cut("the connection failed: ${plain(e.message ?: "$e")}", "check the address and the network", cause = e)
        } finally {
            connection.disconnect()
        }
    }

    private fun read(connection: HttpURLConnection, path: String, largest: Long, out: OutputStream, end: Long, onBytes: (Int) -> Unit) {
        val announced = connection.getHeaderFieldLong("Content-Length", -1)
        if (announced > largest) throw tooLarge("$announced", path, largest)
        val buffer = ByteArray(1 shl 16)
        var done = 0L
        connection.inputStream.use { stream ->
            while (true) {
                val count = stream.read(buffer)
                if (count < 0) break
                done += count
                receivedBytes += count
                if (done > largest) throw tooLarge("more", path, largest)
                if (System.nanoTime() > end) throw Cut("the service did not get to the end in time", "try again when the network is better")
                try {
                    out.write(buffer, 0, count)
                } catch (e: IOException) {
                    throw OutputFailed(e)
                }
                onBytes(count)
            }
        }
        if (announced >= 0 && done < announced) throw Cut("the connection was cut", "try again later")
    }

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

    private fun tooLarge(announced: String, path: String, largest: Long) =
        IntegrityError(
            "the service sends $announced bytes; $largest are the most that this can be",
            "$url/$path",
            "do not use this service; it is broken or hostile",
        )
}

/** An attempt that failed in a way that another one may not. */
private class Cut(val problem: String, val advice: String, val waitMs: Long? = null, cause: Throwable? = null) : Exception(problem, cause)

private class OutputFailed(cause: IOException) : RuntimeException(cause)
