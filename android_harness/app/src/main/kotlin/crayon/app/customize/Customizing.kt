// Customization from the phone: what would leave it is shown, and nothing else is sent.
package crayon.app.customize

import crayon.app.Settings
import crayon.app.model.Keys
import crayon.app.model.Model
import crayon.app.said
import crayon.runtime.CrayonError
import crayon.runtime.Customizer
import crayon.runtime.Engine
import crayon.runtime.Example
import crayon.runtime.InvalidInput
import crayon.runtime.PoolClient
import crayon.runtime.routing.SentLog
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow

/** How far a customization is. */
sealed interface Customized {
    data object Idle : Customized

    data object Working : Customized

    /** @property body what would be sent, every byte of it. */
    data class Preview(val examples: List<Example>, val url: String, val body: String) : Customized {
        val bytes: Int get() = body.toByteArray().size
    }

    data class Done(val installed: Boolean, val reason: String) : Customized

    data class Failed(val why: String) : Customized
}

class Customizing(private val model: Model, private val settings: Settings, private val keys: Keys, private val sent: SentLog) {
    private val told = MutableStateFlow<Customized>(Customized.Idle)
    val state: StateFlow<Customized> = told.asStateFlow()

    private var changes = 0

    /**
     * The task that computes what would be sent. The service is asked for its pool, and told nothing. What comes of it is not shown if the
     * examples were changed after this call, be it before the task began.
     */
    @Synchronized
    fun preview(examples: List<Example>): suspend () -> Unit {
        val seen = changes
        return {
            telling(seen) {
                val client = client { throw InvalidInput("nothing is sent for a preview") }
                Customized.Preview(examples, client.url, Customizer(model.ready(), client).preview(examples))
            }
        }
    }

    /** Sends what was shown, and writes down that it did. If the pool has changed since, something else would be sent: then nothing is. */
    suspend fun send(shown: Customized.Preview) =
        telling {
            var entry: String? = null
            var outcome = "it was stopped"
            val client = client { body ->
                if (String(body) != shown.body) {
                    throw InvalidInput(
                        "the service has another pool now, so something else than what you saw would be sent",
                        advice = "look again",
                    )
                }
                entry = sent.sending(shown.url, shown.body, body.size.toLong())
            }
            try {
                val made = Customizer(model.ready(), client).customize(shown.examples)
                outcome = made.reason
                Customized.Done(made.installed, made.reason)
            } catch (e: CrayonError) {
                outcome = e.what
                throw e
            } finally {
                entry?.let { sent.ended(it, outcome, shown.bytes.toLong()) }
            }
        }

    /** What was shown is no longer what would be sent. */
    @Synchronized
    fun forget() {
        changes++
        told.value = Customized.Idle
    }

    /** Puts a customized adapter back in place, asking nobody. One that does not fit a newly installed model stays where it is. */
    fun restore(engine: Engine) {
        try {
            Customizer(engine, PoolClient("https://localhost", keys.trusted)).restore()
        } catch (_: CrayonError) {
            engine.setAdapter(null)
        }
    }

    private fun client(onSend: (ByteArray) -> Unit): PoolClient {
        val service = settings.service ?: throw InvalidInput("no customization service is set", advice = "give its address in the settings")
        return PoolClient(service.url, keys.trusted, service.key, onSend = onSend)
    }

    /** @param seen the changes of the examples, after which the result is of no use; null: it always is. */
    private suspend fun telling(seen: Int? = null, work: suspend () -> Customized) {
        tell(seen, Customized.Working)
        val result = try {
            work()
        } catch (e: CancellationException) {
            tell(null, Customized.Idle)
            throw e
        } catch (e: Throwable) {
            Customized.Failed(e.said())
        }
        tell(seen, result)
    }

    @Synchronized
    private fun tell(seen: Int?, state: Customized) {
        if (seen == null || seen == changes) told.value = state
    }
}
