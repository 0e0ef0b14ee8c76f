// The address and the key of a server, checked before anything is sent there; and what a server says, made harmless.
package crayon.runtime

import java.net.URI
import java.net.URISyntaxException

private val LOOPBACK = Regex("""localhost|127\.\d{1,3}\.\d{1,3}\.\d{1,3}|\[::1\]""")

/**
 * The address without its last slash.
 *
 * @param plainHttp allow http to other machines.
 * @param exposed what everybody on the way could read: the error where that is not allowed.
 * @throws InvalidInput it is no address of a server, carries a user, a query or a fragment, or is http to another machine.
 */
internal fun checkedUrl(url: String, plainHttp: Boolean, exposed: String): String {
    val uri = try {
        URI(url)
    } catch (e: URISyntaxException) {
        throw InvalidInput("this is not an address: ${e.reason}", shown(url))
    }
    if (uri.scheme !in listOf("http", "https") || uri.host.isNullOrEmpty() || url.any { it !in '!'..'~' }) {
        throw InvalidInput("this is not the address of a service", shown(url), "give one like https://host:8000")
    }
    if (uri.rawUserInfo != null || uri.rawQuery != null || uri.rawFragment != null) {
        throw InvalidInput("the address has a user, a query or a fragment", uri.host, "give the key by itself")
    }
    if (uri.scheme == "http" && !LOOPBACK.matches(uri.host) && !plainHttp) {
        throw InvalidInput(exposed, url, "use https, or allow plain http where the network is your own")
    }
    return url.trimEnd('/')
}

/** The key as it is. Throws InvalidInput: it cannot be a header. */
internal fun checkedKey(key: String?): String? {
    if (key != null &&
        (key.isBlank() || key.any { it !in ' '..'~' })
    ) {
        throw InvalidInput("the API key must be one line of ASCII", "api key")
    }
    return key
}

/** What a server says, short and without what would steer a terminal. */
internal fun plain(text: String): String = text.take(300).filterNot { it.isISOControl() }
