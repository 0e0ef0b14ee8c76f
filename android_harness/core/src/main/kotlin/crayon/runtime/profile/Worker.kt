/*
 * The measuring program: a job goes in, records come out, as JSON lines that Python's `crayon profile` reads. On a phone an app calls [profile]; on
 * a JVM this file is a program, with the job on stdin and the records on stdout.
 *
 * One process should do one job: what a process computed before is seen in what it measures.
 */
package crayon.runtime.profile

import crayon.runtime.BackendError
import crayon.runtime.CrayonError
import crayon.runtime.Engine
import crayon.runtime.backends.BackendLoader
import crayon.runtime.backends.LOADERS
import crayon.runtime.bundle.Bundle
import crayon.runtime.freeMemory
import crayon.runtime.stateFolder
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.runBlocking
import kotlinx.coroutines.withContext
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.Paths
import kotlin.system.exitProcess

/**
 * Does a job. What cannot be measured in a JVM is an [Absent], with the reason.
 *
 * @param sensors an app's own, on a phone.
 * @param loaders see [Engine.load].
 * @param emit is called with each record as it comes, between measurements.
 * @throws CrayonError the bundle is damaged, or does not run here.
 */
suspend fun profile(job: Job, sensors: Sensors = LinuxSensors(), loaders: Map<String, BackendLoader> = LOADERS, emit: (Record) -> Unit) =
    withContext(Dispatchers.Default) {
        val work = job.work
        val bundle = Paths.get(job.bundle)
        if (job.cpus != null) {
            return@withContext emit(Absent("cores ${job.cpus.joinToString(",")}", "a JVM cannot choose the cores that it computes on"))
        }
        when (work) {
            is Work.Describe -> {
                loaded(job, loaders).use { emit(describe(it, Bundle.open(bundle), sensors)) }
                sensors.absent().forEach(emit)
            }

            is Work.Load -> {
                emit(Absent(if (work.first) "load_first" else "load_cold", "a JVM cannot have the system forget the bundle's files"))
            }

            is Work.Measure -> {
                measured(job, work, sensors, loaders, emit)
            }

            is Work.Trace -> {
                emit(
                    Absent(
                        "operators",
                        "this library does not trace them: profile the bundle with `crayon profile` on a computer or a board",
                    ),
                )
            }

            is Work.Long -> {
                val watch = Watch(sensors, bundle.toRealPath(), job.process)
                loaded(job, loaders).use { Measuring(it, watch, emit).longRun(work.seconds) }
            }
        }
    }

private suspend fun measured(job: Job, work: Work.Measure, sensors: Sensors, loaders: Map<String, BackendLoader>, emit: (Record) -> Unit) {
    val bundle = Bundle.open(Paths.get(job.bundle))
    val watch = Watch(sensors, bundle.path, job.process)
    emit(watch.sample("started"))
    for (file in bundle.manifest.files) readThrough(bundle.path.resolve(file.path))
    val began = System.nanoTime()
    loaded(job, loaders).use { engine ->
        emit(Observation("load_warm", samplesNs = listOf(System.nanoTime() - began)))
        Measuring(engine, watch, emit).measure(work, stateFolder(bundle.path))
    }
    controls(readBytes(bundle.model), job.threads, work.rounds, emit)
}

private suspend fun loaded(job: Job, loaders: Map<String, BackendLoader>): Engine {
    val chosen = if (job.backend == "auto") loaders else loaders.filterKeys { it == job.backend }
    if (chosen.isEmpty()) {
        throw BackendError("there is no backend '${job.backend}' here", job.bundle, "use one of: auto, ${loaders.keys.joinToString()}")
    }
    val engine = Engine.load(Paths.get(job.bundle), chosen, job.threads, freeMemory())
    val adapter = job.adapter ?: return engine
    try {
        if (adapter in engine.bundle!!.adapterNames) engine.setAdapter(adapter) else engine.setAdapter(Bundle.open(Paths.get(adapter)))
        return engine
    } catch (e: Throwable) {
        engine.close()
        throw e
    }
}

/** Into the page cache, and not into memory. */
private fun readThrough(file: Path) {
    val buffer = ByteArray(1 shl 20)
    Files.newInputStream(file).use { stream ->
        while (stream.read(buffer) >= 0) {
            // that is all
        }
    }
}

/** An error that a user can do something about, as a record. */
fun failure(error: CrayonError): Failure = Failure(error.javaClass.simpleName, error.what, error.where, error.advice)

/** Does the job on stdin. */
fun main() {
    val code = try {
        runBlocking { profile(readJob(System.`in`.readBytes())) { println(it.toJson()) } }
        0
    } catch (e: CrayonError) {
        println(failure(e).toJson())
        1
    }
    System.out.flush()
    exitProcess(code)
}
