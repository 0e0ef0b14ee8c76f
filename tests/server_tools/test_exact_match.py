"""Scores from answers: judged alike whether a bundle or transformers gave them."""

from __future__ import annotations

import itertools

import pytest

from crayon_runtime.errors import InvalidInput
from crayon_server import models
from crayon_server.data import phone_assistant as pa
from crayon_server.evaluate import exact_match
from tests.support import needs

QUERIES = pa.benchmark().validation[35].queries[:6]


def test_judge() -> None:
    right = [q.completion for q in QUERIES]
    perfect = exact_match.judge(right, QUERIES, 0.5)
    assert (perfect.exact_match, perfect.intent, perfect.structure, perfect.log_loss) == (1, 1, 1, 0.5)
    half = exact_match.judge([*right[:3], "", "?", right[0]], QUERIES, 0.5)
    assert (half.exact_match, half.intent, half.structure) == (3 / 6, 3 / 6, 3 / 6)
    assert half.answers[3:5] == ("", "?")


def test_nothing_to_judge() -> None:
    with pytest.raises(InvalidInput, match="no examples"):
        exact_match.judge([], [], 0.0)


def test_no_completion_is_longer_than_what_may_be_generated() -> None:
    tokenizer = needs.module("tokenizers").Tokenizer.from_file(str(models.load_nano() / "tokenizer.json"))
    examples = itertools.islice(pa.stream("longest", domains=(*pa.DOMAINS, *pa.SERVER_ONLY)), 5000)
    longest = max(len(tokenizer.encode(e.completion, add_special_tokens=False).ids) + 1 for e in examples)
    assert longest < exact_match.MAX_NEW_TOKENS


def test_a_float_bundle_and_transformers_agree(tmp_path) -> None:
    torch, transformers = needs.module("torch"), needs.module("transformers")
    from crayon_export import export
    from crayon_runtime import Engine

    export(models.load_nano(), tmp_path / "bundle", backend="onnx", quantize="none")
    with Engine.load(tmp_path / "bundle", threads=1) as engine:
        on_device = exact_match.evaluate(engine, QUERIES)
    model = models.load(models.load_nano(), torch.float32)
    reference = exact_match.evaluate_float(
        model, transformers.AutoTokenizer.from_pretrained(models.load_nano()), QUERIES
    )
    assert on_device.answers == reference.answers
    assert on_device.log_loss == pytest.approx(reference.log_loss, abs=1e-4)
