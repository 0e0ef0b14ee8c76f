package crayon.app.customize

import com.sun.net.httpserver.HttpExchange
import com.sun.net.httpserver.HttpServer
import crayon.app.FINGERPRINT
import crayon.app.sha256
import java.net.InetSocketAddress
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.concurrent.CopyOnWriteArrayList

/** A customization service that has a pool, keeps what it is sent, and has no adapter to give. */
class FakeService : AutoCloseable {
    /** The bodies that it was sent, as they came. */
    val sent = CopyOnWriteArrayList<String>()

    @Volatile
    var version = "0123456789abcdef"

    private val projection = safetensors(
        mapOf(
            "mean" to (listOf(4) to floatArrayOf(0f, 0f, 0f, 0f)),
            "projection" to (listOf(4, 2) to floatArrayOf(1f, 0f, 0f, 1f, 1f, 1f, 0f, 1f)),
            "indicators" to (listOf(3, 2) to floatArrayOf(1f, 0f, 0f, 1f, 0.6f, 0.8f)),
        ),
    )
    private val server = HttpServer.create(InetSocketAddress("127.0.0.1", 0), 0).also {
        it.createContext("/", ::answer)
        it.start()
    }
    val url = "http://127.0.0.1:${server.address.port}"

    override fun close() = server.stop(0)

    private fun answer(exchange: HttpExchange) {
        when (exchange.requestURI.path) {
            "/v1/pool" -> {
                reply(exchange, 200, pool().toByteArray())
            }

            "/v1/pool/projection" -> {
                reply(exchange, 200, projection)
            }

            "/v1/customizations" -> {
                val body = String(exchange.requestBody.readBytes())
                if (version in body) sent += body
                if (version in body) reply(exchange, 200, "no adapter".toByteArray()) else reply(exchange, 409, "{}".toByteArray())
            }

            else -> {
                reply(exchange, 404, ByteArray(0))
            }
        }
    }

    private fun reply(exchange: HttpExchange, status: Int, content: ByteArray) {
        exchange.sendResponseHeaders(status, content.size.toLong())
        exchange.responseBody.use { it.write(content) }
    }

    private fun pool(): String {
        val adapters = (0..2).joinToString("") {
            """, {"path": "adapters/00$it/adapter_model.safetensors", "size": 100, "sha256": "$FINGERPRINT"}"""
        }
        return """{"kind": "pool", "schema_version": "1.0", "name": "test", "version": "$version", "serial": 1,
            "base_fingerprint": "$FINGERPRINT", "adapters": 3, "embedding": {"tap_layer": 1, "part": "answer", "residual": false},
            "dimensions": 2, "weighting": {}, "blend": "sum",
            "files": [{"path": "projection.safetensors", "size": ${projection.size}, "sha256": "${sha256(projection)}"}$adapters]}"""
    }
}

private fun safetensors(tensors: Map<String, Pair<List<Int>, FloatArray>>): ByteArray {
    var end = 0
    val header = tensors.entries.joinToString(", ", "{", "}") { (name, tensor) ->
        val begin = end
        end += 4 * tensor.second.size
        """"$name": {"dtype": "F32", "shape": ${tensor.first}, "data_offsets": [$begin, $end]}"""
    }
    val text = header.padEnd((header.length + 7) / 8 * 8).toByteArray()
    val file = ByteBuffer.allocate(8 + text.size + end).order(ByteOrder.LITTLE_ENDIAN)
    file.putLong(text.size.toLong()).put(text)
    for ((_, values) in tensors.values) values.forEach(file::putFloat)
    return file.array()
}
