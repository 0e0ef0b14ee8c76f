"""The routing benchmark: its rows from made-up answers, and all of it at a size at which it says nothing, but does everything."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext

import numpy as np
import pytest
from click.testing import CliRunner

from crayon_runtime.customize import alpha_of
from crayon_runtime.customized import ADAPTER, STATES
from crayon_runtime.errors import InvalidInput
from crayon_runtime.examples import score
from crayon_runtime.routing.policies import EARLY, Policy
from crayon_runtime.routing.router import Router
from crayon_runtime.routing.signals import SIGNALS
from crayon_server.cli import bench as cli_bench
from crayon_server.data import phone_assistant as pa
from crayon_server.evaluate import routing
from crayon_server.evaluate.customization import Customization, Device
from crayon_server.evaluate.exact_match import MAX_NEW_TOKENS
from crayon_server.evaluate.routing import run
from crayon_server.evaluate.routing.answers import (
    AFTER,
    PARTS,
    Judged,
    Recorded,
    asking,
    judge,
    record,
    said_by,
    with_prototypes,
)
from crayon_server.evaluate.routing.plot import draw
from crayon_server.evaluate.routing.rows import BUDGET, Seed, asked, report
from crayon_server.models import load_nano
from crayon_server.pool.build import Settings, typical_texts
from tests.support import needs

needs.module("torch")
needs.module("sklearn")

TINY = Settings(adapters=3, rank=2, steps=10, batch_size=16, threads=1)
USERS = tuple(asking(pa.benchmark().validation[i]) for i in (0, 35))
N = sum(PARTS.values())


# Rows of made-up answers: 12 users. The device is right in its task, in half of the other domains, and never beyond these.


EVERYBODY = tuple(asking(user) for user in pa.benchmark().validation[:12])
ASKED = asked(EVERYBODY)
RANDOM = np.random.default_rng(0)
IN_TASK = ASKED.parts == "in_task"
RIGHT = IN_TASK | ((ASKED.parts == "other_domain") & (RANDOM.random(len(IN_TASK)) < 0.5))
SERVER = Judged(exact=np.zeros(len(RIGHT), np.bool_), useful=RANDOM.random(len(RIGHT)) < 0.95)
ORACLE = Judged(exact=SERVER.useful, useful=SERVER.useful)


def recorded(sure: np.ndarray, **signals: np.ndarray | float) -> Recorded:
    """Signals that are noise, but for those given; early ones are the same, and every answer has 20 tokens.

    Args:
        sure: both forms of the probability.
    """
    values = RANDOM.normal(size=(len(RIGHT), len(SIGNALS)))
    for name, value in (signals | {"log_probability": sure, "log_odds": sure}).items():
        values[:, SIGNALS.index(name)] = value
    alone = Policy("calibrated", {"log_probability": 1.0}, 0.0, -1.0)
    return Recorded(
        Judged(RIGHT, RIGHT), np.full(len(RIGHT), 20), values, dict.fromkeys(AFTER, values), [alone] * len(RIGHT)
    )


@pytest.fixture(scope="module")
def reported():
    sure = RIGHT + 0.5 * RANDOM.normal(size=len(RIGHT))
    known = recorded(sure, prompts_top_k=IN_TASK, prototypes_mean=np.nan)
    return report([Seed(known, known), Seed(known, known)], SERVER, ORACLE, ASKED)


def test_a_signal_that_knows_is_seen_to(reported) -> None:
    row = reported["rows"]["exact"]["log_probability"]
    assert 0.85 < row["auroc"]["low"] < row["auroc"]["mean"] < row["auroc"]["high"] < 1
    assert row["auroc_in_task"] is None  # the device is always right there
    assert row["auroc_other_domain"]["mean"] > 0.85
    assert reported["rows"]["exact"]["prompts_top_k"]["auroc_out_of_task"]["mean"] == 1
    assert reported["rows"]["exact"]["prompts_top_k"]["auroc_other_domain"]["mean"] == 0.5
    assert reported["rows"]["exact"]["least_log_probability"]["auroc"]["mean"] == pytest.approx(0.5, abs=0.1)
    assert reported["differences"]["exact"]["all"]["low"] > -0.05


def test_bounds_are_bounds(reported) -> None:
    for measure, rows in reported["rows"].items():
        assert rows["always_small"]["accuracy"] == RIGHT.mean()
        assert rows["always_large"]["calls"] == 1
        for name, row in rows.items():
            if measure != "exact" and not name.startswith("always"):
                assert row["apgr"] <= rows["oracle"]["apgr"], name
                assert row["cpt_80"] >= rows["oracle"]["cpt_80"], name
                assert row["calls_saved"] <= rows["oracle"]["calls_saved"], name
        if measure != "exact":
            assert rows["random"]["apgr"] == pytest.approx(0.5)
            assert (rows["random"]["cpt_50"], rows["random"]["cpt_80"]) == pytest.approx((0.5, 0.8))
            assert rows["log_probability"]["apgr"] > 0.6
    assert reported["rows"]["useful"]["always_large"]["accuracy"] == SERVER.useful.mean()
    assert reported["rows"]["oracle_server"]["always_large"]["accuracy"] == ORACLE.exact.mean()


def test_where_the_server_is_no_better_there_is_no_gap(reported) -> None:
    for row in reported["rows"]["exact"].values():
        assert (row["apgr"], row["cpt_50"], row["cpt_80"]) == (None, None, None)
    assert reported["rows"]["exact"]["random"]["calls_saved"] == 1


def test_thresholds_keep_the_budget(reported) -> None:
    rows = reported["rows"]["useful"]
    for name in ("confidence", "calibrated", "without_labels", "early"):
        assert rows[name]["calls"] == pytest.approx(BUDGET, abs=0.01), name
    for name in ("confidence", "calibrated", "early"):
        assert rows[name]["accuracy"] > RIGHT.mean() + 0.1, name
    assert rows["log_probability"]["calls"] is None
    assert rows["confidence"]["auroc"] == rows["log_probability"]["auroc"]


def test_what_has_no_signal_goes_to_the_server(reported) -> None:
    """`prototypes_mean` is NaN: so is the paper's score."""
    paper = reported["rows"]["useful"]["paper"]
    assert (paper["calls"], paper["accuracy"]) == (1, SERVER.useful.mean())
    assert paper["auroc"]["mean"] == 0.5


def test_deciding_early_costs_fewer_tokens(reported) -> None:
    for measure in ("useful", "oracle_server"):
        rows = reported["early"][measure]
        assert [row["after"] for row in rows] == list(AFTER)
        for row in rows:
            assert list(row["tokens"].values()) == pytest.approx([row["after"] / 20] * 5)
            assert min(row["apgr"], row["apgr_at_the_end"]) > 0.7
    assert reported["early"]["exact"][0]["apgr"] is None
    assert EARLY in AFTER


def test_tokens_are_of_the_answers_that_are_not_shown() -> None:
    """Right answers have 10 tokens, wrong ones 30, and a perfect signal finds these."""
    known = recorded(RIGHT.astype(float))
    known = known._replace(tokens=np.where(RIGHT, 10, 30))
    (row, *_) = [row for row in _early(known) if row["after"] == 12]
    share = 1 - RIGHT.mean()
    assert 0.3 < share < 0.5
    assert row["tokens"]["0.3"] == pytest.approx(12 / 30, rel=0.05)
    beyond = 0.5 - share
    expected = (share * 12 + beyond * 10) / (share * 30 + beyond * 10)
    assert row["tokens"]["0.5"] == pytest.approx(expected, rel=0.05)


def _early(known: Recorded) -> list[dict]:
    return report([Seed(known, known)], SERVER, ORACLE, ASKED)["early"]["useful"]


def test_curves_begin_with_the_device_and_end_with_the_server(reported) -> None:
    for measure, by_server in (("exact", SERVER.exact), ("useful", SERVER.useful), ("oracle_server", ORACLE.exact)):
        curves = reported["curves"][measure]
        calls = curves.pop("calls")
        assert (calls[0], calls[-1], len(calls)) == (0, 1, 21)
        assert set(curves) == set(reported["rows"][measure]) - {"always_small", "always_large"}
        for name, accuracy in curves.items():
            assert accuracy[0] == pytest.approx(RIGHT.mean()), name
            assert accuracy[-1] == pytest.approx(by_server.mean()), name
        curves["calls"] = calls


def test_accuracies_by_part(reported) -> None:
    right = reported["accuracy"]
    assert right["device"]["exact"]["in_task"] == 1
    assert right["device"]["useful"]["server_only"] == 0
    assert right["device"]["exact"]["all"] == RIGHT.mean()
    assert right["server"]["exact"] == dict.fromkeys(["all", *PARTS], 0)
    assert right["oracle_server"]["exact"]["other_domain"] == ORACLE.exact[ASKED.parts == "other_domain"].mean()


def test_the_report_is_json(reported) -> None:
    json.dumps(reported, allow_nan=False)


# Answers


@pytest.fixture(scope="module")
def bench() -> Customization:
    return Customization(USERS, TINY, pa.benchmark().train[:16])


@pytest.fixture(scope="module")
def device(bench, tmp_path_factory) -> Iterator[Device]:
    with Device(tmp_path_factory.mktemp("device"), USERS, bench.query_texts, TINY) as device:
        yield device


@pytest.fixture(scope="module")
def pool(bench, device):
    with bench.pool("groups", TINY) as pool:
        typical = typical_texts(pool.located, bench.sources)
        kept = device.write_pool("routing", pool.located, pool.loras, typical)
    return with_prototypes(device, kept, bench.model)


@pytest.fixture(scope="module")
def answered(device, pool) -> Recorded:
    return record(device, pool)


def test_users_ask_of_all_parts() -> None:
    for user in USERS:
        assert [query.domain in user.domains for query in user.queries] == [True] * 20 + [False] * 20
        assert [query.domain in pa.SERVER_ONLY for query in user.queries] == [False] * 30 + [True] * 10
    assert asked(USERS).users == [USERS[0].name] * N + [USERS[1].name] * N
    assert asked(USERS).parts.tolist() == 2 * (["in_task"] * 20 + ["other_domain"] * 10 + ["server_only"] * 10)


def test_a_server_says_what_it_generates(bench) -> None:
    queries = bench.queries[::5]
    texts = bench.model.tokenize(queries)
    answers = said_by(bench.model, queries, texts)
    assert answers == bench.model.generate(texts, MAX_NEW_TOKENS)
    judged = judge(answers, queries)
    assert 0 <= judged.exact.sum() < judged.useful.sum() < len(queries)


def test_the_device_is_recorded(device, pool, answered) -> None:
    n = 2 * N
    assert answered.signals.shape == (n, len(SIGNALS))
    assert np.isfinite(answered.signals).all()
    assert answered.judged.exact.sum() <= answered.judged.useful.sum()
    assert not answered.judged.useful[asked(USERS).parts == "server_only"].any()
    assert answered.judged.useful[asked(USERS).parts == "in_task"].mean() > 0.5
    assert answered.tokens.min() > 2
    assert [policy.name for policy in answered.uncalibrated] == ["calibrated"] * n
    assert answered.uncalibrated[0] != answered.uncalibrated[N]
    assert pool.prototypes is not None
    assert pool.prototypes.model == "nano-server"


def test_early_signals_are_those_of_an_answer_of_so_many_tokens(device, pool, answered) -> None:
    """The device still has the adapter of the last user."""
    column = SIGNALS.index("log_probability")
    for i in (-1, -25):
        generation = device.engine.generate(USERS[-1].queries[i].prompt, max_new_tokens=6)
        assert answered.early[6][i, column] == pytest.approx(np.mean(generation.log_probabilities), abs=1e-5)
    prompts = SIGNALS.index("prompts_top_k")
    for signals in answered.early.values():
        assert np.array_equal(signals[:, prompts], answered.signals[:, prompts])  # known before the first token
    assert not np.allclose(answered.early[6], answered.signals)


def test_signals_are_those_of_the_router(device, pool, answered, tmp_path) -> None:
    """What decides on a device, with the adapter and the examples of one user kept as there."""
    engine, user = device.engine, USERS[1]
    pairs = [(e.prompt, e.completion) for e in user.examples]
    device.blended(pool, alpha_of(engine, pairs, pool.manifest, pool.projection)).path.rename(tmp_path / ADAPTER)
    engine.set_adapter(tmp_path / ADAPTER)
    (tmp_path / STATES).write_bytes(score(engine, pairs, engine.present_adapter).states.to_bytes())
    names = [name for name in SIGNALS if not name.startswith("projected")]
    for after, expected in ((None, answered.signals), (EARLY, answered.early[EARLY])):
        router = Router(engine, policy=Policy("all", dict.fromkeys(names, 1.0), 0.0, -1e9, after), folder=tmp_path)
        for i in (0, 21, 39):
            said = router.answer(user.queries[i].prompt, max_new_tokens=MAX_NEW_TOKENS)
            row = dict(zip(SIGNALS, expected[N + i], strict=True))
            assert said.signals == pytest.approx({name: row[name] for name in names}, abs=1e-5)
    assert Router(engine, folder=tmp_path).policy == answered.uncalibrated[N]


# All of it


@pytest.fixture
def _small(monkeypatch) -> None:
    bench = pa.benchmark()
    small = dataclasses.replace(bench, validation=(bench.validation[0], bench.validation[35]), train=bench.train[:8])
    monkeypatch.setattr(routing, "benchmark", lambda: small)
    monkeypatch.setattr("crayon_server.evaluate.customization.rows.benchmark", lambda: small)


@pytest.mark.slow
@pytest.mark.usefixtures("_small")
def test_a_run_is_one_json_object(monkeypatch) -> None:
    said: list[str] = []
    quick = dataclasses.replace(TINY, steps=2)
    result = run("validation", [3, 4], quick, said.append, server_dir=load_nano())
    assert set(result) == {
        "rows", "accuracy", "differences", "early", "curves", "device_tokens", "budget", "users", "seeds", "settings",
    }  # fmt: skip
    assert set(SIGNALS) < set(result["rows"]["exact"])
    assert result["users"] == {"split": "validation", "reported": 1, "fitted": 1}
    assert (result["seeds"], result["settings"]["steps"]) == ([3, 4], 2)
    assert result["accuracy"]["oracle_server"]["exact"]["in_task"] > result["accuracy"]["server"]["exact"]["in_task"]
    assert said[:2] == ["server: answers", "oracle_server: answers"]
    assert [line[:6] for line in said[2:]] == ["seed 3", "seed 3", "seed 4", "seed 4"]
    json.dumps(result, allow_nan=False)

    monkeypatch.setattr(routing, "ProcessPoolExecutor", Inline)
    assert run("validation", [3, 4], quick, server_dir=load_nano(), jobs=2) == result


class Inline(nullcontext):
    """Runs what is submitted, in this process."""

    def __init__(self, jobs: int, mp_context: object) -> None:
        super().__init__(self)
        assert jobs == 2

    def submit(self, function, *arguments) -> Future:
        done = Future()
        done.set_result(pickle.loads(pickle.dumps(function(*arguments))))  # noqa: S301, as between processes
        return done


def test_who_is_reported_is_never_fitted_on() -> None:
    bench = pa.benchmark()
    for split, limit, counts in (("test", None, (36, 36)), ("validation", None, (18, 18)), ("test", 4, (4, 4))):
        fitted, reported = routing._users(split, limit)
        assert (len(fitted), len(reported)) == counts
        assert not {user.name for user in fitted} & {user.name for user in reported}
        assert {user.name for user in fitted} <= {user.name for user in bench.validation}
        assert {user.name for user in reported} <= {user.name for user in getattr(bench, split)}
        assert sum(user.seen for user in reported) == len(reported) / 2


def test_seeds_and_limits_that_are_none() -> None:
    with pytest.raises(InvalidInput, match="seeds"):
        run("validation", [])
    with pytest.raises(InvalidInput, match="seeds"):
        run("validation", [1, 1])
    with pytest.raises(InvalidInput, match="limit"):
        run("validation", [1], limit=0)
    for wrong in (["--seeds", "one"], ["--limit", "0"], ["--users", "train"]):
        assert CliRunner().invoke(cli_bench.bench, ["routing", *wrong]).exit_code == 2


def test_the_command_prints_rows(monkeypatch, reported, tmp_path) -> None:
    counts = {"split": "test", "reported": 12, "fitted": 36}
    printed = reported | {"device_tokens": 20.0, "budget": 0.3, "users": counts, "seeds": [0], "settings": {}}
    monkeypatch.setattr("crayon_server.evaluate.routing.run", lambda *_, **__: printed)
    lines = CliRunner().invoke(cli_bench.bench, ["routing", "--seeds", "0"]).output.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["exact", "always_small", "always_large", "random"]
    small = reported["rows"]["exact"]["always_small"]["accuracy"]
    assert lines[1].split() == ["always_small", "0.000", f"{small:.3f}"]
    assert lines[-1] == "12 users; policies are fitted on 36 others, for 30% of calls; 20.0 tokens an answer"
    plot = ["--plot", str(tmp_path / "curves.svg")]
    assert json.loads(CliRunner().invoke(cli_bench.bench, ["routing", "--json", *plot]).stdout) == printed
    drawn = (tmp_path / "curves.svg").read_text()
    assert drawn == draw(printed).decode()
    assert all(f">{name}<" in drawn for name in ("calibrated", "oracle", "prototypes_mean (the paper's)"))
