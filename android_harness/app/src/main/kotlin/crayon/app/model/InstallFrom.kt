package crayon.app.model

import crayon.app.OnProgress
import crayon.runtime.InvalidInput
import crayon.runtime.OutputError
import crayon.runtime.ServerError
import crayon.runtime.bundle.Bundle
import crayon.runtime.bundle.install
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import java.io.IOException
import java.net.HttpURLConnection
import java.net.MalformedURLException
import java.net.URL
import java.nio.file.Path
import kotlin.io.path.deleteIfExists
import kotlin.io.path.name
import kotlin.io.path.outputStream

/** How a bundle comes from an address. */
fun interface InstallFrom {
    /**
     * Downloads a `.crayon` archive and installs it at `place`, in the place of what is there.
     *
     * @param check see [crayon.runtime.bundle.install].
     */
    suspend fun install(url: String, place: Path, onProgress: OnProgress, check: (ByteArray, ByteArray?) -> Unit): Bundle
}

private const val CONNECT_MS = 10_000
private const val IDLE_MS = 30_000

/** In one go. What is no https, except from this phone itself, is refused. */
object HttpInstall : InstallFrom {
    override suspend fun install(url: String, place: Path, onProgress: OnProgress, check: (ByteArray, ByteArray?) -> Unit): Bundle {
        val archive = place.resolveSibling("${place.name}.download")
        try {
            fetch(checked(url), archive, onProgress)
            val context = currentCoroutineContext()
            return install(archive, place, replace = true, onBytes = { context.ensureActive() }, check = check)
        } finally {
            archive.deleteIfExists()
        }
    }

    private suspend fun fetch(url: URL, archive: Path, onProgress: OnProgress) {
        val connection = url.openConnection() as HttpURLConnection
        try {
            connection.connectTimeout = CONNECT_MS
            connection.readTimeout = IDLE_MS
            connection.instanceFollowRedirects = false
            connection.setRequestProperty("Accept-Encoding", "identity")
            if (connection.responseCode != 200) {
                throw ServerError("the server answers with status ${connection.responseCode}", url.host, "check the address")
            }
            val total = connection.contentLengthLong.takeIf { it >= 0 }
            val buffer = ByteArray(1 shl 16)
            var done = 0L
            connection.inputStream.use { stream ->
                archive.outputStream().use { out ->
                    while (true) {
                        currentCoroutineContext().ensureActive()
                        val count = stream.read(buffer)
                        if (count < 0) break
                        write { out.write(buffer, 0, count) }
                        done += count
                        onProgress(done, total)
                    }
                }
            }
            if (total != null && done < total) throw IOException("it was cut")
        } catch (e: IOException) {
            throw ServerError("the connection failed: ${e.message}", url.host, "check the address and the network", e)
        } finally {
            connection.disconnect()
        }
    }

    private fun write(writing: () -> Unit) =
        try {
            writing()
        } catch (e: IOException) {
            throw OutputError("it cannot be written: ${e.message}", advice = "free some space", cause = e)
        }

    private fun checked(url: String): URL {
        val parsed = try {
            URL(url)
        } catch (_: MalformedURLException) {
            throw InvalidInput("this is not an address", advice = "give one like https://host/model.crayon")
        }
        if (parsed.protocol != "https" && !(parsed.protocol == "http" && parsed.host in setOf("127.0.0.1", "localhost"))) {
            throw InvalidInput("everybody on the way could change the model", parsed.host, "give an address that begins with https")
        }
        return parsed
    }
}
