/*
 * Who made a bundle or a pool: Ed25519 signatures over manifests, and the keys that a device trusts.
 *
 * A manifest holds the SHA-256 of every other file, so whoever signs its bytes signs the bundle. The signature lies beside it, in
 * `signature.json`. A key's id is the beginning of the SHA-256 of its public half, so an id cannot be given to another key.
 */
package crayon.runtime

import crayon.runtime.bundle.Bundle
import crayon.runtime.bundle.Folder
import crayon.runtime.bundle.readManifest
import crayon.runtime.bundle.readSignature
import kotlinx.serialization.Serializable
import org.bouncycastle.crypto.params.Ed25519PublicKeyParameters
import org.bouncycastle.crypto.signers.Ed25519Signer
import java.io.IOException
import java.nio.file.Path
import kotlin.io.encoding.Base64
import kotlin.io.path.fileSize
import kotlin.io.path.readBytes

private const val LARGEST_KEYS = 1L shl 20
private val KEY_ID = Regex("[0-9a-f]{16}")

/**
 * The public half of a key.
 *
 * @property public Ed25519, 32 bytes in base64.
 * @property revoked when its signatures ceased to be accepted; null: they are.
 */
@Serializable
data class Key(val id: String, val public: String, val created: String, val revoked: String? = null)

@Serializable
private data class KeyList(val keys: List<Key>)

/** signature.json. */
@Serializable
private data class Signature(val algorithm: String = "ed25519", val key: String, val signature: String)

/** The keys whose signatures are accepted, and those that are revoked. */
class TrustedKeys(val keys: List<Key>) {
    init {
        for (key in keys) {
            val public = base64(key.public, 32)
            if (public == null || key.id != sha256(public).take(16)) {
                throw InvalidInput("the id of the key ${shown(key.id)} is not that of its public half", "keys", "fetch keys.json again")
            }
        }
    }

    /** Writes a `keys.json`, in place of an older one. */
    fun write(path: Path) = writeAtomically(path, JSON.encodeToString(KeyList.serializer(), KeyList(keys)).plus("\n").toByteArray())

    /**
     * Checks that a trusted key has signed the manifest of a bundle.
     *
     * An adapter inside a signed model needs no signature of its own: the model's manifest lists its files.
     *
     * @return the key that signed it.
     * @throws SignatureError the bundle is not signed, or by an unknown or a revoked key, or was changed since it was opened.
     */
    fun verify(bundle: Bundle): Key {
        val source = Folder(bundle.path)
        if (!readManifest(source).contentEquals(bundle.document)) {
            throw SignatureError("the manifest was changed since the bundle was opened", bundle.path)
        }
        return verify(bundle.document, readSignature(source), bundle.path)
    }

    /**
     * Checks that a trusted key has signed a manifest.
     *
     * @param document the bytes of the manifest.
     * @param signature the content of a signature.json; null: there is none.
     * @param where what the manifest is of, for errors.
     * @return the key that signed it.
     * @throws SignatureError there is no signature, or it is malformed, of an unknown or a revoked key, or of other bytes.
     */
    fun verify(document: ByteArray, signature: ByteArray?, where: Any): Key {
        if (signature == null) throw SignatureError("it is not signed", where, "fetch it from a server that signs")
        val read = try {
            fromJson(Signature.serializer(), parseJson(signature))
        } catch (e: Malformed) {
            throw malformed(e.problem, where)
        }
        val bytes = base64(read.signature, 64) ?: throw malformed("its signature is not 64 bytes in base64", where)
        if (read.algorithm != "ed25519") throw malformed("its algorithm is ${shown(read.algorithm)}", where)
        if (!KEY_ID.matches(read.key)) throw malformed("its key has no id", where)
        val key = keys.find { it.id == read.key } ?: throw SignatureError(
            "it is signed by ${read.key}, which is not a key that is trusted here",
            where,
            "ask whoever runs the server for its present keys.json; do not take it from the bundle's source",
        )
        if (key.revoked != null) {
            throw SignatureError(
                "it is signed by ${key.id}, which was revoked on ${key.revoked.take(10)}",
                where,
                "fetch it again from its server, which signs with another key now",
            )
        }
        val signer = Ed25519Signer()
        signer.init(false, Ed25519PublicKeyParameters(base64(key.public, 32), 0))
        signer.update(document, 0, document.size)
        if (!signer.verifySignature(bytes)) {
            throw SignatureError(
                "the manifest is not what ${key.id} signed",
                where,
                "fetch it again; if it stays so, somebody changed it on the way",
            )
        }
        return key
    }

    private fun malformed(problem: String, where: Any) =
        SignatureError("signature.json is malformed: $problem", where, "fetch it again, or sign it again")

    companion object {
        /**
         * Reads a `keys.json`.
         *
         * @throws InvalidInput it cannot be read, or an id in it is not that of its key.
         */
        fun read(path: Path): TrustedKeys {
            try {
                if (path.fileSize() > LARGEST_KEYS) throw InvalidInput("it is too large to be a list of keys", path)
                return TrustedKeys(fromJson(KeyList.serializer(), parseJson(path.readBytes())).keys)
            } catch (e: IOException) {
                throw InvalidInput("the keys cannot be read: ${e.message}", path, "check the path")
            } catch (e: Malformed) {
                throw InvalidInput("this is no keys.json: ${e.problem}", path, "fetch it again")
            }
        }
    }
}

private fun base64(text: String, size: Int): ByteArray? = runCatching { Base64.decode(text) }.getOrNull()?.takeIf { it.size == size }
