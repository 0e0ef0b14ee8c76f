// A process that may write no more than a few bytes, as on a full disk: it installs or downloads, and says why it could not.
package crayon.runtime

import crayon.runtime.bundle.install
import kotlinx.coroutines.runBlocking
import java.nio.file.Paths
import kotlin.system.exitProcess
import kotlin.test.assertEquals

/** What such a process says. @param kind `install` or `download`. */
internal fun filled(kind: String, source: String, target: String): String {
    val command = jvm("crayon.runtime.FillingKt", kind, source, target)
    val child = ProcessBuilder(listOf("sh", "-c", "ulimit -f 400; exec \"$@\"", "sh") + command) // blocks of 512 bytes
        .redirectError(ProcessBuilder.Redirect.INHERIT)
        .start()
    val said = child.inputStream.bufferedReader().readText()
    assertEquals(3, child.waitFor(), said)
    return said
}

fun main(arguments: Array<String>) {
    val (kind, source, target) = arguments
    try {
        runBlocking {
            if (kind == "download") download(source, Paths.get(target)) else install(Paths.get(source), Paths.get(target), replace = true)
        }
    } catch (e: OutputError) {
        println("${e.what} | ${e.advice}")
        exitProcess(3)
    }
}
