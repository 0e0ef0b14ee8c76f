"""The model `hybrid`: OpenAI's own client, an engine with scripted answers, and a server LLM that does as it is told."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from crayon_runtime.errors import ServerError
from crayon_runtime.routing.policies import Policy, always, never
from crayon_runtime.routing.router import Router
from crayon_runtime.routing.rules import Rules
from tests.runtime import tiny
from tests.runtime.tiny import EOS, byte_ids
from tests.support import needs

openai = needs.module("openai")
needs.module("fastapi")
needs.module("llguidance")
needs.module("uvicorn")

from tests.runtime.server.llm import Asked, Told  # noqa: E402
from tests.runtime.server.served import Gate, Served, body, wait  # noqa: E402

DEVICE = [*byte_ids("device says"), EOS]
ASKED = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " the alarm? "}]


def confident(threshold: float, after: int | None = None) -> Policy:
    return Policy("confidence", {"log_probability": 1.0}, 0.0, threshold, after)


NEVER_SURE, ALWAYS_SURE = confident(1.0), confident(-1000.0)


@pytest.fixture
def hybrid(serve: Any, inside: Any) -> Any:
    def start(
        server: Any, policy: Policy, script: Any = DEVICE, *, rules: Rules | None = None, **options: Any
    ) -> Served:
        engine = tiny.engine(script, bundle=inside, chat_template=tiny.CHATML, context_length=2048)
        return serve(engine=engine, router=Router(engine, policy=policy, server=server, rules=rules), **options)  # type: ignore[no-any-return]

    return start


def ask(served: Served, **options: Any) -> Any:
    return served.chat(model="hybrid", messages=ASKED, **options)


def told(reply: Any) -> Any:
    [choice] = reply.choices
    return choice.message.content, choice.finish_reason, reply.crayon


def streamed(chunks: Any) -> Any:
    """The text, the finish reason, the last thing that is told of the route, and the drafts; a restart begins the text anew."""
    text, drafts, reason, crayon = "", [], None, None
    for chunk in chunks:
        told = (chunk.model_extra or {}).get("crayon") or {}
        if "draft" in told:
            assert chunk.choices == []
            drafts.append(told["draft"])
        elif "restart" in told:
            text = ""
        elif chunk.choices:
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
            crayon = told or crayon
    return text, reason, crayon, drafts


def test_the_model_is_there_where_there_is_a_server(hybrid: Any, serve: Any) -> None:
    assert [m.id for m in hybrid(Told("x"), never()).client.models.list()] == ["tiny", "hybrid", "alice", "bob"]
    alone = serve()
    assert "hybrid" not in [m.id for m in alone.client.models.list()]
    with pytest.raises(openai.NotFoundError, match="there is no model 'hybrid'"):
        ask(alone)


@pytest.mark.parametrize("stream", [False, True])
def test_the_device_answers_what_it_is_sure_of(hybrid: Any, stream: bool) -> None:
    server = Told("server")
    served = hybrid(server, ALWAYS_SURE)
    text, reason, crayon, *_ = streamed(ask(served, stream=True)) if stream else told(ask(served))
    assert (text, reason, server.queries) == ("device says", "stop", [])
    assert (crayon["route"], crayon["policy"], crayon["fallback"]) == ("device", "confidence", False)
    assert crayon["score"] == crayon["signals"]["log_probability"] > crayon["threshold"] == -1000
    assert "is not below the threshold" in crayon["reason"]
    assert {*crayon["seconds"]} == {"device", "score", "total"}
    assert crayon["sent_bytes"] == crayon["server_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_server_answers_the_rest_and_is_told_the_query_alone(hybrid: Any, stream: bool) -> None:
    server = Told("server", " says")
    served = hybrid(server, NEVER_SURE)
    text, reason, crayon, *_ = streamed(ask(served, stream=True)) if stream else told(ask(served))
    assert (text, reason) == ("server says", "stop")
    assert server.queries == [("the alarm?", None)]
    assert server.replies[0].closed
    assert (crayon["route"], crayon["fallback"]) == ("server", False)
    assert (crayon["server_tokens"], crayon["sent_bytes"]) == (2, 21)
    assert "server" in crayon["seconds"]


def test_usage_is_that_of_who_answered(hybrid: Any) -> None:
    served = hybrid(Told("a", "b", "c"), NEVER_SURE)
    assert ask(served).usage.completion_tokens == 3
    *_, last = ask(served, stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage.completion_tokens) == ([], 3)
    assert last.usage.prompt_tokens > 10
    served = hybrid(Told("a"), ALWAYS_SURE)
    assert ask(served).usage.completion_tokens == len(DEVICE)


def test_drafts_are_shown_to_who_asks_for_them(hybrid: Any) -> None:
    for policy, text in ((NEVER_SURE, "server says"), (ALWAYS_SURE, "device says")):
        served = hybrid(Told("server", " says"), policy)
        got = streamed(ask(served, stream=True, extra_body={"crayon": {"drafts": True}}))
        assert (got[0], "".join(got[3])) == (text, "device says")
        assert len(got[3]) > 5
        assert streamed(ask(served, stream=True))[3] == []


def test_limits_and_stop_strings_hold_for_both(hybrid: Any) -> None:
    server = Told("one two", " three")
    served = hybrid(server, always())
    assert told(ask(served, max_tokens=7, stop=" three"))[:2] == ("one two", "stop")
    assert server.queries == [("the alarm?", 7)]
    server.pieces = ["too", " long"]
    served = hybrid(Limited("too", " long"), always())
    assert told(ask(served))[:2] == ("too long", "length")
    assert told(ask(hybrid(Told(), never()), max_tokens=3))[:2] == ("dev", "length")


class Limited(Told):
    def ask(self, query: str, **options: Any) -> Asked:
        reply = super().ask(query, **options)
        reply.finish_reason = "length"
        return reply


DOWN = ServerError("the server cannot be reached: no route")


@pytest.mark.parametrize("policy", [always(), NEVER_SURE, confident(1.0, after=3)], ids=["always", "after", "early"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "pieces, said", [([DOWN], "no route"), ([], "is empty"), ([RuntimeError("bug")], "RuntimeError")]
)
def test_a_server_that_fails_leaves_the_devices_answer(
    hybrid: Any, policy: Policy, stream: bool, pieces: list[Any], said: str
) -> None:
    served = hybrid(Told(*pieces), policy)
    text, reason, crayon, *_ = streamed(ask(served, stream=True)) if stream else told(ask(served))
    assert (text, reason) == ("device says", "stop")
    assert (crayon["route"], crayon["fallback"]) == ("device", True)
    assert said in crayon["reason"]
    assert ask(served).usage.completion_tokens == len(DEVICE), "the conversation goes on"


def test_a_server_that_breaks_off_is_told_apart_from_the_device(hybrid: Any) -> None:
    served = hybrid(Told("the server beg", DOWN), NEVER_SURE)
    chunks = list(ask(served, stream=True))
    assert streamed(chunks)[:2] == ("device says", "stop")
    plain = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert plain == "the server beg\n\ndevice says", "whoever does not know of restarts reads two paragraphs"
    assert told(ask(served))[0] == "device says"


def test_rules_hold_a_query_back(hybrid: Any) -> None:
    server = Told("server")
    served = hybrid(server, NEVER_SURE, rules=Rules(deny=["alarm"]))
    text, _, crayon = told(ask(served))
    assert (text, server.queries, crayon["fallback"]) == ("device says", [], True)
    assert "the rules deny" in crayon["reason"]


def test_only_the_last_message_of_the_user_is_the_query(hybrid: Any) -> None:
    server = Told("ok")
    served = hybrid(server, always())
    parts = [{"type": "text", "text": "second "}, {"type": "text", "text": "part\n"}]
    messages = [*ASKED, {"role": "assistant", "content": "a"}, {"role": "user", "content": parts}]
    served.chat(model="hybrid", messages=messages)
    assert server.queries == [("second part", None)]
    for without in ([{"role": "system", "content": "a"}], [{"role": "user", "content": "  "}]):
        text, _, crayon = told(served.chat(model="hybrid", messages=without))
        assert (text, crayon["fallback"]) == ("device says", True)
    assert len(server.queries) == 1


def test_without_a_usable_signal_the_server_is_asked(hybrid: Any) -> None:
    text, _, crayon = told(ask(hybrid(Told("server says"), ALWAYS_SURE, [EOS])))
    assert (text, crayon["route"], crayon["reason"]) == ("server says", "server", "no usable signal")
    assert (crayon["score"], crayon["signals"]) == (None, {"log_probability": None}), "NaN is no JSON"


def test_a_form_that_is_asked_for_holds_for_the_server_too(hybrid: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": "ok"}}}
    for pieces, text, fallback in ((["not it"], '"ok"', True), (['"o', 'k"'], '"ok"', False)):
        for stream, read in ((False, told), (True, streamed)):
            served = hybrid(Told(*pieces), always(), byte_ids('"ok"'))
            got = read(ask(served, response_format=wanted, stream=stream))
            assert (got[0], got[2]["fallback"]) == (text, fallback)


def test_a_call_from_either(hybrid: Any) -> None:
    tools = [{"type": "function", "function": {"name": "stop"}}]
    for pieces, route in (([' {"name": "stop", "arguments": {}} '], "server"), ([DOWN], "device")):
        served = hybrid(Told(*pieces), always(), [*byte_ids('{"name":"stop","arguments":{}}'), EOS])
        reply = ask(served, tools=tools, tool_choice="required")
        assert (reply.choices[0].finish_reason, reply.crayon["route"]) == ("tool_calls", route)
        assert reply.choices[0].message.tool_calls[0].function.name == "stop"
        chunks = [c for c in ask(served, tools=tools, tool_choice="required", stream=True) if c.choices]
        [first, *_] = [c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls]
        assert first[0].function.name == "stop"
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("more", [{"logprobs": True}, {"logprobs": True, "top_logprobs": 2}])
def test_log_probabilities_are_not_told(hybrid: Any, more: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="answers of `hybrid` have no log-probabilities"):
        ask(hybrid(Told("x"), always()), **more)


def test_only_chats_are_answered(hybrid: Any) -> None:
    served = hybrid(Told("x"), always())
    for request in (
        lambda: served.client.completions.create(model="hybrid", prompt="a"),
        lambda: served.client.embeddings.create(model="hybrid", input="a"),
    ):
        with pytest.raises(openai.BadRequestError, match="'hybrid' answers chats"):
            request()


# Turns


def test_while_the_server_is_asked_the_device_answers_others(hybrid: Any) -> None:
    for policy in (always(), NEVER_SURE, confident(1.0, after=3)):
        answered = threading.Event()
        served = hybrid(Told("s", answered, "!"), policy)
        waiting = served.post("/v1/chat/completions", {"model": "hybrid", "messages": ASKED})
        wait(lambda served=served: bool(served.answers.present))
        for i in range(3):
            assert served.ask(f"the {i}").choices[0].message.content == "device says"
        assert served.answers.present == 1
        answered.set()
        assert b'"content":"s!"' in body(waiting)
        waiting.close()


def test_whoever_falls_back_waits_for_a_turn(hybrid: Any, gate: Gate) -> None:
    fails = threading.Event()
    served = hybrid(Told(fails, DOWN), always(), gate)
    first = served.post("/v1/chat/completions", {"model": "hybrid", "messages": ASKED, "max_tokens": 1})
    wait(lambda: not served.answers.turn.locked() and served.answers.present == 1)
    second = served.post("/v1/chat/completions", {"model": "tiny", "messages": ASKED, "max_tokens": 1})
    wait(lambda: gate.asked == 1)
    fails.set()
    wait(lambda: bool(served.answers.turn._waiters))
    assert gate.asked == 1, "the second one has the turn"
    gate.open(2)
    assert b'"content":"x"' in body(second)
    assert b'"fallback":true' in body(first)
    wait(lambda: served.answers.present == 0)
    first.close()
    second.close()


@pytest.mark.parametrize("policy", [always(), NEVER_SURE, confident(1.0, after=3)], ids=["always", "after", "early"])
def test_a_client_that_goes_away_while_the_server_is_asked_frees_everything(hybrid: Any, policy: Policy) -> None:
    server = Told("s", threading.Event())
    served = hybrid(server, policy)
    for i in range(3):
        connection = served.post("/v1/chat/completions", {"model": "hybrid", "messages": ASKED, "stream": bool(i % 2)})
        wait(lambda i=i: len(server.replies) == i + 1)
        connection.close()
        wait(lambda: served.answers.present == 0)
        assert server.replies[-1].closed
    assert not served.answers.turn.locked()
    assert served.ask("the").choices[0].message.content == "device says"


def test_a_client_that_goes_away_while_it_waits_to_fall_back(hybrid: Any, gate: Gate) -> None:
    fails = threading.Event()
    served = hybrid(Told(fails, DOWN), always(), gate)
    first = served.post("/v1/chat/completions", {"model": "hybrid", "messages": ASKED})
    wait(lambda: not served.answers.turn.locked() and served.answers.present == 1)
    second = served.post("/v1/chat/completions", {"model": "tiny", "messages": ASKED, "max_tokens": 1})
    wait(lambda: gate.asked == 1)
    fails.set()
    wait(lambda: bool(served.answers.turn._waiters))
    first.close()
    wait(lambda: not served.answers.turn._waiters)
    gate.open()
    assert b'"content":"x"' in body(second)
    wait(lambda: served.answers.present == 0)
    assert not served.answers.turn.locked()
    assert gate.asked == 1, "nothing was computed for who is gone"
    second.close()


def test_no_more_conversations_are_kept_than_were_asked_for(hybrid: Any) -> None:
    answered = threading.Event()
    served = hybrid(Told(answered, "s"), confident(1.0, after=3), conversations=2, waiting=20)
    connections = [served.post("/v1/chat/completions", {"model": "hybrid", "messages": ASKED}) for _ in range(6)]
    wait(lambda: served.answers.present == 6 and bool(served.answers.turn.locked()))
    answered.set()
    for connection in connections:
        assert b'"content":"s"' in body(connection)
        connection.close()
    wait(lambda: served.answers.present == 0)
    assert 1 <= tiny.fake(served.engine).open_caches <= 2  # one, where answers came one after the other


@pytest.mark.parametrize("policy", [always(), NEVER_SURE, confident(1.0, after=3)], ids=["always", "after", "early"])
def test_many_come_and_go(hybrid: Any, policy: Policy) -> None:
    """With a server that now answers, now fails, now is slow."""
    turns = itertools.count()

    class Moody(Told):
        def ask(self, query: str, **options: Any) -> Asked:
            self.pieces = [["s"], [DOWN], ["s", DOWN], [threading.Event()]][next(turns) % 4]
            return super().ask(query, **options)

    served = hybrid(Moody(), policy, waiting=100)
    said = set()

    def come(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(8):
            model = rng.choice(["hybrid", "hybrid", "tiny"])
            connection = served.post(
                "/v1/chat/completions", {"model": model, "messages": ASKED, "stream": rng.random() < 0.5}
            )
            connection.settimeout(rng.choice([0.01, 0.1, 0.5]))
            with contextlib.suppress(TimeoutError):
                said.add(connection.recv(15))
            connection.close()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(come, range(12)))
    wait(lambda: served.answers.present == 0)
    assert said == {b"HTTP/1.1 200 OK"}
    assert not served.answers.turn.locked()
    assert tiny.fake(served.engine).open_caches <= 2
    assert served.ask("the").choices[0].message.content == "device says"


def test_stopping_while_the_server_is_asked(hybrid: Any) -> None:
    server = Told(threading.Event())
    served = hybrid(server, NEVER_SURE)
    connection = served.post("/v1/chat/completions", {"model": "hybrid", "messages": ASKED})
    wait(lambda: len(server.replies) == 1)
    served.answers.stop()
    assert b"shutting down" in body(connection)
    connection.close()
    wait(lambda: server.replies[0].closed)
