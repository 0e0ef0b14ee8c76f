// Errors as a person reads them.
package crayon.app

import crayon.runtime.CrayonError
import crayon.runtime.EngineClosed

/** What is wrong, where (unless that is a path of this phone), and what to do. */
fun Throwable.said(): String =
    when (this) {
        is EngineClosed -> "The phone needed the memory, so the model was put away. Ask again."

        is CrayonError -> listOfNotNull(what, where?.takeUnless { it.startsWith("/") }?.let { "($it)" }, advice?.let { "– $it" })
            .joinToString(" ")
            .replaceFirstChar { it.uppercase() }

        is OutOfMemoryError -> "The phone has not enough memory for this. End other apps, or take a smaller model."

        else -> "Something went wrong that this app does not know: $this"
    }
