// The addresses that this app may talk to. Without them nothing leaves the phone.
package crayon.app

import android.content.Context
import crayon.runtime.InvalidInput
import crayon.runtime.PoolClient
import crayon.runtime.routing.ServerLlm

/** One address of the user's choice, with its key. */
data class Endpoint(val url: String, val key: String?)

/** What the user has set. */
class Settings(context: Context) {
    private val kept = context.getSharedPreferences("settings", Context.MODE_PRIVATE)

    /** The customization service; null: none. */
    var service: Endpoint?
        get() = read("service")
        set(value) = write("service", value)

    /** The server LLM that is asked where the phone's model is not sure; null: none. */
    var server: Endpoint?
        get() = read("server")
        set(value) = write("server", value)

    /** Refuses, with [InvalidInput], what could not be used later. */
    fun check(service: Endpoint?, server: Endpoint?) {
        service?.let { PoolClient(it.url, null, it.key) }
        server?.let { ServerLlm(it.url, it.key) }
    }

    private fun read(name: String): Endpoint? = kept.getString(name, null)?.let { Endpoint(it, kept.getString("$name key", null)) }

    private fun write(name: String, value: Endpoint?) =
        kept
            .edit()
            .putString(name, value?.url)
            .putString("$name key", value?.key)
            .apply()
}
