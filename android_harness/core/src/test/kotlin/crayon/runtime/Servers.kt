// The servers that the Python tests have started for these.
package crayon.runtime

import kotlinx.serialization.Serializable
import kotlin.io.path.readBytes

@Serializable
internal class Servers(val urls: Map<String, String>, val examples: List<Example>, val alpha: List<Float>)

internal val servers: Servers by lazy { decodeJson(Servers.serializer(), fixtures.resolve("servers.json").readBytes()) }
