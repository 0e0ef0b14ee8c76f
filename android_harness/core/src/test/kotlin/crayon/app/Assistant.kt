// The snippet of docs/android.md, "Your app in an afternoon": a test holds the two together, and another one runs it.
package crayon.app

// begin
import crayon.runtime.Customizer
import crayon.runtime.Engine
import crayon.runtime.Example
import crayon.runtime.PoolClient
import crayon.runtime.TrustedKeys
import crayon.runtime.bundle.install
import java.nio.file.Path

class Assistant(private val files: Path, private val service: String) {
    private val engine = Engine()
    private val keys by lazy { TrustedKeys.read(files.resolve("keys.json")) } // came with the app
    private val customizer by lazy { Customizer(engine, PoolClient(service, keys)) }

    suspend fun start(archive: Path) {
        val model = files.resolve("model")
        install(archive, model, replace = true, check = { manifest, signature -> keys.verify(manifest, signature, archive) })
        engine.load(model)
        customizer.restore()
    }

    suspend fun ask(question: String, show: (String) -> Unit) = engine.stream("$question\n").pieces.collect { show(it.text) }

    suspend fun learn(examples: List<Example>) = customizer.customize(examples).reason
}
// end
