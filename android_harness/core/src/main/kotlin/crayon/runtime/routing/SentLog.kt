/*
 * What was sent to a server, kept on the device for its user to read: two lines a query, what is sent, written before it is; and what came of
 * it. Where the first line cannot be written, nothing is sent.
 */
package crayon.runtime.routing

import crayon.runtime.COMPACT
import crayon.runtime.OutputError
import kotlinx.serialization.Serializable
import kotlinx.serialization.SerializationException
import java.io.IOException
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.StandardCopyOption.REPLACE_EXISTING
import java.nio.file.StandardOpenOption.APPEND
import java.nio.file.StandardOpenOption.CREATE
import java.util.UUID
import kotlin.io.path.exists
import kotlin.io.path.fileSize
import kotlin.io.path.name
import kotlin.io.path.readLines

private const val LARGEST = 10L shl 20

/**
 * One query that was sent.
 *
 * @property time milliseconds since 1970.
 * @property query as it was sent: after redaction.
 * @property bytes of the request.
 * @property outcome "answered", or why not; null: the program has ended before, or is not done.
 */
data class Sent(val time: Long, val server: String, val query: String, val bytes: Long, val outcome: String?)

@Serializable
private data class Line(
    val id: String,
    val time: Long? = null,
    val server: String? = null,
    val query: String? = null,
    val bytes: Long = 0,
    val outcome: String? = null,
)

/**
 * The log of one app. Any number of threads may write to it at once.
 *
 * @param path of the file; it is made when something is sent. When it has grown to 10 MiB it becomes `path.old`, in the place of an older one.
 */
class SentLog(private val path: Path) {
    private val older = path.resolveSibling("${path.name}.old")

    /** Writes down what is about to be sent; returns a name for it. Throws [OutputError]: it cannot be written, so nothing must be sent. */
    fun sending(server: String, query: String, bytes: Long): String {
        val line = Line(UUID.randomUUID().toString(), System.currentTimeMillis(), server, query, bytes)
        try {
            append(line)
        } catch (e: IOException) {
            throw OutputError(
                "the log of what is sent cannot be written: ${e.message}",
                path,
                "free some space; nothing is sent without it",
                e,
            )
        }
        return line.id
    }

    /** Writes down what came of it. Where that cannot be written, it stays unknown. */
    fun ended(name: String, outcome: String, bytes: Long) {
        runCatching { append(Line(name, bytes = bytes, outcome = outcome)) }
    }

    /** What was sent, the oldest first. A line that is damaged is left out. */
    fun read(): List<Sent> {
        val entries = LinkedHashMap<String, Line>()
        for (text in listOf(older, path).filter { it.exists() }.flatMap { it.readLines() }) {
            val line = try {
                COMPACT.decodeFromString(Line.serializer(), text)
            } catch (_: SerializationException) {
                continue
            }
            val known = entries[line.id]
            entries[line.id] = known?.copy(bytes = line.bytes, outcome = line.outcome) ?: line
        }
        return entries.values.filter { it.query != null }.map {
            Sent(
                it.time ?: 0,
                it.server.orEmpty(),
                it.query.orEmpty(),
                it.bytes,
                it.outcome,
            )
        }
    }

    @Synchronized
    private fun append(line: Line) {
        if (path.exists() && path.fileSize() > LARGEST) Files.move(path, older, REPLACE_EXISTING)
        Files.write(path, (COMPACT.encodeToString(Line.serializer(), line) + "\n").toByteArray(), CREATE, APPEND)
    }
}
