"""The phone assistant's calls as a grammar: the benchmark's texts fit it, and a model held to it never writes a broken call.

The judge is `benchmarks.calls`: Python's json with jsonschema, and a parser of the other two styles, all written from the world's lists.
"""

from __future__ import annotations

import itertools
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import calls
from crayon_runtime.backends.fake import FakeBackend
from crayon_runtime.constraint import Constraint
from crayon_runtime.engine import Engine
from crayon_runtime.generation import Generation
from crayon_runtime.manifest import Tokenizer as Info
from crayon_runtime.tokenizer import Tokenizer
from crayon_server.data import phone_assistant as pa
from crayon_server.data.phone_assistant.conventions import Convention
from crayon_server.models import load_nano
from crayon_server.models.tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE
from tests.support import needs

needs.module("llguidance")
jsonschema = needs.module("jsonschema")

EVERYWHERE = (*pa.DOMAINS, *pa.SERVER_ONLY)
TOKENIZER = Tokenizer(
    Info("tokenizer.json", vocab_size=VOCAB_SIZE, add_bos=True, bos=BOS_ID, eos=[EOS_ID]),
    load_nano() / "tokenizer.json",
)


@cache
def constraint(convention: Convention) -> Constraint:
    return Constraint.lark(pa.grammar(convention))


def fits(text: str, c: Constraint) -> bool:
    matcher = c.matcher(TOKENIZER, VOCAB_SIZE)
    for token in TOKENIZER.encode(text, add_bos=False):
        if not matcher.allowed()[token]:
            return False
        matcher.consume(token)
    return bool(matcher.allowed()[EOS_ID])


@pytest.mark.parametrize("convention", pa.CONVENTIONS, ids=str)
def test_every_call_of_the_world_fits_the_grammar_of_its_convention(convention: Convention) -> None:
    own = constraint(convention)
    other = constraint(pa.CONVENTIONS[(pa.CONVENTIONS.index(convention) + 13) % 27])
    for example in itertools.islice(pa.stream("fits", domains=EVERYWHERE, conventions=[convention]), 60):
        assert fits(example.completion, own), example.completion
        assert not fits(example.completion, other)
        assert not fits(example.completion + " ", own)
        assert not fits(example.completion[:-1], own) or example.completion[:-1] in example.completion.split()


def test_a_grammar_of_some_functions_has_no_others() -> None:
    c = Constraint.lark(pa.grammar(pa.CONVENTIONS[0], ["alarm.off", "stocks.price"]))
    assert fits("alarm.off(time=7:30 AM)", c)
    assert fits("stocks.price(symbol=ACM)", c)
    assert not fits("shop.add(item=milk, qty=3)", c)


def sampled(engine: Engine, count: int) -> set[str]:
    """That many calls at temperature 1, over all conventions, each checked; the functions that they name."""
    functions = set()
    for number, example in zip(range(count), pa.stream("sampled", domains=EVERYWHERE), strict=False):
        convention = pa.CONVENTIONS[number % 27]  # not that of the request: what is likely is not what is allowed
        done: Generation = engine.generate(
            example.prompt, constraint=constraint(convention), temperature=1.0, seed=number, max_new_tokens=300
        )
        assert done.finish_reason == "stop"
        functions.add(calls.check(done.text, convention))
        assert pa.read(done.text) is not None
    return functions


def test_a_thousand_calls_of_a_model_that_knows_nothing() -> None:
    table = np.random.default_rng(7).standard_normal((251, VOCAB_SIZE)).astype(np.float32)

    def script(ids: list[int], adapter: str | None) -> Any:
        return table[zlib.crc32(repr(ids).encode()) % 251]

    with Engine(FakeBackend(script, vocab_size=VOCAB_SIZE, context_length=512), TOKENIZER) as engine:
        assert sampled(engine, 1000) == set(calls.FUNCTIONS)


@pytest.mark.slow
def test_calls_of_nano(tmp_path: Path) -> None:
    from crayon_export.exporter import export

    bundle = export(load_nano(), tmp_path / "nano").bundle.path
    with Engine.load(bundle, threads=1) as engine:
        assert sampled(engine, 270) >= {f for f in calls.FUNCTIONS if f.partition(".")[0] in pa.DOMAINS}


@pytest.mark.parametrize(
    "text, style",
    [
        ("alarm.set(time=7:30 AM, day=monday", "call"),
        ("alarm.set(time=7:31 AM, day=monday)", "call"),
        ("alarm.set(day=monday, time=7:30 AM)", "call"),
        ("alarm.set(time=7:30 AM, day=monday))", "call"),
        ("alarm.set | time: 7:30 AM | day: mon", "kv"),
        ('{"fn": "shop.add", "item": "milk", "qty": "3"}', "json"),
        ('{"fn": "shop.add", "item": "milk"}', "json"),
        ('{"fn": "shop.add", "item": "milk", "qty": 3', "json"),
    ],
)
def test_the_judges_refuse_broken_calls(text: str, style: Any) -> None:
    with pytest.raises((AssertionError, ValueError, jsonschema.ValidationError)):
        calls.check(text, Convention(style, "canonical", "en"))
