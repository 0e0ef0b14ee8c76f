// What must hold of a manifest beyond its types: ranges, paths, and that what it names is listed.
package crayon.runtime

private val SHA256 = Regex("[0-9a-f]{64}")
private val NAME = Regex("[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
private val POOL_VERSION = Regex("[0-9a-f]{16}")
private val UNSAFE = Regex("""[\u0000-\u001f\u007f\\:\ud800-\udfff]""")
private const val MOST_REPEATS = 64
private const val MOST_PROTOTYPES = 1024

/** Throws [ManifestError] where something does not hold. */
internal fun checkManifest(manifest: Manifest, where: Any) {
    fun require(holds: Boolean, what: () -> String) {
        if (!holds) throw ManifestError(what(), where, "see manifest.schema.json")
    }
    require(NAME.matches(manifest.name)) { "the name ${shown(manifest.name)} is not one" }
    require(SHA256.matches(manifest.baseFingerprint)) { "base_fingerprint is not a SHA-256" }
    for (file in manifest.files) {
        checkRelative(file.path, where)
        require(file.size >= 0) { "${file.path} has a negative size" }
        require(SHA256.matches(file.sha256)) { "the sha256 of ${file.path} is not one" }
    }
    val listed = manifest.files.map { it.path }
    if (listed.map { it.lowercase() }.toSet().size != listed.size) {
        throw ManifestError("two paths in `files` differ in case alone, or not at all", where)
    }
    val missing = referenced(manifest).filter { it !in listed }.sorted()
    if (missing.isNotEmpty()) throw ManifestError("it refers to ${missing.first()}, which is not in `files`", where)
    when (manifest) {
        is ModelManifest -> checkModel(manifest, listed, where, ::require)
        is AdapterManifest -> checkAdapter(manifest, where, ::require)
    }
}

private fun checkModel(manifest: ModelManifest, listed: List<String>, where: Any, require: (Boolean, () -> String) -> Unit) {
    val a = manifest.architecture
    val counts = listOf(a.layers, a.hiddenSize, a.heads, a.kvHeads, a.headSize, a.ffnSize, a.vocabSize, manifest.contextLength)
    require(counts.all { it >= 1 } && manifest.tokenizer.vocabSize >= 1 && manifest.tap.size >= 1) { "a size is not at least 1" }
    require(a.layerRepeats in 1..MOST_REPEATS) { "layer_repeats is ${a.layerRepeats}; it must be from 1 to $MOST_REPEATS" }
    val ids = manifest.tokenizer.eos + listOfNotNull(manifest.tokenizer.bos, manifest.tokenizer.pad)
    require(ids.all { it >= 0 }) { "a token id is negative" }
    for (folder in manifest.adapters) {
        checkRelative(folder, where)
        if ("$folder/manifest.json" !in listed) throw ManifestError("the adapter folder ${shown(folder)} has no manifest in `files`", where)
    }
    if (manifest.adapters
            .map { it.substringAfterLast('/').lowercase() }
            .toSet()
            .size != manifest.adapters.size
    ) {
        throw ManifestError("two folders in `adapters` have the same name", where)
    }
    if (manifest.tap.layer !in 0..a.layers || manifest.tap.size != a.hiddenSize) {
        throw ManifestError(
            "tap layer ${manifest.tap.layer} of width ${manifest.tap.size} does not exist in ${a.layers} layers of ${a.hiddenSize}",
            where,
        )
    }
}

private fun checkAdapter(manifest: AdapterManifest, where: Any, require: (Boolean, () -> String) -> Unit) {
    require(manifest.targets.all { it.rank >= 1 }) { "a rank is not at least 1" }
    manifest.pool?.let { pool ->
        val holds = NAME.matches(pool.name) && POOL_VERSION.matches(pool.version) && pool.serial >= 0
        require(holds) { "what it says of its pool is malformed" }
    }
    manifest.prototypes?.let { prototypes ->
        require(prototypes.count in 1..MOST_PROTOTYPES) { "${prototypes.count} prototypes; from 1 to $MOST_PROTOTYPES can be" }
        require(prototypes.model.length in 1..200) { "the model of its prototypes has no name of at most 200 characters" }
    }
    val executorch = manifest.variants.executorch
    if (executorch != null && executorch.program == null && executorch.slots == null) {
        throw ManifestError("its variant for ExecuTorch has neither a program nor slots", where)
    }
}

/** Refuses any path that could leave the bundle's folder, on any operating system. */
internal fun checkRelative(path: String, where: Any) {
    val parts = path.split('/')
    val bad = UNSAFE.containsMatchIn(path) ||
        parts.any { it.isEmpty() || it == "." || it == ".." } ||
        path.lowercase() in setOf("manifest.json", "signature.json") ||
        parts.last().lowercase() == ".installed.json"
    if (bad) {
        throw ManifestError(
            "the path ${shown(path)} is not a plain relative path inside the bundle",
            where,
            "do not use this bundle; whoever made it is broken or hostile",
        )
    }
}

/** Every file that the manifest points to outside `files`. */
private fun referenced(manifest: Manifest): Set<String> =
    when (manifest) {
        is ModelManifest -> buildSet {
            manifest.variants.onnx?.let { addAll(listOf(it.model) + it.data) }
            manifest.variants.executorch?.let { addAll(listOfNotNull(it.program, it.slots?.program) + it.data) }
            add(manifest.tokenizer.file)
            manifest.golden?.let { addAll(listOf(it.cases, it.tensors)) }
        }

        is AdapterManifest -> buildSet {
            manifest.variants.onnx?.let { add(it.file) }
            manifest.variants.executorch?.let { addAll(listOfNotNull(it.program) + it.data) }
            manifest.prototypes?.let { add(it.file) }
        }
    }

/** A text of somebody else's in a message: quoted, on one line, and not too long. */
internal fun shown(text: String): String = "'" + text.map { if (it.isISOControl()) '\ufffd' else it }.joinToString("").take(80) + "'"
