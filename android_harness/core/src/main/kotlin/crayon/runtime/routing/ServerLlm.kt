/*
 * The server LLM, as a device asks it: one query goes up, pieces of text come down.
 *
 * The server may be broken, slow or hostile. What it sends is bounded in size and in time, redirects are not followed, nothing is
 * decompressed. Whatever goes wrong is a ServerError.
 */
package crayon.runtime.routing

import crayon.runtime.COMPACT
import crayon.runtime.InvalidInput
import crayon.runtime.Malformed
import crayon.runtime.ServerError
import crayon.runtime.checkedKey
import crayon.runtime.checkedUrl
import crayon.runtime.decodeJson
import crayon.runtime.plain
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.Job
import kotlinx.coroutines.cancel
import kotlinx.coroutines.channels.Channel
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.isActive
import kotlinx.coroutines.launch
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.addJsonObject
import kotlinx.serialization.json.buildJsonObject
import kotlinx.serialization.json.put
import kotlinx.serialization.json.putJsonArray
import java.io.IOException
import java.io.InputStream
import java.net.HttpURLConnection
import java.net.SocketTimeoutException
import java.net.URL

private const val LARGEST_QUERY = 1 shl 20
private const val LARGEST_ERROR = 4096

/** What can be asked: a [ServerLlm], or something of your own. */
interface Server {
    val url: String

    /** What [ask] sends as the body of its request. */
    fun request(query: String, maxTokens: Int? = null): ByteArray

    /** Sends a query, and nothing else of the user's; an answer is its pieces of text, and ends with a [ServerError] if it is none. */
    fun ask(query: String, maxTokens: Int? = null): Flow<String>
}

/**
 * An endpoint with OpenAI's protocol.
 *
 * @param url its address, to which /v1/chat/completions is appended; https, or http to this machine.
 * @param apiKey sent as `Authorization: Bearer`.
 * @param model its name there.
 * @param connectMs to find the server and connect.
 * @param idleMs between one part of the answer and the next, and before the first.
 * @param deadlineMs that everything may take.
 * @param largest bytes of an answer as it is sent; more is refused.
 * @param plainHttp allow http to other machines, where everybody on the way can read queries, answers and the key.
 * @throws InvalidInput the address or the key cannot be used.
 */
class ServerLlm(
    url: String,
    apiKey: String? = null,
    private val model: String = "default",
    private val connectMs: Int = 3_000,
    private val idleMs: Int = 15_000,
    private val deadlineMs: Long = 60_000,
    private val largest: Int = 1 shl 20,
    plainHttp: Boolean = false,
) : Server {
    override val url = checkedUrl(url, plainHttp, "everybody on the way could read what is asked and answered").removeSuffix("/v1")
    private val apiKey = checkedKey(apiKey)

    override fun request(query: String, maxTokens: Int?): ByteArray {
        if (query.isBlank()) throw InvalidInput("there is nothing to ask", "query")
        val body = buildJsonObject {
            put("model", model)
            putJsonArray("messages") {
                addJsonObject {
                    put("role", "user")
                    put("content", query)
                }
            }
            put("stream", true)
            if (maxTokens != null) put("max_tokens", maxTokens)
        }
        val content = COMPACT.encodeToString(JsonObject.serializer(), body).toByteArray()
        if (content.size > LARGEST_QUERY) throw InvalidInput("the query is too long to send: ${content.size} bytes", "query")
        return content
    }

    /** Blocking calls are made elsewhere, and cut where the collector leaves. */
    override fun ask(query: String, maxTokens: Int?): Flow<String> {
        val body = request(query, maxTokens)
        return flow {
            val pieces = Channel<String>(Channel.UNLIMITED) // bounded by `largest`
            val connection = URL("$url/v1/chat/completions").openConnection() as HttpURLConnection
            val scope = CoroutineScope(Dispatchers.IO + Job())
            scope.launch { pieces.close(runCatching { exchange(connection, body, pieces) }.exceptionOrNull()) }
            val watch = scope.launch {
                kotlinx.coroutines.delay(deadlineMs)
                pieces.close(ServerError("the server did not get to the end within ${deadlineMs / 1000.0} s", url, "try again later"))
            }
            try {
                for (piece in pieces) emit(piece)
            } finally {
                watch.cancel()
                scope.cancel()
                // Not here: closing waits for who reads, on some systems.
                CoroutineScope(Dispatchers.IO).launch { connection.disconnect() }
            }
        }
    }

    private suspend fun exchange(connection: HttpURLConnection, body: ByteArray, pieces: Channel<String>) {
        try {
            connection.connectTimeout = connectMs
            connection.readTimeout = idleMs
            connection.instanceFollowRedirects = false
            connection.useCaches = false
            connection.doOutput = true
            connection.setRequestProperty("Accept-Encoding", "identity")
            connection.setRequestProperty("Content-Type", "application/json")
            connection.setRequestProperty("User-Agent", "crayon-edge-android")
            if (apiKey != null) connection.setRequestProperty("Authorization", "Bearer $apiKey")
            connection.outputStream.use { it.write(body) }
            if (connection.responseCode != 200) throw refusal(connection)
            val reply = Reply(url)
            val streamed = when (
                val type = connection.contentType
                    .orEmpty()
                    .substringBefore(';')
                    .trim()
                    .lowercase()
            ) {
                "text/event-stream" -> true
                "application/json" -> false
                else -> throw ServerError("the server sends ${plain(type)}, which is not an answer", url, "check the address")
            }
            connection.inputStream.use { if (streamed) stream(it, reply, pieces) else pieces.send(reply.whole(all(it))) }
            reply.checkEnd()
        } catch (e: SocketTimeoutException) {
            throw ServerError("the server did not answer in time", url, "try again later", e)
        } catch (e: IOException) {
            throw ServerError("the connection failed: ${plain(e.message ?: "$e")}", url, "check the address and the network", e)
        }
    }

    private suspend fun stream(input: InputStream, reply: Reply, pieces: Channel<String>) {
        val reader = input.bufferedReader()
        var read = 0
        while (!reply.done && currentCoroutineContext().isActive) {
            val line = StringBuilder()
            while (true) {
                val c = reader.read()
                if (c < 0 && line.isEmpty()) return
                if (c < 0 || c == '\n'.code) break
                if (++read > largest) throw tooLarge()
                if (c != '\r'.code) line.append(c.toChar())
            }
            if (line.startsWith("data:")) reply.event(line.substring(5).trim())?.let { pieces.send(it) }
        }
    }

    private fun all(input: InputStream): ByteArray {
        val content = input.readUpTo(largest + 1)
        if (content.size > largest) throw tooLarge()
        return content
    }

    private fun tooLarge() = ServerError("the server sends more than $largest bytes", url, "do not use this server")

    private fun refusal(connection: HttpURLConnection): ServerError {
        val status = connection.responseCode
        val page = runCatching { connection.errorStream?.use { it.readUpTo(LARGEST_ERROR) } }.getOrNull() ?: ByteArray(0)
        val said = runCatching { decodeJson(Completion.serializer(), page).error?.let(::message) }.getOrNull()
        val what = said?.let { "$it ($status)" } ?: "HTTP status $status"
        val advice = if (status in listOf(401, 403)) "give the key of this server" else "check the address, or try again later"
        return ServerError("the server refuses: $what", url, advice)
    }
}

private fun InputStream.readUpTo(most: Int): ByteArray {
    val out = java.io.ByteArrayOutputStream()
    val buffer = ByteArray(8192)
    while (out.size() < most) {
        val count = read(buffer, 0, minOf(buffer.size, most - out.size()))
        if (count < 0) break
        out.write(buffer, 0, count)
    }
    return out.toByteArray()
}

/** What an OpenAI-compatible server sends as an answer, which may be anything, to pieces of text. */
private class Reply(private val where: String) {
    var done = false
        private set
    private var finished = false
    private var empty = true

    /** The text of one event of a stream; null: it has none. */
    fun event(data: String): String? {
        if (data == "[DONE]") {
            done = true
            return null
        }
        val choice = first(read(data.toByteArray())) ?: return null
        finished = finished || choice.finishReason != null
        return text(choice.delta)
    }

    /** The text of an answer that came as one JSON object. */
    fun whole(content: ByteArray): String {
        val choice = first(read(content)) ?: throw ServerError("the server's answer is empty", where)
        finished = true
        return text(choice.message).orEmpty()
    }

    fun checkEnd() {
        if (!done && !finished) throw ServerError("the answer was cut off", where, "try again later")
        if (empty) throw ServerError("the server's answer is empty", where)
    }

    private fun read(content: ByteArray): Completion {
        val completion = try {
            decodeJson(Completion.serializer(), content)
        } catch (_: Malformed) {
            throw ServerError("the server sends nonsense in the place of an answer", where)
        }
        completion.error?.let { throw ServerError("the server stopped with an error: ${message(it) ?: "it does not say which"}", where) }
        if (completion.choices == null) throw ServerError("the server sends nonsense in the place of an answer", where)
        return completion
    }

    private fun first(completion: Completion): Choice? = completion.choices?.firstOrNull { (it.index ?: 0) == 0 }

    private fun text(message: Message?): String? {
        val text = message?.content?.filterNot { it.isISOControl() && it !in "\t\n" }?.ifEmpty { null } ?: return null
        if (text.isNotBlank()) empty = false
        return text
    }
}

/** In the forms of OpenAI, of this project's services, and of FastAPI. */
private fun message(error: JsonElement): String? {
    val said = if (error is JsonObject) listOf("message", "what", "detail").firstNotNullOfOrNull { error[it] } else error
    return (said as? JsonPrimitive)
        ?.takeIf { it.isString }
        ?.content
        ?.let(::plain)
        ?.ifEmpty { null }
}

@Serializable
private class Message(val content: String? = null)

@Serializable
private class Choice(
    val index: Int? = null,
    val delta: Message? = null,
    val message: Message? = null,
    @SerialName("finish_reason") val finishReason: String? = null,
)

@Serializable
private class Completion(val choices: List<Choice>? = null, val error: JsonElement? = null)
