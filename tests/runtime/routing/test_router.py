"""Who answers, over the fake backend and a server that is a script."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from crayon_runtime.bundle import Bundle
from crayon_runtime.constraint import Constraint
from crayon_runtime.customized import ROUTING
from crayon_runtime.engine import Engine
from crayon_runtime.errors import AdapterError, ContextOverflow, InvalidInput, ManifestError, ServerError
from crayon_runtime.routing.calibration import Calibration, adapter_sha256
from crayon_runtime.routing.policies import EARLY, Policy, confidence
from crayon_runtime.routing.router import Answer, Part, Router
from crayon_runtime.routing.rules import Rules
from crayon_runtime.routing.sent import SentLog
from crayon_runtime.routing.signals import signals
from tests.runtime import tiny
from tests.runtime.routing import hybrid
from tests.runtime.routing.hybrid import Scripted
from tests.runtime.tiny import EOS, byte_ids, fake
from tests.support import needs

SIZE = 8
SAID = "ok 日本"
DOWN = ServerError("the server is down")

SURE, UNSURE = confidence(-100.0), confidence(0.0)
"""Policies that keep every answer that is one, and none."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    with tiny.engine([*byte_ids(SAID), EOS], tap_size=SIZE) as engine:
        yield engine


def collect(router: Router, prompt: Any = "the alarm", **options: Any) -> tuple[list[Part], Answer]:
    with router.stream(prompt, **options) as stream:
        parts = list(stream)
    return parts, stream.answer


def final(parts: list[Part], source: str) -> str:
    return "".join(part.text for part in parts if not part.draft and part.source == source)


def drafts(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if part.draft)


def test_what_the_device_is_sure_of_it_answers(engine: Engine) -> None:
    server = Scripted()
    parts, answer = collect(Router(engine, policy=SURE, server=server))
    assert (answer.text, answer.route, answer.fallback, server.asked) == (SAID, "device", False, [])
    assert drafts(parts) == final(parts, "device") == SAID
    assert [part.draft for part in parts][-1] is False
    assert (answer.policy, answer.threshold, answer.finish_reason) == ("confidence", -100.0, "stop")
    assert (
        answer.score == answer.signals["log_probability"] == pytest.approx(np.mean(answer.generation.log_probabilities))
    )  # type: ignore[union-attr]
    assert "not below the threshold" in answer.reason
    assert answer.generation is not None
    assert answer.generation.text == SAID
    assert (answer.sent_bytes, answer.server_tokens) == (0, 0)
    assert answer.seconds.keys() == {"device", "score", "total"}
    assert 0 < answer.seconds["device"] + answer.seconds["score"] <= answer.seconds["total"]


def test_what_it_is_not_sure_of_the_server_answers(engine: Engine) -> None:
    server = Scripted()
    parts, answer = collect(Router(engine, policy=UNSURE, server=server), "  the alarm\n", max_new_tokens=50)
    assert (answer.text, answer.route, answer.fallback) == ("from the server", "server", False)
    assert (server.asked, server.limits) == (["the alarm"], [50])
    assert (drafts(parts), final(parts, "device"), final(parts, "server")) == (SAID, "", "from the server")
    assert answer.generation is not None
    assert answer.generation.text == SAID
    assert "below the threshold" in answer.reason
    assert (answer.server_tokens, answer.sent_bytes, answer.finish_reason) == (2, len("the alarm"), "length")
    assert answer.seconds.keys() == {"device", "score", "server", "total"}
    assert server.closed == 1


@pytest.mark.parametrize(
    "said, why",
    [
        ([DOWN], "the server is down"),
        (["half of ", DOWN], "the server is down"),
        ([ValueError("secret")], "asking the server failed with ValueError"),
        ([], "the server's answer is empty"),
        ([" ", "\n"], "the server's answer is empty"),
    ],
)
@pytest.mark.parametrize("policy", ["always", UNSURE, msgspec.structs.replace(UNSURE, after=3)])
def test_whatever_is_wrong_with_the_server_the_device_answers(
    engine: Engine, policy: Any, said: list[Any], why: str
) -> None:
    parts, answer = collect(Router(engine, policy=policy, server=Scripted(said)))
    assert (answer.text, answer.route, answer.fallback) == (SAID, "device", True)
    assert answer.reason.endswith(f", but {why}")
    assert final(parts, "device") == SAID
    sources = [part.source for part in parts if not part.draft]
    assert sources == sorted(sources, reverse=True), "what the server had said comes before the device's answer"
    assert answer.finish_reason == "stop"
    assert answer.generation is not None
    assert answer.generation.token_ids == engine.generate("the alarm").token_ids


def test_a_broken_server_object_is_no_error(engine: Engine) -> None:
    class Broken(Scripted):
        def ask(self, *_: Any, **__: Any) -> Any:
            raise OSError("no network")

    assert Router(engine, policy="always", server=Broken()).answer("the alarm").text == SAID


def test_never_shows_no_drafts_and_asks_nobody(engine: Engine) -> None:
    server = Scripted()
    parts, answer = collect(Router(engine, policy="never", server=server))
    assert (answer.text, answer.route, answer.signals, server.asked) == (SAID, "device", {}, [])
    assert [part.draft for part in parts] == [False] * len(parts)
    assert len(parts) > 1, "it streams"


def test_always_does_not_run_the_device(engine: Engine) -> None:
    answer = Router(engine, policy="always", server=Scripted()).answer("the alarm")
    assert (answer.text, answer.route, answer.generation) == ("from the server", "server", None)
    assert fake(engine).calls["prefill"] == 0
    assert answer.seconds.keys() == {"server", "total"}


def test_always_still_refuses_what_the_device_could_not_answer(engine: Engine) -> None:
    with pytest.raises(InvalidInput, match="the prompt is empty"):
        Router(engine, policy="always", server=Scripted()).answer("")


LONG = "x" * 10_000


@pytest.mark.parametrize("policy", [SURE, "always"])
def test_what_is_too_long_for_the_device_goes_to_the_server(engine: Engine, policy: Any) -> None:
    server = Scripted()
    answer = Router(engine, policy=policy, server=server).answer(LONG)
    assert (answer.route, answer.fallback, answer.generation) == ("server", False, None)
    assert server.asked == [LONG]
    assert "the context holds" in answer.reason


@pytest.mark.parametrize("policy, server", [(SURE, Scripted([DOWN])), (SURE, None), ("never", Scripted())])
def test_what_nobody_can_answer_is_refused(engine: Engine, policy: Any, server: Any) -> None:
    router = Router(engine, policy=policy, server=server)
    with pytest.raises(ContextOverflow, match="the context holds"):
        router.answer(LONG)
    router.server = Scripted()
    assert router.answer("the alarm").text == SAID


@pytest.mark.parametrize("after", [2, 3, 5])
def test_early_decides_after_a_few_tokens_and_computes_no_more(engine: Engine, after: int) -> None:
    policy = msgspec.structs.replace(UNSURE, after=after)
    parts, answer = collect(Router(engine, policy=policy, server=Scripted()))
    assert (answer.text, answer.route) == ("from the server", "server")
    assert answer.generation is not None
    assert (answer.generation.generated_tokens, answer.generation.finish_reason) == (after, "cancelled")
    assert fake(engine).calls["decode"] == after - 1
    assert drafts(parts) == SAID[: len(drafts(parts))]


def test_early_keeps_what_it_is_sure_of_and_streams_the_rest(engine: Engine) -> None:
    policy = msgspec.structs.replace(SURE, after=3)
    parts, answer = collect(Router(engine, policy=policy, server=Scripted()))
    assert (answer.text, answer.route, answer.score) == (SAID, "device", answer.signals["log_probability"])
    first = [part.draft for part in parts].index(False)
    assert final(parts, "device") == SAID
    assert drafts(parts) == parts[first].text
    assert len(parts) > first + 1


def test_early_with_an_answer_that_ends_before(engine: Engine) -> None:
    policy = msgspec.structs.replace(UNSURE, after=100)
    assert Router(engine, policy=policy, server=Scripted()).answer("the alarm").route == "server"


def test_early_signals_are_those_of_the_tokens_so_far() -> None:
    with tiny.engine(tap_size=SIZE) as engine:
        policy = Policy("two", {"log_probability": 1.0, "least_log_probability": 0.1}, 0.0, -100.0, after=EARLY)
        router = Router(engine, policy=policy, server=Scripted())
        reference = router.known(None).reference
        answer = router.answer("the alarm", max_new_tokens=20)
        beginning = engine.generate("the alarm", max_new_tokens=EARLY)
        assert answer.signals == signals(beginning, reference, policy.weights)
        assert answer.text == engine.generate("the alarm", max_new_tokens=20).text


def test_without_a_server_answers_say_that_they_should_have_been_its(engine: Engine) -> None:
    answer = Router(engine, policy=UNSURE).answer("the alarm")
    assert (answer.text, answer.route, answer.fallback) == (SAID, "device", True)
    assert answer.reason.endswith(", but there is no server to ask")
    sure = Router(engine, policy=SURE).answer("the alarm")
    assert (sure.fallback, sure.route) == (False, "device")


def test_an_engine_answers_and_its_router_can_be_set(engine: Engine) -> None:
    assert engine.answer("the alarm").policy == "confidence"
    engine.router = Router(engine, policy="always", server=Scripted())
    assert engine.answer("the alarm", max_new_tokens=5).text == "from the server"


def test_token_ids_are_for_the_device_and_a_query_for_the_server(engine: Engine) -> None:
    server = Scripted()
    router = Router(engine, policy="always", server=server)
    ids = engine.tokenizer.encode("the alarm")
    nothing = router.answer(ids)
    assert (nothing.route, nothing.fallback) == ("device", True)
    assert nothing.reason.endswith("there is no text to ask the server for")
    assert router.answer(ids, query="wake me").route == "server"
    assert server.asked == ["wake me"]


def test_an_empty_answer_has_no_usable_signal() -> None:
    with tiny.engine([EOS], tap_size=SIZE) as engine:
        answer = Router(engine, policy=SURE, server=Scripted()).answer("the alarm")
        assert (answer.route, answer.reason) == ("server", "no usable signal")
        assert math.isnan(answer.score)
        alone = Router(engine, policy=SURE).answer("the alarm")
        assert (alone.text, alone.route, alone.fallback) == ("", "device", True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_tap_that_is_not_finite_has_no_usable_signal(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    def broken(state: int, row: Any) -> None:
        row[:] = bad

    engine.set_adapter(hybrid.customized(tmp_path / "own", size=SIZE))
    monkeypatch.setattr("crayon_runtime.backends.fake.write_hidden", broken)
    with np.errstate(invalid="ignore"):
        answer = Router(engine, server=Scripted(), folder=tmp_path / "own").answer("the alarm")
    assert (answer.route, answer.reason, answer.policy) == ("server", "no usable signal", "calibrated")


def test_rules_are_asked_before_anything_is_sent(engine: Engine) -> None:
    server = Scripted()
    rules = Rules(deny=["secret"], redact=[("[0-9]+", "#")])
    router = Router(engine, policy=UNSURE, server=server, rules=rules)
    assert router.answer("call 555 now").route == "server"
    assert server.asked == ["call # now"]
    denied = router.answer("my secret")
    assert (denied.route, denied.fallback, denied.text) == ("device", True, SAID)
    assert "the rules deny what matches secret" in denied.reason
    assert len(server.asked) == 1


def test_the_log_has_what_was_sent_before_it_is(engine: Engine, tmp_path: Path) -> None:
    log = SentLog(tmp_path / "sent.jsonl")
    seen: list[int] = []

    class Watching(Scripted):
        def ask(self, *args: Any, **options: Any) -> Any:
            seen.append(len(log.read()))
            return super().ask(*args, **options)

    for said in (["fine"], [DOWN], [ValueError("secret")]):
        Router(engine, policy=UNSURE, server=Watching(said), log=log).answer("the alarm")
    Router(engine, policy=SURE, server=Watching(), log=log).answer("the alarm")
    assert seen == [1, 2, 3]
    assert [(entry.query, entry.outcome, entry.bytes) for entry in log.read()] == [
        ("the alarm", "answered", 9),
        ("the alarm", "the server is down", 9),
        ("the alarm", "asking the server failed with ValueError", 9),
    ]


def test_what_cannot_be_logged_is_not_sent(engine: Engine, tmp_path: Path) -> None:
    server = Scripted()
    log = SentLog(tmp_path / "no folder" / "sent.jsonl")
    answer = Router(engine, policy=UNSURE, server=server, log=log).answer("the alarm")
    assert (answer.text, answer.fallback, server.asked) == (SAID, True, [])
    assert "the log of what is sent cannot be written" in answer.reason


def test_cancelling_the_device_asks_nobody(engine: Engine) -> None:
    server, cancel = Scripted(), threading.Event()
    parts = []
    with Router(engine, policy=UNSURE, server=server).stream("the alarm", cancel=cancel) as stream:
        for part in stream:
            parts.append(part)
            cancel.set()
    answer = stream.answer
    assert (answer.route, answer.reason, answer.finish_reason) == ("device", "it was cancelled", "cancelled")
    assert (answer.text, server.asked, answer.fallback) == ("o", [], False)


def test_cancelling_while_the_server_answers_leaves_the_devices_answer(engine: Engine) -> None:
    cancel = threading.Event()
    parts = []
    with Router(engine, policy=UNSURE, server=Scripted()).stream("the alarm", cancel=cancel) as stream:
        for part in stream:
            parts.append(part)
            if part.source == "server":
                cancel.set()
    assert (stream.answer.text, stream.answer.route, stream.answer.fallback) == (SAID, "device", True)
    assert stream.answer.reason.endswith("but it was cancelled")


@pytest.mark.parametrize("read", range(6))
@pytest.mark.parametrize("policy", ["never", "always", UNSURE, msgspec.structs.replace(UNSURE, after=3)])
def test_a_stream_may_be_left_at_any_part(engine: Engine, policy: Any, read: int, tmp_path: Path) -> None:
    log = SentLog(tmp_path / "sent.jsonl")
    server = Scripted()
    stream = Router(engine, policy=policy, server=server, log=log).stream("the alarm")
    with pytest.raises(InvalidInput, match="has not ended"):
        stream.answer  # noqa: B018
    with stream:
        parts = list(islice(stream, read))
    assert "".join(part.text for part in parts if not part.draft) == stream.answer.text
    assert server.closed == len(server.asked)
    assert engine.generate("the alarm").text == SAID, "the session is free again"
    assert [entry.outcome for entry in log.read()] in ([], ["it was cancelled"], ["answered"])


def test_stop_strings_hold_for_the_server_too(engine: Engine) -> None:
    server = Scripted(["one <", "end> two", DOWN])
    answer = Router(engine, policy="always", server=server).answer("the alarm", stop=["<end>", "never"])
    assert (answer.text, answer.route, answer.finish_reason) == ("one ", "server", "stop")


@pytest.mark.parametrize(
    "said, text",
    [
        (['{"a"', ": 1}"], '{"a": 1}'),
        (["\n{", '"a": 1}\n'], '{"a": 1}'),
        (['{"a": 1'], ""),
        (["Sure!", '{"a": 1}'], ""),
    ],
)
def test_an_answer_in_a_form_is_in_that_form_also_from_the_server(said: list[str], text: str) -> None:
    needs.module("llguidance")
    form = Constraint.regex(r'\{"a": ?[0-9]\}')
    with tiny.engine(tap_size=SIZE) as engine:
        parts, answer = collect(Router(engine, policy="always", server=Scripted(said)), constraint=form)
        assert (answer.route == "server") == bool(text)
        assert final(parts, "server") == text
        assert form.meets(answer.text)
        if not text:
            assert answer.reason.endswith("the server's answer has not the form that was asked for")


def test_a_conversation_goes_on_after_the_server_answered(engine: Engine) -> None:
    router = Router(engine, policy=msgspec.structs.replace(UNSURE, after=3), server=Scripted())
    with engine.session() as session:
        first = router.answer("the alarm", session=session)
        assert not session.busy
        again = engine.generate(f"the alarm{first.text} a", session=session)
        assert again.reused_tokens > 0
        assert again.text == SAID


def test_many_threads_use_one_router(engine: Engine, tmp_path: Path) -> None:
    log = SentLog(tmp_path / "sent.jsonl")
    router = Router(engine, policy=UNSURE, server=Scripted(), log=log)
    answers: list[Answer] = []

    def ask() -> None:
        answers.extend(router.answer(f"the alarm {i}") for i in range(5))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.text for answer in answers] == ["from the server"] * 20
    assert len(log.read()) == 20


# What is known of an adapter.


def test_the_base_has_nothing_but_its_confidence(engine: Engine) -> None:
    router = Router(engine)
    assert router.policy == confidence()
    for name in ("paper", "calibrated", "early"):
        with pytest.raises(InvalidInput) as error:
            Router(engine, policy=name)
        assert error.value.do
    with pytest.raises(InvalidInput, match="no policy 'best'"):
        Router(engine, policy="best")


def test_a_customized_model_can_decide_at_once(engine: Engine, tmp_path: Path) -> None:
    engine.set_adapter(hybrid.customized(tmp_path / "own", size=SIZE))
    router = Router(engine, folder=tmp_path / "own")
    assert router.policy.name == "calibrated"
    assert set(router.policy.weights) == {"log_odds", "examples_nearness"}
    answer = router.answer("the alarm")
    assert set(answer.signals) == set(router.policy.weights)
    assert math.isfinite(answer.score)
    for name in ("paper", "early", "confidence"):
        assert Router(engine, policy=name, folder=tmp_path / "own").answer("the alarm").policy == name


def test_the_folder_is_that_of_the_bundle(tmp_path: Path) -> None:
    bundle = tiny.bundle(tmp_path)
    adapter = hybrid.customized(tmp_path / "model.customized", size=SIZE)
    with tiny.engine(tap_size=SIZE, bundle=bundle) as engine:
        engine.set_adapter(adapter)
        assert Router(engine).policy.name == "calibrated"


def test_each_answer_is_judged_with_what_is_known_of_its_adapter(tmp_path: Path) -> None:
    bundle = tiny.bundle(tmp_path)
    adapter = hybrid.customized(tmp_path / "model.customized", size=SIZE)
    with tiny.engine(tap_size=SIZE, bundle=bundle) as engine:
        router = Router(engine)
        assert [router.answer("the", adapter=a).policy for a in (adapter, "alice", None, adapter)] == [
            "calibrated", "confidence", "confidence", "calibrated",
        ]  # fmt: skip
        engine.set_adapter(adapter)
        assert [router.answer("the").policy, router.answer("the", adapter=None).policy] == ["calibrated", "confidence"]


def test_an_adapter_from_elsewhere_has_its_prototypes_and_no_examples(engine: Engine, tmp_path: Path) -> None:
    given = hybrid.adapter(tmp_path / "given", size=SIZE, prototypes=hybrid.prototypes(9, SIZE))
    engine.set_adapter(given)
    names = Router(engine, folder=tmp_path / "own").known(engine.present_adapter).reference.names
    assert {"prototypes_mean", "prototypes_top_k"} <= names
    assert "examples_top_k" not in names


def test_an_adapter_that_was_replaced_meanwhile_is_not_judged_by_its_successor(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    engine.set_adapter(hybrid.customized(folder, size=SIZE))
    hybrid.customized(folder, size=SIZE, seed=1)
    assert Router(engine, folder=folder).policy == confidence()
    engine.set_adapter(Bundle.open(folder / "adapter"))
    assert Router(engine, folder=folder).policy.name == "calibrated"


def test_a_router_keeps_no_adapter_in_memory(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    engine.set_adapter(hybrid.customized(folder, size=SIZE))
    router = Router(engine, folder=folder)
    gone = weakref.ref(engine.present_adapter)  # type: ignore[arg-type]
    router.answer("the")
    engine.set_adapter(hybrid.customized(folder, size=SIZE, seed=1))
    router.answer("the")
    gc.collect()
    assert gone() is None
    assert router.known(engine.present_adapter) is router.known(engine.present_adapter)


def calibrate(folder: Path, **changes: Any) -> Calibration:
    fields: dict[str, Any] = {
        "adapter": adapter_sha256(folder / "adapter"), "budget": 0.2, "target_accuracy": None, "labelled": True, "n": 9, "curve": [],
        "policies": [Policy("calibrated", {"log_probability": 3.0}, 1.0, 0.5, logistic=True)],
    }  # fmt: skip
    calibration = Calibration(**fields | changes)
    calibration.write(folder)
    return calibration


def test_a_calibration_decides(engine: Engine, tmp_path: Path) -> None:
    engine.set_adapter(hybrid.customized(tmp_path / "own", size=SIZE))
    made = calibrate(tmp_path / "own")
    router = Router(engine, folder=tmp_path / "own")
    assert router.policy == made.policies[0]
    assert Router(engine, folder=tmp_path / "own", policy="confidence").policy == confidence(), "it is not in there"
    with pytest.raises(InvalidInput, match="nobody knows the threshold"):
        Router(engine, folder=tmp_path / "own", policy="paper")


def test_a_new_calibration_decides_from_the_next_answer_on(engine: Engine, tmp_path: Path) -> None:
    engine.set_adapter(hybrid.customized(tmp_path / "own", size=SIZE))
    router = Router(engine, folder=tmp_path / "own")
    before = router.answer("the alarm").threshold
    [policy] = calibrate(tmp_path / "own").policies
    assert router.answer("the alarm").threshold == policy.threshold != before


def test_a_calibration_of_another_adapter_is_ignored_and_said(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    hybrid.customized(folder, size=SIZE)
    calibrate(folder)
    engine.set_adapter(hybrid.customized(folder, size=SIZE, seed=1))
    router = Router(engine, folder=folder)
    assert not router.policy.logistic
    (note,) = router.known(engine.present_adapter).notes
    assert "made with another adapter" in note
    assert "crayon route calibrate" in note


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "Expecting property name"),
        (b"{}", "no schema_version"),
        (b'{"schema_version": "1.0"}', "missing required field"),
        (b"x" * (2 << 20), "more than"),
    ],
)
def test_a_damaged_calibration_is_refused(engine: Engine, tmp_path: Path, content: bytes, message: str) -> None:
    engine.set_adapter(hybrid.customized(tmp_path / "own", size=SIZE))
    (tmp_path / "own" / ROUTING).write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        Router(engine, folder=tmp_path / "own")


def test_a_calibration_with_a_policy_that_cannot_be_is_refused(engine: Engine, tmp_path: Path) -> None:
    engine.set_adapter(hybrid.customized(tmp_path / "own", size=SIZE))
    calibrate(tmp_path / "own")
    path = tmp_path / "own" / ROUTING
    path.write_bytes(path.read_bytes().replace(b'"log_probability"', b'"entropy"'))
    with pytest.raises(ManifestError, match="which there is not") as error:
        Router(engine, folder=tmp_path / "own")
    assert error.value.where == str(path)


def test_prototypes_of_another_size_are_refused_by_name(engine: Engine, tmp_path: Path) -> None:
    engine.set_adapter(hybrid.customized(tmp_path / "own", size=SIZE + 1))
    with pytest.raises(AdapterError, match="prototypes"):
        Router(engine, folder=tmp_path / "own")


def test_examples_of_another_size_are_refused(engine: Engine, tmp_path: Path) -> None:
    engine.set_adapter(hybrid.customized(tmp_path / "own", size=SIZE + 1, with_prototypes=False))
    with pytest.raises(InvalidInput, match="the examples' states are of 9; this model's are of 8"):
        Router(engine, folder=tmp_path / "own")
