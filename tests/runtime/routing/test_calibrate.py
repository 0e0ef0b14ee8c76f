"""Calibrating a customized model over the fake backend, and the curve that is drawn."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crayon_runtime.engine import Engine
from crayon_runtime.errors import InvalidInput
from crayon_runtime.routing.calibrate import Query, calibrate, read_queries
from crayon_runtime.routing.calibration import Calibration, adapter_sha256
from crayon_runtime.routing.plot import svg
from crayon_runtime.routing.policies import EARLY
from crayon_runtime.routing.router import Router
from crayon_runtime.routing.signals import signals
from tests.runtime import tiny
from tests.runtime.routing import hybrid
from tests.runtime.tiny import EOS, byte_ids

SIZE = 8


def unsure_of_questions(ids: list[int], adapter: str | None) -> Any:
    """Says "ok"; with a question mark in the prompt it is not sure of it."""
    said = byte_ids("ok please")
    at = next((n for n in range(len(said), 0, -1) if ids[-n:] == said[:n]), 0)
    logits = np.zeros(tiny.VOCAB_SIZE, np.float32)
    logits[(*said, EOS)[at]] = 6.0 if "?" in tiny.TOKENIZER.decode(ids) else 12.0
    return logits


@pytest.fixture
def engine() -> Iterator[Engine]:
    with tiny.engine(unsure_of_questions, tap_size=SIZE) as engine:
        yield engine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hybrid.customized(tmp_path / "own", size=SIZE)
    return tmp_path / "own"


PROMPTS = ["a b", "the alarm", "stop", "é a", *(f"the alarm {i}" for i in range(12))]
N = len(PROMPTS)
QUERIES = [Query(p, completion="ok please") for p in PROMPTS] + [Query(f"{p}?", completion="no") for p in PROMPTS]


def test_what_the_model_is_not_sure_of_goes_to_the_server(engine: Engine, folder: Path) -> None:
    counted: list[int] = []
    made = calibrate(engine, QUERIES, folder, target_accuracy=1.0, on_query=counted.append)
    assert sum(counted) == made.n == 2 * N
    assert (made.labelled, made.budget, made.target_accuracy) == (True, None, 1.0)
    assert made.adapter == adapter_sha256(folder / "adapter")
    made.write(folder)
    router = Router(engine, folder=folder, server=hybrid.Scripted())
    assert router.policy == made.policy("calibrated")
    routes = [router.answer(query.prompt).route for query in QUERIES]
    assert routes == ["device"] * N + ["server"] * N
    assert made.curve[0].accuracy == 0.5
    early = made.policy("early")
    assert early is not None
    assert early.after == EARLY


def test_early_rows_are_those_after_a_few_tokens(engine: Engine, folder: Path) -> None:
    made = calibrate(engine, QUERIES, folder, budget=0.5)
    early = made.policy("early")
    assert early is not None
    reference = Router(engine, folder=folder).known(engine.present_adapter).reference
    routed = 0
    for query in QUERIES:
        beginning = engine.generate(query.prompt, max_new_tokens=EARLY)
        routed += early.decide(signals(beginning, reference, early.weights)).route == "server"
    assert routed == N


def test_a_judgement_counts_more_than_a_completion(engine: Engine, folder: Path) -> None:
    judged = [Query(p, completion="ok please", correct=False) for p in PROMPTS] + [Query("a", correct=True)] * N
    assert calibrate(engine, judged, folder, budget=0.5).curve[0].accuracy == 0.5


def test_a_server_that_was_judged_too(engine: Engine, folder: Path) -> None:
    judged = [Query(p, correct=i % 2 == 0, server_correct=i > 1) for i, p in enumerate(PROMPTS)]
    curve = calibrate(engine, judged, folder, budget=0.5).curve
    assert (curve[0].accuracy, curve[-1].accuracy) == (0.5, 1 - 2 / N)


def test_without_labels(engine: Engine, folder: Path) -> None:
    made = calibrate(engine, [Query(query.prompt) for query in QUERIES], folder, budget=0.5)
    assert not made.labelled
    assert {point.accuracy for point in made.curve} == {None}
    with pytest.raises(InvalidInput, match="without labels nobody knows the accuracy"):
        calibrate(engine, [Query("a")], folder, target_accuracy=0.9)


def test_a_damaged_calibration_can_be_replaced(engine: Engine, folder: Path) -> None:
    (folder / "routing.json").write_text("{")
    calibrate(engine, QUERIES, folder, budget=0.5).write(folder)
    assert Router(engine, folder=folder).policy.logistic


@pytest.mark.parametrize(
    "queries, message, where",
    [
        ([Query("a"), Query("x" * 2000)], "the context holds", "query 2"),
        ([Query("a")], "either a budget or a target", "budget"),
    ],
)
def test_what_cannot_be_calibrated_is_said(
    engine: Engine, folder: Path, queries: list[Query], message: str, where: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as error:
        calibrate(engine, queries, folder)
    assert error.value.where == where


def test_a_model_that_is_not_customized(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="not customized") as error:
        calibrate(engine, QUERIES, tmp_path / "nothing", budget=0.2)
    assert "crayon customize" in str(error.value.do)


# Reading data.


def test_queries_are_read_line_by_line(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "completion": "b", "id": 7}, {"prompt": "日本", "correct": True}]
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(json.dumps(line) for line in lines).encode() + b"\n")
    assert read_queries(path) == [Query("a", completion="b"), Query("日本", correct=True)]


@pytest.mark.parametrize(
    "content, message, place",
    [
        (b"", "there are no queries", ""),
        (b'{"prompt": "a"}\n{', "truncated", ":2"),
        (b"[1]", "Expected `object`", ":1"),
        (b'{"prompt": 1}', "Expected `str`", ":1"),
        (b'{"completion": "a"}', "missing required field `prompt`", ":1"),
        (b'{"prompt": " "}', "its prompt is empty", ":1"),
        (b'{"prompt": "a", "correct": 1}', "Expected `bool", ":1"),
        (b'{"prompt": "a", "correct": true}\n{"prompt": "a"}', "other labels than the first line", ":2"),
        (b'{"prompt": "\xff"}', "not UTF-8", ""),
        (b'{"prompt": "a", "x": ' + b"[" * 100_000, "recursion", ":1"),
    ],
)
def test_data_that_cannot_be_read_names_the_line(tmp_path: Path, content: bytes, message: str, place: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=message) as error:
        read_queries(path)
    assert error.value.where == f"{path}{place}"
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_queries(tmp_path / "nothing.jsonl")


# Drawing.


def test_the_curve_is_drawn(engine: Engine, folder: Path) -> None:
    made = calibrate(engine, QUERIES, folder, budget=0.5)
    root = ET.fromstring(svg(made))
    space = "{http://www.w3.org/2000/svg}"
    chance, curve = root.findall(f"{space}polyline")
    assert len(chance.attrib["points"].split()) == 2
    corners = [tuple(map(float, corner.split(","))) for corner in curve.attrib["points"].split()]
    assert len(corners) == len(made.curve)
    assert [x for x, _ in corners] == sorted(x for x, _ in corners)
    assert corners[-1][1] < corners[0][1], "upwards is less in SVG"
    (dot,) = root.findall(f"{space}circle")
    assert float(dot.attrib["cx"]) == pytest.approx(corners[N][0])
    assert "50% calls" in "".join(root.itertext())


def test_without_labels_there_is_nothing_to_draw() -> None:
    nothing = Calibration(
        adapter="a" * 64, budget=0.5, target_accuracy=None, labelled=False, n=0, policies=[], curve=[]
    )
    with pytest.raises(InvalidInput, match="knows no accuracy"):
        svg(nothing)
