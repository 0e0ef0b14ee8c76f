package crayon.app.model

import android.content.Context
import crayon.app.R
import crayon.runtime.SignatureError
import crayon.runtime.TrustedKeys
import java.nio.file.Path
import kotlin.io.path.writeBytes

/**
 * Whose bundles this app accepts.
 *
 * @property trusted null: everybody's. That is for developers: whoever can change a model can change what it says.
 */
class Keys(val trusted: TrustedKeys?) {
    /** Throws [SignatureError] where no trusted key has signed the bytes of a manifest. */
    fun check(document: ByteArray, signature: ByteArray?, where: Path) {
        if (trusted == null) return
        if (trusted.keys.isEmpty()) {
            throw SignatureError(
                "this app was built without keys, so it trusts nobody's models",
                advice = "put the keys.json of your server into app/src/main/res/raw, and build it again",
            )
        }
        trusted.verify(document, signature, where)
    }

    companion object {
        /** Those that the app was built with: `res/raw/keys.json`; a debug build accepts everything. */
        fun of(context: Context): Keys {
            if (context.resources.getBoolean(R.bool.accept_unsigned)) return Keys(null)
            val path = context.noBackupFilesDir.toPath().resolve("keys.json")
            path.writeBytes(context.resources.openRawResource(R.raw.keys).use { it.readBytes() })
            return Keys(TrustedKeys.read(path))
        }
    }
}
