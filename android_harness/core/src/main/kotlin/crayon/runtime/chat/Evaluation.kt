// Running a template: statements write, expressions have values. What a template may take, in steps and in text, is bounded.
package crayon.runtime.chat

private const val MOST_STEPS = 20_000_000
private const val LONGEST = 1 shl 26

/** Variables by name; a loop, a macro and a block that is captured have their own. */
internal class Scope(private val outer: Scope?) {
    private val values = HashMap<String, Any?>()

    operator fun get(name: String): Any? =
        if (name in
            values
        ) {
            values[name]
        } else {
            outer?.get(name) ?: if (has(name)) null else Undefined(name)
        }

    operator fun set(name: String, value: Any?) {
        values[name] = value
    }

    private fun has(name: String): Boolean = name in values || outer?.has(name) == true
}

private class Break : RuntimeException(null, null, false, false)

private class Continue : RuntimeException(null, null, false, false)

internal class Evaluation(private val global: Scope) {
    private var out = StringBuilder()
    private var steps = 0
    private var written = 0

    /** The text of a template. Throws [Refused]. */
    fun run(body: List<Statement>): String {
        execute(body, Scope(global))
        return out.toString()
    }

    private fun execute(body: List<Statement>, scope: Scope) {
        for (statement in body) {
            step()
            when (statement) {
                is Text -> {
                    write(statement.text)
                }

                is Output -> {
                    write(textOf(value(statement.of, scope)))
                }

                is If -> {
                    execute(statement.branches.firstOrNull { isTrue(value(it.first, scope)) }?.second ?: statement.otherwise, scope)
                }

                is For -> {
                    loop(statement, scope)
                }

                is Assign -> {
                    assign(statement.target, value(statement.value, scope), scope)
                }

                is AssignBlock -> {
                    var value: Any? = captured { execute(statement.body, Scope(scope)) }
                    for ((name, arguments) in statement.filters) value = filter(name, value, arguments, scope)
                    assign(statement.target, value, scope)
                }

                is Macro -> {
                    scope[statement.name] = Callable { call(statement, it, scope) }
                }

                is Jump -> {
                    throw if (statement.isBreak) Break() else Continue()
                }
            }
        }
    }

    private fun write(text: String) {
        written += text.length
        if (written > LONGEST) throw Refused("it writes more than $LONGEST characters")
        out.append(text)
    }

    private fun captured(run: () -> Unit): String {
        val outer = out
        out = StringBuilder()
        try {
            run()
            return out.toString()
        } finally {
            out = outer
        }
    }

    private fun loop(statement: For, scope: Scope) {
        var over = items(value(statement.over, scope))
        if (statement.condition != null) {
            over = over.filter { item ->
                val inner = Scope(scope)
                assign(statement.target, item, inner)
                isTrue(value(statement.condition, inner))
            }
        }
        if (over.isEmpty()) return execute(statement.otherwise, Scope(scope))
        for (i in over.indices) {
            step()
            val inner = Scope(scope)
            inner["loop"] = Loop(over, i)
            assign(statement.target, over[i], inner)
            try {
                execute(statement.body, inner)
            } catch (_: Continue) {
                continue
            } catch (_: Break) {
                break
            }
        }
    }

    private fun call(macro: Macro, arguments: Arguments, scope: Scope): Any {
        val inner = Scope(scope)
        macro.parameters.forEachIndexed { i, (name, default) ->
            val given = arguments[i, name, Missing]
            inner[name] = if (given !== Missing) {
                given
            } else if (default != null) {
                value(default, inner)
            } else {
                Undefined(name)
            }
        }
        arguments.check(macro.parameters.size)
        return captured { execute(macro.body, inner) }
    }

    private fun assign(target: Target, value: Any?, scope: Scope) {
        when (target) {
            is NameTarget -> {
                scope[target.name] = value
            }

            is AttributeTarget -> {
                val namespace = scope[target.namespace] as? Namespace ?: throw Refused("cannot assign attribute on non-namespace object")
                namespace.values[target.name] = value
            }

            is TupleTarget -> {
                val items = items(value)
                if (items.size != target.targets.size) throw Refused("${items.size} values for ${target.targets.size} names")
                target.targets.forEachIndexed { i, inner -> assign(inner, items[i], scope) }
            }
        }
    }

    private fun value(of: Expression, scope: Scope): Any? {
        step()
        return when (of) {
            is Constant -> {
                of.value
            }

            is Name -> {
                scope[of.name]
            }

            is ListOf -> {
                of.items.map { value(it, scope) }.let { if (of.isTuple) Tuple(it) else it }
            }

            is DictOf -> {
                of.items.associateTo(LinkedHashMap()) { (key, item) -> key(value(key, scope)) to value(item, scope) }
            }

            is Attribute -> {
                attribute(value(of.of, scope), of.name)
            }

            is Item -> {
                item(value(of.of, scope), value(of.key, scope))
            }

            is Slice -> {
                slice(value(of.of, scope), listOf(of.start, of.stop, of.step).map { it?.let { part -> value(part, scope) } })
            }

            is Call -> {
                val called = value(of.of, scope)
                if (called is Undefined) throw Refused("'${called.what}' is undefined")
                (called as? Callable ?: throw Refused("'${typeName(called)}' object is not callable")).call(arguments(of.arguments, scope))
            }

            is Filtered -> {
                filter(of.name, value(of.of, scope), of.arguments, scope)
            }

            is Tested -> {
                test(of.name, value(of.of, scope), arguments(of.arguments, scope)) != of.negated
            }

            is Unary -> {
                unary(of.operator, value(of.of, scope))
            }

            is Binary -> {
                binary(of, scope)
            }

            is Concatenation -> {
                of.parts.joinToString("") { textOf(value(it, scope)) }
            }

            is Comparison -> {
                comparison(of, scope)
            }

            is Conditional -> {
                when {
                    isTrue(value(of.condition, scope)) -> value(of.then, scope)
                    of.otherwise != null -> value(of.otherwise, scope)
                    else -> Undefined("the inline if-expression without an else")
                }
            }
        }
    }

    private fun filter(name: String, value: Any?, arguments: CallArguments, scope: Scope): Any? =
        FILTERS.getValue(name)(value, arguments(arguments, scope))

    private fun arguments(of: CallArguments, scope: Scope) =
        Arguments(of.positional.map { value(it, scope) }, of.named.mapValues { value(it.value, scope) })

    private fun unary(operator: String, value: Any?): Any? {
        if (operator == "not") return !isTrue(value)
        return when (val number = number(value)) {
            is Long -> if (operator == "-") Math.negateExact(number) else number
            is Double -> if (operator == "-") -number else number
            else -> throw Refused("bad operand type for unary $operator: '${typeName(value)}'")
        }
    }

    private fun binary(of: Binary, scope: Scope): Any? {
        val left = value(of.left, scope)
        if (of.operator == "and") return if (isTrue(left)) value(of.right, scope) else left
        if (of.operator == "or") return if (isTrue(left)) left else value(of.right, scope)
        return arithmetic(of.operator, left, value(of.right, scope)).also { if (it is String) step(it.length / 64) }
    }

    private fun comparison(of: Comparison, scope: Scope): Boolean {
        var left = value(of.first, scope)
        for ((operator, expression) in of.others) {
            val right = value(expression, scope)
            val holds = when (operator) {
                "==" -> areEqual(left, right)
                "!=" -> !areEqual(left, right)
                "in" -> contains(right, left)
                "not in" -> !contains(right, left)
                "<" -> compare(left, right) < 0
                "<=" -> compare(left, right) <= 0
                ">" -> compare(left, right) > 0
                else -> compare(left, right) >= 0
            }
            if (!holds) return false
            left = right
        }
        return true
    }

    private fun step(count: Int = 1) {
        steps += count + 1
        if (steps > MOST_STEPS) throw Refused("it does not come to an end")
    }

    private object Missing
}

/** `loop`, at one of its rounds. */
internal class Loop(private val over: List<Any?>, private val index: Int) {
    operator fun get(name: String): Any? =
        when (name) {
            "index" -> index + 1L
            "index0" -> index.toLong()
            "revindex" -> (over.size - index).toLong()
            "revindex0" -> over.size - index - 1L
            "first" -> index == 0
            "last" -> index == over.lastIndex
            "length" -> over.size.toLong()
            "previtem" -> if (index > 0) over[index - 1] else Undefined("there is no previous item")
            "nextitem" -> if (index < over.lastIndex) over[index + 1] else Undefined("there is no next item")
            "cycle" -> Callable { it.from(0)[index % it.size] }
            else -> throw Refused("'loop.$name' is not known here")
        }
}

internal fun arithmetic(operator: String, left: Any?, right: Any?): Any? {
    val x = number(left)
    val y = number(right)
    try {
        when {
            x is Long && y is Long -> {
                return integers(operator, x, y)
            }

            x != null && y != null -> {
                return floats(operator, x.toDouble(), y.toDouble())
            }

            operator == "+" && left is String && right is String -> {
                if (left.length + right.length > LONGEST) throw Refused("it writes more than $LONGEST characters")
                return left + right
            }

            operator == "+" && left is List<*> && right is List<*> && (left is Tuple) == (right is Tuple) -> {
                return (left + right).let { if (left is Tuple) Tuple(it) else it }
            }

            operator == "*" && left is String && y is Long -> {
                return repeated(left, y)
            }

            operator == "*" && right is String && x is Long -> {
                return repeated(right, x)
            }
        }
    } catch (e: ArithmeticException) {
        throw Refused(e.message ?: "a number is too large")
    }
    if (left is Undefined) throw Refused("'${left.what}' is undefined")
    if (right is Undefined) throw Refused("'${right.what}' is undefined")
    throw Refused("unsupported operand types for $operator: '${typeName(left)}' and '${typeName(right)}'")
}

private fun repeated(text: String, count: Long): String {
    if (count > LONGEST || text.length * count > LONGEST) throw Refused("it writes more than $LONGEST characters")
    return text.repeat(maxOf(count, 0).toInt())
}

private fun integers(operator: String, x: Long, y: Long): Any =
    when (operator) {
        "+" -> Math.addExact(x, y)
        "-" -> Math.subtractExact(x, y)
        "*" -> Math.multiplyExact(x, y)
        "/" -> if (y == 0L) throw ArithmeticException("division by zero") else x.toDouble() / y
        "//" -> Math.floorDiv(x, y)
        else -> Math.floorMod(x, y)
    }

private fun floats(operator: String, x: Double, y: Double): Double =
    when (operator) {
        "+" -> {
            x + y
        }

        "-" -> {
            x - y
        }

        "*" -> {
            x * y
        }

        else -> {
            if (y == 0.0) throw ArithmeticException("division by zero")
            when (operator) {
                "/" -> x / y
                "//" -> Math.floor(x / y)
                else -> x - Math.floor(x / y) * y
            }
        }
    }

internal fun contains(container: Any?, item: Any?): Boolean =
    when (container) {
        is String -> (item as? String ?: throw Refused("'in <string>' requires string as left operand, not ${typeName(item)}")) in container
        is Map<*, *> -> container.containsKey(item)
        else -> items(container).any { areEqual(it, item) }
    }

/** `value.name`: a method of its type, or else what a dict holds under this name. */
internal fun attribute(value: Any?, name: String): Any? =
    when (value) {
        is Undefined -> throw Refused("'${value.what}' is undefined")
        is Namespace -> if (name in value.values) value.values[name] else Undefined(name)
        is Loop -> value[name]
        is Map<*, *> -> method(value, name) ?: if (value.containsKey(name)) value[name] else Undefined(name)
        else -> method(value, name) ?: Undefined(name)
    }

/** `value[key]`. */
internal fun item(value: Any?, key: Any?): Any? =
    when {
        value is Undefined -> throw Refused("'${value.what}' is undefined")
        value is Map<*, *> && value.containsKey(key) -> value[key]
        value is List<*> && number(key) is Long -> at(value, number(key)!!.toLong())
        value is String && number(key) is Long -> at(characters(value), number(key)!!.toLong())
        key is String -> attribute(value, key)
        else -> Undefined(textOf(key))
    }

private fun at(items: List<Any?>, index: Long): Any? {
    val place = if (index < 0) index + items.size else index
    return if (place in items.indices) items[place.toInt()] else Undefined("item $index")
}

private fun key(key: Any?): Any? =
    if (key == null || key is String || key is Long) key else throw Refused("a ${typeName(key)} as a key is not known here")

private fun slice(value: Any?, parts: List<Any?>): Any? {
    if (value is Undefined) throw Refused("'${value.what}' is undefined")
    val items = if (value is String) characters(value) else value as? List<*> ?: throw Refused("a ${typeName(value)} has no slices")
    val (start, stop, step) = parts.map { if (it == null) null else number(it) as? Long ?: throw Refused("slice indices must be integers") }
    val by = step ?: 1
    if (by == 0L) throw Refused("slice step cannot be zero")
    val size = items.size.toLong()

    fun place(index: Long?, default: Long): Long {
        if (index == null) return default
        val from = if (index < 0) index + size else index
        return if (by > 0) from.coerceIn(0, size) else from.coerceIn(-1, size - 1)
    }
    val taken = ArrayList<Any?>()
    var i = place(start, if (by > 0) 0 else size - 1)
    val end = place(stop, if (by > 0) size else -1)
    while (if (by > 0) i < end else i > end) {
        taken += items[i.toInt()]
        i += by
    }
    return if (value is String) {
        taken.joinToString("")
    } else if (value is Tuple) {
        Tuple(taken)
    } else {
        taken
    }
}
