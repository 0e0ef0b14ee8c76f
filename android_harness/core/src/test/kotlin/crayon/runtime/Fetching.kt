// A process that dies in the middle of a download.
package crayon.runtime

import kotlinx.coroutines.runBlocking
import java.nio.file.Paths

fun main(arguments: Array<String>) =
    runBlocking {
        download(arguments[0], Paths.get(arguments[1])) { done, _ -> if (done > 200_000) Runtime.getRuntime().halt(9) }
        Unit
    }
