// What lives as long as the process, put together in one place.
package crayon.app

import android.content.Context
import android.content.Intent
import android.os.PowerManager
import crayon.app.benchmark.Benchmark
import crayon.app.benchmark.PhoneSensors
import crayon.app.chat.Chat
import crayon.app.chat.Conversation
import crayon.app.chat.Prompting
import crayon.app.customize.Customizing
import crayon.app.model.Importing
import crayon.app.model.Keys
import crayon.app.model.Model
import crayon.executorch.WITH_EXECUTORCH
import crayon.runtime.backends.BackendLoader
import crayon.runtime.freeMemory
import crayon.runtime.routing.SentLog
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.SupervisorJob
import kotlinx.coroutines.launch
import java.nio.file.Path

/**
 * The parts of the app.
 *
 * @param loaders backends by the keys of a manifest's `variants`: an app adds its own here.
 * @param prompting how a conversation becomes a prompt.
 * @param keys whose bundles are accepted.
 * @param freeMemory bytes that a model may take; null: nobody knows.
 * @param freeSpace bytes on the disk.
 */
class Parts(
    context: Context,
    loaders: Map<String, BackendLoader> = WITH_EXECUTORCH,
    prompting: Prompting = Prompting.TEMPLATE,
    keys: Keys = Keys.of(context),
    freeMemory: () -> Long? = ::freeMemory,
    freeSpace: (Path) -> Long = { it.toFile().usableSpace },
) {
    private val folder = context.noBackupFilesDir.toPath()
    private val scope = CoroutineScope(SupervisorJob() + Dispatchers.Default)

    val settings = Settings(context)
    val work = Work { kind ->
        context.startForegroundService(Intent(context, WorkService::class.java).putExtra(WorkService.KIND, kind.name))
    }
    val thermometer = Thermometer(checkNotNull(context.getSystemService(PowerManager::class.java)))
    val model: Model = Model(folder, keys, loaders, freeMemory) { engine -> customizing.restore(engine) }
    val importing = Importing(context.contentResolver, folder, model, freeSpace)
    val conversation = Conversation(folder.resolve("conversation.json"))
    val sent = SentLog(folder.resolve("sent.jsonl"))
    val chat = Chat(conversation, model, settings, thermometer, prompting, sent)
    val customizing: Customizing = Customizing(model, settings, keys, sent)
    val benchmark = Benchmark(model, loaders, PhoneSensors(context)) { context.getExternalFilesDir("benchmarks")?.toPath() }

    /** Once, when the process starts. */
    fun start() {
        scope.launch {
            importing.removeLeftovers()
            model.look()
        }
    }

    /** Gives the memory of the model back; not here and now, as a running computation has to come to a step's end. */
    fun putAway() {
        scope.launch { model.unload() }
    }
}
