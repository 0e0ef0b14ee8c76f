package crayon.app.model

import crayon.runtime.Engine
import crayon.runtime.EngineState
import crayon.runtime.InvalidInput
import crayon.runtime.backends.BackendLoader
import crayon.runtime.bundle.Bundle
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.NonCancellable
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.sync.withLock
import kotlinx.coroutines.withContext
import java.nio.file.Path
import kotlin.io.path.exists

/** The installed model, as it is shown. */
data class Installed(val name: String, val bytes: Long, val contextLength: Int)

/**
 * The model of this phone: one bundle, and an engine that is loaded when somebody asks.
 *
 * @param folder in which the bundle is kept, as `model`.
 * @param freeMemory bytes that a model may take; null: nobody knows.
 * @param restore puts the customized adapter of a bundle back in place.
 */
class Model(
    folder: Path,
    private val keys: Keys,
    private val loaders: Map<String, BackendLoader>,
    private val freeMemory: () -> Long?,
    private val restore: (Engine) -> Unit,
) {
    private val engine = Engine()
    private val changing = Mutex()
    private val told = MutableStateFlow<Installed?>(null)

    /** Where the bundle is. */
    val place: Path = folder.resolve("model")

    /** What is installed; null: nothing. */
    val installed: StateFlow<Installed?> = told.asStateFlow()

    /** Whether it is loaded. */
    val state: StateFlow<EngineState> get() = engine.state

    /** Looks what is installed. A kill in the middle of an installation leaves the earlier bundle. */
    suspend fun look() = changing.withLock { told.value = withContext(Dispatchers.IO) { read() } }

    /**
     * The engine, loaded.
     *
     * @throws InvalidInput nothing is installed.
     * @throws crayon.runtime.CrayonError the model does not load: it is damaged, or there is too little memory.
     */
    suspend fun ready(): Engine =
        changing.withLock {
            val now = engine.state.value
            if (now != EngineState.Ready && now !is EngineState.Answering) load()
            engine
        }

    /** Frees the memory; the next question loads the model again. An answer that is running ends with an error. */
    fun unload() = engine.unload()

    /** Has a bundle installed at [place], with the check of signatures that whoever does it has to make; what was there stays where this fails. */
    suspend fun replace(installing: suspend (check: (ByteArray, ByteArray?) -> Unit) -> Bundle) =
        changing.withLock {
            try {
                withContext(Dispatchers.IO) { installing { document, signature -> keys.check(document, signature, place) } }
            } finally {
                // Also where this was stopped after the last byte: what counts is what is there.
                withContext(NonCancellable + Dispatchers.IO) {
                    engine.unload() // what it has mapped is the old one
                    told.value = read()
                }
            }
        }

    private suspend fun load() {
        if (!place.exists() && read() == null) throw InvalidInput("there is no model on this phone yet", advice = "import or download one")
        engine.load(place, loaders, availableBytes = freeMemory())
        restore(engine)
    }

    private fun read(): Installed? =
        try {
            Bundle.open(place).let { Installed(it.manifest.name, it.size, it.model.contextLength) }
        } catch (_: crayon.runtime.BundleError) {
            null
        }
}
