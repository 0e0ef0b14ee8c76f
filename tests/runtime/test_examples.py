"""Examples: read, refused, and scored. Judge of the score: the log-softmax of each prefix's logits, computed anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from crayon_runtime.backends.fake import FakeAdapter
from crayon_runtime.errors import ContextOverflow, IntegrityError, InvalidInput
from crayon_runtime.examples import Example, ExampleStates, answer_log_loss, read_examples, score, to_jsonl
from tests.runtime import tiny
from tests.runtime.tiny import EOS, TOKENIZER, VOCAB_SIZE, fake

EXAMPLES = [Example("the alarm", " a b"), Example("the alarm stop", "é日本!"), Example("the", " the")]


def logits(tokens: list[int], adapter: str | None) -> np.ndarray:
    seed = hash(tuple(tokens)) % 2**32 + len(adapter or "")
    return np.random.default_rng(seed).standard_normal(VOCAB_SIZE).astype(np.float32) * 3


def defined(examples: list[Example], adapter: str | None) -> float:
    losses = []
    for prompt, completion in examples:
        head, ids = TOKENIZER.encode(prompt), [*TOKENIZER.encode(prompt + completion), EOS]
        assert ids[: len(head)] == head
        for i in range(len(head), len(ids)):
            row = logits(ids[:i], adapter).astype(np.float64)
            losses.append(np.log(np.exp(row).sum()) - row[ids[i]])
    return float(np.mean(losses))


@pytest.mark.parametrize("adapter", [None, FakeAdapter("alice")])
def test_log_loss_is_its_definition(adapter: Any) -> None:
    engine = tiny.engine(logits)
    found = score(engine, EXAMPLES, adapter)
    assert found.log_loss == pytest.approx(defined(EXAMPLES, adapter.name if adapter else None), rel=1e-6)
    assert answer_log_loss(engine, EXAMPLES, adapter) == found.log_loss
    for row, example in zip(found.first_logits, EXAMPLES, strict=True):
        np.testing.assert_array_equal(row, logits(TOKENIZER.encode(example.prompt), adapter.name if adapter else None))


def test_a_prompt_is_fed_at_once_and_only_its_new_part() -> None:
    engine = tiny.engine(logits)
    answer_log_loss(engine, [EXAMPLES[0], EXAMPLES[1]])
    first, second = (len(TOKENIZER.encode(e.prompt)) for e in EXAMPLES[:2])
    assert fake(engine).prefilled == [first, second - first]
    answers = sum(
        len(TOKENIZER.encode(e.prompt + e.completion)) - len(TOKENIZER.encode(e.prompt)) for e in EXAMPLES[:2]
    )
    assert fake(engine).calls["decode"] == answers


def test_the_means_are_those_of_embed() -> None:
    engine = tiny.engine(logits)
    found = score(engine, EXAMPLES).means
    for part in ("prompt", "answer", "all"):
        np.testing.assert_allclose(found[part], engine.embed(EXAMPLES, part=part), rtol=1e-6)


@pytest.mark.parametrize("adapter", [None, FakeAdapter("alice")])
def test_the_log_probability_of_each_answer(adapter: Any) -> None:
    found = score(tiny.engine(logits), EXAMPLES, adapter).log_probability
    expected = [-defined([example], adapter.name if adapter else None) for example in EXAMPLES]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_states_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = score(tiny.engine(logits), EXAMPLES)
    (tmp_path / "s").write_bytes(found.states.to_bytes())
    read = ExampleStates.read(tmp_path / "s")
    np.testing.assert_array_equal(read.prompt, found.means["prompt"])
    np.testing.assert_array_equal(read.answer, found.means["answer"])
    np.testing.assert_array_equal(read.log_probability, found.log_probability)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": np.zeros((2, 5), np.float32)},
        {"answer": np.zeros((3, 4), np.float32)},
        {"log_probability": np.zeros(3, np.float32)},
        {"log_probability": np.zeros((2, 1), np.float32)},
        {"prompt": np.full((2, 4), np.nan, np.float32)},
        {"log_probability": np.float32([0, -np.inf])},
        {"answer": np.zeros((2, 4), np.float16)},
        {"answer": np.zeros((2, 4), np.int32)},
        {
            "prompt": np.zeros((0, 4), np.float32),
            "answer": np.zeros((0, 4), np.float32),
            "log_probability": np.zeros(0, np.float32),
        },
        {"prompt": np.zeros(4, np.float32)},
        {"more": np.zeros(4, np.float32)},
    ],
)
def test_states_that_are_none(changes: dict[str, Any], tmp_path: Path) -> None:
    right = {
        "prompt": np.zeros((2, 4), np.float32),
        "answer": np.zeros((2, 4), np.float32),
        "log_probability": np.zeros(2, np.float32),
    }
    save_file(right, tmp_path / "s")
    assert ExampleStates.read(tmp_path / "s").prompt.shape == (2, 4)
    save_file(right | changes, tmp_path / "s")
    with pytest.raises(IntegrityError, match="no states of examples"):
        ExampleStates.read(tmp_path / "s")


def test_files_of_states_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b"", b"\xff" * 100, b"\2\0\0\0\0\0\0\0{}"):
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(IntegrityError):
            ExampleStates.read(tmp_path / "s")
    monkeypatch.setattr("crayon_runtime.examples.LARGEST_STATES", 9)
    with pytest.raises(IntegrityError, match="have 10 bytes, which is too much"):
        ExampleStates.read(tmp_path / "s")


def test_logits_that_are_far_apart() -> None:
    engine = tiny.engine(lambda tokens, adapter: np.float32([1e30] + [-1e30] * (VOCAB_SIZE - 1)))
    assert answer_log_loss(engine, EXAMPLES) == pytest.approx(2e30)


@pytest.mark.parametrize(
    "examples, error, message",
    [
        ([], InvalidInput, "there are no examples"),
        ([("the", " ")], InvalidInput, "its completion is empty"),
        ([("the", "a"), ("", "a")], InvalidInput, "its prompt is empty"),
        ([("the", "a"), ("the", "a" * 64)], ContextOverflow, "the context holds 64"),
        ([("the", "\ud800")], InvalidInput, "Unicode|surrogate"),
    ],
)
def test_examples_that_cannot_be_scored(examples: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        answer_log_loss(tiny.engine(logits, context_length=64), examples)


def test_examples_are_read_as_they_were_written(tmp_path: Path) -> None:
    odd = [*EXAMPLES, Example('quote " and\nline', "a\u2028b\x85c\ttab")]
    path = tmp_path / "e.jsonl"
    path.write_bytes(to_jsonl(odd))
    assert read_examples(path) == odd


def test_other_fields_empty_lines_and_other_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    line = json.dumps({"prompt": "p", "completion": "c", "user": 3})
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}".encode())
    assert read_examples(path) == [Example("p", "c")] * 2


GOOD = b'{"prompt": "p", "completion": "c"}\n'


@pytest.mark.parametrize(
    "content, message, where",
    [
        (b"", "there are no examples", "examples"),
        (b"\n \n", "there are no examples", "examples"),
        (GOOD + b"{", "not JSON", "e.jsonl:2"),
        (GOOD + b"[" * 100_000, "not JSON", "e.jsonl:2"),
        (b'["p", "c"]', "not a JSON object", "e.jsonl:1"),
        (GOOD + b'\n{"prompt": "p"}', '"completion" is missing', "e.jsonl:3"),
        (b'{"prompt": 3, "completion": "c"}', '"prompt" is not a text', "e.jsonl:1"),
        (b'{"prompt": "p", "completion": " \\n"}', '"completion" is empty', "e.jsonl:1"),
        (GOOD + b"\xff", "not UTF-8 at byte 35", "e.jsonl"),
        ("{}".encode("utf-16"), "not UTF-8 at byte 0", "e.jsonl"),
    ],
)
def test_files_that_are_refused(content: bytes, message: str, where: str, tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=message) as caught:
        read_examples(path)
    assert str(caught.value.where).endswith(where)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No such file"):
        read_examples(tmp_path / "e.jsonl")
