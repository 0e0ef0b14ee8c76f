"""The benchmark of questions with choices: who gets which, how they are scored, and all of it with a small model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

from crayon_runtime.errors import InvalidInput
from crayon_server.cli import bench as cli_bench
from crayon_server.data.phone_assistant.draws import Draws
from crayon_server.evaluate import qa
from crayon_server.evaluate.qa.intervals import estimate
from crayon_server.evaluate.qa.items import Item, deal, read
from crayon_server.models import load_nano
from crayon_server.pool.build import Settings
from tests.support import needs

TINY = Settings(adapters=3, rank=2, steps=2, batch_size=4, threads=1, learning_rate=1e-3)
SUBJECTS = ("arithmetic", "colours", "towns")
WORDS = "red green blue seven twelve lamp river mountain oslo rome bread milk".split()


def make_item(task: str, split: str, i: int, user: str = "") -> dict[str, object]:
    draws = Draws("test", task, split, i, user)
    item: dict[str, object] = {
        "id": f"{task}-{user}-{split}-{i}",
        "task": task,
        "question": f"What goes with {draws.choice(WORDS)} and {draws.choice(WORDS)}, number {split} {i}?",
        "choices": draws.shuffled(WORDS)[: draws.integer(2, 4)],
        "answer": draws.integer(0, 1),
    }
    if task == "siqa":
        item["context"] = f"Kim likes {draws.choice(WORDS)}."
    if user:
        item |= {"user": user, "choice_type": "single"}
    return item


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Items written here, in the files that the benchmark reads; five of the training items stand in the test too."""
    folder = tmp_path_factory.mktemp("qa")
    files = {
        "siqa_train": [make_item("siqa", "train", i) for i in range(30)],
        "siqa_dev": [make_item("siqa", "dev", i) for i in range(9)],
        "openbookqa_train": [make_item("openbookqa", "train", i) for i in range(30)],
        "openbookqa_test": [make_item("openbookqa", "test", i) for i in range(9)],
        "mmlu_dev": [make_item("mmlu", "dev", i, user) for user in SUBJECTS for i in range(5)],
        "mmlu_val": [make_item("mmlu", "val", i, user) for user in SUBJECTS for i in range(9)],
        "mmlu_test": [make_item("mmlu", "test", i, user) for user in SUBJECTS for i in range(6)],
        "medmcqa_dev": [make_item("medmcqa", "dev", i, user) for user in ("Dental", "Skin") for i in range(30)],
    }
    for item in files["openbookqa_test"][:3]:
        twin = item | {
            "id": "twin",
            "question": f"  {str(item['question']).upper()} ",
            "choices": item["choices"][::-1],
        }
        files["openbookqa_train"].append(twin | {"answer": 0})
    for item in files["mmlu_test"][:2]:
        files["mmlu_val"].append(item | {"id": "twin"})
    for name, items in files.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in items))
    return folder


def test_everything_is_dealt_once_and_duplicates_are_not(data) -> None:
    dealt = deal(data, limit=100)
    assert [user.name for user in dealt.users] == ["siqa", "openbookqa", *(f"mmlu/{s}" for s in SUBJECTS), "medmcqa"]
    assert dealt.dropped == {"siqa": 0, "openbookqa": 3, "mmlu": 2, "medmcqa": 0}
    everyone = [item for user in dealt.users for item in (*user.examples, *user.queries)]
    keys = [item.key for item in (*everyone, *dealt.training)]
    assert len(set(keys)) == len(keys)
    assert all(len(user.examples) == 10 for user in dealt.users)
    assert "twin" not in {item.id for item in (*everyone, *dealt.training)}
    for user in dealt.users:
        assert {item.owner for item in (*user.examples, *user.queries)} == {user.name}
    sizes = {user.name: len(user.queries) for user in dealt.users}
    assert sizes["siqa"] == dealt.available["siqa"] == 9
    assert sizes["mmlu/towns"] == 6
    assert dealt.available["mmlu"] == 18
    assert len(keys) == 30 + 9 + 30 + 9 + 3 * (5 + 9 + 6) + 60
    # an example of every group, as far as they go
    assert {item.user for item in dealt.users[-1].examples} == {"Dental", "Skin"}
    assert {item.group for item in dealt.training} == {
        "siqa", "openbookqa", *(f"mmlu/{s}" for s in SUBJECTS), "medmcqa/Dental", "medmcqa/Skin",
    }  # fmt: skip


def test_a_limit_is_spread_over_users_and_a_seed_is_a_choice(data) -> None:
    dealt = deal(data, limit=4)
    sizes = {user.name: len(user.queries) for user in dealt.users}
    assert sizes == {"siqa": 4, "openbookqa": 4, "mmlu/arithmetic": 2, "mmlu/colours": 1, "mmlu/towns": 1, "medmcqa": 4}
    assert deal(data, limit=4) == dealt
    assert deal(data, limit=4, seed=1).users != dealt.users
    assert {user.name for user in deal(data, limit=1).users} == {"siqa", "openbookqa", "mmlu/arithmetic", "medmcqa"}


def test_an_item_is_asked_without_its_choices() -> None:
    item = Item("1", "siqa", "Why?", ["a", "b b"], 1, "It rains.")
    assert item.right == ("It rains.\nQuestion: Why?\nAnswer:", " b b")
    assert Item("1", "mmlu", "Why?", ["a", "b"], 0, user="law").pairs[0].prompt == "Question: Why?\nAnswer:"
    assert item.key != Item("1", "siqa", "Why?", ["a", "b b"], 1, "It snows.").key


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not a question"),
        ('{"id": "1", "task": "siqa", "question": "q", "choices": ["a"], "answer": 1}', "no such answer"),
        ('{"id": "1", "task": "siqa", "question": "q", "choices": ["a"], "answer": -1}', "no such answer"),
        ('{"id": "1", "task": "siqa", "question": "q", "choices": ["a", " "], "answer": 0}', "empty choice"),
        ('{"id": "1", "task": "siqa", "question": "q", "choices": "a", "answer": 0}', "not a question"),
        (b"\xff", "not a question"),
    ],
)
def test_lines_that_are_none(line, message, tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(InvalidInput, match=message) as error:
        read(path)
    assert f"{path}:1" in str(error.value)


def test_data_that_is_missing_or_too_little(data, tmp_path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        deal(tmp_path, limit=1)
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "siqa_train.jsonl").write_text(json.dumps(make_item("siqa", "train", 0)) + "\n")
    with pytest.raises(InvalidInput, match="siqa has 1 items"):
        deal(tmp_path, limit=1)


def test_intervals_hold_what_they_say() -> None:
    exact = estimate([2.0] * 7)
    assert exact == {"mean": 2, "low": 2, "high": 2}
    generator = np.random.default_rng(0)
    values = generator.normal(1, 3, 400)
    found = estimate(values)
    assert found["mean"] == pytest.approx(values.mean())
    margin = 1.96 * values.std() / math.sqrt(400)  # the normal approximation
    assert found["high"] - found["mean"] == pytest.approx(margin, rel=0.1)
    assert found["mean"] - found["low"] == pytest.approx(margin, rel=0.1)
    assert estimate(values) == found


@pytest.fixture(scope="module")
def bench(data):
    needs.module("torch")
    needs.module("sklearn")
    return qa.Qa(load_nano(), deal(data, limit=6), TINY)


def test_choices_are_scored_as_transformers_scores_them(bench) -> None:
    import torch

    scores = bench._score()
    model, tokenizer = bench.model.model, bench.model.tokenizer
    for i, item in enumerate(bench.queries[:8]):
        log_likelihoods = []
        for pair in item.pairs:
            prompt, whole = tokenizer(pair.prompt)["input_ids"], tokenizer(pair.prompt + pair.completion)["input_ids"]
            start = len(prompt) - (prompt != whole[: len(prompt)])  # ":" may be one token with the space after it
            ids = torch.tensor([whole])
            with torch.inference_mode():
                log_probabilities = model(input_ids=ids).logits[0].log_softmax(-1)
            picked = log_probabilities[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]
            log_likelihoods.append((float(picked.sum()), ids.shape[1] - start))
        best = max(range(len(item.choices)), key=lambda c: log_likelihoods[c][0] / len(item.choices[c]))
        assert scores.right[i] == (best == item.answer)
        total, tokens = log_likelihoods[item.answer]
        assert scores.log_loss[i] == pytest.approx(-total / tokens, rel=1e-4)


def test_long_questions_lose_their_beginning(bench) -> None:
    text = bench.model.tokenize([Item("1", "siqa", "why " * 200, ["because"], 0).right])[0]
    short = qa._shortened(text, 40)
    assert len(short.ids) == len(short.in_completion) == 40
    assert short.ids[0] == text.ids[0]
    assert short.ids[1:] == text.ids[-39:]
    assert sum(short.in_completion) == sum(text.in_completion)
    assert qa._shortened(text, len(text.ids)) is text


@pytest.mark.slow
def test_the_command_with_a_real_small_model(data) -> None:
    folder = needs.reference_model()
    needs.module("sklearn")
    command = ["qa", "--model", str(folder), "--data", str(data), "--limit", "3", "--steps", "2", "--adapters", "3"]
    command += ["--batch-size", "4", "--learning-rate", "1e-3", "--threads", "1"]
    done = CliRunner().invoke(cli_bench.bench, [*command, "--json"], catch_exceptions=False)
    result = json.loads(done.stdout)
    assert list(result["rows"]) == ["base", "single_lora", "uniform", "nearest", "crayon"]
    base = result["rows"]["base"]
    assert base["log_loss_change"] == {"mean": 0, "low": 0, "high": 0}
    for row in result["rows"].values():
        assert row["log_loss"]["low"] <= row["log_loss"]["mean"] <= row["log_loss"]["high"]
        difference = row["log_loss"]["mean"] - base["log_loss"]["mean"]
        assert row["log_loss_change"]["mean"] == pytest.approx(difference, abs=1e-5)
        tasks = row["tasks"]
        assert np.mean([t["accuracy"]["mean"] for t in tasks.values()]) == pytest.approx(row["accuracy"]["mean"])
    assert result["rows"]["single_lora"]["log_loss"]["mean"] < base["log_loss"]["mean"]
    assert result["tasks"]["openbookqa"] == {"test": 3, "of": 9, "dropped": 3}
    assert (result["users"], result["seed"], result["settings"]["steps"]) == (6, 0, 2)
    assert 0.25 <= result["chance"] <= 0.5


def test_a_model_at_chance_is_told_so_and_a_better_one_is_not(data, monkeypatch) -> None:
    def scores(right: list[bool]) -> qa.Scores:
        return qa.Scores(np.array(right), np.ones(len(right), np.float32))

    class Fake:
        def __init__(self, _model, dealt, _settings) -> None:
            self.queries = [item for user in dealt.users for item in user.queries]

        def rows(self):
            n = len(self.queries)
            for name in ("base", "single_lora", "nearest", "uniform", "crayon"):
                yield name, scores([name == "crayon" and better] * n)

    monkeypatch.setattr(qa, "Qa", Fake)
    better = True
    assert qa.run(load_nano(), data, limit=6, settings=TINY)["note"] is None
    better = False
    result = qa.run(load_nano(), data, limit=6, settings=TINY)
    assert "only log-loss" in result["note"]
    command = ["qa", "--model", str(load_nano()), "--data", str(data), "--limit", "6"]
    printed = CliRunner().invoke(cli_bench.bench, command, catch_exceptions=False).stdout
    assert "only log-loss means anything" in printed
    assert "openbookqa: 6 of 9 test questions; 3 duplicates of them dropped" in printed
    assert printed.splitlines()[1].split()[:4] == ["base", "1.000", "(1.000", "to"]
