"""A server LLM as threads ask it, well or badly behaved."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from crayon_runtime.errors import InvalidInput, ServerError
from crayon_server.upstream import Upstream, UpstreamError, endpoint, reply
from tests.runtime.services import Fault, Handler, answers, hangs_up
from tests.server_tools.upstreams import ANSWER, ServerLLM, completion, replies, stalls

NOTHING = {"data": []}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BACK_OFF", 0.01)


@pytest.fixture
def server() -> Iterator[ServerLLM]:
    with ServerLLM() as made:
        yield made


@pytest.fixture
def upstream(server: ServerLLM) -> Iterator[Upstream]:
    with Upstream(server.url, api_key="secret key", first_byte_timeout=20) as made:
        yield made


def test_a_prompt_is_sent_alone(upstream: Upstream, server: ServerLLM) -> None:
    assert upstream.complete("what time\nis it", max_tokens=7, temperature=0.5) == ANSWER
    assert server.bodies == [
        {
            "model": "large",
            "messages": [{"role": "user", "content": "what time\nis it"}],
            "max_tokens": 7,
            "temperature": 0.5,
        }
    ]
    (asked,) = server.asked
    assert (asked.method, asked.path) == ("POST", "/v1/chat/completions")
    assert asked.headers["authorization"] == "Bearer secret key"
    assert asked.headers["accept-encoding"] == "identity"
    assert "cookie" not in asked.headers


def test_the_first_model_that_is_listed_answers(upstream: Upstream, server: ServerLLM) -> None:
    assert upstream.model() == "large"
    upstream.complete("x")
    upstream.complete("x")
    assert server.listed == 1
    with Upstream(f"{server.url}/v1/", model="mine") as named:
        named.complete("x")
        assert named.model() == "mine"
    assert server.listed == 1
    assert [body["model"] for body in server.bodies] == ["large", "large", "mine"]


def test_a_model_that_took_the_place_of_another_is_found(upstream: Upstream, server: ServerLLM) -> None:
    upstream.complete("x")
    server.models = replies({"data": [{"id": "newer"}]})
    server.faults = [replies({"error": {"message": "no model large"}}, 404)]
    with pytest.raises(UpstreamError, match="no such model"):
        upstream.complete("x")
    upstream.complete("x")
    assert server.bodies[-1]["model"] == "newer"


@pytest.mark.parametrize(
    "listed",
    [replies(NOTHING), replies({"data": [{"id": ""}]}), replies([]), answers(200, b"<html>", Content_Type="text/html")],
)
def test_a_server_that_lists_no_model(upstream: Upstream, server: ServerLLM, listed: Fault) -> None:
    server.models = listed
    with pytest.raises(UpstreamError, match="sent"):
        upstream.model()
    assert server.asked == []


@pytest.mark.parametrize("text, told", [("", ""), (None, ""), ("日本 🙂\n", "日本 🙂\n")])
def test_an_answer_is_told_as_it_is(upstream: Upstream, server: ServerLLM, text: str | None, told: str) -> None:
    server.always = replies(completion(text))
    assert upstream.complete("x") == told


# What is tried again


def cut_in_the_middle(to: Handler) -> None:
    to.head(200, Content_Type="application/json", Content_Length=1000)
    to.wfile.write(b'{"choices"')
    to.cut()


@pytest.mark.parametrize(
    "fault",
    [
        replies({}, 429, Retry_After=0),
        replies({}, 503),
        answers(502, b"<html>bad gateway"),
        replies({"error": "x"}, 500),
        hangs_up,
        cut_in_the_middle,
    ],
)
def test_what_failed_for_a_moment_is_tried_again(upstream: Upstream, server: ServerLLM, fault: Fault) -> None:
    server.faults = [fault] * 3
    assert upstream.complete("x") == ANSWER
    assert len(server.asked) == 4
    assert len({asked.body for asked in server.asked}) == 1


def speaks_something_else(to: Handler) -> None:
    to.wfile.write(b"220 mail.example.com ESMTP\r\n")
    to.cut()


@pytest.mark.parametrize(
    "fault, message",
    [(replies({}, 503), "busy"), (speaks_something_else, "cannot be reached"), (cut_in_the_middle, "cut")],
)
def test_what_fails_again_and_again_is_given_up(
    upstream: Upstream, server: ServerLLM, fault: Fault, message: str
) -> None:
    server.always = fault
    with pytest.raises(ServerError, match=message):
        upstream.complete("x")
    assert len(server.asked) == 1 + endpoint.RETRIES


def test_pauses_double_and_are_as_long_as_the_server_wants(
    upstream: Upstream, server: ServerLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("crayon_server.upstream.endpoint.asyncio.sleep", sleep)
    monkeypatch.setattr(endpoint, "BACK_OFF", 1.0)
    server.faults = [hangs_up, replies({}, 429, Retry_After=7), hangs_up]
    assert upstream.complete("x") == ANSWER
    assert 0.5 <= pauses[0] <= 1
    assert pauses[1] == 7
    assert 2 <= pauses[2] <= 4


def test_a_server_that_wants_to_be_left_alone_for_long_is_not_waited_for(upstream: Upstream, server: ServerLLM) -> None:
    server.always = replies({}, 429, Retry_After=3600)
    with pytest.raises(UpstreamError, match="busy") as caught:
        upstream.complete("x")
    assert (caught.value.status, caught.value.wait) == (503, 3600)
    assert len(server.asked) == 1


# What is not


def floods(to: Handler) -> None:
    to.head(200, Content_Type="application/json")
    to.cut()
    while True:
        to.wfile.write(b" " * 100_000)


def error(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "param": None, "code": None} | fields}


@pytest.mark.parametrize(
    "fault, message",
    [
        (replies(error("too long: \x1b[31mred"), 400), r"refuses the request \(HTTP status 400\): too long: \[31mred"),
        (replies({"error": "as a text"}, 422), "as a text"),
        (answers(413, b"<html>"), r"refuses the request \(HTTP status 413\)"),
        (replies({}, 401), "refuses the key"),
        (replies({}, 403), "refuses the key"),
        (replies({}, 404), "is not at this address"),
        (replies({}, 402), "HTTP status 402"),
        (replies({}, 501), "HTTP status 501"),
        (answers(307, Location="http://127.0.0.1:1/elsewhere"), "redirects to http://127.0.0.1:1/elsewhere"),
        (answers(200, b"<html><body>hello", Content_Type="text/html"), "sent text/html instead of application/json"),
        (answers(200, b"hello", Content_Type="text/event-stream"), "instead of application/json"),
        (answers(200, b"hello"), "sent something instead"),
        (answers(200, b"", Content_Type="application/json"), "what is no answer"),
        (answers(200, b"x" * 100, Content_Type="application/json", Content_Encoding="gzip"), "compressed"),
        (answers(200, b'{"choices": NaN}', Content_Type="application/json"), "what is no answer"),
        (answers(200, b"\xff" * 9, Content_Type="application/json"), "what is no answer"),
        (answers(200, b"[" * 99_999, Content_Type="application/json"), "what is no answer"),
        (replies([1]), "what is no answer"),
        (replies({"choices": []}), "sent no answer"),
        (replies({"something": "else"}), "sent no answer"),
        (replies({"choices": [{"text": "x"}]}), "what is no answer"),
        (replies({"choices": [{"message": {"content": 7}}]}), "what is no answer"),
        (replies(error("out of memory")), "failed: out of memory"),
        (floods, "more than 100000 bytes"),
    ],
)
def test_what_is_no_answer_is_an_error(
    upstream: Upstream, server: ServerLLM, fault: Fault, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply, "LARGEST_ANSWER", 100_000)
    server.always = fault
    with pytest.raises(ServerError, match=message):
        upstream.complete("x")
    assert len(server.asked) == 1
    server.always = None
    assert upstream.complete("x") == ANSWER


def test_nobody_is_there() -> None:
    with ServerLLM() as server:
        url = server.url
    with Upstream(url, model="x") as upstream, pytest.raises(ServerError, match="cannot be reached") as caught:
        upstream.complete("x")
    assert caught.value.where == url


@pytest.mark.parametrize("url", ["http://example.com", "https://user:key@host", "ftp://host", "host:8000"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InvalidInput):
        Upstream(url)
    with Upstream("http://example.com", plain_http=True) as allowed:
        assert allowed.url == "http://example.com"


# What takes too long


def stops(to: Handler) -> None:
    to.head(200, Content_Type="application/json", Content_Length=1000)
    to.wfile.write(b"{")
    stalls(to)


def dribbles(to: Handler) -> None:
    to.head(200, Content_Type="application/json", Content_Length=1000)
    while not to.service.over.wait(0.03):  # type: ignore[attr-defined]
        to.wfile.write(b" ")


@pytest.mark.parametrize(
    "fault, limit",
    [
        (stalls, {"first_byte_timeout": 0.3}),
        (stops, {"idle_timeout": 0.3}),
        (dribbles, {"deadline": 1.0}),
    ],
)
def test_a_slow_server_is_not_waited_for(server: ServerLLM, fault: Fault, limit: dict[str, float]) -> None:
    server.always = fault
    with Upstream(server.url, model="x", **limit) as upstream:
        with pytest.raises(UpstreamError, match="did not answer in time") as caught:
            upstream.complete("x")
        assert caught.value.status == 504
        assert (server.now, len(server.asked)) == (1, 1)


# Threads


def test_no_more_requests_at_once_than_are_allowed(server: ServerLLM) -> None:
    def slow(to: Handler) -> None:
        time.sleep(0.05)
        replies(completion())(to)

    server.always = slow
    with Upstream(server.url, concurrency=3) as upstream, ThreadPoolExecutor(10) as pool:
        assert list(pool.map(upstream.complete, "abcdefghij")) == [ANSWER] * 10
    assert server.most == 3
    assert sorted(body["messages"][0]["content"] for body in server.bodies) == list("abcdefghij")


def test_closing_gives_up_what_is_asked(server: ServerLLM) -> None:
    there = threading.Event()
    server.always = lambda to: (there.set(), stalls(to))
    upstream = Upstream(server.url)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(upstream.complete, "x")
        assert there.wait(20)
        upstream.close()
        with pytest.raises(ServerError, match="given up"):
            asked.result(20)
        assert server.now == 1
    upstream.close()
