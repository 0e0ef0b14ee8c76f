r"""What an answer may be: a JSON schema, one call of a list of tools, a grammar, or a regular expression.

    Constraint ──matcher(tokenizer)──> Matcher ──allowed()──> bool [V] ──> Sampler
    (checked when it is made)          (one answer)            (each step)

A token is allowed if the answer so far, the token's bytes and some further bytes together are what the constraint describes; an eos
token, if the answer so far is. That is a property of text alone: no token is forced because a tokenizer would have split the text so,
and a constraint that the model would have met anyway changes nothing. The bytes are those that `Tokenizer.token_bytes` gives, which
are what a reader sees.

llguidance (the extra `grammar`) computes the allowed tokens. It knows regular expressions without look-around, and context-free
grammars; a JSON schema with a keyword that it cannot hold is refused, never half obeyed.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import numpy as np

from crayon_runtime.errors import InvalidInput, MissingExtra

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.tokenizer import Tokenizer

    Bools = npt.NDArray[np.bool_]

MAX_SIZE: Final = 256 * 1024
"""Characters of a schema, a grammar or an expression; one of this size is compiled, or refused, in a second or two."""

LIMITS: Final = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 20_000,
}
"""llguidance's own, but for two: it compiles in a time that grows with the square of the grammar, and would keep 250,000 states of
its lexer, each of about 2 kB. With these a step takes tens of milliseconds at worst. 20,000 symbols are a schema of 2800 properties."""

_NO_BRACE = "TEXT: /(.|\\n)*/ & ~/[ \\t\\r\\n]*\\{(.|\\n)*/"

_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'

_JSON_STYLE = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_pattern": r"( |\n[ \t]{0,20})",  # llama.cpp's: a model cannot go on with blanks for ever
    "coerce_one_of": False,
    "lenient": False,
    "json_allowed_escapes": 'nrbtf\\"',  # no \uXXXX: llguidance takes "\u0061" for another name than "a", a reader does not
}
"""Instead of a schema's own "x-guidance", which could make llguidance ignore keywords, or allow what is no JSON."""


class Constraint:
    """What an answer may be. Make it once for many answers: what is compiled stays. Any number of threads may use it.

    Each way of making one raises:
        InvalidInput: it is malformed, too large or too complex, cannot be met by any text, or uses what cannot be enforced.
        MissingExtra: llguidance is not installed.
    """

    def __init__(self, kind: str, grammar: str) -> None:
        self.kind = kind
        """"json_schema", "tools", "lark", "gbnf" or "regex"."""
        self.grammar = grammar
        """In llguidance's variant of Lark."""
        self._compiled: WeakKeyDictionary[_Vocabulary, Any] = WeakKeyDictionary()
        error = _llguidance().LLMatcher.validate_grammar(
            _checked_text(grammar, kind) + _NO_FORCING, None, limits=_limits()
        )
        if error and not error.startswith("WARNING"):
            raise _refused(kind, error)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Constraint:
        """A JSON document that a schema describes, and nothing around it.

        Properties come in the schema's order; names that are not in the schema may come twice. Whitespace is at most one space, or a newline
        with an indentation. Strings hold no control characters but \\b \\f \\n \\r \\t, and no escapes but these, \\" and \\\\.

        Args:
            schema: JSON Schema, draft 2020-12, parsed or as text. `{}` and `True` are any document.
        """
        parsed = _parse(schema, "json_schema")
        return cls("json_schema", f"start: %json {_schema_text(parsed, 'json_schema')}")

    @classmethod
    def tools(cls, tools: Sequence[Mapping[str, Any]], *, or_text: bool = False) -> Constraint:
        """One call of one of these tools: `{"name": "alarm.set", "arguments": {"day": "monday"}}`.

        Args:
            tools: in OpenAI's form: {"type": "function", "function": {"name": …, "parameters": a JSON schema of an object}}.
                A tool without parameters takes none.
            or_text: or any text whose first character that is not blank is no brace: what begins like a call is one.
        """
        if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence) or not tools:
            raise InvalidInput("a list of tools is wanted, with at least one", where="tools")
        calls: dict[str, Any] = {}
        definitions = {}
        for i, tool in enumerate(tools):
            name, parameters = _tool(tool, where=f"tools[{i}]")
            if name in calls:
                raise InvalidInput(f"two tools have the name {name!r}", where=f"tools[{i}]")
            place = f"#/$defs/tool{i}"
            definitions[f"tool{i}"] = _moved(parameters, place)
            parts = {"name": {"const": name}, "arguments": {"$ref": place}}
            calls[name] = {"type": "object", "properties": parts, "required": [*parts], "additionalProperties": False}
        schema = {"anyOf": [*calls.values()], "$defs": definitions}
        call = f"%json {_schema_text(schema, 'tools')}"
        return cls(
            "tools", f"start: /[ \\n]{{0,2}}/ call | TEXT\ncall: {call}\n{_NO_BRACE}" if or_text else f"start: {call}"
        )

    @classmethod
    def lark(cls, text: str) -> Constraint:
        """A text of the language of a context-free grammar, whose first rule is `start`.

        Args:
            text: in llguidance's variant of Lark: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md.
                What an upper-case name or a /regular expression/ matches is taken as long as it can be; JSON schemas go inside as `%json {…}`.
        """
        return cls("lark", _checked_text(text, "lark"))

    @classmethod
    def gbnf(cls, text: str) -> Constraint:
        """As `lark`, of a grammar in the form of llama.cpp, whose first rule is `root`."""
        _llguidance()
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            return cls("gbnf", gbnf_to_lark(_checked_text(text, "gbnf")))
        except InvalidInput:
            raise
        except Exception as e:  # the converter raises plain Exception, IndexError and RecursionError
            raise InvalidInput(f"not a GBNF grammar: {_shortened(str(e) or type(e).__name__)}", where="gbnf") from e

    @classmethod
    def regex(cls, text: str) -> Constraint:
        """A text that a regular expression matches as a whole.

        Args:
            text: in the syntax of Rust's regex, which is that of Python's `re` in all common cases, without look-around and back-references.
                `.` is any character but a newline; `\\d`, `\\w` and `\\s` are those of ASCII.
        """
        checked = _checked_text(text, "regex")
        try:
            expression = _llguidance().regex_to_lark(checked, "dws")
        except ValueError as e:
            raise _refused("regex", str(e)) from e
        return cls("regex", f"start: /{expression}/")

    def matcher(self, tokenizer: Tokenizer, vocab_size: int) -> Matcher:
        """Follow one answer of a model.

        Args:
            vocab_size: V, of the model; at least the tokenizer's.

        Raises:
            InvalidInput: the model's tokens cannot begin such an answer, or it is too complex.
        """
        if not tokenizer.info.eos:
            raise InvalidInput("the model has no eos token, which ends a constrained answer", where="constraint")
        return Matcher(self, _vocabulary(tokenizer, vocab_size))

    def meets(self, text: str) -> bool:
        """Whether a text is what it describes, whoever wrote it; also False where to find out would take too long."""
        matcher = self._start(_bytes())
        data = text.encode(errors="surrogatepass")
        for start in range(0, len(data), _BYTES_AT_ONCE):
            piece = [*data[start : start + _BYTES_AT_ONCE]]
            if matcher.try_consume_tokens(piece) < len(piece):
                return False
        accepting: bool = matcher.is_accepting() and not matcher.is_error()
        return accepting

    def _start(self, vocabulary: _Vocabulary, *, anew: bool = False) -> Any:
        """A matcher of llguidance at the beginning of an answer: a copy of what is compiled, or `anew`."""
        compiled = None if anew else self._compiled.get(vocabulary)
        if compiled is None:
            matcher = _llguidance().LLMatcher
            compiled = matcher(vocabulary.library, self.grammar + _NO_FORCING, log_level=0, limits=_limits())
            if compiled.is_error():
                raise _refused(self.kind, compiled.get_error())
            self._compiled[vocabulary] = compiled
        return compiled.deep_copy()

    def __repr__(self) -> str:
        return f"<Constraint {self.kind}: {_shortened(self.grammar, 60)!r}>"


class Matcher:
    """Follows one answer, token by token. Made by `Constraint.matcher`; not safe for threads."""

    def __init__(self, constraint: Constraint, vocabulary: _Vocabulary) -> None:
        self._constraint = constraint
        self._vocabulary = vocabulary
        self._tokens: list[int] = []
        self._allowed: Bools | None = None
        self._matcher = constraint._start(vocabulary)
        self.allowed()

    def allowed(self) -> Bools:
        """bool [V]: the tokens that may come next; at least one.

        Raises:
            InvalidInput: there is none, or to find out would take too long.
        """
        if self._allowed is None:
            mask = self._matcher.compute_bitmask()
            if self._matcher.is_error():
                self._start_again()
                mask = self._matcher.compute_bitmask()
                self._check()
            bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=self._vocabulary.size, bitorder="little")
            self._allowed = bits.view(np.bool_)
        return self._allowed

    def consume(self, token: int) -> None:
        """Go on with one of the allowed tokens."""
        self._allowed = None
        if not self._matcher.consume_token(token):
            self._start_again()
            self._matcher.consume_token(token)
            self._check()
        self._tokens.append(token)

    def _start_again(self) -> None:
        """All copies of a compiled matcher share a lexer, and other answers may have used up its states: then take a new one."""
        if "lexer" in self._matcher.get_error():
            self._matcher = self._constraint._start(self._vocabulary, anew=True)
            self._matcher.consume_tokens(self._tokens)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise self._stuck(self._matcher.get_error())

    def _stuck(self, error: str) -> InvalidInput:
        said = b"".join(self._vocabulary.tokens[token] for token in self._tokens).decode(errors="replace")
        after = f" after {_shortened(said, -40)!r}" if said else ""
        if error.startswith("NoExtension"):
            return InvalidInput(
                f"no token of this model goes on with what the constraint wants{after}",
                where=self._constraint.kind,
                do="it contradicts itself there, or wants characters that the model's vocabulary cannot write",
            )
        return InvalidInput(
            f"the constraint is too complex{after}: {_message(error)}",
            where=self._constraint.kind,
            do=_SIMPLER,
        )


class _Vocabulary:
    """A tokenizer's tokens, as llguidance wants them.

    Args:
        size: V.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.size = size
        self.tokens = [tokenizer.token_bytes(token) for token in range(size)]
        self.special_token_ids = sorted(token for token in tokenizer.special_ids if token < size)
        self.bos_token_id = tokenizer.info.bos
        self.eos_token_id = tokenizer.info.eos[0]
        self.is_tokenizer_wrapper = True
        self.library = _llguidance().LLTokenizer(self, n_vocab=size, eos_token=tokenizer.info.eos)

    def __call__(self, text: str) -> list[int]:
        """Only tokens that are forced would have to be split; none are."""
        raise NotImplementedError


class _ByteVocabulary(_Vocabulary):
    """A token for each byte, whose id it is, and an eos token: for texts that no model has split."""

    def __init__(self) -> None:
        self.size = 257
        self.tokens = [*(bytes([byte]) for byte in range(256)), b"</s>"]
        self.special_token_ids = [256]
        self.bos_token_id = None
        self.eos_token_id = 256
        self.is_tokenizer_wrapper = True
        self.library = _llguidance().LLTokenizer(self, n_vocab=257, eos_token=256)


_BYTES_AT_ONCE = 4096


@functools.cache
def _bytes() -> _ByteVocabulary:
    return _ByteVocabulary()


_VOCABULARIES: WeakKeyDictionary[Tokenizer, dict[int, _Vocabulary]] = WeakKeyDictionary()
_MAKING = threading.Lock()


def _vocabulary(tokenizer: Tokenizer, size: int) -> _Vocabulary:
    """Made once for a tokenizer: half a second for 32,000 tokens."""
    with _MAKING:
        made = _VOCABULARIES.setdefault(tokenizer, {})
        if size not in made:
            made[size] = _Vocabulary(tokenizer, size)
        return made[size]


def _llguidance() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as e:
        raise MissingExtra("grammar", "constrained output") from e
    return llguidance


def _limits() -> Any:
    return _llguidance().LLParserLimits(**LIMITS, verbose_errors=False)


def _parse(document: Any, where: str) -> Any:
    """A JSON document that may still be text."""
    if not isinstance(document, str):
        return document
    try:
        return json.loads(_checked_text(document, where))
    except json.JSONDecodeError as e:
        raise InvalidInput(f"not JSON: {e.msg}, line {e.lineno} column {e.colno}", where=where) from None
    except RecursionError:
        raise InvalidInput("nested too deeply", where=where) from None


def _schema_text(schema: Any, where: str) -> str:
    """A schema as JSON, with our style of writing documents."""
    if schema is True:
        schema = {}
    if schema is False:
        raise InvalidInput("the schema is false: there is no such document", where=where)
    if not isinstance(schema, Mapping):
        raise InvalidInput(f"a schema is an object, not {type(schema).__name__}", where=where)
    try:
        text = json.dumps({**schema, "x-guidance": _JSON_STYLE}, allow_nan=False)
        for part in _subschemas(schema):
            _check_counted_properties(part, where)
    except (RecursionError, TypeError, ValueError) as e:
        what = "nested too deeply" if isinstance(e, RecursionError) else f"not a JSON document: {e}"
        raise InvalidInput(what, where=where) from None
    return text


def _check_counted_properties(schema: Mapping[str, Any], where: str) -> None:
    """llguidance counts properties, but does not hold names that are not in the schema apart; a reader keeps one of each name."""
    least, required = schema.get("minProperties"), schema.get("required")
    if isinstance(least, int | float) and least > 1 + (len(set(required)) if isinstance(required, list) else 0):
        raise InvalidInput(
            f"minProperties {least} cannot be enforced: only the properties in `required` are sure to have different names",
            where=where,
            do="name the properties in `properties` and `required`",
        )


_DATA = ("const", "default", "enum", "examples")
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


def _subschemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all in it."""
    if isinstance(schema, Mapping):
        yield schema
        for key, value in schema.items():
            if key in _NAMED and isinstance(value, Mapping):
                for part in value.values():
                    yield from _subschemas(part)
            elif key not in _DATA:
                yield from _subschemas(value)
    elif isinstance(schema, Sequence) and not isinstance(schema, str):
        for part in schema:
            yield from _subschemas(part)


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself hold when it stands at `place` in another one."""
    if isinstance(schema, Mapping):
        moved: dict[str, Any] = {}
        for key, value in schema.items():
            if key == "$ref" and isinstance(value, str) and value.startswith("#"):
                moved[key] = place + value[1:]
            elif key in _NAMED and isinstance(value, Mapping):
                moved[key] = {name: _moved(part, place) for name, part in value.items()}
            else:
                moved[key] = value if key in _DATA else _moved(value, place)
        return moved
    if isinstance(schema, list | tuple):
        return [_moved(part, place) for part in schema]
    return schema


def _tool(tool: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The name of a tool, and the schema of its arguments."""
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise InvalidInput('a tool is {"type": "function", "function": {"name": …, "parameters": …}}', where=where)
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise InvalidInput(f"the parameters of {name} are not the schema of an object", where=f"{where}.parameters")
    return name, {"type": "object", **parameters}


def _checked_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise InvalidInput(f"a text is wanted, not {type(text).__name__}", where=where)
    if len(text) > MAX_SIZE:
        raise InvalidInput(
            f"it has {len(text)} characters; the most is {MAX_SIZE}",
            where=where,
            do="make it smaller, or split the task",
        )
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InvalidInput(
            f"the text is not valid Unicode: character {e.start} is a lone surrogate", where=where
        ) from None
    return text


_UNENFORCEABLE = re.compile(r"Unimplemented keys|not supported|not implemented|Unknown format")
_TOO_COMPLEX = re.compile(r"fuel exhausted|too big|too large|too deeply|recursion limit|too many")


def _refused(kind: str, error: str) -> InvalidInput:
    message = _message(error)
    if _UNENFORCEABLE.search(message):
        return InvalidInput(f"cannot be enforced: {message}", where=kind, do="leave it out, or say it in another way")
    return InvalidInput(message, where=kind, do=_SIMPLER if _TOO_COMPLEX.search(message) else None)


_SIMPLER = "make it simpler: fewer alternatives that begin alike, smaller numbers, less nesting"
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): ")
_EXCERPT = re.compile(r"\n +\d+ \| ")


def _message(error: str) -> str:
    """What llguidance says, without what it shows of the grammar; with the place, if it is in a text that the user wrote."""
    text = _EXCERPT.split(error.partition("\n<state>")[0], maxsplit=1)[0]
    if "\nerror: " in text:  # below a copy of the expression, and a mark where it is wrong
        return "in a regular expression: " + _shortened(text.rpartition("\nerror: ")[2].strip())
    if "failed to compile JSON schema: " in text:
        return _shortened(text.partition("failed to compile JSON schema: ")[2].strip())
    if place := _PLACE.match(text):
        text = f"line {place[1]}, column {place[2]}: {text[place.end() :]}"
    return _shortened(text.strip())


def _shortened(text: str, length: int = 300) -> str:
    """At most so many characters, of the beginning; with a negative length, of the end."""
    if len(text) <= abs(length):
        return text
    return f"{text[:length]}…" if length > 0 else f"…{text[length:]}"
