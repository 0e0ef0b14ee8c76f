// The first step of tokenizing: what becomes of a text before it is split.
package crayon.runtime.tokenizer

import kotlinx.serialization.json.JsonElement
import java.text.Normalizer

private val SPACE_AT_START = onigPattern("""\A\s+""")
private val SPACE_AT_END = onigPattern("""\s+\z""")

/** Reads the `normalizer` of a tokenizer.json. Throws [IllegalArgumentException]: it has a step that nobody here knows. */
internal fun readNormalizer(normalizer: JsonElement?): (String) -> String {
    val steps = steps(normalizer, "normalizers").map(::normalizerStep)
    return { text -> steps.fold(text) { done, step -> step(done) } }
}

private fun normalizerStep(step: JsonElement): (String) -> String =
    when (val type = step.type) {
        "Replace" -> {
            replacing(step)
        }

        "Prepend" -> {
            val prefix = step.string("prepend").orEmpty();
            { text: String -> if (text.isEmpty()) text else prefix + text }
        }

        "NFC", "NFD", "NFKC", "NFKD" -> {
            val form = Normalizer.Form.valueOf(type);
            { text: String -> Normalizer.normalize(text, form) }
        }

        "Lowercase" -> {
            { text: String -> text.lowercase() }
        }

        "Strip" -> {
            val left = step.flag("strip_left", true)
            val right = step.flag("strip_right", true);
            { text: String ->
                val started = if (left) SPACE_AT_START.matcher(text).replaceAll("") else text
                if (right) SPACE_AT_END.matcher(started).replaceAll("") else started
            }
        }

        else -> {
            throw IllegalArgumentException("the normalizer $type is not supported")
        }
    }
