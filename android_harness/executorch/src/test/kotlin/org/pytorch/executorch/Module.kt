// In the place of the stubs: a program that is scripted. It says what core's FakeBackend says, and keeps its tokens as a real one its KV cache.
package org.pytorch.executorch

import crayon.runtime.backends.FakeBackend
import java.nio.LongBuffer

class Module private constructor(private val path: String, private val threads: Int) {
    private val kept = ArrayList<Int>()
    private var destroyed = false

    @Suppress("unused") // as the property of Java's getter
    fun getMethods(): Array<String> = (constants.keys + "forward" + methods).toTypedArray()

    fun execute(methodName: String, vararg inputs: EValue): Array<EValue> {
        check(!destroyed) { "Module has been destroyed" }
        constants[methodName]?.let { return arrayOf(EValue(number = it)) }
        require(methodName == "forward_tap") { "no method $methodName" }
        val (tokens, position) = inputs.map { it.toTensor() }
        val at = position.longs().single().toInt()
        val fed = tokens.longs().map { it.toInt() }
        require(tokens.shape.toList() == listOf(1L, fed.size.toLong()) && fed.size <= constants.getValue("get_max_seq_len"))
        require(at <= kept.size) { "position $at behind ${kept.size} tokens" }
        calls += fed.size
        while (kept.size > at) kept.removeAt(kept.lastIndex)
        kept += fed
        if (broken) throw RuntimeException("no power")
        val backend = FakeBackend(null, vocabSize = 512, contextLength = 4096)
        return backend.newCache().use { cache ->
            val all = cache.prefill(kept.toIntArray())
            val logits = all.logits.copyOf()
            val last = all.tapLast.copyOf()
            cache.reset(null)
            val sum = backend.hidden(kept).takeLast(fed.size).reduce { a, b -> FloatArray(a.size) { a[it] + b[it] } }
            arrayOf(
                logits.copyOf(logits.size - missing),
                sum,
                last,
            ).map { EValue(Tensor(null, it, longArrayOf(1, it.size.toLong()))) }.toTypedArray()
        }
    }

    fun destroy() {
        check(!destroyed)
        destroyed = true
        open -= this
    }

    companion object {
        const val LOAD_MODE_FILE = 0
        const val LOAD_MODE_MMAP = 1
        var constants = emptyMap<String, Long>()
        var methods = listOf("forward_tap")
        var missing = 0
        var broken = false
        val open = ArrayList<Module>()
        val calls = ArrayList<Int>()
        val loaded = ArrayList<Triple<String, Int, Int>>()

        @JvmStatic
        fun load(modelPath: String, loadMode: Int, numThreads: Int): Module {
            loaded += Triple(modelPath, loadMode, numThreads)
            return Module(modelPath, numThreads).also { open += it }
        }
    }
}

class EValue(private val tensor: Tensor? = null, private val number: Long? = null) {
    fun toTensor(): Tensor = tensor!!

    fun toInt(): Long = number!!

    companion object {
        @JvmStatic
        fun from(tensor: Tensor) = EValue(tensor)
    }
}

class Tensor(private val data: LongBuffer?, private val floats: FloatArray?, val shape: LongArray) {
    @Suppress("unused") // as the property of Java's getter
    fun getDataAsFloatArray(): FloatArray = floats!!.copyOf()

    fun longs(): LongArray = LongArray(data!!.capacity()) { data.get(it) }

    companion object {
        @JvmStatic
        fun fromBlob(data: LongBuffer, shape: LongArray): Tensor {
            require(data.isDirect)
            return Tensor(data, null, shape)
        }
    }
}
