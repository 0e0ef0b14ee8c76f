"""`crayon demo`: service, relay and device are real processes; only the training is short."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from crayon_export.executorch import programs
from crayon_runtime import Engine
from crayon_runtime.backends import served
from crayon_runtime.bundle import Bundle
from crayon_runtime.cli.common import size_text
from crayon_runtime.customize import PARTS as MEASURED
from crayon_runtime.errors import BackendError, MissingExtra, OutputError
from crayon_runtime.pool import Pool
from crayon_runtime.prototypes import read_prototypes
from crayon_runtime.routing import SentLog, sent_log_path
from crayon_runtime.routing.policies import Route
from crayon_runtime.signing import KeyStore, TrustedKeys, verify_signature
from crayon_server import models
from crayon_server.cli import demo as cli
from crayon_server.data.phone_assistant import benchmark, more_examples, useful
from crayon_server.demo import backends, comparison, hybrid, page, story
from crayon_server.demo.device import Text
from crayon_server.demo.processes import running
from crayon_server.demo.report import CHAT, Asked, Comparison, DemoReport, Judged
from crayon_server.demo.service import serving
from crayon_server.demo.wire import Wire, split
from crayon_server.evaluate.exact_match import MAX_NEW_TOKENS
from crayon_server.models import load_nano, load_nano_server
from crayon_server.pool.build import Settings as PoolSettings
from tests.runtime import pools
from tests.support import needs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

QUICK = story.Settings(
    PoolSettings(adapters=4, steps=25, batch_size=32, threads=1),
    sources=48,
    oracle_texts=24,
    oracle_steps=5,
    queries=3,
    mixed=(4, 2, 3),
    threads=1,
)


@pytest.fixture(scope="module")
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """All that were started."""
    started: list[subprocess.Popen[bytes]] = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            started.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Popen)
        yield started


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, processes: list[subprocess.Popen[bytes]]) -> tuple[Path, DemoReport]:
    for package in ("torch", "transformers", "accelerate", "uvicorn", "httpx"):
        needs.module(package)
    out = tmp_path_factory.mktemp("demo") / "demo"
    return out, story.run(out, QUICK)


# The story


def test_customized_users_are_understood_better(done: tuple[Path, DemoReport]) -> None:
    for person in done[1].people:
        before, after = person.examples_log_loss
        assert person.installed == (after <= 1.01 * before)
        if person.installed:
            assert person.scores["after"].log_loss != person.scores["before"].log_loss
        else:
            assert person.scores["after"] == person.scores["before"]
    assert sum(person.installed for person in done[1].people) >= 2
    assert sum(p.scores["after"].log_loss for p in done[1].people) < sum(
        p.scores["before"].log_loss for p in done[1].people
    )


def test_who_the_pool_knows(done: tuple[Path, DemoReport]) -> None:
    everybody = {user.name: user for user in benchmark().validation}
    sources = benchmark().train[: QUICK.sources]
    for person in done[1].people:
        user = everybody[person.user]
        assert person.sources == sum(source.convention == user.convention for source in sources)
        assert bool(person.sources) == user.seen
        assert person.examples == tuple((e.prompt.strip(), e.completion) for e in user.examples)
    assert any(not everybody[person.user].seen for person in done[1].people)


def test_no_training_has_the_answer_of_a_query(tmp_path: Path) -> None:
    told = story._Story(tmp_path, story.Settings(), lambda _: None, nullcontext)
    for user in told.users.values():
        trained = [e for _, e in told.texts] + [*user.examples, *more_examples(user, told.settings.oracle_texts)]
        assert not {e.completion for e in trained} & {query.completion for query in user.queries}
    asked = {query.completion for queries in told.mixed.values() for _, query in queries}
    assert len(asked) > 90
    assert not {e.completion for _, e in told.texts} & asked
    assert len(told.texts) > 6000


def test_the_right_answer_to_what_everybody_is_told(done: tuple[Path, DemoReport]) -> None:
    wanted = [person.shared.wanted for person in done[1].people]
    assert wanted[0] == '{"fn": "calendar.add", "what": "dinner", "who": "anna", "day": "monday", "time": "7:30 PM"}'
    assert re.fullmatch(r"add_calendar\(arg_what=\w+n, arg_who=anna, arg_day=\w+n, arg_time=18:30\)", wanted[1])
    assert re.fullmatch(r"calendar\.add \| what: \w+n \| who: anna \| day: \w+n \| time: 18:30", wanted[2])
    assert len({person.shared.before for person in done[1].people}) == 1  # the base knows no user


def test_the_device_process_is_light(done: tuple[Path, DemoReport]) -> None:
    device = done[1].device
    assert not device["torch_loaded"]
    assert device["peak_rss_bytes"] < 200e6
    assert device["running_answer_kept"]


def test_numbers_are_finite(done: tuple[Path, DemoReport]) -> None:
    def check(value: Any) -> None:
        if isinstance(value, float):
            assert np.isfinite(value)
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                check(item)

    report = done[1].to_dict()
    check(report)
    for person in report["people"]:
        assert sum(person["alpha"]) == pytest.approx(1, abs=1e-3)
        assert len(person["alpha"]) == QUICK.pool.adapters
        assert all(0 <= score["exact_match"] <= score["intent"] <= 1 for score in person["scores"].values())
        assert 0 < sum(person["seconds"].values()) <= person["total_seconds"]


def test_parameters_are_counted_as_transformers_does(done: tuple[Path, DemoReport]) -> None:
    needs.module("transformers")
    assert done[1].parameters == models.load(load_nano()).num_parameters()


# What is sent


def test_no_word_of_a_user_is_sent_to_customize(done: tuple[Path, DemoReport]) -> None:
    for person in done[1].people:
        said = "".join(message.request_head + message.request_body for message in person.customizing).lower()
        texts = [text for pair in person.examples for text in pair]
        words = {word for text in texts for word in re.findall(r"[a-z]{4,}", text.lower())}
        assert len(words) > 20
        assert not any(text.lower() in said for text in texts)
        assert not {word for word in words if re.search(rf"\b{word}\b", said)}


def test_what_is_shown_is_what_the_service_received(done: tuple[Path, DemoReport], tmp_path: Path) -> None:
    """Asked with the very bytes that the report shows, another process of the service gives the very adapter."""
    httpx = needs.module("httpx")
    out, report = done
    with serving(
        out / "server/pool",
        out / "server/keys",
        tmp_path / "log",
        upstream=load_nano_server(),
        cache=tmp_path / "cache",
    ) as (host, port):
        for person in report.people:
            sent = person.order
            assert len(sent.request_body.encode()) == sent.request_bytes[1]
            assert f"content-length: {sent.request_bytes[1]}\r\n" in sent.request_head.lower()
            assert json.loads(sent.request_body)["alpha"] == person.alpha
            url = f"http://{host}:{port}/v1/customizations"
            again = httpx.post(url, content=sent.request_body, trust_env=False)
            assert f"etag: {again.headers['etag']}\r\n" in sent.response_head
            assert len(again.content) == sent.response_bytes[1]


def test_the_service_counts_the_same_bytes(done: tuple[Path, DemoReport]) -> None:
    out, report = done
    log = [json.loads(line) for line in (out / "server/service.log").read_text().splitlines() if line[0] == "{"]
    messages = [message for person in report.people for message in (*person.customizing, *person.chat)]
    assert {message.response_head.split()[1] for message in messages} == {"200"}
    chats = [line for line in log if line["route"] == CHAT], [m for person in report.people for m in person.chat]
    others = (
        [line for line in log if line["route"] != CHAT],
        [m for person in report.people for m in person.customizing],
    )
    pairs = [pair for kind in (others, chats) for pair in zip(*kind, strict=False)]
    assert len(pairs) == len(messages)
    for line, message in pairs:  # of each kind, what follows is what the demo itself has asked
        assert line["method"] == message.request_head.split()[0]
        assert line["ms"] == message.service_ms
        if line["route"] == CHAT:  # its chunks have sizes, which the service does not count
            assert 0 < message.response_bytes[1] - line["bytes"] < message.response_bytes[1] / 4
        else:
            assert line["bytes"] == message.response_bytes[1]
    queries = {query.prompt for person in report.people for query in person.asked}
    routed = {query.prompt for person in report.people for query in person.asked if query.route == "server"}
    assert len(chats[0]) == len(chats[1]) + len(queries - routed)
    again = others[0][len(others[1]) :]  # in ExecuTorch
    assert {line["route"] for line in again} <= {line["route"] for line in others[0][: len(others[1])]}


def test_what_leaves_with_a_query_is_the_query(done: tuple[Path, DemoReport]) -> None:
    out, report = done
    # The policy of so small a demo may keep all that one of them asks.
    asking = [person for person in report.people if person.chat]
    assert len(asking) > 1
    for person in report.people:
        assert len(person.chat) == sum(query.route == "server" for query in person.asked)
    for person in asking:
        sent = [query for query in person.asked if query.route == "server"]
        assert not any(query.fallback for query in person.asked)
        for query, message in zip(sent, person.chat, strict=True):
            assert json.loads(message.request_body) == {
                "model": "default",
                "messages": [{"role": "user", "content": query.prompt}],
                "stream": True,
                "max_tokens": MAX_NEW_TOKENS,
            }
            assert query.sent_bytes == message.request_bytes[1] == len(message.request_body.encode())
            assert query.server_tokens > 0
        log = SentLog(sent_log_path(out / "device/customized" / person.name)).read()
        assert [entry.query for entry in log] == [query.prompt for query in sent]
        assert {entry.outcome for entry in log} == {"answered"}
        assert person.examples_sent == 0
        prompt, completion = person.examples[0]
        leaky = replace(person.chat[0], request_body=json.dumps({"content": completion}))
        assert replace(person, messages=(leaky, replace(leaky, request_body=prompt))).examples_sent == 1


# Who answers


def test_who_answers(done: tuple[Path, DemoReport]) -> None:
    everybody = {user.name: user for user in benchmark().validation}
    for person in done[1].people:
        user = everybody[person.user]
        wanted = [*user.queries[:4], *user.out_of_task[:2], *user.server_only[:3]]
        assert [query.wanted for query in person.asked] == [query.completion for query in wanted]
        assert [query.part for query in person.asked] == ["in_task"] * 4 + ["other_domain"] * 2 + ["server_only"] * 3
        for query, example in zip(person.asked, wanted, strict=True):
            assert query.text == (query.by_server if query.route == "server" else query.draft)
            assert (query.score is None or query.score < query.threshold) == (query.route == "server")
            for judged, answer in ((query.draft_is, query.draft), (query.by_server_is, query.by_server)):
                assert judged.exact == (answer == example.completion)
                assert judged.useful == useful(answer, example)
            assert query.shown_is == (query.by_server_is if query.route == "server" else query.draft_is)
    beyond = [query for person in done[1].people for query in person.asked if query.part == "server_only"]
    assert any(query.by_server_is.useful for query in beyond)
    assert not any(query.draft_is.useful for query in beyond)


def test_the_policy_lies_on_its_curve(done: tuple[Path, DemoReport]) -> None:
    queries = [query for person in done[1].people for query in person.asked]
    for measure, curve in done[1].routing.curves.items():
        assert curve.policy_calls == sum(query.route == "server" for query in queries) / len(queries)
        assert np.interp(curve.policy_calls, curve.calls, curve.accuracy) == pytest.approx(curve.policy_accuracy)
        assert curve.device == pytest.approx(np.mean([getattr(query.draft_is, measure) for query in queries]))
        assert curve.server == pytest.approx(np.mean([getattr(query.by_server_is, measure) for query in queries]))
        best = np.interp(curve.calls, curve.oracle_calls, curve.oracle_accuracy)
        assert (best >= np.array(curve.accuracy) - 1e-9).all()
    useful_, exact = (done[1].routing.curves[measure].policy_accuracy for measure in ("useful", "exact"))
    assert exact <= useful_


def test_a_curve_of_answers_without_a_score_and_of_fallbacks() -> None:
    right, wrong = Judged(exact=False, useful=True), Judged(exact=False, useful=False)

    def query(score: float | None, draft: Judged, by_server: Judged, *, fallback: bool = False) -> Asked:
        low = score is None or score < 0
        shown = by_server if low and not fallback else draft
        route: Route = "server" if low and not fallback else "device"
        texts = ("q", "w", route, "why", fallback, score, 0.0, "shown", "draft", "server", shown, draft, by_server)
        return Asked("in_task", *texts, 5, 6, 7, {})

    queries = [query(None, wrong, right), query(-1, wrong, right, fallback=True), query(1, right, wrong)]
    curve = hybrid.curves(queries)["useful"]
    assert curve.calls == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert curve.accuracy == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3])
    assert (curve.policy_calls, curve.policy_accuracy) == pytest.approx((1 / 3, 2 / 3))  # one call has failed
    assert curve.oracle_accuracy == pytest.approx([1 / 3, 1, 2 / 3])
    assert hybrid.curves(queries)["exact"].apgr is None


def test_the_pool_has_what_the_server_llm_says(done: tuple[Path, DemoReport]) -> None:
    out, report = done
    pool = Pool.open(out / "server/pool")
    assert pool.manifest.prototypes is not None
    assert pool.manifest.prototypes.count == report.routing.prototypes > 0
    for person in report.people:
        if person.installed:
            adapter = Bundle.open(out / "device/customized" / person.name / "adapter")
            assert read_prototypes(adapter, 96) is not None


def test_the_adapters_are_signed_with_fresh_keys(done: tuple[Path, DemoReport]) -> None:
    out, report = done
    trusted = TrustedKeys.read(out / "device/keys.json")
    assert trusted.keys == KeyStore.open(out / "server/keys").keys
    for person in report.people:
        if person.installed:
            verify_signature(Bundle.open(out / "device/customized" / person.name / "adapter"), trusted)


# Two backends


@pytest.fixture(scope="module")
def compared(done: tuple[Path, DemoReport]) -> Comparison:
    needs.native()
    needs.module("executorch")
    assert done[1].not_compared is None
    assert done[1].comparison is not None
    return done[1].comparison


def test_both_backends_are_measured(done: tuple[Path, DemoReport], compared: Comparison) -> None:
    onnx, executorch = compared.backends
    assert (onnx.name, executorch.name) == ("onnx", "executorch")
    for facts, folder in ((onnx, "bundle"), (executorch, "bundle-executorch")):
        bundle = Bundle.open(done[0] / "device" / folder, verify=True)
        assert served(bundle) == [facts.name]
        assert 0 < facts.weights_bytes < facts.bundle_bytes < done[1].float_bytes
        assert facts.golden_passed == facts.golden_cases == 6
        assert 0 < facts.golden_error < facts.golden_tolerance
        assert 0 < facts.mean_kl < 0.2
        assert facts.load_seconds > 0
        assert facts.prefill_tokens_per_second > facts.decode_tokens_per_second > 0
        assert facts.peak_rss_bytes < 200e6
        assert not facts.torch_loaded
    assert onnx.mean_kl == done[1].mean_kl


def test_how_far_they_agree(done: tuple[Path, DemoReport], compared: Comparison) -> None:
    agreed, examples = compared.agreement, [text for person in done[1].people for text in person.examples]
    assert agreed.answers == len(examples)
    assert 0.8 < agreed.same_best_token <= 1
    assert 0 < agreed.mean_kl < 0.2
    answers = []
    for facts, folder in zip(compared.backends, ("bundle", "bundle-executorch"), strict=True):
        with Engine.load(done[0] / "device" / folder, backend=facts.name) as engine:
            answers.append([engine.generate(f"{said}\n", max_new_tokens=MAX_NEW_TOKENS).text for said, _ in examples])
    assert agreed.same_answers == pytest.approx(sum(a == b for a, b in zip(*answers, strict=True)), abs=2)  # threads


def test_everybody_is_customized_in_executorch_too(done: tuple[Path, DemoReport], compared: Comparison) -> None:
    out, report = done
    trusted = TrustedKeys.read(out / "device/keys.json")
    assert [one.name for one in compared.customized] == [person.name for person in report.people]
    assert sum(one.installed for one in compared.customized) >= 2
    base = Bundle.open(out / "device/bundle-executorch")
    for one, person in zip(compared.customized, report.people, strict=True):
        assert not one.torch_loaded
        if not one.installed:
            continue
        adapter = Bundle.open(out / "device/customized-executorch" / one.name / "adapter")
        verify_signature(adapter, trusted)
        assert served(adapter) == ["executorch"]
        assert one.adapter_bytes == adapter.size > 0
        with Engine.load(base, backend="executorch", adapter=adapter) as engine:
            answers = [engine.generate(f"{said}\n", max_new_tokens=MAX_NEW_TOKENS).text for said, _ in person.examples]
            engine.set_adapter(None)
            before = [engine.generate(f"{said}\n", max_new_tokens=MAX_NEW_TOKENS).text for said, _ in person.examples]
        assert answers != before


def test_what_a_backend_says_is_scored(done: tuple[Path, DemoReport], tmp_path: Path) -> None:
    """Given its own greedy answer, every token of it is the most likely one."""
    bundle, prompt = done[0] / "device/bundle", f"{done[1].people[0].examples[0][0]}\n"
    with Engine.load(bundle, threads=1) as engine:
        answer = engine.generate(prompt, max_new_tokens=MAX_NEW_TOKENS)
        ids = engine.tokenizer.encode(prompt + answer.text)[answer.prompt_tokens :]
    logits = tmp_path / "logits.npy"
    job = backends.Job(str(bundle), "onnx", 1, [(prompt, answer.text)], MAX_NEW_TOKENS, str(logits))
    with running(backends.__name__, job) as process:
        measured = msgspec.json.decode(process.communicate()[0], type=backends.Measured)
    assert np.load(logits).argmax(1).tolist() == ids
    assert measured.answers == [answer.token_ids]
    assert len(measured.prefill_seconds) == len(measured.decode_seconds) == backends.REPETITIONS
    quiet = msgspec.structs.replace(job, texts=[], logits=str(tmp_path / "none"))
    with running(backends.__name__, quiet) as process:
        measured = msgspec.json.decode(process.communicate()[0], type=backends.Measured)
    assert measured.answers == measured.golden == []
    assert not (tmp_path / "none").exists()


def test_agreement(tmp_path: Path) -> None:
    def said(answers: list[list[int]]) -> backends.Measured:
        return backends.Measured(0.1, 1, [0.1], [0.1], answers, [], False)

    one, other = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    np.save(tmp_path / "one.npy", one + 7)
    np.save(tmp_path / "other.npy", other)
    files = [tmp_path / "one.npy", tmp_path / "other.npy"]
    agreed = comparison._agreement([said([[1, 2], [3]]), said([[1, 2], [4]])], files)
    assert (agreed.answers, agreed.same_answers, agreed.tokens) == (2, 1, 2)
    assert agreed.same_best_token == 0.5
    assert agreed.mean_kl == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2)


def test_what_is_missing_for_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "check_installed", lambda: None)
    monkeypatch.setitem(sys.modules, "crayon_native", None)
    assert re.search(r"^crayon_native\b.*; to have it: pip install .*make native$", comparison.missing() or "")

    def absent() -> None:
        raise MissingExtra("pte", "exporting for ExecuTorch")

    monkeypatch.setattr(programs, "check_installed", absent)
    assert (comparison.missing() or "").endswith("; to have it: pip install 'crayon-edge[pte]'")


def test_without_a_comparison_the_demo_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(comparison, "missing", lambda: "no compiler")
    waited = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(story._Story, "_oracle", lambda _: nullcontext(waited))
    for part in ("_export", "_build", "_with_prototypes"):
        monkeypatch.setattr(story._Story, part, lambda *_: None)
    monkeypatch.setattr(story._Story, "_serve", lambda *_, **__: (None, None, None, None))
    monkeypatch.setattr(story._Story, "_report", lambda _, *facts: facts)
    said: list[str] = []
    compared, missing, _ = story._Story(tmp_path, QUICK, said.append, nullcontext).tell()[-3:]  # type: ignore[index]
    assert (compared, missing) == (None, "no compiler")
    assert "without a comparison of backends: no compiler" in said


def test_a_report_without_a_comparison(done: tuple[Path, DemoReport]) -> None:
    alone = replace(done[1], comparison=None, not_compared="no compiler; to have it: buy one")
    assert alone.to_text().splitlines()[-1] == "backends not compared: no compiler; to have it: buy one"
    shown = page.render(alone, Pool.open(done[0] / "server/pool"))
    assert "That was not compared here: no compiler; to have it: buy one." in shown
    assert "has the bundle, the trusted" in shown


# The files


def test_the_folder_can_be_used(done: tuple[Path, DemoReport]) -> None:
    out, report = done
    assert sorted(path.name for path in out.iterdir()) == ["device", "oracle", "report.html", "report.json", "server"]
    assert [path.name for path in out.parent.iterdir()] == ["demo"]
    assert json.loads((out / "report.json").read_text()) == json.loads(msgspec.json.encode(report.to_dict()))
    assert Pool.open(out / "server/pool", verify=True).manifest.adapters == report.pool.adapters


_VOID = frozenset({"meta", "br"})


class _Page(HTMLParser):
    """Refuses what a page that stands alone does not have, and collects its text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "img", "object", "base")
        assert not {name for name, _ in attrs} & {"src", "href", "xlink:href", "srcset", "onload", "onclick", "data"}
        self.tags.append(tag)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_stands_alone(done: tuple[Path, DemoReport]) -> None:
    out, report = done
    content = (out / "report.html").read_text()
    parsed = _Page()
    parsed.feed(content)
    parsed.close()
    assert parsed.open == []
    assert not re.search(r"url\(|@import|\bnan\b|\binf\b", content, re.IGNORECASE)
    assert "prefers-color-scheme: dark" in content
    assert parsed.tags.count("svg") > 10
    text = "".join(parsed.text)
    assert "Alice, Clara and Bruno ask" in " ".join(text.split())
    for person in report.people:
        assert person.order.request_body in text
        for line in person.lines:
            assert all(said in text for said in (line.prompt, line.wanted, line.before, line.after))
        for query in person.asked:
            assert query.prompt in text
            assert query.draft in text
        assert all(message.request_body in text for message in person.chat)
    assert "convention never seen" in text
    shown = " ".join(text.split())
    for measure, curve in report.routing.curves.items():
        assert f"{curve.policy_accuracy:.0%} right, {curve.policy_calls:.0%} to the server" in shown, measure
    assert "crayon bench customization" in text
    if report.comparison:
        agreed = report.comparison.agreement
        assert f"to {agreed.same_answers} of {agreed.answers} prompts" in shown
        for facts in report.comparison.backends:
            assert f"{facts.decode_tokens_per_second:.0f} tokens/s" in shown
            assert size_text(facts.peak_rss_bytes) in shown


def test_all_that_is_measured_is_shown(done: tuple[Path, DemoReport]) -> None:
    assert {*MEASURED} - {"blend"} == {*page.PARTS}
    assert all({*person.seconds} <= {*page.PARTS} for person in done[1].people)


def test_the_summary(done: tuple[Path, DemoReport]) -> None:
    text = done[1].to_text()
    assert re.search(r"bruno, convention never seen\s+\d+%\s+\d+%\s+\d+%", text)
    assert f"sent for alice: {done[1].people[0].order.request_bytes[1]} B" in text
    assert re.search(
        r"useful answers to 27 queries, 15 of them .*:\n\d+% by the device, \d+% by the server LLM, \d+% by both", text
    )


def test_the_summary_of_a_comparison(done: tuple[Path, DemoReport], compared: Comparison) -> None:
    text = done[1].to_text()
    assert re.search(r"the same model in both backends +ONNX Runtime +ExecuTorch\n", text)
    assert re.search(r"golden cases +6 of 6 +6 of 6\n", text)
    assert f"the same answer to {compared.agreement.same_answers} of 30 prompts" in text


def test_the_command(done: tuple[Path, DemoReport], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def run(out: Path, settings: story.Settings, **_: Any) -> DemoReport:
        asked.append((out, settings.threads, settings.pool.threads))
        return done[1]

    monkeypatch.setattr(story, "run", run)
    shown = CliRunner().invoke(cli.demo, ["--out", str(tmp_path / "x")], catch_exceptions=False)
    assert shown.stdout.splitlines()[-1] == f"report: {tmp_path / 'x/report.html'}"
    printed = CliRunner().invoke(cli.demo, ["--out", "y", "--threads", "2", "--json"], catch_exceptions=False)
    assert json.loads(printed.stdout) == json.loads(msgspec.json.encode(done[1].to_dict()))
    assert asked == [(tmp_path / "x", None, 1), (Path("y"), 2, 2)]


# What is left behind


def test_no_process_is_left(done: tuple[Path, DemoReport], processes: list[subprocess.Popen[bytes]]) -> None:
    ran = [" ".join(map(str, process.args)) for process in processes if isinstance(process.args, list)]
    assert [command.count(" serve ") for command in ran if "crayon" in command].count(1) >= 1
    assert all(process.poll() is not None for process in processes)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path, stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "crayon_runtime", "demo", "--out", str(tmp_path / "demo")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (running := _children(process.pid)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(stop)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode not in (0, -signal.SIGKILL)
    assert b"Traceback" not in said
    assert not [child for child in running if Path("/proc", str(child)).exists()]
    assert list(tmp_path.iterdir()) == []


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_the_service_ends_with_its_block(tmp_path: Path) -> None:
    needs.module("uvicorn")
    pool, keys = pools.write(tmp_path / "pool"), KeyStore.create(tmp_path / "keys")
    serves = serving(pool.path, keys.path, tmp_path / "log", upstream=load_nano_server(), cache=tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt), serves as address:
        socket.create_connection(address).close()
        raise KeyboardInterrupt
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_a_service_that_does_not_start(tmp_path: Path) -> None:
    with (
        pytest.raises(BackendError, match=r"(?s)the service did not start.*no pool here"),
        serving(tmp_path / "absent", tmp_path, tmp_path / "log", upstream=load_nano_server(), cache=tmp_path / "cache"),
    ):
        pass


def test_only_a_demo_is_replaced(
    done: tuple[Path, DemoReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = []

    def tell(told: story._Story) -> DemoReport:
        began.append(told.folder)
        raise ZeroDivisionError

    monkeypatch.setattr(story._Story, "tell", tell)
    for content in ("{}", "[]", "mine", '{"kind": "other"}'):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine/report.json").write_text(content)
        with pytest.raises(OutputError, match="something else than an earlier demo"):
            story.run(tmp_path / "mine", QUICK)
        assert (tmp_path / "mine/report.json").read_text() == content
    with pytest.raises(OutputError):
        story.run(tmp_path / "mine/report.json", QUICK)
    assert not began
    (tmp_path / "empty").mkdir()
    for replaced in (done[0], tmp_path / "empty", tmp_path / "new"):
        with pytest.raises(ZeroDivisionError):
            story.run(replaced, QUICK)
    assert len(began) == 3
    assert (done[0] / "report.html").exists()  # what did not finish replaces nothing


def test_a_process_that_fails() -> None:
    with (
        pytest.raises(BackendError, match=r"(?s)demo.absent ended with exit code 1:.*No module named"),
        running("crayon_server.demo.absent", Text("a", "b")) as process,
    ):
        process.wait()


# The relay


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """Answers each request with its length, in many small pieces, on the same connection."""
    import threading

    listening = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with client:
            while data := client.recv(1 << 20):
                _, body = split(data)
                answer = b"HTTP/1.1 200 OK\r\n\r\n" + body[::-1] * 1000
                for start in range(0, len(answer), 1001):
                    client.sendall(answer[start : start + 1001])

    def accept() -> None:
        while True:
            try:
                client = listening.accept()[0]
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listening.getsockname()
    listening.close()


def test_the_relay_passes_every_byte_and_writes_it_down(echo: tuple[str, int]) -> None:
    with Wire(*echo) as wire:
        address = ("127.0.0.1", int(wire.url.rpartition(":")[2]))
        asked = [b"POST /%d HTTP/1.1\r\n\r\n" % i + bytes(range(256)) for i in range(3)]
        got = []
        with socket.create_connection(address) as client, socket.create_connection(address) as other:
            for end, request in ((client, asked[0]), (client, asked[1]), (other, asked[2])):
                end.sendall(request)
                wanted, answer = 19 + 256_000, b""
                while len(answer) < wanted and (piece := end.recv(1 << 16)):
                    answer += piece
                got.append(answer)
        exchanges = wire.exchanges
    assert [exchange.request for exchange in exchanges] == asked
    assert [exchange.response for exchange in exchanges] == got
    assert all(e.started <= e.answered <= e.ended for e in exchanges)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_the_relay_survives_a_service_that_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        gone = closed.getsockname()
    with Wire(*gone) as wire, socket.create_connection(("127.0.0.1", int(wire.url.rpartition(":")[2]))) as client:
        client.settimeout(5)
        assert client.recv(1) == b""
        assert wire.exchanges == []


def test_split() -> None:
    assert split(b"GET / HTTP/1.1\r\nA: b\r\n\r\nbody\r\n\r\n") == (b"GET / HTTP/1.1\r\nA: b\r\n\r\n", b"body\r\n\r\n")
