/*
 * Every error that the public API throws, as one tree, with the names of Python's `crayon_runtime.errors`:
 *
 *     CrayonError
 *     ├── BundleError            a bundle cannot be used
 *     │   ├── ManifestError      manifest.json is missing, malformed or contradicts itself
 *     │   ├── SchemaTooNew       the bundle was written by a newer major version
 *     │   ├── IntegrityError     a file's size or hash is not what the manifest says
 *     │   └── SignatureError     no key that is trusted here has signed the manifest
 *     ├── AdapterError           an adapter does not fit the base it is offered to
 *     ├── InvalidInput           a prompt, option or token id that cannot be served
 *     │   └── ContextOverflow    more tokens than the context holds
 *     ├── BackendError           the inference backend failed, or the model does not fit into memory
 *     ├── ServerError            a service cannot be reached, refuses, or does not answer as it should
 *     │   └── PoolChanged        it serves another pool now than the one that alpha was computed with
 *     ├── EngineClosed           used after `close()`
 *     └── OutputError            a result could not be written (disk full, target exists)
 */
package crayon.runtime

/**
 * Base of the tree. Its message is one paragraph: what is wrong, where, and what to do.
 *
 * @property what what is wrong, in a sentence without a full stop.
 * @property where the file, field or option concerned.
 * @property advice what the reader can do about it.
 */
open class CrayonError(val what: String, val where: String? = null, val advice: String? = null, cause: Throwable? = null) :
    Exception(listOfNotNull(what, where?.let { "  where: $it" }, advice?.let { "  do:    $it" }).joinToString("\n"), cause)

/** A bundle cannot be used. */
open class BundleError(what: String, where: Any? = null, advice: String? = null, cause: Throwable? = null) :
    CrayonError(what, where?.toString(), advice, cause)

/** manifest.json is missing, malformed or contradicts itself. */
class ManifestError(what: String, where: Any? = null, advice: String? = null) : BundleError(what, where, advice)

/** The bundle was written by a newer major version of the schema. */
class SchemaTooNew(what: String, where: Any? = null, advice: String? = null) : BundleError(what, where, advice)

/** A file's size or hash is not what the manifest says. */
class IntegrityError(what: String, where: Any? = null, advice: String? = null, cause: Throwable? = null) :
    BundleError(what, where, advice, cause)

/** No key that is trusted here has signed the manifest as it is. */
class SignatureError(what: String, where: Any? = null, advice: String? = null) : BundleError(what, where, advice)

/** An adapter does not fit the base model it is offered to. */
class AdapterError(what: String, where: Any? = null, advice: String? = null, cause: Throwable? = null) :
    CrayonError(what, where?.toString(), advice, cause)

/** A prompt, an option or a token id that cannot be served. */
open class InvalidInput(what: String, where: Any? = null, advice: String? = null) : CrayonError(what, where?.toString(), advice)

/** More tokens than the context holds. */
class ContextOverflow(what: String, where: Any? = null, advice: String? = null) : InvalidInput(what, where, advice)

/** The inference backend failed, or the model does not fit into memory. */
class BackendError(what: String, where: Any? = null, advice: String? = null, cause: Throwable? = null) :
    CrayonError(what, where?.toString(), advice, cause)

/** A service cannot be reached, refuses, or does not answer as it should. */
open class ServerError(what: String, where: Any? = null, advice: String? = null, cause: Throwable? = null) :
    CrayonError(what, where?.toString(), advice, cause)

/** The service has another pool now than the one that alpha was computed with. */
class PoolChanged(what: String, where: Any? = null, advice: String? = null) : ServerError(what, where, advice)

/** The engine was used after it was closed. */
class EngineClosed(what: String, where: Any? = null, advice: String? = null) : CrayonError(what, where?.toString(), advice)

/** A result could not be written: the disk is full, the target exists, or is not writable. */
class OutputError(what: String, where: Any? = null, advice: String? = null, cause: Throwable? = null) :
    CrayonError(what, where?.toString(), advice, cause)
