// A process that dies in the middle of an installation.
package crayon.runtime.bundle

import java.nio.file.Paths

fun main(arguments: Array<String>) {
    var bytes = 0L
    install(Paths.get(arguments[0]), Paths.get(arguments[1]), replace = true, onBytes = {
        bytes += it
        if (bytes > 500_000) Runtime.getRuntime().halt(9)
    })
}
