"""crayon run and chat, over the fake backend."""

from __future__ import annotations

import json
import re
import signal
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from crayon_runtime.cli import main
from crayon_runtime.cli.run import chat, run
from crayon_runtime.engine import Engine
from crayon_runtime.errors import AdapterError, ContextOverflow, InvalidInput
from tests.runtime import tiny
from tests.runtime.tiny import EOS, TOKENIZER, byte_ids, fake
from tests.support import needs

ANSWER = [*byte_ids("ok 日本"), EOS]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What `Engine.load` was called with, and the engine that it gave. `script`, `chat_template` and `context_length` shape it."""
    record: dict[str, Any] = {"script": ANSWER, "chat_template": None, "context_length": 512}
    inside = tiny.bundle(tmp_path)

    def load(bundle: Path, *, backend: str, threads: int | None, adapter: str | None) -> Engine:
        record.update(bundle=bundle, backend=backend, threads=threads)
        record["engine"] = tiny.engine(
            record["script"],
            chat_template=record["chat_template"],
            context_length=record["context_length"],
            bundle=inside,
        )
        try:
            record["engine"].set_adapter(adapter)
        except AdapterError:
            record["engine"].close()
            raise
        return record["engine"]  # type: ignore[no-any-return]

    monkeypatch.setattr(Engine, "load", load)
    return record


def call(command: Any, *args: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner(catch_exceptions=False).invoke(command, ["some/bundle", *args], input=stdin)


def test_the_answer_goes_to_stdout_and_its_speed_to_stderr(loaded: dict[str, Any]) -> None:
    result = call(run, "the alarm")
    assert (result.exit_code, result.stdout) == (0, "ok 日本\n")
    prompt = len(TOKENIZER.encode("the alarm"))
    assert result.stderr.startswith(f"prompt: {prompt} tokens, ")
    assert "first token after " in result.stderr
    assert f"answer: {len(ANSWER)} tokens, " in result.stderr
    assert result.stderr.endswith("tokens/s, stop\n")
    assert result.stderr.count("\n") == 1
    assert (loaded["bundle"], loaded["backend"], loaded["threads"]) == (Path("some/bundle"), "auto", None)
    assert fake(loaded["engine"]).closed


def test_a_prompt_is_a_turn_in_the_chat_template_unless_raw(loaded: dict[str, Any]) -> None:
    loaded["chat_template"] = tiny.CHATML
    turn = json.loads(call(run, "the alarm", "--json").stdout)
    raw = json.loads(call(run, "the alarm", "--json", "--raw").stdout)
    engine = loaded["engine"]
    assert turn["prompt_tokens"] == len(
        engine.tokenizer.apply_chat_template([{"role": "user", "content": "the alarm"}])
    )
    assert raw["prompt_tokens"] == len(engine.tokenizer.encode("the alarm"))
    assert turn["prompt_tokens"] > raw["prompt_tokens"]


def test_json_is_all_there_is_on_stdout(loaded: dict[str, Any]) -> None:
    result = call(run, "the alarm", "--json", "--adapter", "alice", "--stop", "本", "--max-new-tokens", "50")
    facts = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert (facts["text"], facts["finish_reason"], facts["stop"]) == ("ok 日", "stop", "本")
    assert (facts["adapter"], facts["backend"]) == ("alice", "fake")
    assert facts["token_ids"] == ANSWER[:-1]
    assert facts["generated_tokens"] == len(facts["log_probabilities"]) == len(ANSWER) - 1
    assert facts["first_token_seconds"] > 0


def test_options_reach_the_engine(loaded: dict[str, Any]) -> None:
    loaded["script"] = None
    options = {
        "temperature": 2.5, "top_k": 9, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 5, "max_new_tokens": 20,
    }  # fmt: skip
    args = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    got = json.loads(call(run, "the alarm", "--json", "--threads", "3", "--backend", "onnx", *args).stdout)
    assert got["token_ids"] == tiny.engine().generate("the alarm", **options).token_ids  # type: ignore[arg-type]
    assert (loaded["threads"], loaded["backend"]) == (3, "onnx")


def test_sliding(loaded: dict[str, Any]) -> None:
    loaded.update(script=byte_ids("x"), context_length=16)
    with pytest.raises(ContextOverflow):
        call(run, "x" * 30)
    assert call(run, "x" * 30, "--overflow", "slide", "--max-new-tokens", "40").stdout == "x" * 40 + "\n"
    assert call(run, "x", "--max-new-tokens", "400").stderr.endswith("length\n")


@pytest.mark.parametrize("text", ["the alarm", "日本\n\nthe", "  a "])
def test_a_prompt_from_stdin(loaded: dict[str, Any], text: str) -> None:
    loaded["script"] = None
    for end in ("", "\n", "\r\n"):
        got = json.loads(call(run, "-", "--json", stdin=(text + end).encode()).stdout)
        assert got["prompt_tokens"] == len(TOKENIZER.encode(text))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of what an answer may be."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in {
        "schema.json": b'{"enum": ["the", "the alarm"]}',
        "grammar.lark": 'start: "é" ("a" | "b")~3\n'.encode(),
        "grammar.gbnf": b'root ::= "a" tail\ntail ::= [0-9]{2}\n',
        "bad.json": b'{"type": "integer", "minimum": 5, "maximum": 4}',
        "broken.json": b'{"type":',
        "bad.lark": b"start: x\n\nx: missing\n",
        "bytes.json": b'{"a": "\xff"}',
    }.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "option, value, pattern",
    [
        ("--json-schema", "schema.json", '"the( alarm)?"'),
        ("--grammar", "grammar.lark", "é[ab]{3}"),
        ("--grammar", "grammar.gbnf", "a[0-9]{2}"),
        ("--regex", "[a-c]{4}é", "[a-c]{4}é"),
    ],
)
def test_an_answer_in_a_form(loaded: dict[str, Any], files: Path, option: str, value: str, pattern: str) -> None:
    needs.module("llguidance")
    loaded["script"] = None
    value = str(files / value) if (files / value).exists() else value
    for seed in range(5):
        args = ("the", option, value, "--temperature", "1", "--seed", str(seed))
        assert re.fullmatch(pattern + "\n", call(run, *args).stdout)
    assert json.loads(call(run, "the", option, value, "--json").stdout)["finish_reason"] == "stop"
    said = call(chat, option, value, stdin="the\nalarm\n").stdout.split("\n")
    assert [bool(re.fullmatch(pattern, line)) for line in said[:2]] == [True, True]


@pytest.mark.parametrize(
    "args, code, said",
    [
        (["--json-schema", "bad.json"], 1, ["minimum (5) is greater than maximum (4)", "bad.json"]),
        (["--json-schema", "broken.json"], 1, ["not JSON", "line 1 column 9", "broken.json"]),
        (["--json-schema", "bytes.json"], 1, ["not UTF-8: byte 7 is 0xFF", "bytes.json"]),
        (["--json-schema", "nowhere.json"], 1, ["cannot be read: No such file", "nowhere.json"]),
        (["--grammar", "."], 1, ["cannot be read: Is a directory"]),
        (["--grammar", "bad.lark"], 1, ['line 3, column 4: unknown name: "missing"', "bad.lark"]),
        (["--regex", "(a"], 1, ["unclosed group", "where: regex"]),
        (["--regex", "a", "--grammar", "grammar.lark"], 2, ["--grammar and --regex exclude each other"]),
    ],
)
@pytest.mark.parametrize("verb", [["run", "b", "the"], ["chat", "b"]])
def test_forms_that_cannot_be_served(
    loaded: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, files: Path,
    verb: list[str], args: list[str], code: int, said: list[str],
) -> None:  # fmt: skip
    needs.module("llguidance")
    monkeypatch.chdir(files)
    assert crayon(*verb, *args) == code
    printed = capsys.readouterr().err
    assert all(part in printed for part in said), printed
    assert "engine" not in loaded, "said before anything is loaded"


def test_a_form_without_the_extra(
    loaded: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert crayon("run", "b", "the", "--regex", "a") == 1
    assert "pip install 'crayon-edge[grammar]'" in capsys.readouterr().err
    assert crayon("run", "b", "the") == 0, "all else goes without"


def test_stdin_that_is_not_utf8(loaded: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="not UTF-8: byte 2 is 0xFF") as error:
        call(run, "-", stdin=b"ab\xff")
    assert error.value.where == "stdin"
    assert "engine" not in loaded, "said before anything is loaded"


def crayon(*args: str) -> int:
    return main(
        args, [EntryPoint(verb, f"crayon_runtime.cli.run:{verb}", "crayon.commands") for verb in ("run", "chat")]
    )


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["run", "b", "the"], 0, ""),
        (["run", "b", ""], 1, "the prompt is empty"),
        (["run", "b", "caf\udce9"], 1, "not valid Unicode"),
        (["run", "b", "the", "--temperature", "-1"], 1, "temperature is -1.0"),
        (["run", "b", "the", "--max-new-tokens", "0"], 1, "max_new_tokens is 0"),
        (["run", "b", "the", "--adapter", "dave"], 1, "there is no adapter 'dave'"),
        (["run", "b", "the", "--threads", "0"], 2, "--threads"),
        (["run", "b", "the", "--overflow", "wrap"], 2, "--overflow"),
        (["run", "b"], 2, "PROMPT"),
        (["chat", "b", "--json"], 2, "--json"),
    ],
)
def test_exit_codes(
    loaded: dict[str, Any], capsys: pytest.CaptureFixture[str], args: list[str], code: int, message: str
) -> None:
    assert crayon(*args) == code
    assert message in capsys.readouterr().err
    assert "engine" not in loaded or fake(loaded["engine"]).closed


def test_a_bundle_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert crayon("run", str(tmp_path / "nothing"), "the") == 1
    assert "there is no bundle here" in capsys.readouterr().err


def interrupting(ids: list[int], adapter: str | None) -> int:
    """Says x, and presses Ctrl-C at the third one; then ends."""
    text = TOKENIZER.decode(ids)
    if text.endswith("xxx"):
        return EOS
    if text.endswith("xx"):
        signal.raise_signal(signal.SIGINT)
    return byte_ids("x")[0]


def test_ctrl_c_ends_the_answer_of_run_with_130(loaded: dict[str, Any]) -> None:
    loaded["script"] = interrupting
    before = signal.getsignal(signal.SIGINT)
    result = call(run, "the alarm")
    assert (result.exit_code, result.stdout) == (130, "xxx\n")
    assert "cancelled" in result.stderr
    assert signal.getsignal(signal.SIGINT) is before
    assert fake(loaded["engine"]).closed


def test_a_second_ctrl_c_interrupts_at_once(loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    def script(ids: list[int], adapter: str | None) -> int:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return EOS

    loaded["script"] = script
    assert crayon("run", "b", "the alarm") == 130
    assert "interrupted" in capsys.readouterr().err
    assert fake(loaded["engine"]).closed


def test_a_chat_keeps_what_was_said_in_the_cache(loaded: dict[str, Any]) -> None:
    loaded["chat_template"] = tiny.CHATML
    result = call(chat, stdin="the alarm\n\na b\n/exit\nnever\n")
    assert result.exit_code == 0
    assert result.stdout == "ok 日本\nok 日本\n"
    first, second = (line for line in result.stderr.splitlines() if line.startswith("prompt:"))
    assert "in the cache" not in first
    assert "of them in the cache" in second
    backend = fake(loaded["engine"])
    assert backend.calls["new_cache"] == 1
    assert backend.closed


def test_a_chat_sends_the_whole_conversation_and_reset_forgets_it(loaded: dict[str, Any]) -> None:
    seen: list[str] = []

    def script(ids: list[int], adapter: str | None) -> int:
        seen.append(TOKENIZER.decode(ids, skip_special=False))
        return EOS if seen[-1].endswith("ok") else byte_ids("ok")[seen[-1].endswith("o")]

    loaded.update(script=script, chat_template=tiny.CHATML)
    result = call(chat, stdin="first\nsecond\n/reset\nthird\n")
    prompts = [text for text in seen if text.rstrip().endswith("assistant")]
    assert [[word in text for word in ("first", "second", "third")] for text in prompts] == [
        [True, False, False],
        [True, True, False],
        [False, False, True],
    ]
    assert prompts[1].count("ok") == 1
    assert "the conversation is forgotten" in result.stderr


def test_a_chat_without_a_template_completes_each_line(loaded: dict[str, Any]) -> None:
    result = call(chat, stdin="the alarm\na b\n")
    assert "no chat template: each line is a prompt of its own" in result.stderr
    assert result.stdout.startswith("ok 日本\nok 日本\n")
    counts = [line.split()[1] for line in result.stderr.splitlines() if line.startswith("prompt:")]
    assert counts == [str(len(TOKENIZER.encode(text))) for text in ("the alarm", "a b")]


def test_adapters_in_a_chat(loaded: dict[str, Any]) -> None:
    used: list[str | None] = []

    def script(ids: list[int], adapter: str | None) -> int:
        used.append(adapter)
        return EOS

    loaded["script"] = script
    lines = "/adapter", "a", "/adapter bob", "a", "/adapter dave", "a", "/adapter none", "a"
    result = call(chat, "--adapter", "alice", stdin="\n".join(lines))
    assert used == ["alice", "bob", "bob", None]
    assert "adapter: alice; in the bundle: alice, bob" in result.stderr
    assert "there is no adapter 'dave'" in result.stderr
    assert result.exit_code == 0


def test_ctrl_c_ends_the_answer_not_the_chat(loaded: dict[str, Any]) -> None:
    loaded.update(script=interrupting, chat_template=tiny.CHATML)
    result = call(chat, stdin="the alarm\nagain\n")
    assert result.stdout == "xxx\nxxx\n\n"
    assert result.exit_code == 0


def test_errors_do_not_end_a_chat(loaded: dict[str, Any]) -> None:
    loaded.update(chat_template=tiny.CHATML, context_length=100)
    result = call(chat, stdin="x" * 100 + "\na\n/wave\n")
    assert "the context holds 100" in result.stderr
    assert "there is no command /wave" in result.stderr
    assert result.stdout == "ok 日本\n\n"


def test_help_in_a_chat(loaded: dict[str, Any]) -> None:
    result = call(chat, stdin="/help\n/exit\n")
    for word in ("/adapter NAME", "/reset", "/help", "/exit"):
        assert word in result.stderr
