// Byte-pair encoding: from a word to token ids, by merges in the order of their ranks.
package crayon.runtime.tokenizer

import java.util.PriorityQueue

/**
 * The model of a tokenizer.json, which gives the ids that the `tokenizers` library gives.
 *
 * @throws IllegalArgumentException the model is of another type than BPE, has parts that are not supported, or contradicts itself.
 */
internal class Bpe(model: Model) {
    private val vocabulary = model.vocab
    private val merges = Merges(model.merges.size)
    private val ignoreMerges = model.ignoreMerges
    private val fuseUnknown = model.fuseUnk
    private val unknown: Int = model.unkToken?.let { id(it) } ?: NONE

    /** Ids of the byte tokens; null where a character that is not in the vocabulary is not spelt. */
    private val bytes: IntArray?

    init {
        require(model.type == "BPE") { "a model of type ${model.type} is not supported; BPE is" }
        require(model.dropout == null || model.dropout == 0.0) { "dropout is for training" }
        require(model.continuingSubwordPrefix.isNullOrEmpty()) { "a continuing_subword_prefix is not supported" }
        require(model.endOfWordSuffix.isNullOrEmpty()) { "an end_of_word_suffix is not supported" }
        model.merges.forEachIndexed { rank, merge ->
            merges.put(id(merge.left), id(merge.right), rank, id(merge.left + merge.right))
        }
        bytes = if (model.byteFallback) IntArray(256) { vocabulary["<0x%02X>".format(it)] ?: NONE } else null
    }

    /** Appends the ids of a word. */
    fun encode(word: String, out: MutableList<Int>) {
        if (ignoreMerges) vocabulary[word]?.let { return out.plusAssign(it) }
        val symbols = Symbols(word.length)
        spell(word, symbols)
        merge(symbols)
        symbols.appendTo(out)
    }

    private fun id(token: String): Int = vocabulary[token] ?: throw IllegalArgumentException("'$token' is not in the vocabulary")

    /** Characters, or their bytes, or the unknown token. */
    private fun spell(word: String, symbols: Symbols) {
        var pending = false // an unknown token that further characters may become part of
        var at = 0
        while (at < word.length) {
            val end = at + Character.charCount(word.codePointAt(at))
            val character = word.substring(at, end)
            at = end
            val known = vocabulary[character]
            if (known != null) {
                if (pending) symbols.add(unknown)
                pending = false
                symbols.add(known)
                continue
            }
            val spelt = bytes?.let { ids -> character.toByteArray().map { ids[it.toInt() and 0xff] } }
            if (spelt != null && spelt.none { it == NONE }) {
                spelt.forEach(symbols::add)
                continue
            }
            if (unknown == NONE) continue
            if (pending && !fuseUnknown) symbols.add(unknown)
            pending = true
        }
        if (pending) symbols.add(unknown)
    }

    private class Candidate(val position: Int, val rank: Int, val made: Int) : Comparable<Candidate> {
        override fun compareTo(other: Candidate) =
            if (rank !=
                other.rank
            ) {
                rank.compareTo(other.rank)
            } else {
                position.compareTo(other.position)
            }
    }

    private fun merge(symbols: Symbols) {
        val queue = PriorityQueue<Candidate>()

        fun offer(left: Int, right: Int) {
            if (left < 0 || right < 0) return
            val merge = merges.get(symbols.ids[left], symbols.ids[right])
            if (merge >= 0) queue += Candidate(left, (merge ushr 32).toInt(), merge.toInt())
        }
        for (i in 0 until symbols.size - 1) offer(i, i + 1)
        while (true) {
            val best = queue.poll() ?: return
            val left = best.position
            val right = symbols.next[left]
            // Something else may have become of the two since.
            if (symbols.ids[left] == NONE || right < 0) continue
            val merge = merges.get(symbols.ids[left], symbols.ids[right])
            if (merge < 0 || merge.toInt() != best.made) continue
            symbols.join(left, right, best.made)
            offer(symbols.previous[left], left)
            offer(left, symbols.next[left])
        }
    }
}

private const val NONE = -1

/** The tokens of a word in a linked list; one that was merged into its neighbour has no id. */
private class Symbols(capacity: Int) {
    var ids = IntArray(capacity)
    var previous = IntArray(0)
    var next = IntArray(0)
    var size = 0

    fun add(id: Int) {
        if (size == ids.size) ids = ids.copyOf(2 * size + 4)
        ids[size++] = id
        if (next.size < ids.size) {
            previous = IntArray(ids.size) { it - 1 }
            next = IntArray(ids.size) { it + 1 }
        }
    }

    fun join(left: Int, right: Int, made: Int) {
        ids[left] = made
        ids[right] = NONE
        next[left] = next[right]
        if (next[left] in 0 until size) previous[next[left]] = left else next[left] = NONE
    }

    fun appendTo(out: MutableList<Int>) {
        for (i in 0 until size) if (ids[i] != NONE) out += ids[i]
    }
}

/** Rank and result by pair of ids, without an object for each: a vocabulary has a few hundred thousand. */
private class Merges(count: Int) {
    private val mask = Integer.highestOneBit(maxOf(2 * count, 1)) * 2 - 1
    private val keys = LongArray(mask + 1) { EMPTY }
    private val values = LongArray(mask + 1)

    /** The last of equal pairs counts. */
    fun put(left: Int, right: Int, rank: Int, made: Int) {
        val slot = slot(left, right)
        keys[slot] = key(left, right)
        values[slot] = (rank.toLong() shl 32) or made.toLong()
    }

    /** The rank in the upper half, the id that is made in the lower; negative: these are not merged. */
    fun get(left: Int, right: Int): Long {
        val slot = slot(left, right)
        return if (keys[slot] == EMPTY) EMPTY else values[slot]
    }

    private fun slot(left: Int, right: Int): Int {
        val key = key(left, right)
        var slot = (key * -0x61c8864680b583ebL ushr 32).toInt() and mask
        while (keys[slot] != EMPTY && keys[slot] != key) slot = (slot + 1) and mask
        return slot
    }

    private fun key(left: Int, right: Int): Long = (left.toLong() shl 32) or right.toLong()
}

private const val EMPTY = -1L
