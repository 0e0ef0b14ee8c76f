"""Many texts at once, each with its own blend: against one text at a time, and against peft."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from crayon_server.data import phone_assistant as pa
from crayon_server.data.phone_assistant import Piece
from crayon_server.evaluate import float_model
from crayon_server.evaluate.float_model import FloatModel
from crayon_server.models import load_nano
from crayon_server.pool.joint import JointLoras
from tests.support import needs

torch = needs.module("torch")

EXAMPLES = pa.benchmark().validation[3].queries[:7]


@pytest.fixture(scope="module")
def model() -> FloatModel:
    return FloatModel(load_nano())


@pytest.fixture
def loras(model):
    loras = JointLoras(model.model, 2, 2, scale=2.0, seed=0)
    with torch.no_grad():
        for n, (_, b) in enumerate(loras.matrices.values()):
            b.copy_(0.2 * torch.randn(b.shape, generator=torch.Generator().manual_seed(n)))
    yield loras
    loras.remove()


def test_log_loss_is_that_of_transformers(model) -> None:
    texts = model.tokenize(EXAMPLES)
    for text, log_loss in zip(texts, model.force(texts).log_loss, strict=True):
        labels = torch.tensor([[i if inside else -100 for i, inside in zip(*text, strict=True)]])
        with torch.inference_mode():
            expected = model.model(input_ids=torch.tensor([text.ids]), labels=labels).loss.item()
        assert log_loss == pytest.approx(expected, rel=1e-4)


def test_each_text_has_its_own_blend(model, loras, monkeypatch) -> None:
    monkeypatch.setattr(float_model, "BATCH_TOKENS", 150)  # several batches, in another order than the texts
    texts = model.tokenize(EXAMPLES)
    alphas = np.random.default_rng(0).dirichlet([1, 1], len(texts)).astype(np.float32)
    together, generated = model.force(texts, loras, alphas), model.generate(texts, 20, loras, alphas)
    for i, text in enumerate(texts):
        alone = model.force([text], loras, alphas[[i]])
        assert together.log_loss[i] == pytest.approx(alone.log_loss[0], rel=1e-4)
        assert generated[i] == model.generate([text], 20, loras, alphas[[i]])[0]
    assert abs(together.log_loss - model.force(texts).log_loss).min() > 1e-2
    assert loras.alpha is None


def test_exact_is_what_greedy_generation_gives(model) -> None:
    texts = model.tokenize(EXAMPLES)
    answers = model.generate(texts, 72)
    told = [
        dataclasses.replace(e, pieces=(Piece(answer, "value"),)) for e, answer in zip(EXAMPLES, answers, strict=True)
    ]
    assert model.force(model.tokenize(told)).exact.all()
    right = [answer == e.completion for answer, e in zip(answers, EXAMPLES, strict=True)]
    assert model.force(texts).exact.tolist() == right
    assert not all(right)


def test_nothing(model) -> None:
    assert model.generate([], 5) == []
    assert len(model.force([]).log_loss) == 0


@pytest.mark.parametrize("lengths", [[5], [3, 1, 4, 1, 5, 9, 2, 6], [20, 1, 1], []])
def test_batches_hold_everything_once(lengths, monkeypatch) -> None:
    monkeypatch.setattr(float_model, "BATCH_TOKENS", 10)
    batches = list(float_model._batches(lengths))
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 10 for batch in batches)
