// From tokens to statements: Jinja's grammar as far as chat templates use it. All else is refused, with its line.
package crayon.runtime.chat

private const val DEEPEST = 100

internal class Parser(source: String) {
    private val tokens = Lexer(source).read()
    private var next = 0
    private var depth = 0
    private var loops = 0
    private val current get() = tokens[next]

    /** Throws [Unreadable]. */
    fun parse(): List<Statement> {
        val body = body()
        if (current.kind != Kind.END) throw fail("'${current.text}' closes nothing")
        return body
    }

    /** Up to a block of one of these names, whose name is the current token then; without names to the end. */
    private fun body(vararg ends: String): List<Statement> {
        if (++depth > DEEPEST) throw fail("it is nested too deep")
        val statements = ArrayList<Statement>()
        while (true) {
            val token = current
            when (token.kind) {
                Kind.DATA -> {
                    next++
                    statements += Text(token.text)
                }

                Kind.VARIABLE_BEGIN -> {
                    next++
                    statements += Output(tuple())
                    expect(Kind.VARIABLE_END)
                }

                Kind.BLOCK_BEGIN -> {
                    next++
                    if (current.isName(*ends)) {
                        depth--
                        return statements
                    }
                    statement()?.let { statements += it }
                }

                else -> {
                    if (ends.isNotEmpty()) throw fail("'${ends.last()}' is missing")
                    depth--
                    return statements
                }
            }
        }
    }

    private fun statement(): Statement? {
        val name = name()
        return when (name) {
            "if" -> {
                parseIf()
            }

            "for" -> {
                parseFor()
            }

            "set" -> {
                parseSet()
            }

            "macro" -> {
                parseMacro()
            }

            "break", "continue" -> {
                if (loops == 0) throw fail("'$name' is outside of any loop")
                expect(Kind.BLOCK_END)
                Jump(name == "break")
            }

            // What a model is trained to say; without an effect here.
            "generation" -> {
                expect(Kind.BLOCK_END)
                val body = body("endgeneration")
                end()
                If(listOf(Constant(true) to body), emptyList())
            }

            else -> {
                next--
                throw fail("the tag '$name' is not known here")
            }
        }
    }

    private fun parseIf(): Statement {
        val branches = ArrayList<Pair<Expression, List<Statement>>>()
        while (true) {
            val condition = tuple(conditional = false)
            expect(Kind.BLOCK_END)
            branches += condition to body("elif", "else", "endif")
            when (name()) {
                "elif" -> {
                    continue
                }

                "else" -> {
                    expect(Kind.BLOCK_END)
                    val otherwise = body("endif")
                    end()
                    return If(branches, otherwise)
                }

                else -> {
                    expect(Kind.BLOCK_END)
                    return If(branches, emptyList())
                }
            }
        }
    }

    private fun parseFor(): Statement {
        val target = target()
        if (name() != "in") throw fail("'in' is missing")
        val over = tuple(conditional = false)
        val condition = if (current.isName("if")) {
            next++
            expression()
        } else {
            null
        }
        expect(Kind.BLOCK_END)
        loops++
        val body = body("else", "endfor")
        loops--
        val otherwise = if (name() == "else") {
            expect(Kind.BLOCK_END)
            body("endfor").also { next++ }
        } else {
            emptyList()
        }
        expect(Kind.BLOCK_END)
        return For(target, over, condition, body, otherwise)
    }

    private fun parseSet(): Statement {
        val target = target()
        if (current.isOperator("=")) {
            next++
            val value = tuple()
            expect(Kind.BLOCK_END)
            return Assign(target, value)
        }
        val filters = ArrayList<Pair<String, CallArguments>>()
        while (current.isOperator("|")) filters += filter()
        expect(Kind.BLOCK_END)
        val body = body("endset")
        end()
        return AssignBlock(target, filters, body)
    }

    private fun parseMacro(): Statement {
        val macro = name()
        val parameters = ArrayList<Pair<String, Expression?>>()
        operator("(")
        while (!current.isOperator(")")) {
            val name = name()
            val default = if (current.isOperator("=")) {
                next++
                expression()
            } else {
                null
            }
            parameters += name to default
            if (!current.isOperator(")")) operator(",")
        }
        operator(")")
        expect(Kind.BLOCK_END)
        val outer = loops.also { loops = 0 }
        val body = body("endmacro")
        loops = outer
        end()
        return Macro(macro, parameters, body)
    }

    private fun target(): Target {
        val targets = ArrayList<Target>()
        var isTuple = false
        val parenthesis = current.isOperator("(")
        if (parenthesis) next++
        while (true) {
            val name = name()
            if (name in CONSTANTS) throw fail("'$name' cannot be assigned to")
            targets += if (current.isOperator(".")) {
                next++
                AttributeTarget(name, name())
            } else {
                NameTarget(name)
            }
            if (!current.isOperator(",")) break
            next++
            isTuple = true
            if (current.kind != Kind.NAME || current.isName("in")) break
        }
        if (parenthesis) operator(")")
        return if (isTuple) TupleTarget(targets) else targets[0]
    }

    /** One expression, or several with commas between them. */
    private fun tuple(conditional: Boolean = true): Expression {
        val items = arrayListOf(if (conditional) expression() else or())
        if (!current.isOperator(",")) return items[0]
        while (current.isOperator(",")) {
            next++
            if (current.kind == Kind.VARIABLE_END || current.kind == Kind.BLOCK_END || current.isOperator(")")) break
            items += if (conditional) expression() else or()
        }
        return ListOf(items, isTuple = true)
    }

    private fun expression(): Expression {
        if (++depth > DEEPEST) throw fail("it is nested too deep")
        var result = or()
        while (current.isName("if")) {
            next++
            val condition = or()
            val otherwise = if (current.isName("else")) {
                next++
                expression()
            } else {
                null
            }
            result = Conditional(condition, result, otherwise)
        }
        depth--
        return result
    }

    private fun or(): Expression {
        var left = and()
        while (current.isName("or")) {
            next++
            left = Binary("or", left, and())
        }
        return left
    }

    private fun and(): Expression {
        var left = not()
        while (current.isName("and")) {
            next++
            left = Binary("and", left, not())
        }
        return left
    }

    private fun not(): Expression {
        if (!current.isName("not")) return comparison()
        next++
        if (++depth > DEEPEST) throw fail("it is nested too deep")
        return Unary("not", not()).also { depth-- }
    }

    private fun comparison(): Expression {
        val first = sum()
        val others = ArrayList<Pair<String, Expression>>()
        while (true) {
            val operator = when {
                current.isOperator("==", "!=", "<", "<=", ">", ">=") || current.isName("in") -> {
                    current.text
                }

                current.isName("not") && tokens[next + 1].isName("in") -> {
                    next++
                    "not in"
                }

                else -> {
                    return if (others.isEmpty()) first else Comparison(first, others)
                }
            }
            next++
            others += operator to sum()
        }
    }

    private fun sum(): Expression {
        var left = concatenation()
        while (current.isOperator("+", "-")) left = Binary(take(), left, concatenation())
        return left
    }

    private fun concatenation(): Expression {
        val parts = arrayListOf(product())
        while (current.isOperator("~")) {
            next++
            parts += product()
        }
        return if (parts.size == 1) parts[0] else Concatenation(parts)
    }

    private fun product(): Expression {
        var left = power()
        while (current.isOperator("*", "/", "//", "%")) left = Binary(take(), left, power())
        return left
    }

    private fun power(): Expression {
        val left = unary()
        if (current.isOperator("**")) throw fail("'**' is not known here")
        return left
    }

    private fun unary(filters: Boolean = true): Expression {
        if (!current.isOperator("-", "+")) {
            val primary = postfix(primary())
            return if (filters) filtered(primary) else primary
        }
        if (++depth > DEEPEST) throw fail("it is nested too deep")
        val of = Unary(take(), unary(filters = false))
        depth--
        return if (filters) filtered(of) else of
    }

    private fun primary(): Expression {
        val token = tokens[next++]
        return when {
            token.kind == Kind.NAME -> {
                if (token.text in CONSTANTS) Constant(CONSTANTS[token.text]) else Name(token.text)
            }

            token.kind == Kind.STRING -> {
                val text = StringBuilder(token.text)
                while (current.kind == Kind.STRING) text.append(tokens[next++].text)
                Constant(text.toString())
            }

            token.kind == Kind.INTEGER -> {
                Constant(token.text.toLongOrNull() ?: throw fail("${token.text} is too large"))
            }

            token.kind == Kind.FLOAT -> {
                Constant(token.text.toDouble())
            }

            token.isOperator("(") -> {
                if (current.isOperator(")")) {
                    next++
                    ListOf(emptyList(), isTuple = true)
                } else {
                    tuple().also { operator(")") }
                }
            }

            token.isOperator("[") -> {
                ListOf(items("]") { expression() }, isTuple = false)
            }

            token.isOperator("{") -> {
                DictOf(
                    items("}") {
                        val key = expression()
                        operator(":")
                        key to expression()
                    },
                )
            }

            else -> {
                next--
                throw fail("an expression is missing")
            }
        }
    }

    private fun <T> items(end: String, item: () -> T): List<T> {
        val items = ArrayList<T>()
        while (!current.isOperator(end)) {
            items += item()
            if (!current.isOperator(end)) operator(",")
        }
        next++
        return items
    }

    private fun postfix(of: Expression): Expression {
        var result = of
        while (true) {
            result = when {
                current.isOperator(".") -> {
                    next++
                    val token = tokens[next++]
                    when (token.kind) {
                        Kind.NAME -> Attribute(result, token.text)
                        Kind.INTEGER -> Item(result, Constant(token.text.toLong()))
                        else -> throw fail("a name is missing after '.'")
                    }
                }

                current.isOperator("[") -> {
                    next++
                    subscript(result)
                }

                current.isOperator("(") -> {
                    Call(result, arguments())
                }

                else -> {
                    return result
                }
            }
        }
    }

    private fun subscript(of: Expression): Expression {
        val parts = ArrayList<Expression?>()
        while (true) {
            parts += if (current.isOperator(":", "]")) null else expression()
            if (!current.isOperator(":")) break
            next++
        }
        operator("]")
        if (parts.size == 1) return Item(of, parts[0] ?: throw fail("an index is missing"))
        if (parts.size > 3) throw fail("a slice has three parts at most")
        return Slice(of, parts[0], parts[1], parts.getOrNull(2))
    }

    private fun filtered(of: Expression): Expression {
        var result = of
        while (true) {
            result = when {
                current.isOperator("|") -> filter().let { (name, arguments) -> Filtered(result, name, arguments) }
                current.isName("is") -> test(result)
                current.isOperator("(") -> Call(result, arguments())
                else -> return result
            }
        }
    }

    private fun filter(): Pair<String, CallArguments> {
        operator("|")
        val name = name()
        if (name !in FILTERS) throw fail("the filter '$name' is not known here")
        return name to if (current.isOperator("(")) arguments() else CallArguments()
    }

    private fun test(of: Expression): Expression {
        next++
        val negated = current.isName("not")
        if (negated) next++
        val name = name()
        if (name !in TESTS) throw fail("the test '$name' is not known here")
        val arguments = when {
            current.isOperator("(") -> {
                arguments()
            }

            current.kind in listOf(Kind.NAME, Kind.STRING, Kind.INTEGER, Kind.FLOAT) || current.isOperator("[", "{") -> {
                if (current.isName(
                        "else",
                        "or",
                        "and",
                        "if",
                        "is",
                        "not",
                        "in",
                    )
                ) {
                    CallArguments()
                } else {
                    CallArguments(listOf(postfix(primary())))
                }
            }

            else -> {
                CallArguments()
            }
        }
        return Tested(of, name, arguments, negated)
    }

    private fun arguments(): CallArguments {
        operator("(")
        val positional = ArrayList<Expression>()
        val named = LinkedHashMap<String, Expression>()
        while (!current.isOperator(")")) {
            if (current.isOperator("*", "**")) throw fail("'${current.text}' in a call is not known here")
            if (current.kind == Kind.NAME && tokens[next + 1].isOperator("=")) {
                val name = name()
                next++
                named[name] = expression()
            } else {
                if (named.isNotEmpty()) throw fail("an argument without a name follows one that has a name")
                positional += expression()
            }
            if (!current.isOperator(")")) operator(",")
        }
        next++
        return CallArguments(positional, named)
    }

    private fun take(): String = tokens[next++].text

    private fun name(): String {
        if (current.kind != Kind.NAME) throw fail("a name is missing")
        return take()
    }

    private fun operator(text: String) {
        if (!current.isOperator(text)) throw fail("'$text' is missing")
        next++
    }

    /** The name of an end that `body` found, and what closes it. */
    private fun end() {
        next++
        expect(Kind.BLOCK_END)
    }

    private fun expect(kind: Kind) {
        if (current.kind != kind) throw fail(if (current.text.isEmpty()) "a tag does not end" else "'${current.text}' is not expected here")
        next++
    }

    private fun fail(what: String) = Unreadable("line ${tokens[minOf(next, tokens.lastIndex)].line}: $what")
}

private val CONSTANTS = mapOf("true" to true, "false" to false, "none" to null, "True" to true, "False" to false, "None" to null)
