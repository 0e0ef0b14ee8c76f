// How a bundle comes to the phone: from a document that the user picks, or from an address.
package crayon.app.model

import android.content.ContentResolver
import android.net.Uri
import android.provider.OpenableColumns
import crayon.app.OnProgress
import crayon.app.said
import crayon.runtime.InvalidInput
import crayon.runtime.OutputError
import crayon.runtime.bundle.install
import crayon.runtime.installFrom
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.sync.withLock
import kotlinx.coroutines.withContext
import java.io.IOException
import java.io.InputStream
import java.nio.file.Path
import kotlin.io.path.deleteIfExists
import kotlin.io.path.outputStream

/** Left free on the disk, for the system and for other apps. */
private const val RESERVE = 64L shl 20

/** What came of the last import. */
sealed interface Imported {
    data object Nothing : Imported

    data object Done : Imported

    data class Failed(val why: String) : Imported
}

/**
 * Imports bundles. Whatever goes wrong, the bundle that was installed before still works.
 *
 * @param folder on the disk of the model.
 */
class Importing(
    private val documents: ContentResolver,
    private val folder: Path,
    private val model: Model,
    private val freeSpace: (Path) -> Long,
) {
    private val importing = Mutex()
    private val copy = folder.resolve("picked.crayon")
    private val told = MutableStateFlow<Imported>(Imported.Nothing)
    val imported: StateFlow<Imported> = told.asStateFlow()

    /** Removes the copy of a document whose import was killed. */
    suspend fun removeLeftovers() = importing.withLock { copy.deleteIfExists() }

    /** From a document. A provider may give it but once and in one direction, so it is copied before it is read. */
    suspend fun document(uri: Uri, onProgress: OnProgress) =
        telling {
            try {
                val size = size(uri)
                if (size != null) checkSpace(2 * size)
                val total = size?.times(2)
                var done = 0L
                withContext(Dispatchers.IO) {
                    open(uri).use { stream ->
                        copyOf(stream) { count ->
                            done += count
                            onProgress(done, total)
                        }
                    }
                }
                val context = currentCoroutineContext()
                val onBytes = { count: Int ->
                    context.ensureActive()
                    done += count
                    onProgress(done, total)
                }
                model.replace { check -> install(copy, model.place, replace = true, onBytes, check) }
            } finally {
                copy.deleteIfExists()
            }
        }

    /** From an address. A download that was stopped or killed goes on with the next one. */
    suspend fun address(url: String, onProgress: OnProgress) =
        telling { model.replace { check -> installFrom(url, model.place, replace = true, onProgress = onProgress, check = check) } }

    private suspend fun telling(work: suspend () -> Unit) {
        told.value = Imported.Nothing
        try {
            importing.withLock { work() }
            told.value = Imported.Done
        } catch (e: CancellationException) {
            throw e
        } catch (e: Throwable) {
            told.value = Imported.Failed(e.said())
        }
    }

    private fun checkSpace(needed: Long) {
        val free = freeSpace(folder) - RESERVE
        if (needed <= free) return
        throw OutputError("it needs ${needed / MB} MB while it is imported; ${maxOf(free, 0) / MB} MB are free", advice = "free some space")
    }

    private fun size(uri: Uri): Long? =
        try {
            documents.query(uri, arrayOf(OpenableColumns.SIZE), null, null, null)?.use { row ->
                if (row.moveToFirst() && !row.isNull(0)) row.getLong(0) else null
            }
        } catch (_: UnsupportedOperationException) {
            null
        } catch (_: SecurityException) {
            null
        }

    private fun open(uri: Uri): InputStream =
        try {
            documents.openInputStream(uri) ?: throw unreadable(null)
        } catch (e: IOException) {
            throw unreadable(e)
        } catch (e: SecurityException) {
            throw unreadable(e)
        }

    private suspend fun copyOf(stream: InputStream, onBytes: (Int) -> Unit) {
        val buffer = ByteArray(1 shl 18)
        copy.outputStream().use { out ->
            while (true) {
                currentCoroutineContext().ensureActive()
                val count = try {
                    stream.read(buffer)
                } catch (e: IOException) {
                    throw unreadable(e)
                }
                if (count < 0) return
                try {
                    out.write(buffer, 0, count)
                } catch (e: IOException) {
                    throw OutputError("it cannot be copied: ${e.message}", advice = "free some space", cause = e)
                }
                onBytes(count)
            }
        }
    }

    private fun unreadable(e: Exception?) =
        InvalidInput("the document cannot be read${e?.message?.let { ": $it" }.orEmpty()}", advice = "pick it again")
}

private const val MB = 1_000_000
