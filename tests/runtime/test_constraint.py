"""Constraints: judged by Python's re and json, by jsonschema, and by trying out every token."""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crayon_runtime import constraint
from crayon_runtime.backends.fake import FakeBackend
from crayon_runtime.constraint import Constraint
from crayon_runtime.engine import Engine
from crayon_runtime.errors import InvalidInput, MissingExtra
from crayon_runtime.tokenizer import Tokenizer
from tests.runtime import tiny
from tests.runtime.tiny import EOS
from tests.support import needs

needs.module("llguidance")
jsonschema = needs.module("jsonschema")

TOKENIZERS = {"byte_fallback": tiny.TOKENIZER, "byte_level": tiny.tokenizer(tiny.byte_level_library())}
both = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def noise(likely: str = "", by: float = 4.0, tokenizer: Tokenizer = tiny.TOKENIZER) -> Callable[..., Any]:
    """A script: random logits that depend on all tokens before; tokens of these characters, and eos, are likelier."""
    table = np.random.default_rng(7).standard_normal((251, tokenizer.info.vocab_size)).astype(np.float32)
    lift = np.zeros(tokenizer.info.vocab_size, np.float32)
    lift[[t for t in range(lift.size) if tokenizer.token_bytes(t) in [c.encode() for c in likely]]] = by
    lift[EOS] = by if likely else 0

    def script(ids: list[int], adapter: str | None) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = table[zlib.crc32(repr(ids).encode()) % 251] + lift
        return logits

    return script


def engine(tokenizer: Tokenizer = tiny.TOKENIZER, script: Any = None, **options: Any) -> Engine:
    backend = FakeBackend(script, **{"vocab_size": tokenizer.info.vocab_size, "context_length": 1024} | options)
    return Engine(backend, tokenizer)


def answers(
    c: Constraint, n: int, tokenizer: Tokenizer = tiny.TOKENIZER, likely: str = "", **options: Any
) -> list[str]:
    """Sampled ones, all of which came to their end."""
    texts = []
    with engine(tokenizer, noise(likely, tokenizer=tokenizer)) as e:
        for seed in range(n):
            done = e.generate("the", constraint=c, seed=seed, **{"temperature": 1.0, "max_new_tokens": 600} | options)
            assert done.finish_reason == "stop", done.text
            texts.append(done.text)
    return texts


def encoded(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token by token, one for each byte."""
    single = {tokenizer.token_bytes(t): t for t in reversed(range(tokenizer.info.vocab_size))}
    return [single[bytes([byte])] for byte in text.encode()]


# ---- which tokens are allowed


EXPRESSIONS = [
    "a", "ab|ba", "[ab]*", "a*b", "(ab)*é", "a{2,3}", "(a|ab)(b|)a?", "é+ ?", " the", " *a", "[^a]b", "(?:a|b| ){1,2}é", ".a?", "(a*)*b?",
]  # fmt: skip
ALPHABET, LONGEST = "ab é", 6


@functools.cache
def language(expression: str) -> set[bytes]:
    """Every text of at most six characters of the alphabet that Python's re matches, and " the" """
    words = ("".join(word) for length in range(LONGEST + 1) for word in itertools.product(ALPHABET, repeat=length))
    return {word.encode() for word in [*words, " the"] if re.fullmatch(expression, word)}


def spell(tokenizer: Tokenizer, depth: int) -> Iterator[tuple[int, ...]]:
    """Sequences of tokens that are text of the alphabet, or a part of it."""
    known = [t for t in range(tokenizer.info.vocab_size) if t not in tokenizer.special_ids and tokenizer.token_bytes(t)]
    usable = [
        t for t in known if any(tokenizer.token_bytes(t) in w.encode() for w in ("abab", "  ", " a", " b", " ab", "é"))
    ]
    for length in range(depth + 1):
        yield from itertools.product(usable, repeat=length)


@both
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_allowed_is_what_some_text_goes_on_with(expression: str, tokenizer: Tokenizer) -> None:
    words, c = language(expression), Constraint.regex(expression)
    beginnings = {word[:end] for word in words for end in range(len(word) + 1)}
    within = set(ALPHABET.encode()) | set(b"the" if expression == " the" else b"")
    size = tokenizer.info.vocab_size
    judged = 0
    for prefix in spell(tokenizer, 2):
        said = b"".join(map(tokenizer.token_bytes, prefix))
        if said not in beginnings or len(said) > 3:
            continue
        matcher = c.matcher(tokenizer, size)
        for token in prefix:
            assert matcher.allowed()[token]
            matcher.consume(token)
        allowed = matcher.allowed()
        assert allowed.dtype == np.bool_
        assert allowed.shape == (size,)
        for token in range(size):
            adds = tokenizer.token_bytes(token)
            if token == EOS:
                assert allowed[token] == (said in words), (said, "eos")
            elif token in tokenizer.special_ids or not adds:
                assert not allowed[token]
            elif set(adds) <= within and len(said + adds) <= LONGEST - 2:  # the others are not in the list of words
                assert allowed[token] == (said + adds in beginnings), (said, adds)
                judged += 1
    assert judged >= 10


@both
def test_bytes_and_pieces_of_the_same_text_are_both_allowed(tokenizer: Tokenizer) -> None:
    allowed = Constraint.regex(" the").matcher(tokenizer, tokenizer.info.vocab_size).allowed()
    texts = [tokenizer.token_bytes(int(t)) for t in np.flatnonzero(allowed)]
    assert set(texts) >= {b" ", b" the"}
    if tokenizer is tiny.TOKENIZER:
        assert texts.count(b" ") == 2, "the piece, and the byte"


def test_every_eos_token_may_end_an_answer() -> None:
    tokenizer = tiny.tokenizer(eos=[EOS, tiny.VOCAB_SIZE - 1])
    matcher = Constraint.regex("a?").matcher(tokenizer, tiny.VOCAB_SIZE)
    assert matcher.allowed()[[EOS, tiny.VOCAB_SIZE - 1]].all()
    matcher.consume(encoded("a", tokenizer)[0])
    assert np.flatnonzero(matcher.allowed()).tolist() == [EOS, tiny.VOCAB_SIZE - 1]


def test_a_vocabulary_that_is_padded() -> None:
    matcher = Constraint.regex(".*").matcher(tiny.TOKENIZER, tiny.VOCAB_SIZE + 77)
    assert matcher.allowed().shape == (tiny.VOCAB_SIZE + 77,)
    assert not matcher.allowed()[tiny.VOCAB_SIZE :].any()


TEXTS = ['{"a": "é\\n日本"}', " the alarm 😀", "a</s>b", "<0x41>", "\u200d\ufeff", "ｆｕｌｌ"]


@pytest.mark.parametrize("text", TEXTS)
@both
def test_any_way_to_split_a_text_is_allowed(text: str, tokenizer: Tokenizer) -> None:
    c = Constraint.lark(f"start: {json.dumps(text)}")
    continued = tokenizer.encode("x" + text, add_bos=False)
    ways = [encoded(text, tokenizer)]
    if tokenizer.token_bytes(continued[-1]) and tokenizer.decode(continued[:2]).endswith("x"):
        ways.append(continued[[tokenizer.decode(continued[:n]) for n in range(9)].index("x") :])
    for ids in ways:
        matcher = c.matcher(tokenizer, tokenizer.info.vocab_size)
        for token in ids:
            assert matcher.allowed()[token]
            matcher.consume(token)
        assert np.flatnonzero(matcher.allowed()).tolist() == [EOS]


# ---- answers


@both
@pytest.mark.parametrize(
    "expression", ["[ab]{1,9}é", r" the(alarm| \d{2,4})", r"(日|本|😀){2}", r"[^a-z\W]{1,3}", r"\S\D\w", "x|"]
)
def test_an_answer_matches(expression: str, tokenizer: Tokenizer) -> None:
    texts = answers(Constraint.regex(expression), 25, tokenizer, temperature=2.0)
    assert len(set(texts)) > 1
    assert all(re.fullmatch(expression, text, re.ASCII) for text in texts), texts


SCHEMAS: dict[str, Any] = {
    "anything": {},
    "true": True,
    "empty object": {"type": "object", "properties": {}, "additionalProperties": False},
    "types": {"type": ["string", "null", "boolean", "integer"]},
    "enum": {"enum": ["é\"\\", 3, None, [1, {"a": []}], "日本\n", 1.5]},
    "const": {"const": {"a b": "</s>\t/\\"}},
    "integers": {"type": "array", "items": {"type": "integer", "minimum": -13, "exclusiveMaximum": 205}, "minItems": 2, "maxItems": 5},
    "numbers": {"type": "number", "minimum": -1.25, "maximum": 10},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 1},
    "nested": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 5},
            "where": {
                "type": "object",
                "properties": {"room": {"enum": ["hall", "küche"]}, "at": {"type": "array", "items": {"type": "number"}, "maxItems": 2}},
                "required": ["room"],
                "additionalProperties": False,
            },
            "on": {"type": "boolean"},
        },
        "required": ["where", "name"],
        "additionalProperties": False,
    },
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 3},
    "additional": {"type": "object", "properties": {"a": {"type": "integer"}, "b\n": {"type": "null"}}, "additionalProperties": {"type": "string"}},
    "pattern": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,3}$"},
    "format": {"type": "string", "format": "date"},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "x"}], "items": False, "minItems": 2},
    "any of": {"anyOf": [{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}, {"type": "array", "maxItems": 1}]},
    "one of": {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]},
    "all of": {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"a": {"minimum": 3}}}]},
    "tree": {
        "$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/node"}}}, "required": ["v"], "additionalProperties": False}},
        "$ref": "#/$defs/node",
    },
    "names that mean something else": {"type": "object", "properties": {"minProperties": {"const": 9}, "$ref": {"type": "null"}, "x-guidance": {"type": "null"}}, "required": ["minProperties", "$ref", "x-guidance"], "additionalProperties": False},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
@both
def test_an_answer_is_valid_under_its_schema(name: str, tokenizer: Tokenizer) -> None:
    schema = SCHEMAS[name]
    c = Constraint.json_schema(schema)
    assert c.grammar == Constraint.json_schema(json.dumps(schema)).grammar
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for text in answers(c, 12, tokenizer, likely='"}],:019'):
        validator.validate(json.loads(text, parse_constant=pytest.fail))
        assert text == text.strip()


def test_a_pattern_speaks_of_ascii() -> None:
    texts = answers(Constraint.json_schema({"type": "string", "pattern": r"^\d{3}\w$"}), 20)
    assert all(re.fullmatch('"[0-9]{3}[0-9A-Za-z_]"', text) for text in texts)


ALIASES = {"b\n": {"type": "null"}, "é": {"type": "null"}, "ab": {"type": "null"}}


@pytest.mark.parametrize(
    "beginning, allowed",
    [
        ('{"é": null, "y": "z"', True),
        ('{"b\\n": null', True),
        ('{"x1": 3', True),
        ('{"é": "', False),
        ('{"b\\n": "', False),
        ('{"x1": "', False),
        ('{"b\\u000a"', False),
        ('{"\\u00e9"', False),
        ('{"\\u0061b"', False),
        ('{"\\u00781"', False),
        ('{"y": "\\ud800"', False),
        ('{"y": "\\/"', False),
        ('{"y": "\n"', False),
        (' {"y"', False),
        ('{  "y"', False),
    ],
)
def test_no_spelling_of_a_name_escapes_its_schema(beginning: str, allowed: bool) -> None:
    schema = {
        "type": "object",
        "properties": ALIASES,
        "patternProperties": {"^x": {"type": "integer"}},
        "additionalProperties": {"type": "string"},
    }
    matcher = Constraint.json_schema(schema).matcher(tiny.TOKENIZER, tiny.VOCAB_SIZE)
    for token in encoded(beginning, tiny.TOKENIZER):
        if not matcher.allowed()[token]:
            assert not allowed
            return
        matcher.consume(token)
    assert allowed


def test_strings_are_written_as_every_reader_reads_them() -> None:
    texts = answers(Constraint.json_schema({"type": "string", "minLength": 3, "maxLength": 12}), 60, likely="\\u0/")
    said = [json.loads(text) for text in texts]
    assert all(3 <= len(text) <= 12 for text in said)
    assert any("\\" in text for text in texts)
    assert all(re.fullmatch(r'"(\\[nrbtf\\"]|[^\\\x00-\x1f])*"', text) for text in texts)


words = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=4)
leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, st.integers(-99, 99), st.integers(0, 99)
    ),
    st.builds(lambda words: {"enum": words}, st.lists(words, min_size=1, max_size=3, unique=True)),
    st.builds(
        lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, st.integers(0, 3), st.integers(0, 3)
    ),
    st.just({}),
)


def objects(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(words, parts, max_size=3)
    return st.one_of(
        st.builds(
            lambda p, n, more: {"type": "object", "properties": p, "required": [*p][:n], "additionalProperties": more},
            properties, st.integers(0, 3), st.booleans(),
        ),
        st.builds(lambda p, n, m: {"type": "array", "items": p, "minItems": n, "maxItems": n + m}, parts, st.integers(0, 2), st.integers(0, 2)),
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.recursive(leaves, objects, max_leaves=5), st.integers(0, 2**32))
def test_any_schema_of_these_kinds_holds(schema: Any, seed: int) -> None:
    c = Constraint.json_schema(schema)
    with engine(script=noise('"}],:0')) as e:
        done = e.generate("the", constraint=c, seed=seed, temperature=1.0, max_new_tokens=900)
    if done.finish_reason == "stop":
        jsonschema.Draft202012Validator(schema).validate(json.loads(done.text))


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather.get",
        "description": "how it will be",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "day": {"$ref": "#/$defs/day"}},
            "required": ["city", "day"],
            "additionalProperties": False,
            "$defs": {"day": {"enum": ["today", "morgen"]}},
        },
    },
}
LIGHTS: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": 'home "lamp"',
        "parameters": {
            "properties": {"level": {"type": "integer", "minimum": 0, "maximum": 20}, "then": {"$ref": "#"}},
            "required": ["level"],
            "additionalProperties": False,
        },
    },
}
STOP: dict[str, Any] = {"type": "function", "function": {"name": "stop"}}


@both
def test_an_answer_is_one_call_of_one_of_the_tools(tokenizer: Tokenizer) -> None:
    tools = {tool["function"]["name"]: tool["function"] for tool in (WEATHER, LIGHTS, STOP)}
    called = set()
    for text in answers(Constraint.tools([WEATHER, LIGHTS, STOP]), 60, tokenizer, likely='"}'):
        call = json.loads(text)
        assert [*call] == ["name", "arguments"]
        parameters = tools[call["name"]].get("parameters")
        if parameters is None:
            assert call["arguments"] == {}
        else:
            jsonschema.Draft202012Validator({"type": "object", **parameters}).validate(call["arguments"])
        called.add(call["name"])
    assert called == set(tools)


@both
def test_an_answer_is_a_call_or_text_that_does_not_look_like_one(tokenizer: Tokenizer) -> None:
    either = Constraint.tools([LIGHTS, STOP], or_text=True)
    said = {True: 0, False: 0}
    for text in answers(either, 60, tokenizer, likely='{ "}', max_new_tokens=1200, temperature=0.5, stop="\0"):
        is_call = text.lstrip(" \t\r\n").startswith("{")
        said[is_call] += 1
        if is_call:
            assert json.loads(text)["name"] in ("stop", LIGHTS["function"]["name"])
    assert min(said.values()) > 0


@pytest.mark.parametrize(
    "text, can_be",
    [
        ("", True), ("hello {", True), ("a\n{}", True), (" [1]", True), ("\x0c{", True),
        ('{"name":"stop","arguments":{}}', True), ('\n{"name": "stop", "arguments": {}}', True), ('  {"name":"stop","arguments":{}}', True),
        ("{}", False), (" { }", False), ("\n\n\n\n{", False), ('{"name":"stopp","arguments":{}}', False), ('{"name":"stop","arguments":{}}.', False),
    ],
)  # fmt: skip
def test_which_answers_can_be_a_call_or_text(text: str, can_be: bool) -> None:
    matcher = Constraint.tools([STOP], or_text=True).matcher(tiny.TOKENIZER, tiny.VOCAB_SIZE)
    for token in [*encoded(text, tiny.TOKENIZER), tiny.EOS]:
        if not matcher.allowed()[token]:
            assert not can_be
            return
        matcher.consume(token)
    assert can_be


def test_one_tool_must_be_called() -> None:
    assert {json.loads(text)["name"] for text in answers(Constraint.tools([STOP]), 5)} == {"stop"}


ARITHMETIC = {
    "lark": 'start: sum\nsum: product (("+" | "-") product)*\nproduct: atom ("*" atom)*\natom: NUMBER | "(" sum ")"\nNUMBER: /[1-9][0-9]{0,2}/\n',
    "gbnf": 'root ::= prod (("+" | "-") prod)*\nprod ::= atom ("*" atom)*\natom ::= number | "(" root ")" # again\nnumber ::= [1-9] [0-9]{0,2}\n',
}


class Arithmetic:
    """A parser of such terms."""

    def __init__(self, text: str) -> None:
        self.rest = text

    def sum(self) -> None:
        self.product()
        while self.rest[:1] in ("+", "-"):
            self.rest = self.rest[1:]
            self.product()

    def product(self) -> None:
        self.atom()
        while self.rest[:1] == "*":
            self.rest = self.rest[1:]
            self.atom()

    def atom(self) -> None:
        if self.rest[:1] == "(":
            self.rest = self.rest[1:]
            self.sum()
            assert self.rest[:1] == ")"
            self.rest = self.rest[1:]
        else:
            match = re.match("[1-9][0-9]{0,2}", self.rest)
            assert match
            self.rest = self.rest[match.end() :]


@pytest.mark.parametrize("form", ARITHMETIC)
@both
def test_an_answer_is_of_its_grammar(form: str, tokenizer: Tokenizer) -> None:
    texts = answers(getattr(Constraint, form)(ARITHMETIC[form]), 40, tokenizer, likely="12*()", temperature=1.5)
    for text in texts:
        parser = Arithmetic(text)
        parser.sum()
        assert parser.rest == ""
    assert any("(" in text for text in texts)
    assert any("*" in text for text in texts)


def test_a_grammar_may_hold_schemas_and_control_tokens() -> None:
    c = Constraint.lark('start: <|im_start|> "call " %json {"enum": [1, 2]} "!" <|im_end|>')
    with engine(script=noise()) as e:
        done = e.generate("the", constraint=c, temperature=1.0, seed=1)
    assert re.fullmatch("call [12]!", done.text), "control tokens have no text"
    names = {tiny.TOKENIZER.decode([t], skip_special=False) for t in done.token_ids}
    assert names >= {"<|im_start|>", "<|im_end|>"}


@pytest.mark.slow
def test_a_real_model_answers_with_json(tmp_path: Path) -> None:
    from crayon_export.exporter import export

    schema = {
        "type": "object",
        "properties": {"title": {"type": "string", "maxLength": 40}, "pages": {"type": "integer", "maximum": 99, "minimum": 1}},
        "required": ["title", "pages"],
        "additionalProperties": False,
    }  # fmt: skip
    c = Constraint.json_schema(schema)
    bundle = export(needs.reference_model(), tmp_path / "bundle").bundle.path
    with Engine.load(bundle, threads=1) as e:
        for seed in range(12):
            done = e.generate("Once upon a time", constraint=c, temperature=1.0, seed=seed, max_new_tokens=200)
            assert done.finish_reason == "stop"
            jsonschema.Draft202012Validator(schema).validate(json.loads(done.text))
            assert e.tokenizer.decode(
                [e.tokenizer.info.bos, *e.tokenizer.encode("x", add_bos=False), *done.token_ids]
            ) == ("x" + done.text)


# ---- what else an answer has goes on as ever


def test_a_constraint_that_is_met_anyway_changes_nothing() -> None:
    script = [*encoded('{"a": 12}', tiny.TOKENIZER), EOS]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    with engine(script=script) as e:
        free = e.generate("the")
        for c in (
            Constraint.json_schema(schema),
            Constraint.regex(r"\{.*\}"),
            Constraint.lark('start: "{" /[^}]*/ "}"'),
        ):
            bound = e.generate("the", constraint=c)
            assert (bound.text, bound.token_ids, bound.finish_reason) == (free.text, free.token_ids, "stop")
            assert bound.log_probabilities == free.log_probabilities
            assert free.answer_tap is not None
            assert bound.answer_tap is not None
            assert bound.answer_tap.tolist() == free.answer_tap.tolist()


def test_log_probabilities_are_those_of_all_tokens() -> None:
    with engine(script=noise()) as e:
        done = e.generate("the", constraint=Constraint.regex("[ab]{5}"), temperature=1.0, seed=0)
        ids = [*tiny.TOKENIZER.encode("the")]
        for token, said in zip(done.token_ids, done.log_probabilities, strict=True):
            logits = noise()(ids, None).astype(np.float64)
            assert said == pytest.approx(logits[token] - np.log(np.exp(logits).sum()), abs=1e-5)
            ids.append(token)


def test_a_complete_answer_is_followed_by_eos_even_if_it_is_unlikely() -> None:
    with engine(script=encoded("ba", tiny.TOKENIZER)) as e:  # says "a" for ever
        done = e.generate("the", constraint=Constraint.regex("ba{3}"))
    assert (done.text, done.finish_reason, done.token_ids[-1]) == ("baaa", "stop", EOS)


def test_an_answer_that_is_cut_is_a_beginning() -> None:
    c = Constraint.json_schema({"type": "array", "items": {"const": 7}, "minItems": 5})
    with engine(script=encoded("[7,", tiny.TOKENIZER)) as e:
        done = e.generate("the", constraint=c, max_new_tokens=4)
    assert done.finish_reason == "length"
    assert re.fullmatch(r"\[[7, \n\t]*", done.text)
    with engine(script=noise()) as e:
        done = e.generate("the", constraint=Constraint.regex("é{9}"), max_new_tokens=5)
    assert re.fullmatch("é{2,5}\ufffd?", done.text)
    assert done.finish_reason == "length"


def test_a_stop_string_ends_it_as_ever() -> None:
    with engine(script=encoded("ab", tiny.TOKENIZER)) as e:
        done = e.generate("the", constraint=Constraint.regex("[abc]{9}"), stop="bb")
    assert (done.text, done.finish_reason, done.stop) == ("a", "stop", "bb")


def test_pieces_are_the_answer() -> None:
    c = Constraint.json_schema({"enum": ["日本 é", "the alarm 😀"]})
    with engine(script=noise()) as e:
        for seed in range(5):
            options: Any = {"constraint": c, "temperature": 1.0, "seed": seed}
            stream = e.stream("the", **options)
            pieces = list(stream)
            assert (
                "".join(piece.text for piece in pieces) == stream.generation.text == e.generate("the", **options).text
            )
            assert not any("\ufffd" in piece.text for piece in pieces)
            assert [piece.token_id for piece in pieces] == stream.generation.token_ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 1.5, "top_p": 0.3},
        {"temperature": 1.0, "min_p": 0.5},
        {"repetition_penalty": 2.0},
        {"temperature": 1.0, "repetition_penalty": 1.5, "top_k": 2, "top_p": 0.9},
    ],
)
def test_every_way_of_sampling_obeys(options: dict[str, Any]) -> None:
    c = Constraint.regex("(ab|ba| the|é){4,6}")
    with engine(script=noise()) as e:
        for seed in range(6):
            first = e.generate("the", constraint=c, seed=seed, **options)
            assert re.fullmatch("(ab|ba| the|é){4,6}", first.text)
            assert first.token_ids == e.generate("the", constraint=c, seed=seed, **options).token_ids


def test_sliding_keeps_the_constraint() -> None:
    c = Constraint.regex("(abc){30}")
    with engine(context_length=24) as e:
        done = e.generate("the alarm", constraint=c, overflow="slide", temperature=1.0, seed=2)
        assert (done.text, done.finish_reason) == ("abc" * 30, "stop")
        assert e.generate("the alarm", constraint=c).finish_reason == "length"


def test_cancelling() -> None:
    cancel = threading.Event()
    with engine(script=noise()) as e:
        stream = e.stream("the", constraint=Constraint.regex("[ab]{40}"), cancel=cancel)
        for _ in range(5):
            next(stream)
        cancel.set()
        assert list(stream) == []
        assert stream.generation.finish_reason == "cancelled"
        assert e.generate("the", constraint=Constraint.regex("a")).text == "a"


def test_answers_that_take_turns_do_not_disturb_each_other() -> None:
    c = Constraint.json_schema(SCHEMAS["nested"])
    options: Any = {"constraint": c, "temperature": 1.0, "max_new_tokens": 600}
    with engine(script=noise('"}')) as e:
        alone = [e.generate("the", seed=seed, **options).text for seed in range(4)]
        streams = [e.stream("the", seed=seed, **options) for seed in range(4)]
        for _ in itertools.zip_longest(*streams):
            pass
        assert [stream.generation.text for stream in streams] == alone


def test_threads_share_a_constraint() -> None:
    c = Constraint.json_schema(SCHEMAS["nested"])
    tokenizer = tiny.tokenizer()  # nothing of it is made yet

    def answer(seed: int) -> str:
        with engine(tokenizer, noise('"}')) as e:
            return e.generate("the", constraint=c, temperature=1.0, seed=seed, max_new_tokens=600).text

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as threads:
            together = list(threads.map(answer, range(12)))
    finally:
        sys.setswitchinterval(before)
    assert together == [answer(seed) for seed in range(12)]


def test_what_other_answers_needed_of_the_lexer_is_not_missing_for_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(constraint.LIMITS, "max_lexer_states", 90)
    c = Constraint.regex("[ab]*a[ab]{10}c")  # thousands of states, but few of them in one answer
    for text in answers(c, 40, likely="c"):
        assert re.fullmatch("[ab]*a[ab]{10}c", text)


# ---- what cannot be served


def deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


CYCLE: dict[str, Any] = {"type": "object"}
CYCLE["properties"] = {"a": CYCLE}


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum .* is greater than"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "incompatible types"),
        ({"enum": []}, "empty"),
        ({"type": "integer", "const": "a"}, "incompatible"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a' is unsatisfiable"),
        (False, "no such document"),
        ({"not": {"type": "string"}}, "cannot be enforced.*not"),
        ({"type": "array", "uniqueItems": True}, "cannot be enforced.*uniqueItems"),
        ({"if": {}, "then": {}}, "cannot be enforced"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "cannot be enforced.*oneOf"),
        ({"type": "string", "format": "mood"}, "cannot be enforced.*mood"),
        ({"type": "string", "pattern": "(?=a)b"}, "cannot be enforced.*look-around"),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"type": "object", "minProperties": 2}, "minProperties 2 cannot be enforced"),
        ({"$defs": {"a": {"minProperties": 3, "required": ["x"]}}}, "minProperties 3 cannot"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "cannot be enforced"),
        ({"$ref": "https://example.org/x"}, "not present|does not fetch"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "mood"}, "Invalid type: mood"),
        ([1], "is an object, not list"),
        (3, "is an object, not int"),
        ({"a": {1, 2}}, "not a JSON document"),
        ({"const": float("nan")}, "not a JSON document"),
        (CYCLE, "not a JSON document"),
        (deep(300), "recursion limit|nested too deeply"),
        (deep(100_000 if sys.version_info < (3, 12) else 3000), "nested too deeply|recursion limit"),
        ('{"type":', "not JSON: .* line 1 column 9"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        ('{"a": "' + "x" * 300_000, "characters; the most is"),
        ({"enum": [f"value{i}" for i in range(100_000)]}, "characters; the most is"),
        ('{"const": "\ud800"}', "not valid Unicode"),
        ({"const": "\ud800"}, "surrogate|escape|Unicode"),
    ],
)
def test_a_schema_that_cannot_be_served(schema: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=f"(?s){message}") as e:
        Constraint.json_schema(schema)
    assert e.value.where == "json_schema"
    assert len(str(e.value)) < 600


@pytest.mark.parametrize(
    "form, text, message",
    [
        ("regex", "(a", "in a regular expression: unclosed group"),
        ("regex", "(?<=a)b", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", r"\bab", "cannot be enforced"),
        ("regex", "(" * 10_000, "regular expression|nested"),
        ("regex", "a" * 300_000, "300000 characters; the most is"),
        ("regex", b"a", "a text is wanted, not bytes"),
        ("regex", "a\ud800", "not valid Unicode"),
        ("lark", "", "no start rule"),
        ("lark", "start: b", 'line 1, column 8: unknown name: "b"'),
        ("lark", 'start: "a"\nx: (((', "line "),
        ("lark", "start: " + "(" * 20_000, "too deeply nested"),
        ("lark", 'start: %json {"type"', "%json"),
        ("lark", 'start: "a" /(/', "regular expression|regex"),
        ("lark", None, "a text is wanted, not NoneType"),
        ("gbnf", "", "'root' rule"),
        ("gbnf", 'root ::= "a', "not a GBNF grammar"),
        ("gbnf", "root ::= " + "(" * 20_000, "not a GBNF grammar"),
        ("gbnf", "root ::= other", "Rule 'other' not found"),
        ("gbnf", 'start: "a"', "Expected ::="),
    ],
)
def test_a_grammar_that_cannot_be_served(form: str, text: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as e:
        getattr(Constraint, form)(text)
    assert e.value.where == form
    assert len(str(e.value)) < 600


@pytest.mark.parametrize(
    "tools, message, where",
    [
        ([], "at least one", "tools"),
        ({"type": "function"}, "a list of tools", "tools"),
        ("weather", "a list of tools", "tools"),
        ([WEATHER, 3], "a tool is", "tools[1]"),
        ([{"type": "web_search"}], "a tool is", "tools[0]"),
        ([{"type": "function", "function": {"name": ""}}], "a tool is", "tools[0]"),
        ([{"type": "function", "name": "flat"}], "a tool is", "tools[0]"),
        ([STOP, WEATHER, STOP], "two tools have the name 'stop'", "tools[2]"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}], "not the schema of an object", "tools[0].parameters"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}], "cannot be enforced", "tools"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/$defs/x"}}}], "x", "tools"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_served(tools: Any, message: str, where: str) -> None:
    with pytest.raises(InvalidInput, match=message) as e:
        Constraint.tools(tools)
    assert e.value.where == where


@pytest.mark.parametrize(
    "c",
    [
        lambda: Constraint.regex(r"[^\s\S]"),
        lambda: Constraint.lark("start: A\nA: /a/ & /b/"),
        lambda: Constraint.lark('start: start "x"'),
        lambda: Constraint.json_schema({"$ref": "#"}),
        lambda: Constraint.json_schema({"const": "\x01"}),
    ],
)
def test_what_no_token_can_begin_is_said_before_anything_is_computed(c: Callable[[], Constraint]) -> None:
    with engine() as e:
        with pytest.raises(InvalidInput, match="no token of this model goes on"):
            e.stream("the", constraint=c())
        assert tiny.fake(e).calls["prefill"] == 0


def test_what_the_vocabulary_cannot_write_is_said_where_it_comes() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    size = encoded("f", tokenizer)[0]  # the tokens from "f" on are not there
    with Engine(FakeBackend(vocab_size=size), tokenizer) as e:
        assert e.generate([1], constraint=Constraint.regex("abc|xyz")).text == "abc"
        with pytest.raises(InvalidInput, match="no token of this model goes on .* after 'abc'"):
            e.generate([1], constraint=Constraint.regex("abcx"))
        assert e.generate([1], constraint=Constraint.regex("cde")).text == "cde", "the engine goes on"


def test_what_the_model_gives_no_probability_is_an_error() -> None:
    logits = np.full(tiny.VOCAB_SIZE, -np.inf, np.float32)
    logits[tiny.BYTE + ord("b")] = 0
    for temperature in (0.0, 1.0):
        with (
            engine(script=lambda ids, adapter: logits) as e,
            pytest.raises(InvalidInput, match="none of the tokens"),
        ):
            e.generate("the", constraint=Constraint.regex("a"), temperature=temperature)


def test_options_that_contradict_a_constraint() -> None:
    c = Constraint.regex("a")
    with engine() as e:
        with pytest.raises(InvalidInput, match="cannot be ignored"):
            e.generate("the", constraint=c, ignore_eos=True)
        with pytest.raises(InvalidInput, match="a Constraint is wanted, not dict"):
            e.generate("the", constraint={"type": "object"})  # type: ignore[arg-type]
    tokenizer = tiny.tokenizer()
    tokenizer.info.eos.clear()
    with engine(tokenizer) as e, pytest.raises(InvalidInput, match="no eos token"):
        e.generate("the", constraint=c)


def expanding(n: int) -> dict[str, Any]:
    parts = [
        {"anyOf": [{"properties": {f"a{i}": {"type": "string"}}}, {"properties": {f"b{i}": {"type": "integer"}}}]}
        for i in range(n)
    ]
    return {"allOf": parts}


def chain(n: int, keyword: str) -> dict[str, Any]:
    definitions: dict[str, Any] = {
        f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}, {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}}]}
        for i in range(n)
    }
    return {"$defs": definitions | {f"d{n}": {}}, "$ref": "#/$defs/d0"}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "make",
    [
        lambda: Constraint.json_schema(expanding(12)),
        lambda: Constraint.json_schema(chain(1000, "anyOf")),
        lambda: Constraint.json_schema(chain(200, "allOf")),
        lambda: Constraint.json_schema(
            {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}}
        ),
        lambda: Constraint.json_schema({"type": "string", "minLength": 10**8, "maxLength": 10**9}),
        lambda: Constraint.json_schema({"type": "integer", "multipleOf": 999_999_937}),
        lambda: Constraint.json_schema({"allOf": [{"type": "integer", "multipleOf": p} for p in (7, 11, 13, 17, 19)]}),
        lambda: Constraint.json_schema({"type": "string", "pattern": "^(((a{1,50}){1,50}){1,50}){1,50}$"}),
        lambda: Constraint.json_schema({"type": "string", "pattern": "^(a|aa)+$", "minLength": 50, "maxLength": 9999}),
        lambda: Constraint.json_schema({"type": "object", "properties": {f"p{i}": {} for i in range(5000)}}),
        lambda: Constraint.json_schema({"enum": [f"{i:x}" * 3 for i in range(12_000)]}),
        lambda: Constraint.regex("((a{100}){100}){100}"),
        lambda: Constraint.regex("(.{0,1000}x){50}"),
        lambda: Constraint.regex("(a*)*(a|aa)*(a|b|ab)*c"),
        lambda: Constraint.lark("start: A\nA: /[ab]*a[ab]{20}/ & ~/(a|b)*bbb(a|b)*/"),
        lambda: Constraint.lark("\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)) + '\nA40: "x"\nstart: A0'),
        lambda: Constraint.lark("\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(40)) + '\na40: "x"\nstart: a0'),
        lambda: Constraint.lark('start: a\na: a a a | a a | "x" | ""'),
        lambda: Constraint.lark('start: "a" start'),
        lambda: Constraint.lark("start: " + " | ".join(f'"a{i}"' for i in range(20_000))),
    ],
)
def test_what_would_blow_up_is_served_or_refused(make: Callable[[], Constraint]) -> None:
    with engine(script=noise("\"'}],a")) as e:
        try:
            ended = e.generate("the", constraint=make(), temperature=1.0, seed=0, max_new_tokens=60).finish_reason
        except InvalidInput as error:
            ended = error.where
    assert ended in ("stop", "length", "json_schema", "regex", "lark")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (
        lambda: Constraint.regex("a"),
        lambda: Constraint.lark('start: "a"'),
        lambda: Constraint.gbnf('root ::= "a"'),
        lambda: Constraint.json_schema({}),
        lambda: Constraint.tools([STOP]),
    ):
        with pytest.raises(MissingExtra, match="constrained output needs the 'grammar' extra") as e:
            make()
        assert "pip install 'crayon-edge[grammar]'" in str(e.value)


def test_a_constraint_shows_what_it_is() -> None:
    assert repr(Constraint.regex("a" * 300)) == f"<Constraint regex: {'start: /' + 'a' * 52 + '…'!r}>"


@pytest.mark.parametrize(
    "made, met, not_met",
    [
        (
            lambda: Constraint.regex("é[ab]{2}日*"),
            ["éab", "éba日日"],
            ["", "é", "éa", "éabc", " éab", "éab\n", "\ud800"],
        ),
        (
            lambda: Constraint.json_schema(
                {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
            ),
            ['{"a": 1}', '{"a":1}', '{\n "a": 1\n}'],
            ["", "{}", '{"a": 1', '{"a": "1"}', '{"a": 1} ', "```json\n{}\n```", '{"a": 1}{"a": 1}'],
        ),
    ],
)
def test_whether_a_text_that_no_model_wrote_meets_it(made: Any, met: list[str], not_met: list[str]) -> None:
    constraint = made()
    assert [constraint.meets(text) for text in met] == [True] * len(met)
    assert [constraint.meets(text) for text in not_met] == [False] * len(not_met)


def test_a_long_text_meets_it_in_parts() -> None:
    numbers = Constraint.json_schema({"type": "array", "items": {"type": "integer"}})
    text = f"[{', '.join(['1234'] * 5000)}]"
    assert numbers.meets(text)
    assert not numbers.meets(text[:-1])
