"""The service passes queries to a server LLM: asked by OpenAI's own client, over sockets, and by raw requests."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crayon_runtime.pool import Pool
from tests.runtime import pools
from tests.runtime.services import Fault, Handler, answers, hangs_up
from tests.server_tools.upstreams import (
    ANSWER,
    STREAM,
    ServerLLM,
    chunk,
    completion,
    event,
    gone,
    replies,
    stalls,
    streams,
)
from tests.support import needs

httpx = needs.module("httpx")
openai = needs.module("openai")
needs.module("fastapi")
uvicorn = needs.module("uvicorn")
needs.module("limits")

from crayon_server import upstream as upstreams  # noqa: E402
from crayon_server.cli.serve import _config, _listen  # noqa: E402
from crayon_server.service import chat, create_app  # noqa: E402
from crayon_server.upstream import Endpoint, as_bundle, endpoint, local, reply, serving  # noqa: E402

QUESTION = [{"role": "user", "content": "a private question"}]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(endpoint, "BACK_OFF", 0.01)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return pools.write(tmp_path / "pool")


@pytest.fixture
def server() -> Iterator[ServerLLM]:
    with ServerLLM() as made:
        yield made


class Served:
    """A service that listens, and OpenAI's client of it."""

    def __init__(self, address: tuple[str, int], api_key: str | None) -> None:
        self.address = address
        self.url = f"http://127.0.0.1:{address[1]}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key or "none", max_retries=0, timeout=30)
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def ask(self, **options: Any) -> Any:
        return self.client.chat.completions.create(model="any", messages=QUESTION, **options)

    def post(self, body: Any) -> socket.socket:
        """Send a request, and read nothing of the answer."""
        connection = socket.create_connection(self.address, timeout=20)
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        return connection


@pytest.fixture
def serve(pool: Pool, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Starts services."""
    with contextlib.ExitStack() as stack:

        def start(
            url: str | None,
            *,
            key: str | None = None,
            rate_limit: str | None = None,
            concurrency: int = 4,
            **options: Any,
        ) -> Served:
            (tmp_path / "cache").mkdir(exist_ok=True)
            app = create_app(
                pool.path,
                None,
                cache=tmp_path / "cache",
                api_key=key,
                rate_limit=rate_limit,
                upstream=Endpoint(url, **options) if url else None,
                upstream_concurrency=concurrency,
            )
            listening = stack.enter_context(_listen("127.0.0.1", 0))
            running = uvicorn.Server(_config(app, None))
            thread = threading.Thread(target=running.run, args=([listening],))

            def stop() -> None:
                running.should_exit = running.force_exit = True
                thread.join(20)
                assert not thread.is_alive()

            stack.callback(stop)
            thread.start()
            served = Served(listening.getsockname(), key)
            stack.callback(served.client.close)
            stack.callback(served.http.close)
            until(lambda: running.started)
            return served

        yield start


@pytest.fixture
def served(serve: Callable[..., Served], server: ServerLLM) -> Served:
    return serve(server.url)


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def problem(response: Any) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return f"{response.status_code} {error['code']}: {error['message']}"


# What is passed on


def test_a_whole_answer_comes_as_it_is(served: Served, server: ServerLLM) -> None:
    response = served.http.post("/v1/chat/completions", json={"messages": QUESTION})
    assert response.json() == completion()
    assert response.headers["content-type"] == "application/json"
    assert served.ask().choices[0].message.content == ANSWER


def test_a_streamed_answer_comes_event_by_event(served: Served, server: ServerLLM) -> None:
    step = threading.Semaphore(0)
    waits = [lambda: step.acquire(timeout=20)] * len(STREAM)
    server.always = streams(*(each for pair in zip(STREAM, waits, strict=True) for each in pair))
    got = []
    for part in served.ask(stream=True):
        got.append(part.choices[0].delta.content or part.choices[0].finish_reason)
        step.release()  # only now the next one is sent
    assert got == ["the", " ", "answer", "stop"]
    step.release(20)
    response = served.http.post("/v1/chat/completions", json={"messages": QUESTION, "stream": True})
    assert response.content == b"".join(STREAM)
    assert response.headers["content-type"] == "text/event-stream"


def test_all_fields_but_the_model_are_passed_on_as_they_are(served: Served, server: ServerLLM) -> None:
    body = (
        b'{"messages": [{"role": "user", "content": [{"type": "x", "y": "\\u00e9 \xc3\xa9"}]}], "model": "customized", '
        b'"temperature": 0.30000000000000004, "seed": 123456789012345678901234567890, "tools": [{"a": null}], "stream": null}'
    )
    assert served.http.post("/v1/chat/completions", content=body).status_code == 200
    assert server.bodies == [json.loads(body) | {"model": "large", "stream": False}]
    assert b'"seed":123456789012345678901234567890' in server.asked[0].body.replace(b": ", b":")
    assert "authorization" not in server.asked[0].headers
    assert "private" not in str(server.asked[0].headers)


def test_our_key_is_not_sent_on_and_the_server_llms_is(serve: Any, server: ServerLLM) -> None:
    served = serve(server.url, key="correct horse battery", model="named")
    assert problem(served.http.post("/v1/chat/completions", json={"messages": QUESTION})).startswith(
        "401 invalid_api_key"
    )
    assert problem(served.http.get("/v1/models")).startswith("401")
    assert served.ask().choices[0].message.content == ANSWER
    assert "battery" not in str(server.asked)
    serve(server.url, api_key="of the server LLM", model="named").ask()
    assert server.asked[-1].headers["authorization"] == "Bearer of the server LLM"
    assert [body["model"] for body in server.bodies] == ["named"] * 2


def test_there_is_one_model(served: Served, server: ServerLLM) -> None:
    assert [model.id for model in served.client.models.list()] == ["large"]
    server.models = replies({}, 500)
    assert [model.id for model in served.client.models.list()] == ["large"]


def test_a_service_without_a_server_llm_says_so(serve: Any) -> None:
    served = serve(None)
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models")):
        response = served.http.request(method, path)
        assert problem(response).startswith("404 no_upstream: this service has no server LLM")
    paths = served.http.get("/openapi.json").json()["paths"]
    assert "/v1/pool" in paths
    assert "/v1/chat/completions" not in paths


# What is refused


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "400 None: the body is not JSON"),
        (b"[]", "400 None: the body is no JSON object"),
        (b'{"messages": [1', "400 None: the body is not JSON"),
        (b'{"messages": [NaN]}', "400 None: the body is not JSON"),
        (b'{"messages": [1], "x": "\xff"}', "400 None: the body is not JSON"),
        (b'{"messages": ' + b"[" * 200_000, "400 None: the body is not JSON"),
        (b"{}", "400 None: `messages` is no list"),
        (b'{"messages": []}', "400 None: `messages` is no list"),
        (b'{"messages": "x"}', "400 None: `messages` is no list"),
        (b'{"messages": [1], "stream": "yes"}', "400 None: `stream` is neither"),
        (b'{"messages": [1], "stream": 1}', "400 None: `stream` is neither"),
        (b" " * (1 << 20) + b" ", "413 None: the body is larger than 1048576 bytes"),
    ],
)
def test_requests_that_are_none(served: Served, server: ServerLLM, body: bytes, message: str) -> None:
    assert problem(served.http.post("/v1/chat/completions", content=body)).startswith(message)
    assert server.asked == []


def test_other_methods(served: Served) -> None:
    response = served.http.get("/v1/chat/completions")
    assert problem(response).startswith("405 None: this method")
    assert response.headers["allow"] == "POST"


def test_an_address_that_asks_too_often(serve: Any, server: ServerLLM) -> None:
    served = serve(server.url, rate_limit="2/minute")
    served.ask()
    served.client.models.list()
    with pytest.raises(openai.RateLimitError) as caught:
        served.ask()
    assert problem(caught.value.response).startswith("429 rate_limit_exceeded: you ask too often; ask again in")
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60


def test_pages_in_a_browser_need_a_key(serve: Any, server: ServerLLM) -> None:
    page = {"Origin": "https://example.com"}
    body = {"messages": QUESTION}
    assert problem(serve(server.url).http.post("/v1/chat/completions", json=body, headers=page)).startswith("403")
    assert server.asked == []
    key = {"Authorization": "Bearer correct horse battery"}
    keyed = serve(server.url, key="correct horse battery")
    assert keyed.http.post("/v1/chat/completions", json=body, headers=page | key).status_code == 200


# A server LLM that misbehaves


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "param": "messages", "code": "context_length_exceeded"}}


def floods(to: Handler) -> None:
    to.head(200, Content_Type="text/event-stream")
    while True:
        to.wfile.write(b": still here\n" * 1000)


def endless_line(to: Handler) -> None:
    to.head(200, Content_Type="text/event-stream")
    while True:
        to.wfile.write(b"data: " + b"x" * 10_000)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fault, message",
    [
        (replies(error("too long"), 400), r"400 context_length_exceeded: .*\(HTTP status 400\): too long"),
        (replies({}, 401), "502 upstream_error: the server LLM refuses the key$"),
        (replies({}, 404), "502 upstream_error: the server LLM has no such model"),
        (replies({}, 500), r"502 upstream_error: the server LLM failed \(HTTP status 500\)"),
        (replies({}, 503), "503 busy: the server LLM is busy"),
        (answers(302, Location="http://127.0.0.1:1"), "502 upstream_error: the server LLM redirects"),
        (answers(200, b"<html>", Content_Type="text/html"), "502 upstream_error: the server LLM sent text/html"),
        (replies(error("no memory")), "502 upstream_error: the server LLM"),
        (hangs_up, "502 upstream_error: the server LLM cannot be reached"),
    ],
)
def test_what_goes_wrong_before_an_answer_has_a_status(
    served: Served, server: ServerLLM, fault: Fault, message: str, stream: bool
) -> None:
    server.always = fault
    with pytest.raises(openai.APIStatusError) as caught:
        served.ask(stream=stream)
    assert re.match(message, problem(caught.value.response))
    assert server.url not in caught.value.response.text
    server.always = None
    assert served.ask().choices[0].message.content == ANSWER


def test_a_server_llm_that_stalls_is_not_waited_for(serve: Any, server: ServerLLM) -> None:
    server.always = stalls
    quick = serve(server.url, model="x", first_byte_timeout=0.3)
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            quick.ask(stream=stream)
        assert problem(caught.value.response) == "504 upstream_timeout: the server LLM did not answer in time"
    server.always = lambda to: streams(STREAM[0], lambda: stalls(to))(to)
    *_, last = parts(serve(server.url, model="x", idle_timeout=0.5).ask(stream=True))
    assert last == "the server LLM did not answer in time"


@pytest.mark.parametrize(
    "pieces, message",
    [
        ([], "cut its answer off"),
        ([event(b"[DONE]")], "sent what is no answer"),
        ([event(b"<html>")], "sent what is no answer"),
        ([event({"something": "else"})], "sent an event that is no part of an answer"),
        ([event(error("no memory"))], "failed: no memory"),
    ],
)
def test_a_stream_that_does_not_begin(served: Served, server: ServerLLM, pieces: list[bytes], message: str) -> None:
    server.always = streams(*pieces)
    with pytest.raises(openai.APIStatusError) as caught:
        served.ask(stream=True)
    assert message in problem(caught.value.response)


@pytest.mark.parametrize("fault", [floods, endless_line])
def test_a_flood_of_nothing_is_cut_off(
    served: Served, server: ServerLLM, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply, "LARGEST_ANSWER", 100_000)
    server.always = fault
    with pytest.raises(openai.APIStatusError, match="sends more than 100000 bytes"):
        served.ask(stream=True)


def parts(stream: Any) -> list[str | None]:
    """What comes of a stream until its error, which is the last."""
    got = []
    try:
        for part in stream:
            got.append(part.choices[0].delta.content)
    except openai.APIError as e:
        got.append(e.message)
    return got


@pytest.mark.parametrize(
    "pieces, cut, message",
    [
        ([], True, "the server LLM cut its answer off"),
        ([], False, "the server LLM cut its answer off"),
        ([event(b'{"choices": [{')], False, "the server LLM sent what is no answer"),
        ([event(error("no memory"))], False, "the server LLM failed: no memory"),
        ([STREAM[0]] * 1000, False, "the server LLM sends more than 100000 bytes"),
    ],
)
def test_what_goes_wrong_within_a_stream_is_its_last_event(
    served: Served, server: ServerLLM, pieces: list[Any], cut: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply, "LARGEST_ANSWER", 100_000)
    server.always = streams(*STREAM[:2], *pieces, cut=cut)
    got = parts(served.ask(stream=True))
    assert got[:2] == ["the", " "]
    assert got[-1] == message
    raw = served.http.post("/v1/chat/completions", json={"messages": QUESTION, "stream": True}).content
    assert b"[DONE]" not in raw
    assert json.loads(raw.split(b"data: ")[-1])["error"]["message"] == message
    assert len(server.asked) == 2, "what has begun is not asked again"


def test_an_answer_that_said_why_it_ends_needs_no_end_mark(served: Served, server: ServerLLM) -> None:
    server.always = streams(*STREAM[:-1])
    raw = served.http.post("/v1/chat/completions", json={"messages": QUESTION, "stream": True}).content
    assert raw == b"".join(STREAM)


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_for_a_moment_is_not_noticed(served: Served, server: ServerLLM, stream: bool) -> None:
    server.faults = [replies({}, 429), hangs_up, replies({}, 502)]
    got = served.ask(stream=stream)
    assert ("".join(parts(got)[:-1]) if stream else got.choices[0].message.content) == ANSWER
    assert len(server.asked) == 4


def test_nobody_is_there(serve: Any) -> None:
    with ServerLLM() as server:
        url = server.url
    served = serve(url)
    for response in (
        served.http.post("/v1/chat/completions", json={"messages": QUESTION}),
        served.http.get("/v1/models"),
    ):
        assert problem(response).startswith("502 upstream_error: the server LLM cannot be reached")
    assert served.http.get("/healthz").status_code == 200


# Who waits, and who leaves


def test_more_than_there_is_room_for_is_busy(serve: Any, server: ServerLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "QUEUE_SECONDS", 60)
    made = []
    monkeypatch.setattr(chat, "Places", lambda count, kind=chat.Places: made.append(kind(count)) or made[-1])
    served = serve(server.url, concurrency=2, model="x")
    free = threading.Semaphore(0)
    server.always = lambda to: (free.acquire(timeout=30), replies(completion())(to))
    asking = [served.post({"messages": QUESTION}) for _ in range(2)]
    until(lambda: server.now == 2)
    waiting = [served.post({"messages": QUESTION}) for _ in range(2)]
    until(lambda: made[0]._waiting == 2)
    refused = served.http.post("/v1/chat/completions", json={"messages": QUESTION})
    assert problem(refused).startswith("503 busy: busy")
    assert refused.headers["retry-after"] == str(chat.BUSY_SECONDS)
    waiting.pop().close()  # makes room
    until(lambda: made[0]._waiting == 1)
    monkeypatch.setattr(chat, "QUEUE_SECONDS", 0.2)
    assert problem(served.http.post("/v1/chat/completions", json={"messages": QUESTION})).startswith("503 busy")
    assert server.most == len(server.asked) == 2
    free.release(10)
    for connection in asking + waiting:
        assert b"200 OK" in connection.recv(100)
        connection.close()
    assert server.most == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_the_server_llm(
    serve: Any, server: ServerLLM, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(server.url, concurrency=1)
    noticed = []

    def asks_forever(to: Handler) -> None:
        if stream:
            to.head(200, Content_Type="text/event-stream")
            to.wfile.write(STREAM[0])
        noticed.append(gone(to))

    server.faults = [asks_forever]
    with caplog.at_level(logging.INFO, logger="crayon.service"):
        connection = served.post({"messages": QUESTION, "stream": stream})
        if stream:
            assert b"200 OK" in connection.recv(100)
        until(lambda: server.now == 1)
        connection.close()
        until(lambda: noticed == [True])
        assert served.ask().choices[0].message.content == ANSWER, "its place is free"
        until(lambda: len(caplog.records) >= 2)
    assert json.loads(caplog.messages[0])["status"] == 499


def test_a_client_that_reads_slowly_slows_the_server_llm(served: Served, server: ServerLLM) -> None:
    sent = 0

    def much(to: Handler) -> None:
        nonlocal sent
        to.head(200, Content_Type="text/event-stream")
        for _ in range(1500):
            to.wfile.write(event(chunk("x" * 10_000)))
            sent += 1

    server.always = much
    connection = served.post({"messages": QUESTION, "stream": True})
    connection.recv(100)
    before = -1
    while before != sent:
        before = sent
        time.sleep(0.3)
    assert sent < 1400
    connection.close()


# What others see


def test_the_log_and_the_metrics_tell_nothing_of_what_was_asked(
    served: Served, server: ServerLLM, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = [
        replies(completion()),
        replies({"error": {"message": "cannot read: a private question"}}),
        replies({"error": {"message": "not liked: a private question"}}, 400),
    ]
    with caplog.at_level(logging.INFO, logger="crayon.service"):
        for _ in range(3):
            served.http.post("/v1/chat/completions", json={"messages": QUESTION})
        until(lambda: len(caplog.records) == 4)
    lines = [json.loads(message) for message in caplog.messages if message.startswith("{")]
    assert [(line["route"], line["status"]) for line in lines] == [("/v1/chat/completions", s) for s in (200, 502, 400)]
    (warning,) = (message for message in caplog.messages if not message.startswith("{"))
    assert warning == "the server LLM failed; look at its log"
    numbers = served.http.get("/metrics").text
    assert 'crayon_upstream_seconds_count{outcome="answered"} 3.0' in numbers
    assert 'crayon_upstream_seconds_count{outcome="refused"} 1.0' in numbers
    assert 'crayon_requests_total{route="/v1/chat/completions",status="502"} 1.0' in numbers
    assert "private" not in caplog.text + numbers


@pytest.mark.slow
def test_requests_made_from_the_openapi_document(pool: Pool, server: ServerLLM, tmp_path: Path) -> None:
    schemathesis = needs.module("schemathesis")
    hypothesis = needs.module("hypothesis")
    (tmp_path / "cache").mkdir()
    app = create_app(pool.path, None, cache=tmp_path / "cache", upstream=Endpoint(server.url, model="x"))
    accepted = 0

    @hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
    def check(case: Any) -> None:
        nonlocal accepted
        accepted += case.call_and_validate().status_code == 200

    operations = schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()
    for operation in (operation.ok() for operation in operations):
        if operation.path in ("/v1/chat/completions", "/v1/models"):
            hypothesis.given(case=operation.as_strategy())(check)()
    assert accepted > 10


# A model of this machine


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs.module("onnx")
    from crayon_server.models import load_nano

    return as_bundle(load_nano(), tmp_path_factory.mktemp("exports"))


def test_a_folder_is_exported_once_for_each_state_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = []

    def export(model: Path, out: Path, **options: Any) -> None:
        exported.append(options.pop("quantize"))
        out.mkdir()

    needs.module("onnx")
    monkeypatch.setattr("crayon_export.exporter.export", export)
    model, cache = tmp_path / "model", tmp_path / "cache"
    model.mkdir()
    (model / "config.json").write_text("{}")
    first = as_bundle(model, cache)
    assert as_bundle(model, cache) == first
    (model / "config.json").write_text("{ }")
    second = as_bundle(model, cache)
    assert exported == ["none", "none"]
    assert (first.exists(), second.exists()) == (False, True)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    assert as_bundle(tmp_path / "bundle", cache) == tmp_path / "bundle"
    with pytest.raises(Exception, match="no model here"):
        as_bundle(tmp_path / "nothing", cache)


@pytest.fixture(scope="module")
def there(bundle: Path) -> Iterator[local.Local]:
    with serving(bundle, waiting=4) as made:
        yield made


def test_openais_client_asks_a_real_second_process(serve: Any, bundle: Path, there: local.Local) -> None:
    from crayon_runtime.engine import Engine

    question = [{"role": "user", "content": "set an alarm for six"}]
    with Engine.load(bundle) as engine:
        wanted = engine.generate(engine.tokenizer.apply_chat_template(question), max_new_tokens=40)
        assert len(wanted.text) > 10
    served = serve(there.url, api_key=there.api_key)
    assert [model.id for model in served.client.models.list()] == ["nano"]
    create = served.client.chat.completions.create
    whole = create(model="any", messages=question, max_tokens=40)
    assert whole.choices[0].message.content == wanted.text
    assert whole.usage.completion_tokens == wanted.generated_tokens
    stream = list(
        create(model="any", messages=question, max_tokens=40, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(part.choices[0].delta.content or "" for part in stream if part.choices) == wanted.text
    assert stream[-1].usage.completion_tokens == wanted.generated_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="any", messages=[{"role": "user", "content": "alarm " * 2000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="any", messages=question, extra_body={"best_friend": 1})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "best_friend")
    with pytest.raises(openai.APIStatusError, match="refuses the key"):
        serve(there.url).ask()


def test_upstream_asks_a_real_second_process(there: local.Local) -> None:
    with upstreams.Upstream(there.url, api_key=there.api_key) as upstream:
        assert upstream.model() == "nano"
        assert upstream.complete("set an alarm for six", max_tokens=40).startswith('{"fn": "alarm.set"')


@pytest.mark.slow
def test_a_process_that_ends_is_started_again_where_it_was(
    bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    start = local._Child._start
    monkeypatch.setattr(local._Child, "_start", lambda self: made.append(start(self)) or made[-1])
    with serving(bundle, waiting=4) as there:
        with upstreams.Upstream(there.url, api_key=there.api_key, patience=60, retries=20) as upstream:
            first = upstream.complete("what time is it")
            made[0].kill()
            until(lambda: len(made) == 2)
            assert upstream.complete("what time is it") == first
        assert "ended with status -9" in caplog.text
    assert [process.returncode for process in made] == [-9, 0]


def test_a_model_that_cannot_be_served(tmp_path: Path) -> None:
    from crayon_runtime.errors import BackendError

    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(BackendError, match="manifest.json"), serving(tmp_path, waiting=1):
        pass


@pytest.mark.slow
def test_what_the_command_starts_ends_with_it(pool: Pool, bundle: Path, tmp_path: Path) -> None:
    program = "import sys; from crayon_server.cli.serve import serve; serve(sys.argv[1:])"
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    command = [
        sys.executable,
        "-c",
        program,
        str(pool.path),
        "--port",
        "0",
        "--upstream",
        str(bundle),
        "--workers",
        "2",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            line = ""
            while process.poll() is None and not line.startswith("serving"):
                line = process.stderr.readline()
            url = f"http://{line.strip().rpartition('http://')[2]}"
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=20)
            answered = {
                client.chat.completions.create(model="x", messages=QUESTION, max_tokens=5).model for _ in range(4)
            }
            client.close()
            assert answered == {"nano"}
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            serving_it = [pid for pid in children if b"upstream.child" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            assert len(serving_it) == 1, "all workers share it"
        finally:
            process.send_signal(signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in serving_it))


@pytest.mark.parametrize(
    "args, message",
    [
        (["--upstream", "nothing"], "no model here"),
        (["--upstream", "http://example.com"], "--plain-http"),
        (["--upstream", "https://example.com", "--upstream-key-file", "absent"], "key cannot be read"),
    ],
)
def test_a_server_llm_that_is_none(pool: Pool, tmp_path: Path, args: list[str], message: str) -> None:
    from crayon_runtime.cli import main

    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(["serve", str(pool.path), "--port", "0", "--cache", str(tmp_path / "cache"), *args]) == 1
    assert message in said.getvalue()
