"""The customization benchmark at a size at which it says nothing, but does everything."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from concurrent.futures import Future
from contextlib import nullcontext
from typing import get_args

import numpy as np
import pytest
from click.testing import CliRunner

from crayon_runtime.customize import alpha_of
from crayon_runtime.errors import InvalidInput
from crayon_server.cli import bench as cli_bench
from crayon_server.data import phone_assistant as pa
from crayon_server.evaluate import customization
from crayon_server.evaluate.customization import Answers, Customization, Device, rows, run
from crayon_server.evaluate.customization.answers import answer, summary
from crayon_server.evaluate.customization.privacy import privacy, recognized
from crayon_server.evaluate.customization.rows import RowName, agreement
from crayon_server.evaluate.exact_match import evaluate, evaluate_float
from crayon_server.models import CONTEXT_LENGTH
from crayon_server.pool.build import Settings
from tests.support import needs

needs.module("torch")
needs.module("sklearn")

USERS = tuple(
    dataclasses.replace(pa.benchmark().validation[i], queries=pa.benchmark().validation[i].queries[:6]) for i in (0, 35)
)
TINY = Settings(adapters=3, rank=2, steps=3, batch_size=8, threads=1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(rows, "REFINE_EVALUATIONS", 5)
    monkeypatch.setattr(rows, "ORACLE_TEXTS", 16)


@pytest.fixture(scope="module")
def bench() -> Customization:
    return Customization(USERS, TINY, pa.benchmark().train[:8])


@pytest.fixture(scope="module")
def device(bench, tmp_path_factory):
    with Device(tmp_path_factory.mktemp("device"), USERS, bench.query_texts, TINY) as device:
        yield device


@pytest.fixture(scope="module")
def untrained(bench, device):
    return bench.untrained(device)


@pytest.mark.slow
def test_every_row_is_there(bench, device, untrained) -> None:
    told = []
    measured = bench.measure(device, 0, lambda name, _: told.append(name))
    answers = untrained | measured.rows
    assert set(answers) == set(get_args(RowName))
    assert told == list(measured.rows)
    for name, result in answers.items():
        row = summary(USERS, [result, result])
        assert len(row.em_seeds) == 2
        assert 0 <= row.em <= row.intent <= 1, name
        assert row.em <= row.structure
        assert row.em == pytest.approx((row.em_seen + row.em_unseen) / 2)
        assert math.isfinite(row.log_loss)
    loss = {name: result.log_loss.mean() for name, result in answers.items()}
    assert loss["uniform"] != loss["crayon"] != loss["crayon_refined"]
    assert loss["single_lora"] < loss["base"]
    assert loss["tuned_on_10"] < loss["base"]
    assert loss["crayon_int4"] == pytest.approx(loss["crayon_int4_float_alpha"], rel=1e-2)
    assert loss["crayon_int4"] == pytest.approx(loss["crayon"], rel=0.2)
    assert set(measured.alpha) == {"crayon", "crayon_no_groups", "quantized_indicators"}
    assert all(0.99 < cosine.least <= cosine.mean <= 1 for cosine in measured.alpha.values())
    assert len(measured.privacy) == 8
    assert measured.privacy[0].em == answers["crayon"].exact.mean()


@pytest.mark.slow
def test_answers_are_those_of_generation(bench, untrained) -> None:
    result, expected = untrained["base"], evaluate_float(bench.model.model, bench.model.tokenizer, bench.queries)
    assert result.exact.mean() == expected.exact_match
    assert result.intent.mean() == expected.intent
    assert result.structure.mean() == expected.structure
    assert result.log_loss.mean() == pytest.approx(expected.log_loss, rel=1e-4)


@pytest.mark.slow
def test_answers_of_the_device_are_those_of_its_engine(bench, device, untrained) -> None:
    device.engine.set_adapter(None)
    result, expected = untrained["base_int4"], evaluate(device.engine, bench.queries)
    assert result.exact.mean() == expected.exact_match
    assert result.intent.mean() == expected.intent
    assert result.structure.mean() == expected.structure
    assert result.log_loss.mean() == pytest.approx(expected.log_loss, rel=1e-4)


@pytest.mark.slow
def test_the_device_answers_as_the_float_model_does_with_the_same_pool(bench, device, untrained) -> None:
    """With a pool of which only the second LoRA is anything: the device must blend what was trained."""
    import torch

    with bench.pool("groups", TINY) as pool:
        with torch.no_grad():
            for n, (_, b) in enumerate(pool.loras.matrices.values()):
                b.zero_()
                b[1] = 0.2 * torch.randn(b[1].shape, generator=torch.Generator().manual_seed(n))
        only = np.eye(3, dtype=np.float32)[[1, 1]]
        kept = device.write_pool("only", pool.located, pool.loras)
        expected, result = bench._answer(pool.loras, only), device.answer(kept, only)
        none = device.answer(kept, np.eye(3, dtype=np.float32)[[0, 2]])
        examples = [(e.prompt, e.completion) for e in USERS[1].examples]
        own = alpha_of(device.engine, examples, kept.manifest, kept.projection)
        assert np.array_equal(device.alphas(kept)[1], own)
        assert np.allclose(device.alphas(kept), pool.alphas, atol=0.05)
        embedded = bench._alphas(pool.located, [device.embed(user.examples) for user in USERS])
    assert np.allclose(embedded[1], own, atol=1e-6)
    assert np.allclose(none.log_loss, untrained["base_int4"].log_loss, rtol=1e-3)
    assert abs(expected.log_loss - untrained["base"].log_loss).mean() > 0.1
    assert result.log_loss == pytest.approx(expected.log_loss, rel=0.25)


def test_few_shot_texts_are_conversations_that_fit(bench) -> None:
    texts = bench.few_shot_texts()
    examples = bench.model.tokenize(USERS[1].examples)
    given = [i for text in examples for i in text.ids]
    query = bench.query_texts[-1]
    assert texts[-1].ids[-len(query.ids) :] == query.ids
    assert texts[-1].in_completion[: -len(query.ids)] == [False] * (len(texts[-1].ids) - len(query.ids))
    shown = texts[-1].ids[: -len(query.ids)]
    assert shown == given[-len(shown) :]
    assert shown[0] == query.ids[0]  # an exchange is never cut
    assert len(shown) > len(given) / 2
    assert max(map(len, (text.ids for text in texts))) <= CONTEXT_LENGTH


def test_long_examples_are_left_out(bench, monkeypatch) -> None:
    monkeypatch.setattr("crayon_server.models.CONTEXT_LENGTH", 200)
    for text, query in zip(bench.few_shot_texts(), bench.query_texts, strict=True):
        assert text.in_completion.index(True) <= 200 - 72
        assert text.ids[-len(query.ids) :] == query.ids


@pytest.mark.slow
def test_a_refined_alpha_is_no_worse_on_the_examples(bench) -> None:
    with bench.pool("groups", TINY) as pool:
        refined = bench._refined(pool, 0)
        for user, before, after in zip(USERS, pool.alphas, refined, strict=True):
            log_loss = bench._log_loss(user, pool.loras)
            assert log_loss(after) <= log_loss(before)
        texts = bench.model.tokenize(USERS[0].examples)
        forced = bench.model.force(texts, pool.loras, np.tile(refined[0], (len(texts), 1)))
        tokens = [sum(text.in_completion) for text in texts]
        expected = (forced.log_loss * tokens).sum() / sum(tokens)
        assert bench._log_loss(USERS[0], pool.loras)(refined[0]) == pytest.approx(expected)


def test_users_that_are_exactly_themselves_are_recognized() -> None:
    alphas = np.eye(4, dtype=np.float32)
    assert recognized(alphas, alphas) == 1
    assert recognized(alphas, alphas[[1, 0, 2, 3]]) == 0.5


def test_disguises_are_measured() -> None:
    alphas = np.random.default_rng(0).dirichlet(np.ones(6), 12).astype(np.float32)
    seen = []

    def exact_match(disguised):
        seen.append(disguised)
        return 0.5

    found = list(privacy(alphas, alphas, exact_match, seed=0, signed=False))
    assert [(d.noise, d.digits) for d in found] == [
        (0, None), (0.02, None), (0.05, None), (0.1, None), (0, 4), (0, 3), (0, 2), (0, 1),
    ]  # fmt: skip
    assert found[0].recognized == 1
    assert found[3].recognized < 1
    assert np.array_equal(seen[0], alphas)
    assert 0.01 < np.abs(seen[2] - alphas).mean() < 0.08
    assert np.array_equal(seen[7], alphas.round(1))
    assert len(np.unique((seen[1] - alphas).round(5), axis=0)) == 12  # everyone has noise of their own


def test_agreement() -> None:
    same = np.array([[1, 0], [0.6, 0.8]], np.float32)
    assert agreement(same, same) == pytest.approx((1, 1))
    assert agreement(same, np.array([[1, 0], [1, 0]], np.float32)) == pytest.approx((0.8, 0.6))


def test_a_row_is_summed_up() -> None:
    no, yes = np.zeros(12, np.bool_), np.ones(12, np.bool_)
    half = np.repeat([True, False], 6)
    loss = np.arange(12, dtype=np.float32)
    row = summary(USERS, [Answers(half, yes, half, loss), Answers(no, yes, no, loss + 1)])
    seen = [0.5, 0.0] if USERS[0].seen else [0.0, 0.5]
    assert (row.em, [row.em_seen, row.em_unseen], row.em_seeds) == (0.25, seen[:1] + seen[1:], [0.5, 0.0])
    assert row.em_deviation == (0.5 + 0) / 2
    assert (row.intent, row.structure, row.log_loss) == (1, 0.25, 6.0)


def test_nothing_is_generated_where_all_is_right(bench, monkeypatch) -> None:
    class Forced:
        def force(self, *_):
            return np.ones(12, np.bool_), np.zeros(12, np.float32)

        def generate(self, texts, *_):
            assert texts == []
            return []

    assert answer(Forced(), bench.queries, bench.query_texts).structure.all()


def test_users_and_seeds_that_are_none() -> None:
    with pytest.raises(InvalidInput, match="seeds"):
        run("validation", [])
    with pytest.raises(InvalidInput, match="seeds"):
        run("validation", [1, 1])
    with pytest.raises(InvalidInput, match="no users"):
        Customization([], TINY)
    assert CliRunner().invoke(cli_bench.bench, ["customization", "--seeds", "one"]).exit_code == 2


@pytest.mark.slow
def test_a_run_is_one_json_object(monkeypatch) -> None:
    small = dataclasses.replace(pa.benchmark(), validation=USERS, train=pa.benchmark().train[:6])
    monkeypatch.setattr(customization, "benchmark", lambda: small)
    monkeypatch.setattr(rows, "benchmark", lambda: small)
    said = []
    result = run("validation", [3, 4], dataclasses.replace(TINY, steps=1), say=said.append)
    assert list(result["rows"]) == list(get_args(RowName))
    assert len(result["rows"]["base"]["em_seeds"]) == 1
    assert len(result["rows"]["crayon"]["em_seeds"]) == 2
    assert result["alpha"]["crayon"]["min"] <= result["alpha"]["crayon"]["mean"]
    assert result["prompt_tokens"]["few_shot"] > 8 * result["prompt_tokens"]["plain"]
    assert (result["seeds"], result["users"], result["settings"]["steps"]) == ([3, 4], "validation", 1)
    assert said[0].startswith("base: ")
    assert said[3].startswith("seed 3  single_lora: ")
    json.dumps(result)

    monkeypatch.setattr(customization, "ProcessPoolExecutor", Inline)
    several = []
    assert run("validation", [3, 4], dataclasses.replace(TINY, steps=1), say=several.append, jobs=2) == result
    assert sorted(several) == sorted(said)


class Inline(nullcontext):
    """Runs what is submitted, in this process."""

    def __init__(self, jobs: int, mp_context: object) -> None:
        super().__init__(self)
        assert jobs == 2

    def submit(self, function, *arguments) -> Future:
        done = Future()
        done.set_result(pickle.loads(pickle.dumps(function(*arguments))))  # noqa: S301, as between processes
        return done


def test_the_command_prints_rows(monkeypatch) -> None:
    row = dict.fromkeys(("em", "em_seen", "em_deviation", "intent", "structure", "log_loss"), 0.5) | {"em_unseen": None}
    printed = {
        "rows": {"crayon": row},
        "alpha": {"crayon": {"mean": 0.999, "min": 0.99}},
        "privacy": [{"noise": 0.02, "digits": None, "em": 0.75, "recognized": 0.25}],
        "prompt_tokens": {"plain": 22.2, "few_shot": 230.4},
        "seeds": [0],
        "users": "validation",
        "settings": {},
    }
    monkeypatch.setattr("crayon_server.evaluate.customization.run", lambda *_, **__: printed)
    lines = CliRunner().invoke(cli_bench.bench, ["customization", "--seeds", "0"]).output.splitlines()
    assert lines[1].split() == ["crayon", *["0.500"] * 6]
    assert lines[2] == "prompt tokens: 22, few_shot 230"
    assert lines[4].split() == ["crayon", "0.9990", "0.9900"]
    assert lines[6].split() == ["0.02", "0.750", "0.250"]
    assert json.loads(CliRunner().invoke(cli_bench.bench, ["customization", "--json"]).stdout) == printed
