/*
 * One long task at a time: an answer, a download, a customization, a benchmark.
 *
 * Whoever wants one calls `begin`; the foreground service is started, takes the task and runs it, so that the system lets the process live
 * until it has ended.
 */
package crayon.app

import kotlinx.coroutines.Job
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.job

/** What a task does. */
enum class Kind {
    ANSWER,
    INSTALL,
    CUSTOMIZE,
    BENCHMARK,
}

/** A task, as it is shown. @property percent null: nobody knows. */
data class Running(val kind: Kind, val percent: Int? = null)

/** Told how far a task is: what is done, and of how much; null: nobody knows. */
typealias OnProgress = (Long, Long?) -> Unit

/** @param start starts the foreground service, which calls [run]. */
class Work(private val start: (Kind) -> Unit) {
    private class Task(val kind: Kind, val body: suspend (OnProgress) -> Unit)

    private val told = MutableStateFlow<Running?>(null)
    private var waiting: Task? = null
    private var job: Job? = null

    /** The present task; null: none. */
    val running: StateFlow<Running?> = told.asStateFlow()

    /**
     * Begins a task, which says itself, to whoever shows it, what went wrong.
     *
     * @return false: another one is running, or the system does not let this app begin one now.
     */
    @Synchronized
    fun begin(kind: Kind, body: suspend (OnProgress) -> Unit): Boolean {
        if (told.value != null) return false
        waiting = Task(kind, body)
        told.value = Running(kind)
        try {
            start(kind)
        } catch (_: IllegalStateException) {
            // the app is in the background, where no service may be started
            end()
            return false
        }
        return true
    }

    /** Runs what waits; called by the service. */
    internal suspend fun run() {
        val task = take(currentCoroutineContext().job) ?: return
        try {
            task.body { done, total ->
                val percent = total?.takeIf { it > 0 }?.let { (100 * done / it).toInt().coerceIn(0, 100) }
                told.value = Running(task.kind, percent)
            }
        } finally {
            end()
        }
    }

    /** Ends the task before its end. */
    @Synchronized
    fun cancel() {
        job?.cancel()
        if (waiting != null) end()
    }

    @Synchronized
    private fun take(job: Job): Task? = waiting.also { if (it != null) this.job = job }.also { waiting = null }

    @Synchronized
    private fun end() {
        waiting = null
        job = null
        told.value = null
    }
}
