/*
 * Moving about in buffers through their common class: since Java 9 each has methods of its own for this, which Android lacks before API 34,
 * and code that was compiled against them fails there.
 */
package crayon.runtime

import java.nio.Buffer

internal fun <B : Buffer> B.at(position: Int): B = apply { position(position) }

internal fun <B : Buffer> B.upTo(limit: Int): B = apply { limit(limit) }

internal fun <B : Buffer> B.flipped(): B = apply { flip() }

internal fun <B : Buffer> B.cleared(): B = apply { clear() }
