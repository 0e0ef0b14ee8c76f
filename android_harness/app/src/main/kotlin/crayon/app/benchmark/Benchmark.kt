package crayon.app.benchmark

import android.util.AtomicFile
import android.util.Log
import crayon.app.model.Model
import crayon.app.said
import crayon.runtime.CrayonError
import crayon.runtime.InvalidInput
import crayon.runtime.OutputError
import crayon.runtime.backends.BackendLoader
import crayon.runtime.profile.Failure
import crayon.runtime.profile.Job
import crayon.runtime.profile.Sensors
import crayon.runtime.profile.Work
import crayon.runtime.profile.failure
import crayon.runtime.profile.profile
import crayon.runtime.profile.readJob
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import java.io.IOException
import java.nio.file.Path
import java.nio.file.Paths

private val NAME = Regex("[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

/** How far a benchmark is. @property lines results. @property problem null: nothing went wrong. */
data class Measured(val lines: List<String> = emptyList(), val problem: String? = null)

/**
 * Does jobs of `crayon profile`, and writes their records to a file in the app's external folder, where a computer fetches it.
 *
 * @param pushed where adb's shell puts bundles, and apps may read.
 * @param folder null: the phone has no such folder now.
 */
class Benchmark(
    private val model: Model,
    private val loaders: Map<String, BackendLoader>,
    private val sensors: Sensors,
    private val pushed: Path = Paths.get("/data/local/tmp"),
    private val folder: () -> Path?,
) {
    private val told = MutableStateFlow(Measured())
    val measured: StateFlow<Measured> = told.asStateFlow()

    /**
     * Measures.
     *
     * @param job what to measure, as JSON, its `bundle` aside; null: what there is, and prefill and decode.
     * @param name of the file, which appears when everything is in it. Where something went wrong, its last line is a [Failure].
     * @param bundle relative to the app's external folder, or a path in [pushed]; null: the installed model.
     */
    suspend fun run(job: String? = null, name: String? = null, bundle: String? = null) {
        told.value = Measured()
        model.unload() // two models may not fit, and one must not disturb the other
        try {
            val place = "${bundle?.let(::place) ?: model.place}"
            for (asked in job?.let { listOf(readJob(it.toByteArray())) } ?: STANDARD) {
                profile(asked.copy(bundle = place), sensors, loaders) { record ->
                    told.value = told.value.copy(lines = told.value.lines + record.toJson())
                }
            }
        } catch (e: CancellationException) {
            finish(name, InvalidInput("the benchmark was stopped"))
            throw e
        } catch (e: Throwable) {
            finish(name, e)
            return
        }
        finish(name, null)
    }

    /** Writes down that it was not begun. */
    fun refuse(name: String) {
        save(name, emptyList(), InvalidInput("something else is running in the app", advice = "end it, and try again"))
    }

    private fun finish(name: String?, problem: Throwable?) {
        told.value = told.value.copy(problem = problem?.said())
        val unsaved = name?.let { save(it, told.value.lines, problem) } ?: return
        told.value = told.value.copy(problem = unsaved.said())
    }

    /** @return why it could not be written. */
    private fun save(name: String, lines: List<String>, problem: Throwable?): CrayonError? =
        try {
            write(name, lines + listOfNotNull(problem?.let { failed(it).toJson() }))
            null
        } catch (e: CrayonError) {
            Log.e(TAG, "benchmark $name: ${e.said()}")
            e
        }

    private fun write(name: String, lines: List<String>) {
        val path = inside(name.also { if (!NAME.matches(it)) throw InvalidInput("this is no name of a file", "name") })
        val file = AtomicFile(path.toFile())
        try {
            val stream = file.startWrite()
            stream.write(lines.joinToString("") { "$it\n" }.toByteArray())
            file.finishWrite(stream)
        } catch (e: IOException) {
            throw OutputError("the results cannot be written: ${e.message}", path, "free some space", e)
        }
        Log.i(TAG, "benchmark written: $path")
    }

    private fun place(bundle: String): Path = Paths.get(bundle).normalize().takeIf { it.startsWith(pushed) } ?: inside(bundle)

    /** A path of the external folder; it must not lead out of it. */
    private fun inside(relative: String): Path {
        val root = folder() ?: throw OutputError("the phone has no external folder now", advice = "unlock it, and try again")
        val path = root.resolve(relative).normalize()
        if (!path.startsWith(root)) throw InvalidInput("the path leads out of the app's folder", "bundle")
        return path
    }

    private fun failed(problem: Throwable) =
        if (problem is CrayonError) failure(problem) else Failure("CrayonError", "$problem", null, null)

    companion object {
        private val STANDARD = listOf(
            Work.Describe,
            Work.Measure(prompts = listOf(128), depths = listOf(0), generate = 64, rounds = 3, more = false),
        ).map { Job("", "auto", adapter = null, threads = null, cpus = null, process = 0, work = it) }

        /** Of the lines in the system's log. */
        const val TAG = "crayon"
    }
}
