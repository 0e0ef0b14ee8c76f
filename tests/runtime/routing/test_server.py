"""Asking a server LLM that misbehaves in every way that we could think of, and a good one."""

from __future__ import annotations

import gc
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from crayon_runtime.errors import InvalidInput, ServerError
from crayon_runtime.routing import exchange
from crayon_runtime.routing.server import Asking, ServerLLM
from tests.runtime import tiny
from tests.runtime.routing.upstreams import (
    COMPLETIONS,
    DONE,
    Upstream,
    chunk,
    completes,
    refuses,
    sends,
    silent,
    sse,
    streams,
)
from tests.runtime.services import Fault, Handler, answers, hangs_up
from tests.support import needs

LONG = 5.0
"""Seconds that nothing here may take: what is waited for is a small part of it."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BACK_OFF", 0.01)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.fixture
def llm(upstream: Upstream) -> Iterator[ServerLLM]:
    with ServerLLM(upstream.url) as llm:
        yield llm


@pytest.fixture
def free() -> Iterator[threading.Event]:
    free = threading.Event()
    yield free
    free.set()


@pytest.fixture
def failure(upstream: Upstream) -> Callable[..., ServerError]:
    """What asking a server that does this ends with."""

    def ask(fault: Fault, **options: float) -> ServerError:
        upstream.always = fault
        started = time.monotonic()
        with (
            ServerLLM(upstream.url, **options) as llm,  # type: ignore[arg-type]
            llm.ask("a query") as asking,
            pytest.raises(ServerError) as raised,
        ):
            list(asking)
        assert time.monotonic() - started < LONG
        assert raised.value.where == upstream.url
        assert list(asking) == [], "it stays ended"
        assert raised.value.what.isprintable()
        return raised.value

    return ask


def alive() -> list[threading.Thread]:
    """Threads that ask."""
    return [thread for thread in threading.enumerate() if thread.name == "crayon-ask"]


def gone(within: float = LONG) -> bool:
    end = time.monotonic() + within
    while alive() and time.monotonic() < end:
        time.sleep(0.01)
    return not alive()


# A server as it should be


def test_what_is_sent_is_the_query_and_nothing_else(upstream: Upstream, llm: ServerLLM) -> None:
    asking = llm.ask("what is the tallest mountain?")
    assert list(asking) == ["an", " answer"]
    (asked,) = upstream.asked
    assert (asked.method, asked.path) == ("POST", COMPLETIONS)
    assert json.loads(asked.body) == {
        "model": "default",
        "messages": [{"role": "user", "content": "what is the tallest mountain?"}],
        "stream": True,
    }
    assert asked.headers.keys() == {
        "host",
        "accept",
        "accept-encoding",
        "connection",
        "content-length",
        "content-type",
        "user-agent",
    }
    assert asked.headers["accept-encoding"] == "identity"
    assert asking.sent_bytes == len(asked.body) == len(llm.request("what is the tallest mountain?"))


def test_what_is_known_at_the_end(upstream: Upstream, llm: ServerLLM) -> None:
    upstream.always = streams("one", " two", " three", finish="length", pause=0.01)
    asking = llm.ask("a query")
    assert "".join(asking) == asking.text == "one two three"
    assert (asking.finish_reason, asking.tokens) == ("length", 3)
    assert asking.first_token_seconds is not None
    assert 0 < asking.first_token_seconds < asking.seconds


def test_pieces_come_as_they_are_sent(upstream: Upstream, llm: ServerLLM) -> None:
    goes_on = threading.Event()

    def script(to: Handler) -> None:
        to.head(200, Content_Type="text/event-stream")
        to.wfile.write(chunk("one"))
        goes_on.wait(LONG)
        to.wfile.write(chunk(" two", "stop") + DONE)
        to.cut()

    upstream.always = script
    asking = llm.ask("a query")
    assert next(asking) == "one"
    assert asking.text == "one"
    goes_on.set()
    assert list(asking) == [" two"]


def test_the_model_the_key_and_the_limit(upstream: Upstream) -> None:
    with ServerLLM(f"{upstream.url}/v1/", api_key="a-key", model="large") as llm:
        list(llm.ask("a query", max_tokens=7))
    asked = upstream.asked[-1]
    assert asked.path == COMPLETIONS, "an address may end in /v1, as OpenAI's clients want it"
    assert asked.headers["authorization"] == "Bearer a-key"
    assert (json.loads(asked.body)["model"], json.loads(asked.body)["max_tokens"]) == ("large", 7)


@pytest.mark.parametrize(
    "script",
    [
        completes("an answer", usage={"completion_tokens": 2}),
        streams("an", " answer"),
        sends(chunk("an") + chunk(" answer"), chunk(finish="stop"), b"data: [DONE]"),
        sends(chunk("an answer", "stop"), b"data: [DONE]\n"),
        sends(chunk("an answer"), DONE),
        sends(chunk("an answer", "stop")),
        sends(chunk("an answer", "stop"), end=False),
        sends(chunk("an"), chunk(" answer", "stop"), sse({"choices": [], "usage": {"completion_tokens": 2}}), DONE),
        sends(b": a comment\r\nevent: message\r\nid: 7\r\n" + chunk("an answer").replace(b"\n", b"\r\n"), DONE),
        sends(b'data: {"choices":[{"delta":\ndata: {"content":"an answer"}}]}\n\n', DONE),
        sends(sse({"choices": []}), chunk("an answer"), DONE, chunk("and more"), b"data: nonsense\n\n"),
        sends(
            sse({"choices": [{"index": 1, "delta": {"content": "another"}}, {"delta": {"content": "an answer"}}]}), DONE
        ),
        sends(sse({"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]}), chunk("an answer"), DONE),
    ],
)
def test_forms_of_an_answer(script: Fault, upstream: Upstream, llm: ServerLLM) -> None:
    upstream.always = script
    asking = llm.ask("a query")
    assert "".join(asking) == "an answer"
    assert asking.finish_reason in ("stop", None)
    assert asking.tokens in (1, 2)


def test_packets_end_anywhere(upstream: Upstream, llm: ServerLLM) -> None:
    content = chunk("é日") + b'data: {"choices":[{"delta":{"content":" \xf0\x9f\x96\x8d!"}}]}\r\n\r\n' + DONE
    upstream.always = sends(*(content[n : n + 1] for n in range(len(content))))
    assert "".join(llm.ask("a query")) == "é日 🖍!"


def test_a_server_that_forgets_the_end_mark(upstream: Upstream, llm: ServerLLM, free: threading.Event) -> None:
    def script(to: Handler) -> None:
        sends(chunk("an answer", "stop"), end=False)(to)
        free.wait(LONG)

    upstream.always = script
    asking = llm.ask("a query")
    assert list(asking) == ["an answer"]
    assert asking.seconds < LONG


def test_the_connection_is_kept(upstream: Upstream, llm: ServerLLM) -> None:
    for _ in range(3):
        assert "".join(llm.ask("a query")) == "an answer"
    upstream.always = completes("whole")
    assert "".join(llm.ask("a query")) == "whole"
    assert upstream.connections == 1
    llm.close()
    assert "".join(llm.ask("a query")) == "whole"
    assert upstream.connections == 2


def test_a_kept_connection_that_the_server_closed(upstream: Upstream, free: threading.Event) -> None:
    with ServerLLM(upstream.url, retries=0) as llm:
        for _ in range(3):
            # Twice it is closed without a word, and the request may already be on its way.
            upstream.scripts = [lambda to: (streams("an answer")(to), to.cut())]
            assert "".join(llm.ask("a query")) == "an answer"
        upstream.scripts = [streams("an answer"), hangs_up, streams("another")]
        list(llm.ask("a query"))
        assert "".join(llm.ask("a query")) == "another"


def test_many_at_once(upstream: Upstream, llm: ServerLLM) -> None:
    upstream.always = streams("yes", pause=0.01)
    askings = [llm.ask(f"query {n}") for n in range(20)]
    assert ["".join(asking) for asking in askings] == ["yes"] * 20
    assert sorted(upstream.queries) == sorted(f"query {n}" for n in range(20))
    assert len(llm._connections._free) <= exchange._KEPT
    assert gone()


def test_control_characters_are_left_out(upstream: Upstream, llm: ServerLLM) -> None:
    upstream.always = streams("a\x1b[31m red\r\n", "\x07\x9b1m\tline\u2028")
    assert "".join(llm.ask("a query")) == "a[31m red\n1m\tline\u2028"


def test_cookies_are_not_kept(upstream: Upstream, llm: ServerLLM) -> None:
    upstream.always = lambda to: to.reply(
        200,
        b'{"choices":[{"message":{"content":"yes"}}]}',
        Content_Type="application/json",
        Set_Cookie="user=42; Path=/",
    )
    for _ in range(2):
        list(llm.ask("a query"))
    assert "cookie" not in upstream.asked[-1].headers


def test_the_device_server_of_this_project(tmp_path: Path) -> None:
    needs.module("fastapi")
    needs.module("openai")
    from tests.runtime.server.served import serving

    engine = tiny.engine(
        lambda ids, adapter: tiny.BYTE + ord("x"), bundle=tiny.bundle(tmp_path / "bundle"), chat_template=tiny.CHATML
    )
    with serving(engine) as served, ServerLLM(served.url, model="tiny") as llm:
        asking = llm.ask("the alarm", max_tokens=5)
        assert ("".join(asking), asking.finish_reason, asking.tokens) == ("xxxxx", "length", 5)
        with pytest.raises(ServerError, match="there is no such server or model"):
            list(ServerLLM(served.url, model="another").ask("the alarm"))
        with pytest.raises(ServerError, match="the server refuses: .*context"):
            list(llm.ask("the alarm " * 10_000))


# Servers that are not there


def test_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    asking = ServerLLM(f"http://127.0.0.1:{port}").ask("a query")
    with pytest.raises(ServerError, match="cannot be reached: .*refused") as raised:
        next(asking)
    assert raised.value.do == "check the network"
    assert asking.sent_bytes == 0


def test_a_name_that_is_not_resolved(monkeypatch: pytest.MonkeyPatch, free: threading.Event) -> None:
    def resolves_later(*_: object, **__: object) -> list[object]:
        free.wait(LONG)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", resolves_later)
    asking = ServerLLM("https://far.example.org", connect_timeout=0.1).ask("a query")
    with pytest.raises(ServerError, match="no connection within 0.1 s"):
        next(asking)
    assert asking.seconds < LONG
    free.set()
    assert gone()


def test_what_connects_after_it_was_given_up_sends_nothing(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, free: threading.Event
) -> None:
    resolve = socket.getaddrinfo

    def resolves_later(*asked: object, **more: object) -> object:
        free.wait(LONG)
        return resolve(*asked, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolves_later)
    with ServerLLM(upstream.url, connect_timeout=0.1) as llm:
        asking = llm.ask("a query")
        with pytest.raises(ServerError, match="no connection"):
            next(asking)
        free.set()
        assert gone()
    assert (upstream.asked, asking.sent_bytes) == ([], 0)


def test_a_connection_that_nobody_accepts() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        others = []
        for _ in range(3):  # fill the queue
            others.append(socket.socket())
            others[-1].setblocking(False)
            others[-1].connect_ex(listening.getsockname())
        asking = ServerLLM(f"http://127.0.0.1:{listening.getsockname()[1]}", connect_timeout=0.2).ask("a query")
        with pytest.raises(ServerError, match="cannot be reached"):
            next(asking)
        assert asking.seconds < LONG
        for other in others:
            other.close()


def test_a_port_that_does_not_encrypt() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_one:
        asking = ServerLLM(f"https://127.0.0.1:{silent_one.getsockname()[1]}", connect_timeout=0.2).ask("a query")
        with pytest.raises(ServerError, match="cannot be reached"):
            next(asking)
        assert asking.sent_bytes == 0
        assert gone(), "nothing waits for it any more"


CERTIFICATE = Path(__file__).parents[2] / "data" / "localhost.pem"


@pytest.fixture
def encrypted(upstream: Upstream) -> str:
    """The address of the same server over TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    upstream._server.socket = context.wrap_socket(upstream._server.socket, server_side=True)
    return upstream.url.replace("http:", "https:")


def test_over_tls(upstream: Upstream, encrypted: str, monkeypatch: pytest.MonkeyPatch, free: threading.Event) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    with ServerLLM(encrypted) as llm:
        for _ in range(2):
            assert "".join(llm.ask("a query")) == "an answer"
        assert upstream.connections == 1
        upstream.always = silent(free)
        cancel = threading.Event()
        asking = llm.ask("a query", cancel=cancel)
        threading.Timer(0.1, cancel.set).start()
        assert list(asking) == []
        assert asking.seconds < LONG
        assert gone(), "nothing waits for the server any more"


def test_a_certificate_that_nobody_trusts(upstream: Upstream, encrypted: str) -> None:
    asking = ServerLLM(encrypted, api_key="a-key").ask("a query")
    with pytest.raises(ServerError, match="CERTIFICATE_VERIFY_FAILED"):
        next(asking)
    assert (upstream.asked, asking.sent_bytes) == ([], 0)


def test_a_port_that_speaks_something_else(failure: Callable[..., ServerError]) -> None:
    def ssh(to: Handler) -> None:
        to.wfile.write(b"SSH-2.0-OpenSSH_9.2p1\r\n")
        to.cut()

    assert "the connection failed" in failure(ssh).what


# Slow ones


def test_a_server_that_does_not_answer(failure: Callable[..., ServerError], free: threading.Event) -> None:
    error = failure(silent(free), first_token_timeout=0.2)
    assert error.what == "no answer began within 0.2 s"
    assert gone(), "nothing waits for it any more"


def test_a_server_that_sends_only_a_head(failure: Callable[..., ServerError], free: threading.Event) -> None:
    def script(to: Handler) -> None:
        to.head(200, Content_Type="text/event-stream")
        free.wait(LONG)

    assert failure(script, first_token_timeout=0.2).what == "no answer began within 0.2 s"


@pytest.mark.parametrize("part", [b": still there\n\n", chunk(""), b"\n", b"x"])
def test_a_server_that_keeps_one_waiting(part: bytes, failure: Callable[..., ServerError]) -> None:
    script = sends(*[part] * 100, pause=0.02)
    assert failure(script, first_token_timeout=0.2).what == "no answer began within 0.2 s"


@pytest.mark.parametrize("part", [b": still there\n\n", b"\n", b"x", b'data: {"choices": []}\n\n'])
def test_an_answer_that_stops(part: bytes, failure: Callable[..., ServerError]) -> None:
    script = sends(chunk("an"), *[part] * 100, pause=0.02)
    assert failure(script, idle_timeout=0.2).what == "the answer stopped for 0.2 s"


@pytest.mark.parametrize("part", [chunk("a"), chunk("")])
def test_an_answer_that_does_not_end(part: bytes, failure: Callable[..., ServerError]) -> None:
    script = sends(chunk("an"), *[part] * 200, pause=0.02)
    assert failure(script, deadline=0.4).what == "the answer did not end within 0.4 s"


def test_the_deadline_holds_also_where_nobody_listens(upstream: Upstream) -> None:
    upstream.always = sends(*[chunk("a")] * 200, pause=0.02)
    with ServerLLM(upstream.url, deadline=0.3) as llm:
        asking = llm.ask("a query")
        assert gone()
        with pytest.raises(ServerError, match="did not end within 0.3 s"):
            list(asking)


def test_a_reader_that_is_slow_loses_nothing(upstream: Upstream) -> None:
    with ServerLLM(upstream.url, idle_timeout=0.05) as llm:
        asking = llm.ask("a query")
        assert next(asking) == "an"
        assert gone()
        time.sleep(0.1)
        assert list(asking) == [" answer"]


# Cancelled


@pytest.mark.parametrize("begun", [False, True])
def test_it_can_be_cancelled_at_any_time(
    begun: bool, upstream: Upstream, llm: ServerLLM, free: threading.Event
) -> None:
    left = threading.Event()

    def script(to: Handler) -> None:
        if begun:
            to.head(200, Content_Type="text/event-stream")
            to.wfile.write(chunk("an"))
            to.wfile.flush()
        if to.connection.recv(1) == b"":
            left.set()

    upstream.always = script
    cancel = threading.Event()
    asking = llm.ask("a query", cancel=cancel)
    if begun:
        assert next(asking) == "an"
    cancelled: list[float] = []
    threading.Timer(0.1, lambda: (cancelled.append(time.perf_counter()), cancel.set())).start()
    assert list(asking) == []
    assert time.perf_counter() - cancelled[0] < LONG
    assert (asking.finish_reason, asking.text) == ("cancelled", "an" if begun else "")
    assert left.wait(LONG), "the server sees it"
    assert gone()
    upstream.always = streams("another")
    assert "".join(llm.ask("a query")) == "another"


def test_it_is_cancelled_on_a_kept_connection_too(upstream: Upstream, llm: ServerLLM, free: threading.Event) -> None:
    list(llm.ask("a query"))
    upstream.always = silent(free)
    asking = llm.ask("another")
    while len(upstream.asked) < 2:
        time.sleep(0.01)
    asking.close()
    assert gone()
    assert upstream.connections == 1


def test_it_is_cancelled_while_it_waits_to_ask_again(upstream: Upstream, llm: ServerLLM) -> None:
    upstream.always = refuses(503, Retry_After=10)
    cancel = threading.Event()
    asking = llm.ask("a query", cancel=cancel)
    while not upstream.asked:
        time.sleep(0.01)
    threading.Timer(0.1, cancel.set).start()
    assert list(asking) == []
    assert gone()
    assert len(upstream.asked) == 1


def test_what_nobody_reads_any_more_is_stopped(upstream: Upstream, llm: ServerLLM) -> None:
    upstream.always = sends(*[chunk("a")] * 500, pause=0.02)
    asking: Asking | None = llm.ask("a query")
    assert asking
    next(asking)
    del asking
    gc.collect()
    assert gone()


def test_a_reader_that_fails_leaves_nothing_behind(upstream: Upstream, llm: ServerLLM) -> None:
    upstream.always = sends(*[chunk("a")] * 500, pause=0.02)
    with pytest.raises(ZeroDivisionError), llm.ask("a query") as asking:
        for _ in asking:
            1 / 0  # noqa: B018
    assert asking.finish_reason == "cancelled"
    assert gone()


# Those that cut


@pytest.mark.parametrize(
    "parts",
    [
        [chunk("an")],
        [chunk("an"), chunk(" answer")[:-10]],
        [chunk("an"), b"data: [DONE"],
        [chunk("an"), b"data"],
    ],
)
@pytest.mark.parametrize("end", [True, False])
def test_an_answer_that_is_cut_off(parts: list[bytes], end: bool, upstream: Upstream, llm: ServerLLM) -> None:
    upstream.always = sends(*parts, end=end)
    asking = llm.ask("a query")
    with pytest.raises(ServerError, match="the answer was cut off"):
        list(asking)
    assert asking.text == "an", "what came can be looked at"
    assert len(upstream.asked) == 1, "it is not asked again"


def test_json_that_is_cut_off(failure: Callable[..., ServerError]) -> None:
    def script(to: Handler) -> None:
        to.head(200, Content_Type="application/json", Content_Length=100)
        to.wfile.write(b'{"choices":[{"message":{"content":"yes"}}]}')
        to.cut()

    assert failure(script).what == "the answer was cut off"


def test_a_server_that_hangs_up_is_asked_once_more(upstream: Upstream, llm: ServerLLM) -> None:
    upstream.scripts = [hangs_up]
    asking = llm.ask("a query")
    assert "".join(asking) == "an answer"
    assert asking.sent_bytes == 2 * len(upstream.asked[0].body)


def test_and_not_more_often(upstream: Upstream, failure: Callable[..., ServerError]) -> None:
    assert "the connection failed" in failure(hangs_up).what
    assert len(upstream.asked) == 2


# Those that refuse


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_once_more(status: int, upstream: Upstream, llm: ServerLLM) -> None:
    upstream.scripts = [refuses(status, Retry_After=0)]
    assert "".join(llm.ask("a query")) == "an answer"


def test_the_time_that_a_server_asks_for(upstream: Upstream, llm: ServerLLM) -> None:
    upstream.scripts = [refuses(429, Retry_After=1)]
    asking = llm.ask("a query")
    assert "".join(asking) == "an answer"
    assert asking.seconds > 1


@pytest.mark.parametrize("retry_after", ["60", "99999999999999999999", "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_nobody_waits_for_long(retry_after: str, upstream: Upstream, failure: Callable[..., ServerError]) -> None:
    error = failure(refuses(503, "too many users", Retry_After=retry_after))
    assert error.what == "the server cannot answer now: too many users (503)"
    assert error.do is not None
    assert error.do.startswith("try again in")
    assert len(upstream.asked) == 1


@pytest.mark.parametrize(
    "fault, what",
    [
        (refuses(401, "bad key"), "the server refuses: bad key (401)"),
        (refuses(403), "the server refuses: no (403)"),
        (refuses(404, "no such model"), "there is no such server or model: no such model (404)"),
        (refuses(400, "the context is too long"), "the server refuses: the context is too long (400)"),
        (refuses(400, "a\x1b[31m\nb" + "x" * 3000), "the server refuses: a[31mb" + "x" * 292 + " (400)"),
        (answers(400, b'{"error": "as text"}'), "the server refuses: as text (400)"),
        (answers(422, b'{"detail": "of FastAPI"}'), "the server refuses: of FastAPI (422)"),
        (answers(400, b'{"error": {"what": "ours"}}'), "the server refuses: ours (400)"),
        (answers(400, b'{"error": {"message": 7}}'), "the server refuses: HTTP status 400"),
        (answers(400, b'["nonsense"]'), "the server refuses: HTTP status 400"),
        (answers(400, b"[" * 100_000), "the server refuses: HTTP status 400"),
        (answers(418, b"<html>"), "the server refuses: HTTP status 418"),
        (answers(204), "the server refuses: HTTP status 204"),
        (answers(206, chunk("an answer")), "the server refuses: HTTP status 206"),
    ],
)
def test_a_refusal(fault: Fault, what: str, upstream: Upstream, failure: Callable[..., ServerError]) -> None:
    assert failure(fault).what == what
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int, upstream: Upstream, failure: Callable[..., ServerError]) -> None:
    with Upstream() as other:
        error = failure(answers(status, Location=f"{other.url}{COMPLETIONS}"))
        assert error.what == f"the server redirects to {other.url}{COMPLETIONS}"
        assert not other.asked
    assert len(upstream.asked) == 1


# Nonsense


@pytest.mark.parametrize(
    "fault, what",
    [
        (
            answers(200, b"<html>Log in to the hotel's network</html>", Content_Type="text/html"),
            "sends text/html, which",
        ),
        (answers(200, b"an answer"), "sends what it does not name"),
        (answers(200, b"x", Content_Type="\x1b[31mred"), "which is not an answer"),
        (answers(200, b"x" * 100, Content_Type="application/json", Content_Encoding="gzip"), "compressed"),
        (answers(200, b"<html>", Content_Type="text/event-stream"), "cut off"),
        (answers(200, b"", Content_Type="text/event-stream"), "cut off"),
        (answers(200, b"<html>", Content_Type="application/json"), "nonsense"),
        (answers(200, b"", Content_Type="application/json"), "nonsense"),
        (answers(200, b"[]", Content_Type="application/json"), "nonsense"),
        (answers(200, b"{}", Content_Type="application/json"), "nonsense"),
        (answers(200, b"[" * 100_000, Content_Type="application/json"), "nonsense"),
        (answers(200, b'{"choices":[{"message":{"content":7}}]}', Content_Type="application/json"), "nonsense"),
        (answers(200, b'{"choices":[{"message":{"content":NaN}}]}', Content_Type="application/json"), "nonsense"),
        (answers(200, b'{"choices":[{"message":{"content":"\xff"}}]}', Content_Type="application/json"), "nonsense"),
        (answers(200, b'{"choices":[{"message":{"content":"\\ud800"}}]}', Content_Type="application/json"), "nonsense"),
        (
            answers(200, b'{"error":{"message":"out of memory"}}', Content_Type="application/json"),
            "error: out of memory",
        ),
        (sends(b"data: nonsense\n\n", DONE), "nonsense"),
        (sends(b"data: NaN\n\n", DONE), "nonsense"),
        (sends(b'data: {"choices":[{"delta":{"content":"a"},"logprobs":NaN}]}\n\n', DONE), "nonsense"),
        (sends(chunk("an"), sse({"object": "something else"}), DONE), "nonsense"),
        (sends(chunk("an"), sse({"choices": {"0": "x"}}), DONE), "nonsense"),
        (sends(chunk("an"), b"data: \xff\xfe\n\n", DONE), "nonsense"),
        (sends(chunk("an"), sse({"error": {"message": "out of memory"}})), "stopped with an error: out of memory"),
        (sends(chunk("an"), b"event: error\n" + sse({"error": {}})), "stopped with an error: it does not say which"),
        (sends(chunk("an", "stop"), sse({"error": "too late"})), "stopped with an error: too late"),
    ],
)
def test_nonsense(fault: Fault, what: str, upstream: Upstream, failure: Callable[..., ServerError]) -> None:
    assert what in failure(fault).what
    assert len(upstream.asked) == 1


@pytest.mark.parametrize(
    "fault",
    [
        sends(DONE),
        sends(chunk(finish="stop"), DONE),
        streams("", " ", "\n"),
        streams("\x1b\x07"),
        streams(finish="tool_calls"),
        completes(""),
        completes(None),
        completes("\r\n"),
        answers(200, b'{"choices":[]}', Content_Type="application/json"),
        answers(200, b'{"choices":[{"index":1,"message":{"content":"a"}}]}', Content_Type="application/json"),
    ],
)
def test_an_empty_answer(fault: Fault, failure: Callable[..., ServerError]) -> None:
    assert failure(fault).what == "the server's answer is empty"


@pytest.mark.parametrize("said, tokens", [(5, 5), (0, 0), (-1, 2), (1 << 40, 2), (None, 2)])
def test_a_count_that_cannot_be(said: int | None, tokens: int, upstream: Upstream, llm: ServerLLM) -> None:
    upstream.always = sends(chunk("an"), chunk(" answer", "stop", usage={"completion_tokens": said}), DONE)
    asking = llm.ask("a query")
    list(asking)
    assert asking.tokens == tokens


def test_a_reason_that_is_no_reason(upstream: Upstream, llm: ServerLLM) -> None:
    upstream.always = streams("an answer", finish="\x1b" + "x" * 9999)
    asking = llm.ask("a query")
    list(asking)
    assert asking.finish_reason == "x" * 40


# Floods


def forever(head: bytes, part: bytes) -> Fault:
    def script(to: Handler) -> None:
        to.wfile.write(head)
        try:
            while True:
                to.wfile.write(part)
        except OSError:
            to.close_connection = True

    return script


EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"


@pytest.mark.parametrize(
    "head, part",
    [
        (EVENTS, chunk("a" * 1000)),
        (EVENTS, chunk("")),
        (EVENTS, b"\n" * 1000),
        (EVENTS, b"data: x"),
        (EVENTS, b"data: x\n"),
        (EVENTS, bytes(1000)),
        (EVENTS + chunk("an answer", "stop") + DONE, chunk("more")),
        (JSON, b"[" * 1000),
        (JSON, b" " * 1000),
        (b"HTTP/1.1 400 no\r\n\r\n", b"x" * 1000),
        (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nx: ", b"y" * 1000),
        (b"HTTP/1.1 ", b"2" * 1000),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_a_flood(head: bytes, part: bytes, upstream: Upstream) -> None:
    upstream.always = forever(head, part)
    with ServerLLM(upstream.url, first_token_timeout=1, largest=100_000, retries=0) as llm:
        asking = llm.ask("a query")
        if b"stop" in head:
            assert list(asking) == ["an answer"], "what follows the end mark is no part of it"
        else:
            with pytest.raises(ServerError):
                list(asking)
        assert len(asking.text) <= 100_000
        assert asking.seconds < LONG
        assert gone(), "nothing goes on reading"
        assert not llm._connections._free, "such a connection is not kept"


@pytest.mark.parametrize("announced", [100_001, 1 << 60])
def test_a_length_that_is_too_much(announced: int, failure: Callable[..., ServerError]) -> None:
    def script(to: Handler) -> None:
        to.head(200, Content_Type="application/json", Content_Length=announced)
        to.wfile.write(b"[")

    assert failure(script, largest=100_000).what == "the server sends more than 100000 bytes"


# What we give it


@pytest.mark.parametrize("query", ["", " \n\t", "\ud800", "x" * (1 << 20)])
def test_what_cannot_be_asked(query: str, upstream: Upstream, llm: ServerLLM) -> None:
    with pytest.raises(InvalidInput) as raised:
        llm.ask(query)
    assert raised.value.where == "query"
    assert not upstream.asked


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org",
        "ftp://example.org",
        "https://user@example.org",
        "https://example.org?key=1",
        "http://192.0.2.1",
    ],
)
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(InvalidInput):
        ServerLLM(url)


def test_plain_http_has_to_be_allowed() -> None:
    with pytest.raises(InvalidInput, match="everybody on the way could read what is asked and answered"):
        ServerLLM("http://example.org")
    assert ServerLLM("http://192.0.2.1", plain_http=True).url == "http://192.0.2.1"


@pytest.mark.parametrize("key", ["", " ", "a\nb", "é"])
def test_keys_that_are_refused(key: str) -> None:
    with pytest.raises(InvalidInput, match="one line of ASCII"):
        ServerLLM("https://example.org", api_key=key)


def test_the_proxy_of_the_environment_is_not_asked_for_this_machine(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://192.0.2.1:1")
    monkeypatch.setenv("ALL_PROXY", "nonsense")
    assert "".join(ServerLLM(upstream.url).ask("a query")) == "an answer"


def test_a_proxy_that_cannot_be_used_is_an_error_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://proxy")
    with pytest.raises(ServerError, match="asking the server failed: .*nonsense"):
        list(ServerLLM("https://example.org").ask("a query"))


def test_no_thread_is_left_to_ask_with(llm: ServerLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    with pytest.raises(ServerError, match="can't start new thread"):
        list(llm.ask("a query"))


def test_no_socket_stays_open(upstream: Upstream) -> None:
    def sockets() -> int:
        return sum("socket" in str(fd.resolve()) for fd in Path("/proc/self/fd").iterdir())

    faults = [streams("an answer"), hangs_up, refuses(400), sends(chunk("an"), end=False), answers(200, b"<html>")]
    before = sockets()
    for fault in faults * 3:
        upstream.always = fault
        with ServerLLM(upstream.url) as llm, llm.ask("a query") as asking, suppress(ServerError):
            list(asking)
    assert gone()
    end = time.monotonic() + LONG
    while sockets() > before and time.monotonic() < end:  # the server's own ends
        time.sleep(0.01)
    assert sockets() <= before
