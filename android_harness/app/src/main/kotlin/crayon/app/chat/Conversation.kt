package crayon.app.chat

import android.util.AtomicFile
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.serialization.Serializable
import kotlinx.serialization.SerializationException
import kotlinx.serialization.json.Json
import java.io.IOException
import java.nio.file.Path

/** How far an answer is. */
@Serializable
enum class Stage {
    RUNNING,
    DONE,
    STOPPED,
    FAILED,
}

/** Who has answered. */
@Serializable
enum class Source {
    PHONE,
    SERVER,
}

/**
 * A question and its answer.
 *
 * @property source null: nobody yet.
 * @property why the reason for that source, or what went wrong.
 */
@Serializable
data class Turn(
    val question: String,
    val answer: String = "",
    val source: Source? = null,
    val why: String = "",
    val stage: Stage = Stage.RUNNING,
)

private val JSON = Json { ignoreUnknownKeys = true }

/** Between two savings of an answer that is coming. */
private const val SAVE_EVERY_MS = 1000L

/**
 * The conversation, kept in a file that is whole at any moment: it outlives rotations and the process.
 *
 * An answer that was running when the process died is there as far as it had come, as one that was stopped.
 */
class Conversation(path: Path) {
    private val file = AtomicFile(path.toFile())
    private val told = MutableStateFlow(read())
    private var saved = 0L

    /** The oldest first. */
    val turns: StateFlow<List<Turn>> = told.asStateFlow()

    @Synchronized
    fun add(question: String) = set(told.value + Turn(question), now = true)

    /** Changes the last turn. */
    @Synchronized
    fun change(change: (Turn) -> Turn) {
        val turns = told.value
        if (turns.isEmpty()) return // it was cleared
        val last = change(turns.last())
        set(turns.dropLast(1) + last, now = last.stage != Stage.RUNNING)
    }

    @Synchronized
    fun clear() = set(emptyList(), now = true)

    private fun set(turns: List<Turn>, now: Boolean) {
        told.value = turns
        val time = System.nanoTime() / 1_000_000
        if (!now && time - saved < SAVE_EVERY_MS) return
        saved = time
        val stream = try {
            file.startWrite()
        } catch (_: IOException) {
            return // no space: what is on the screen is right all the same
        }
        try {
            stream.write(JSON.encodeToString(turns).toByteArray())
            file.finishWrite(stream)
        } catch (_: IOException) {
            file.failWrite(stream)
        }
    }

    private fun read(): List<Turn> =
        try {
            JSON
                .decodeFromString<List<Turn>>(String(file.readFully()))
                .map { if (it.stage == Stage.RUNNING) it.copy(stage = Stage.STOPPED) else it }
        } catch (_: IOException) {
            emptyList()
        } catch (_: SerializationException) {
            emptyList()
        }
}
