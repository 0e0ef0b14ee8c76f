"""crayon run and chat with a server, and crayon route, over the fake backend and a server that speaks HTTP."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from crayon_runtime.cli import main
from crayon_runtime.cli.hybrid import Hybrid, show
from crayon_runtime.cli.route import route
from crayon_runtime.cli.run import chat, run
from crayon_runtime.engine import Engine
from crayon_runtime.errors import InvalidInput, ServerError
from crayon_runtime.routing.policies import PLAIN
from crayon_runtime.routing.router import Answer, Part, Router
from crayon_runtime.routing.sent import SentLog, sent_log_path
from tests.runtime import pools, tiny
from tests.runtime.routing import hybrid
from tests.runtime.routing.hybrid import Scripted
from tests.runtime.routing.test_calibrate import QUERIES, unsure_of_questions
from tests.runtime.routing.upstreams import Upstream, refuses
from tests.runtime.tiny import EOS, byte_ids, fake
from tests.support import needs

SIZE = 8
UNSURE = ("--policy", "confidence", "--threshold", "0")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The bundle is `tmp_path / "model"`; `script` and `chat_template` shape what answers. The latest engine is in "engine"."""
    record: dict[str, Any] = {"script": [*byte_ids("ok 日本"), EOS], "chat_template": None}
    inside = tiny.bundle(tmp_path)

    def load(
        bundle: Path, *, backend: str = "auto", threads: int | None = None, adapter: str | Path | None = None
    ) -> Engine:
        record["engine"] = tiny.engine(
            record["script"], chat_template=record["chat_template"], tap_size=SIZE, bundle=inside
        )
        record["engine"].set_adapter(adapter)
        return record["engine"]  # type: ignore[no-any-return]

    monkeypatch.setattr(Engine, "load", load)
    monkeypatch.chdir(tmp_path)
    return record


@pytest.fixture
def customized(loaded: dict[str, Any], tmp_path: Path) -> Path:
    """The folder of the customized model."""
    hybrid.customized(tmp_path / "model.customized", size=SIZE)
    return tmp_path / "model.customized"


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


def call(command: Any, *args: str, stdin: str | None = None) -> Result:
    return CliRunner(catch_exceptions=False).invoke(command, [*args], input=stdin)


def test_run_asks_the_server_and_says_so(loaded: dict[str, Any], upstream: Upstream) -> None:
    result = call(run, "model", " the alarm ", "--server", upstream.url, *UNSURE)
    assert (result.exit_code, result.stdout) == (0, "an answer\n")
    assert upstream.queries == ["the alarm"]
    assert "answered by the server: the score" in result.stderr
    assert "bytes sent" in result.stderr
    assert fake(loaded["engine"]).closed
    (entry,) = SentLog(sent_log_path("model")).read()
    assert (entry.query, entry.outcome) == ("the alarm", "answered")


def test_run_keeps_what_the_device_can(loaded: dict[str, Any], upstream: Upstream) -> None:
    result = call(run, "model", "the alarm", "--server", upstream.url, "--policy", "never")
    assert result.stdout == "ok 日本\n"
    assert "answered by the device: the policy is 'never'" in result.stderr
    assert upstream.asked == []
    assert not sent_log_path("model").exists()


def test_json_has_every_field_of_an_answer(loaded: dict[str, Any], upstream: Upstream) -> None:
    facts = json.loads(call(run, "model", "the", "--server", upstream.url, *UNSURE, "--json").stdout)
    assert set(facts) == {*Answer.__dataclass_fields__, "adapter", "backend"}
    assert (facts["text"], facts["route"], facts["fallback"], facts["policy"]) == (
        "an answer",
        "server",
        False,
        "confidence",
    )
    assert facts["generation"]["text"] == "ok 日本"
    assert facts["signals"] == {"log_probability": facts["score"]}
    assert facts["seconds"].keys() == {"device", "score", "server", "total"}
    always = json.loads(call(run, "model", "the", "--server", upstream.url, "--policy", "always", "--json").stdout)
    assert always["generation"] is None


def test_a_server_that_fails_leaves_the_devices_answer(loaded: dict[str, Any], upstream: Upstream) -> None:
    upstream.always = refuses(401, "who are you")
    result = call(run, "model", "the", "--server", upstream.url, "--policy", "always")
    assert (result.exit_code, result.stdout) == (0, "ok 日本\n")
    assert "answered by the device, as a fallback: the policy is 'always', but the server refuses" in result.stderr


def test_offline_sends_nothing(loaded: dict[str, Any], upstream: Upstream) -> None:
    result = call(run, "model", "the", "--server", upstream.url, "--offline", *UNSURE, "--json")
    facts = json.loads(result.stdout)
    assert (facts["text"], facts["fallback"], upstream.asked) == ("ok 日本", True, [])


def test_key_model_and_rules_reach_the_server(loaded: dict[str, Any], upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame\n")
    (tmp_path / "rules.toml").write_text("deny = ['secret']\n[[redact]]\npattern = '\\d+'\nreplacement = '#'\n")
    args = ("--server", upstream.url, "--server-key-file", "key", "--server-model", "big", "--rules", "rules.toml")
    for prompt in ("call 555", "a secret"):
        call(run, "model", prompt, *args, *UNSURE)
    (asked,) = upstream.asked
    assert asked.headers["authorization"] == "Bearer sesame"
    assert json.loads(asked.body)["model"] == "big"
    assert upstream.queries == ["call #"]


def test_a_customized_model_answers_unless_another_adapter_is_named(loaded: dict[str, Any], customized: Path) -> None:
    def adapter(*args: str) -> Any:
        return json.loads(call(run, "model", "the", "--json", *args).stdout)["adapter"]

    assert adapter("--offline") == "customized"
    assert adapter("--offline", "--adapter", "alice") == "alice"
    assert adapter("--offline", "--adapter", "none") is None
    assert adapter() is None, "nothing was said of who answers"


def test_the_policy_of_a_customized_model(loaded: dict[str, Any], customized: Path) -> None:
    facts = json.loads(call(run, "model", "the", "--json", "--offline").stdout)
    assert facts["policy"] == "calibrated"
    facts = json.loads(call(run, "model", "the", "--json", "--policy", "paper", "--threshold", "0.9").stdout)
    assert (facts["policy"], facts["threshold"]) == ("paper", 0.9)
    assert facts["signals"].keys() == {"prototypes_mean"}


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["--server-key-file", "k"], 2, "--server-key-file is for --server"),
        (["--rules", "r", "--offline"], 2, "--rules is for --server"),
        (["--policy", "never", "--threshold", "1"], 2, "has no threshold"),
        (["--policy", "best"], 2, "--policy"),
        (["--policy", "calibrated"], 1, "the signal prototypes_top_k needs"),
        (["--policy", "paper", "--threshold", ".5"], 1, "the signal prototypes_mean needs"),
        (["--server", "http://llm.example"], 1, "everybody on the way could read"),
        (["--server", "https://llm.example", "--rules", "nothing.toml"], 1, "cannot be read"),
        (["--server", "https://llm.example", "--server-key-file", "nothing"], 1, "the API key cannot be read"),
    ],
)
def test_what_makes_no_sense_is_said(
    loaded: dict[str, Any], capsys: pytest.CaptureFixture[str], args: list[str], code: int, message: str
) -> None:
    verbs = [EntryPoint("run", "crayon_runtime.cli.run:run", "crayon.commands")]
    assert main(["run", "model", "the", *args], verbs) == code
    assert message in capsys.readouterr().err
    assert "engine" not in loaded or fake(loaded["engine"]).closed


def test_a_chat_sends_what_was_typed_and_nothing_else(loaded: dict[str, Any], upstream: Upstream) -> None:
    loaded["chat_template"] = tiny.CHATML
    result = call(chat, "model", "--server", upstream.url, *UNSURE, stdin="first\n  second \n")
    assert result.stdout == "an answer\nan answer\n\n"
    assert upstream.queries == ["first", "second"]
    prompts = [line for line in result.stderr.splitlines() if "prompt: " in line]
    assert "in the cache" in prompts[1], "the server's answer is part of the conversation, and the session goes on"


def test_adapters_can_be_changed_in_a_chat(loaded: dict[str, Any], customized: Path) -> None:
    result = call(chat, "model", "--offline", stdin="a\n/adapter none\na\n")
    assert [line.rpartition("(")[2] for line in result.stderr.splitlines() if line.startswith("answered")] == [
        "calibrated)",
        "confidence)",
    ]


def test_ctrl_c_while_the_device_answers(loaded: dict[str, Any], upstream: Upstream) -> None:
    def script(ids: list[int], adapter: str | None) -> int:
        if tiny.TOKENIZER.decode(ids).endswith("xx"):
            signal.raise_signal(signal.SIGINT)
        return byte_ids("x")[0]

    loaded["script"] = script
    result = call(run, "model", "the", "--server", upstream.url, *UNSURE)
    assert (result.exit_code, result.stdout, upstream.asked) == (130, "xxx\n", [])


@pytest.mark.parametrize(
    "said, policy, after, shown",
    [
        (["sure"], "confidence", None, "ok 日本\nsure\n"),
        (["sure"], "never", None, "ok 日本\n"),
        ([ServerError("down")], "confidence", None, "ok 日本\n"),
        (["su", ServerError("down")], "confidence", None, "ok 日本\nsu\nok 日本\n"),
        (["su", ServerError("down")], "always", None, "su\nok 日本\n"),
        (["sure"], "always", None, "sure\n"),
        ([ServerError("down")], "confidence", 3, "ok 日本\n"),
        (["su", ServerError("down")], "confidence", 3, "ok \nsu\nok 日本\n"),
    ],
)
def test_who_watches_sees_drafts_and_what_became_of_them(
    capsys: pytest.CaptureFixture[str], said: list[Any], policy: str, after: int | None, shown: str
) -> None:
    chosen = PLAIN[policy]()
    if chosen.weights:
        chosen = msgspec.structs.replace(chosen, threshold=0.0, after=after)
    with tiny.engine([*byte_ids("ok 日本"), EOS]) as engine:
        stream = Router(engine, policy=chosen, server=Scripted(said)).stream("the alarm")
        show(stream, live=True)
    assert capsys.readouterr().out == shown


def test_parts_that_nobody_watches_are_shown_when_they_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with tiny.engine([*byte_ids("ok"), EOS]) as engine:
        server = Scripted(["half", ServerError("down")])
        show(Router(engine, policy="always", server=server).stream("the"), live=False)
    assert capsys.readouterr().out == "ok\n"


def test_without_options_nothing_changes() -> None:
    options = dict.fromkeys(Hybrid.__dataclass_fields__)
    options.update(plain_http=False, offline=False)
    assert Hybrid.take({**options}) is None
    with pytest.raises(click.UsageError):
        Hybrid.take({**options, "plain_http": True})
    assert Part("a", "device", draft=True).draft


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be served."""
    needs.module("fastapi")
    apps: list[Any] = []
    monkeypatch.setattr("crayon_runtime.server.serve.serve", lambda app, _: apps.append(client_of(app)))
    return apps


def client_of(app: Any) -> dict[str, Any]:
    client = needs.module("starlette.testclient").TestClient(app, base_url="http://127.0.0.1")
    with client:
        models = [model["id"] for model in client.get("/v1/models").json()["data"]]
        return {"models": models, "customization": client.get("/v1/customization").json()}


def test_a_server_with_a_server_has_a_hybrid_model(
    loaded: dict[str, Any], served: list[Any], customized: Path, upstream: Upstream, tmp_path: Path
) -> None:
    serve = ("model", "--serve", "127.0.0.1:0")
    pools.write(tmp_path / "pool")
    for args in (
        (),
        ("--offline",),
        ("--server", upstream.url),
        ("--pool", "pool"),
        ("--server", upstream.url, "--pool", "pool"),
    ):
        assert call(run, *serve, *args).exit_code == 0
    assert ["hybrid" in one["models"] for one in served] == [False, False, True, False, True]
    assert [one["customization"]["possible"] for one in served] == [False, False, True, True, True]
    assert [one["customization"]["to"] for one in served] == [None, None, upstream.url, None, None]
    assert upstream.asked == [], "nobody has asked for anything"


@pytest.mark.parametrize(
    "args, message",
    [
        (["the", "--pool", "p"], "--pool is for --serve"),
        (["the", "--unsigned"], "--unsigned is for --serve"),
        (["--serve", ":0", "--keys", "k", "--unsigned"], "exclude each other"),
        (["the", "--serve", ":0"], "--serve takes no PROMPT"),
    ],
)
def test_serving_options_that_make_no_sense(loaded: dict[str, Any], args: list[str], message: str) -> None:
    result = call(run, "model", *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "engine" not in loaded


# crayon route


@pytest.fixture
def data(loaded: dict[str, Any], customized: Path, tmp_path: Path) -> Path:
    """Queries, half of which the model is not sure of, and wrong."""
    loaded["script"] = unsure_of_questions
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": q.prompt, "completion": q.completion}) + "\n" for q in QUERIES))
    return path


def test_calibrate_keeps_what_then_decides(data: Path, customized: Path, upstream: Upstream, tmp_path: Path) -> None:
    result = call(route, "calibrate", "model", "--data", "data.jsonl", "--budget", "0.5", "--plot", "curve.svg")
    assert result.exit_code == 0, result.stderr
    assert f"calibrated for a budget of 50% with {len(QUERIES)} queries, labelled" in result.stdout
    assert (tmp_path / "curve.svg").read_text().startswith("<svg")
    kept = json.loads((customized / "routing.json").read_bytes())
    assert (kept["budget"], kept["labelled"], kept["n"]) == (0.5, True, len(QUERIES))

    assert call(run, "model", "the alarm", "--server", upstream.url).stdout == "ok please\n"
    assert call(run, "model", "the alarm?", "--server", upstream.url).stdout == "an answer\n"
    assert upstream.queries == ["the alarm?"]

    shown = call(route, "show", "model").stdout
    assert "compared with: 9 prototypes of server, 10 examples of the user's own" in shown
    assert "decides, unless another one is chosen: calibrated" in shown
    facts = json.loads(call(route, "show", "model", "--json").stdout)
    assert facts["calibration"]["budget"] == 0.5
    assert facts["calibration"]["curve"][-1]["accuracy"] == 1


def test_calibrate_for_an_accuracy_as_json(data: Path) -> None:
    made = json.loads(
        call(route, "calibrate", "model", "--data", "data.jsonl", "--target-accuracy", "0.9", "--json").stdout
    )
    assert (made["target_accuracy"], made["budget"]) == (0.9, None)
    assert {policy["name"] for policy in made["policies"]} == {"calibrated", "early", "confidence", "paper"}


def test_a_calibration_of_another_adapter_is_said(data: Path, customized: Path) -> None:
    call(route, "calibrate", "model", "--data", "data.jsonl", "--budget", "0.5")
    hybrid.customized(customized, size=SIZE, seed=1)
    for result in (call(route, "show", "model"), call(run, "model", "the", "--offline")):
        assert "made with another adapter, and is ignored" in result.stderr
    assert "not calibrated" in call(route, "show", "model").stdout


def test_what_cannot_be_calibrated_leaves_everything_as_it_was(data: Path, customized: Path, tmp_path: Path) -> None:
    (tmp_path / "blind.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(InvalidInput, match="without labels"):
        call(route, "calibrate", "model", "--data", "blind.jsonl", "--target-accuracy", "0.9")
    with pytest.raises(InvalidInput, match="knows no accuracy"):
        call(route, "calibrate", "model", "--data", "blind.jsonl", "--budget", "0.9", "--plot", "curve.svg")
    assert call(route, "calibrate", "model", "--data", "data.jsonl").exit_code == 2
    assert not (customized / "routing.json").exists()
    assert not (tmp_path / "curve.svg").exists()


def test_a_model_that_is_not_customized_has_no_route(loaded: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="not customized"):
        call(route, "show", "model")


def test_the_log_is_for_its_user_to_read(loaded: dict[str, Any], upstream: Upstream) -> None:
    assert "nothing was sent" in call(route, "log", "model").stdout
    for prompt in ("one", "two\x1b[2J\nlines"):
        call(run, "model", prompt, "--server", upstream.url, *UNSURE)
    shown = call(route, "log", "model")
    assert "\x1b" not in shown.stdout
    assert [line.split("  ")[-1] for line in shown.stdout.splitlines()[1:]] == ["one", "two [2J lines"]
    assert "2 queries" in shown.stderr
    facts = json.loads(call(route, "log", "model", "--json").stdout)
    assert [entry["query"] for entry in facts["sent"]] == ["one", "two\x1b[2J\nlines"]
