"""`crayon eval`: questions in files and API calls are asked and judged as the harness does it, and bad input is said."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import lm_eval.tasks
import pytest
from click.testing import CliRunner
from lm_eval.tasks._yaml_loader import load_yaml
from rouge_score.rouge_scorer import RougeScorer

from crayon_export import export
from crayon_runtime.errors import AdapterError, BackendError, CrayonError, InvalidInput, OutputError
from crayon_server.cli.evaluate import evaluate
from crayon_server.data.phone_assistant import benchmark, score
from crayon_server.evaluate.harness import api_calling, local
from crayon_server.evaluate.harness.model import CrayonLM
from crayon_server.models import load_nano

WORDS = "a red lamp|the blue river|oslo|seven trees|milk and bread|a long road|rome|green hills".split("|")
ITEMS: dict[str, dict[str, Any]] = {
    "arc_easy": {"choices": WORDS[:4]},
    "arc_challenge": {"choices": WORDS[:5]},
    "boolq": {"choices": ["False", "True"], "context": "Milk is white."},
    "piqa": {"choices": WORDS[:2]},
    "siqa": {"choices": WORDS[:3], "context": "Kim likes milk."},
    "hellaswag": {"choices": WORDS[:4]},
    "openbookqa": {"choices": WORDS[:4]},
    "winogrande": {"question": "The lamp is near the wall since _ is red.", "choices": ["the lamp", "the wall"]},
    "csqa": {"choices": WORDS[:5]},
    "qasc": {"choices": WORDS},
    "mmlu": {"choices": WORDS[:4], "user": "anatomy"},
    "medmcqa": {"choices": WORDS[:4], "user": "Dental"},
}
PROMPTS = {
    "arc_easy": ("Question: What is near, 0?\nAnswer:", [" a red lamp", " the blue river", " oslo", " seven trees"]),
    "boolq": ("Milk is white.\nQuestion: What is near, 0??\nAnswer:", [" no", " yes"]),
    "siqa": ("Q: Kim likes milk. What is near, 0?\nA:", [" a red lamp", " the blue river", " oslo"]),
    "openbookqa": ("What is near, 0?", [" a red lamp", " the blue river", " oslo", " seven trees"]),
    "csqa": (
        "Question: What is near, 0?\nA. a red lamp\nB. the blue river\nC. oslo\nD. seven trees\nE. milk and bread\nAnswer:",
        [" A", " B", " C", " D", " E"],
    ),
    "mmlu": (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "What is near, 0?\nA. a red lamp\nB. the blue river\nC. oslo\nD. seven trees\nAnswer:",
        [" A", " B", " C", " D"],
    ),
}
"""Of the first question, and its choices, as the harness's definition of each task says."""


def write(folder: Path, name: str, task: str, count: int = 3, **other: Any) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [
        {"id": f"{task}-{i}", "task": task, "question": f"What is near, {i}?", "answer": (i + 1) % 2}
        | ITEMS[task]
        | other
        for i in range(count)
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task in ITEMS:
        write(folder, f"{task}_test" if task != "piqa" else "piqa_dev", task)
    write(folder, "piqa_train", "piqa", 5, question="What else is there?")
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(load_nano(), tmp_path_factory.mktemp("bundle") / "nano", quantize="none").bundle.path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something wants the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def run(bundle: Path, *options: object, code: int = 0) -> Any:
    """The JSON of one command, or its error."""
    result = CliRunner().invoke(evaluate, [str(bundle), "--threads", "1", "--json", *map(str, options)])
    if code:
        assert isinstance(result.exception, CrayonError), result.output
        return result.exception
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.mark.usefixtures("no_network")
def test_every_local_task(bundle: Path, data: Path) -> None:
    assert local.present(data) == [*local.TASKS] == [*ITEMS]
    found = run(bundle, "--tasks", ",".join(ITEMS), "--data", data, "--limit", 2)
    assert found["tasks"].keys() == {*ITEMS, "mmlu_anatomy"}
    for name, row in found["tasks"].items():
        assert row["samples"] == 2
        metrics = row["metrics"]
        definition = load_yaml(
            Path(lm_eval.tasks.__file__).parent / local.TASKS[name.removesuffix("_anatomy")].file.format(user="anatomy")
        )
        assert metrics.keys() == {m["metric"] for m in definition["metric_list"]} | {"log_loss"}
        assert metrics["log_loss"]["value"] > 0
        assert metrics["log_loss"]["stderr"] >= 0
    assert found["tasks"]["mmlu"]["metrics"]["acc"] == found["tasks"]["mmlu_anatomy"]["metrics"]["acc"]
    assert found["tokens"]["computed"] < found["tokens"]["asked"]


def test_prompts_are_the_harness_s(data: Path) -> None:
    for name, (prompt, choices) in PROMPTS.items():
        loaded = local.load(name, data)
        task = next(iter(loaded)) if name == "mmlu" else loaded
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=1)
        assert [instance.args for instance in task.instances] == [(prompt, choice) for choice in choices]


def test_accuracy_and_log_loss_are_those_of_the_scores(bundle: Path, data: Path) -> None:
    found = run(bundle, "--tasks", "piqa", "--data", data)["tasks"]["piqa"]
    lm = CrayonLM(bundle, threads=1)
    right, normed, losses = [], [], []
    for i in range(3):
        instances = local_instances(local.load("piqa", data), i)
        scores = [score for score, _ in lm.loglikelihood(instances)]
        per_character = [s / len(choice) for s, choice in zip(scores, WORDS[:2], strict=True)]
        answer = (i + 1) % 2
        right.append(scores.index(max(scores)) == answer)
        normed.append(per_character.index(max(per_character)) == answer)
        losses.append(-scores[answer] / len(WORDS[answer].encode()))
    assert found["metrics"]["acc"]["value"] == pytest.approx(sum(right) / 3)
    assert found["metrics"]["acc_norm"]["value"] == pytest.approx(sum(normed) / 3)
    assert found["metrics"]["log_loss"]["value"] == pytest.approx(sum(losses) / 3)


def local_instances(task: Any, i: int) -> list[Any]:
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    return [instance for instance in task.instances if instance.doc_id == i]


def test_examples_are_shown_before_a_question(bundle: Path, data: Path) -> None:
    task = local.load("piqa", data, shots=2)
    task.set_config("num_fewshot", 2)
    task.set_fewshot_seed(1)
    task.build_all_requests(limit=1)
    shown = "Question: What else is there?\nAnswer: the blue river\n\n"
    other = "Question: What else is there?\nAnswer: a red lamp\n\n"
    context = task.instances[0].args[0]
    assert context.count(shown) + context.count(other) == 2
    assert context.endswith("Question: What is near, 0?\nAnswer:")
    assert run(bundle, "--tasks", "piqa", "--data", data, "--num-fewshot", 2)["num_fewshot"] == 2
    assert "6 are wanted" in str(run(bundle, "--tasks", "piqa", "--data", data, "--num-fewshot", 6, code=1))
    assert "arc_easy_train.jsonl" in str(run(bundle, "--tasks", "arc_easy", "--data", data, "--num-fewshot", 1, code=1))


# API calling


def test_judging_agrees_with_the_benchmark_and_with_rouge() -> None:
    rouge = RougeScorer(["rouge1", "rougeL"])
    queries = [query for user in benchmark().validation[:6] for query in user.queries[:3]]
    for expected in queries:
        for other in queries[:9]:
            judged, reference = (
                api_calling.judge(other.completion, expected.completion),
                score(other.completion, expected),
            )
            assert (judged["exact_match"], judged["intent"], judged["structure"]) == (
                reference.exact,
                reference.intent,
                reference.structure,
            )
            wanted = rouge.score(expected.completion, other.completion)
            assert (judged["rouge1"], judged["rougeL"]) == (wanted["rouge1"].fmeasure, wanted["rougeL"].fmeasure)


@pytest.mark.parametrize(
    "generated, wanted",
    [
        ("music.play(song=yesterday)\nPlaying yesterday for you.", (1, 1, 1, 1, 1)),
        ("music.play(song=tomorrow)\nPlaying tomorrow for you.", (0, 1, 1, 0.75, 0.75)),
        ("music.play(title=yesterday)\nfor you, yesterday", (0, 1, 0, 6 / 7, 4 / 7)),
        ('{"name": "music.play", "arguments": {"song": "yesterday"}}', (0, 1, 0, 0, 0)),
        ("timer.start(song=yesterday)", (0, 0, 0, 0, 0)),
        ("I cannot do that", (0, 0, 0, 0, 0)),
        ("", (0, 0, 0, 0, 0)),
    ],
)
def test_a_call_with_a_reply(generated: str, wanted: tuple[float, ...]) -> None:
    found = api_calling.judge(generated, "music.play(song=yesterday)\nPlaying yesterday for you.")
    assert [*found] == [*api_calling.METRICS]
    assert [*found.values()] == pytest.approx(wanted)


def test_calls_in_openai_s_form() -> None:
    call = '{"name": "set_alarm", "arguments": {"time": "7:30", "days": [1, 2]}}'
    other = '{"name": "set_alarm", "arguments": {"time": "8:30", "days": [3]}}'
    assert api_calling.judge(call, call)["exact_match"] == 1
    shared = pytest.approx(2 * 7 / (10 + 9))  # words: all but 7, 1 and 2 of the one, and 8 and 3 of the other
    wanted = {"exact_match": 0, "intent": 1, "structure": 1, "rouge1": shared, "rougeL": shared}
    assert api_calling.judge(other, call) == wanted


@pytest.mark.usefixtures("no_network")
def test_the_shipped_calls(bundle: Path) -> None:
    found = run(bundle, "--tasks", "api_calling", "--limit", 36)["tasks"]["api_calling"]
    assert found["samples"] == 36
    assert found["metrics"].keys() == {*api_calling.METRICS}
    assert found["metrics"]["intent"]["value"] > 0.9  # nano knows what is meant, and not who speaks
    assert found["metrics"]["rouge1"]["value"] > found["metrics"]["exact_match"]["value"]


def test_calls_of_one_s_own_in_the_chat_template(bundle: Path, tmp_path: Path) -> None:
    queries = [user.queries[0] for user in benchmark().validation[:4]]
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(json.dumps({"prompt": q.prompt, "completion": q.completion}) + "\n" for q in queries))
    plain = run(bundle, "--tasks", "api_calling", "--data", path)
    chat = run(bundle, "--tasks", "api_calling", "--data", path, "--apply-chat-template")
    assert plain["tasks"] == chat["tasks"]  # nano's template writes the very prompts
    assert chat["chat_template"]
    assert plain["tasks"]["api_calling"]["samples"] == 4


# What is printed and written


def test_a_table_and_a_file(bundle: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = CliRunner().invoke(
        evaluate, [str(bundle), "--tasks", "piqa", "--data", str(data), "--threads", "1", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert written["backend"] == "onnx"
    assert f"piqa  acc       {written['tasks']['piqa']['metrics']['acc']['value']:.4f}" in result.stdout
    assert "%|" not in result.stderr


def test_what_is_interrupted_leaves_no_file(
    bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("crayon_server.evaluate.harness.scoring.rows", interrupt)
    out = tmp_path / "result.json"
    out.write_text("older")
    result = CliRunner().invoke(evaluate, [str(bundle), "--tasks", "piqa", "--data", str(data), "--out", str(out)])
    assert result.exit_code != 0
    assert isinstance(result.exception, KeyboardInterrupt | SystemExit | click.Abort)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("result.json", "older")]


def test_importing_the_verb_is_light() -> None:
    code = "import sys, crayon_server.cli.evaluate; print({'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Bad input


@pytest.mark.slow
def test_names_that_nobody_knows(bundle: Path, data: Path) -> None:
    unknown = run(bundle, "--tasks", "piqqa", "--data", data, code=1)
    assert "there is no task 'piqqa'; near: piqa, siqa," in str(unknown)
    assert f"with --data: {', '.join(ITEMS)}" in str(unknown)


@pytest.mark.slow
def test_a_task_of_the_hub_without_a_network(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = run(bundle, "--tasks", "piqa", code=1)
    assert "the data of piqa cannot be had" in str(error)
    assert "--data" in str(error)


def test_data_that_are_not_there(bundle: Path, tmp_path: Path) -> None:
    write(tmp_path / "few", "boolq_dev", "boolq")
    missing = run(bundle, "--tasks", "boolq,piqa", "--data", tmp_path / "few", code=1)
    assert "there are no questions of piqa" in str(missing)
    assert "there are: boolq" in str(missing)
    assert "there is no data" in str(run(bundle, "--tasks", "piqa", "--data", tmp_path / "none", code=1))
    file = tmp_path / "few" / "boolq_dev.jsonl"
    assert "read from a folder, and this is a file" in str(run(bundle, "--tasks", "boolq", "--data", file, code=1))
    assert "examples" in str(run(bundle, "--tasks", "api_calling", "--num-fewshot", 1, code=1))
    assert "no task is named" in str(run(bundle, "--tasks", ",", code=1))


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "there are no questions in the file"),
        (b'{"id": "1"}\n', "not a question"),
        (b"not JSON\n", "not a question"),
        (b'{"id": "\xff"}\n', "not a question"),
        (b'{"id": "1", "task": "piqa", "question": "Q", "choices": ["a", "b"], "answer": 2}\n', "no such answer"),
        (b'{"id": "1", "task": "piqa", "question": "Q", "choices": ["a", "b"], "answer": -1}\n', "no such answer"),
        (b'{"id": "1", "task": "piqa", "question": "Q", "choices": ["a", " "], "answer": 0}\n', "an empty choice"),
        (
            b'{"id": "1", "task": "piqa", "question": "Q", "choices": ["a", "b", "c"], "answer": 0}\n',
            "has 2 choices, not 3",
        ),
    ],
)
def test_questions_that_are_none(bundle: Path, tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "piqa_test.jsonl").write_bytes(content)
    error = run(bundle, "--tasks", "piqa", "--data", tmp_path, code=1)
    assert isinstance(error, InvalidInput)
    assert says in str(error)
    assert "piqa_test.jsonl" in str(error)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "no texts"),
        (b'{"prompt": "a"}\n', "line 1"),
        (b'{"prompt": "\xff", "completion": "a(b=c)"}\n', "line 1"),
        (b'{"prompt": "a", "completion": "Good morning!"}\n', "text 1 does not begin with a call: 'Good morning!'"),
    ],
)
def test_calls_that_are_none(bundle: Path, tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_bytes(content)
    assert says in str(run(bundle, "--tasks", "api_calling", "--data", path, code=1))


def test_other_subjects_and_sentences(bundle: Path, tmp_path: Path) -> None:
    write(tmp_path, "mmlu_test", "mmlu", user="astrology")
    assert "no task 'mmlu_astrology'" in str(run(bundle, "--tasks", "mmlu", "--data", tmp_path, code=1))
    write(tmp_path, "winogrande_dev", "winogrande", question="No gap.")
    assert "_ in the place of a choice" in str(run(bundle, "--tasks", "winogrande", "--data", tmp_path, code=1))


def test_bundles_that_cannot(bundle: Path, data: Path, tmp_path: Path) -> None:
    options = ("--tasks", "piqa", "--data", data)
    assert isinstance(run(bundle, *options, "--backend", "executorch", code=1), BackendError)
    assert isinstance(run(bundle, *options, "--adapter", "nobody", code=1), AdapterError)
    assert "no bundle" in str(run(tmp_path / "none", *options, code=1))
    assert isinstance(run(bundle, *options, "--out", tmp_path, code=1), OutputError)
