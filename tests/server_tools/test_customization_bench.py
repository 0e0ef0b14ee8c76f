"""The customization benchmark at a size at which it says nothing, but does everything."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner

from crayon_runtime.errors import InvalidInput
from crayon_server.cli import bench as cli_bench
from crayon_server.data import phone_assistant as pa
from crayon_server.evaluate.customization import Customization, run
from crayon_server.evaluate.exact_match import evaluate_float
from crayon_server.pool.build import Settings
from tests.support import needs

needs.module("torch")
needs.module("sklearn")

USERS = (pa.benchmark().validation[0], pa.benchmark().validation[35])
TINY = Settings(adapters=3, rank=2, steps=3, batch_size=8, threads=1)
ROWS = [
    "base", "single_lora", "single_lora_nr", "uniform", "nearest", "crayon", "crayon_no_groups", "crayon_paper", "oracle",
]  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Customization:
    return Customization(USERS, TINY, pa.benchmark().train[:8])


@pytest.mark.slow
def test_every_row_is_there(bench) -> None:
    answers = dict(bench.rows(0))
    assert list(answers) == ROWS
    for name, result in answers.items():
        row = bench.summary([result, result])
        assert len(row.em_seeds) == 2
        assert 0 <= row.em <= row.intent <= 1, name
        assert row.em_seen is not None
        assert row.em_unseen is not None
        assert row.em == pytest.approx((row.em_seen + row.em_unseen) / 2)
        assert math.isfinite(row.log_loss)
    assert answers["uniform"].log_loss.mean() != answers["crayon"].log_loss.mean()
    assert answers["single_lora"].log_loss.mean() < answers["base"].log_loss.mean()


@pytest.mark.slow
def test_exact_match_and_intent_are_those_of_generation(bench) -> None:
    _, result = next(bench.rows(0))
    expected = evaluate_float(bench.model, bench.tokenizer, bench.queries)
    assert result.exact.mean() == expected.exact_match
    assert result.intent.mean() == expected.intent
    assert result.log_loss.mean() == pytest.approx(expected.log_loss, rel=1e-4)


def test_users_and_seeds_that_are_none() -> None:
    with pytest.raises(InvalidInput, match="seeds"):
        run("validation", [])
    with pytest.raises(InvalidInput, match="seeds"):
        run("validation", [1, 1])
    with pytest.raises(InvalidInput, match="no users"):
        Customization([], TINY)
    assert CliRunner().invoke(cli_bench.bench, ["customization", "--seeds", "one"]).exit_code == 2


def test_the_command_prints_rows(monkeypatch) -> None:
    row = {"em": 0.5, "em_seen": 0.75, "em_unseen": None, "em_deviation": 0.1, "intent": 1.0, "log_loss": 0.2}
    printed = {"rows": {"crayon": row}, "seeds": [0], "users": "validation", "settings": {}}
    monkeypatch.setattr("crayon_server.evaluate.customization.run", lambda *_, **__: printed)
    table = CliRunner().invoke(cli_bench.bench, ["customization", "--seeds", "0"])
    assert table.output.splitlines()[1].split() == ["crayon", "0.500", "0.750", "0.100", "1.000", "0.200"]
    assert json.loads(CliRunner().invoke(cli_bench.bench, ["customization", "--json"]).stdout) == printed
