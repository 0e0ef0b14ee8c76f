// What a template consists of.
package crayon.runtime.chat

internal sealed interface Expression

internal class Constant(val value: Any?) : Expression

internal class Name(val name: String) : Expression

internal class ListOf(val items: List<Expression>, val isTuple: Boolean) : Expression

internal class DictOf(val items: List<Pair<Expression, Expression>>) : Expression

internal class Attribute(val of: Expression, val name: String) : Expression

internal class Item(val of: Expression, val key: Expression) : Expression

internal class Slice(val of: Expression, val start: Expression?, val stop: Expression?, val step: Expression?) : Expression

internal class Call(val of: Expression, val arguments: CallArguments) : Expression

internal class Filtered(val of: Expression, val name: String, val arguments: CallArguments) : Expression

internal class Tested(val of: Expression, val name: String, val arguments: CallArguments, val negated: Boolean) : Expression

internal class Unary(val operator: String, val of: Expression) : Expression

internal class Binary(val operator: String, val left: Expression, val right: Expression) : Expression

internal class Concatenation(val parts: List<Expression>) : Expression

/** `a < b <= c`: the first, then each operator with what is behind it. */
internal class Comparison(val first: Expression, val others: List<Pair<String, Expression>>) : Expression

internal class Conditional(val condition: Expression, val then: Expression, val otherwise: Expression?) : Expression

internal class CallArguments(val positional: List<Expression> = emptyList(), val named: Map<String, Expression> = emptyMap())

internal sealed interface Statement

internal class Text(val text: String) : Statement

internal class Output(val of: Expression) : Statement

internal class If(val branches: List<Pair<Expression, List<Statement>>>, val otherwise: List<Statement>) : Statement

internal class For(
    val target: Target,
    val over: Expression,
    val condition: Expression?,
    val body: List<Statement>,
    val otherwise: List<Statement>,
) : Statement

internal class Assign(val target: Target, val value: Expression) : Statement

/** `{% set x | trim %}…{% endset %}`. */
internal class AssignBlock(val target: Target, val filters: List<Pair<String, CallArguments>>, val body: List<Statement>) : Statement

internal class Macro(val name: String, val parameters: List<Pair<String, Expression?>>, val body: List<Statement>) : Statement

internal class Jump(val isBreak: Boolean) : Statement

/** What is assigned to. */
internal sealed interface Target

internal class NameTarget(val name: String) : Target

internal class AttributeTarget(val namespace: String, val name: String) : Target

internal class TupleTarget(val targets: List<Target>) : Target
