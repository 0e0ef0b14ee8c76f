"""The device's server against the engine alone, and with clients that come, cancel and come back."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.bundles import tinyllama
from benchmarks.table import Row
from crayon_export import export
from crayon_runtime import Engine
from crayon_runtime.server import create_app
from crayon_runtime.server.asgi import listen
from crayon_runtime.server.serve import Server
from crayon_server.models import load_nano

PROMPT, TOKENS, ROUNDS = 8, 24, 15
CLIENTS = 200
SECONDS = float(os.environ.get("CRAYON_BENCH_SECONDS", "60"))


def run(work: Path) -> Iterator[Row]:
    nano = export(load_nano(), work / "server.bundle", replace=True).bundle.path
    # What is added does not depend on the model, and is a smaller part of the noise of a small one; a rate is judged at a real size.
    yield from _speed(nano, "nano", threads=1, judged="first")
    yield from _speed(tinyllama(work), "TinyLlama-1.1B shapes, int4", threads=2, judged="rate")
    yield _crowd(nano)


def _speed(bundle: Path, what: str, *, threads: int, judged: str) -> Iterator[Row]:
    """Streams of the server and of the engine, in turns."""
    alone: list[tuple[float, float]] = []
    served: list[tuple[float, float]] = []
    fixed = {"ignore_eos": True}
    with (
        Engine.load(bundle, threads=threads) as engine,
        _serving(engine, defaults=fixed) as (url, _),
        closing(HTTPConnection(url.removeprefix("http://"))) as client,
    ):
        rng = np.random.default_rng(0)
        session = engine.session()
        for i in range(-1, ROUNDS):
            ids = rng.integers(3, min(engine.backend.vocab_size, 1000), PROMPT).tolist()
            for side in (0, 1) if i % 2 else (1, 0):
                measured = _by_server(client, engine, ids) if side else _by_engine(engine, session, ids)
                if i >= 0:
                    (served if side else alone).append(measured)
    (first_alone, rate_alone), (first, rate) = np.median(alone, axis=0), np.median(served, axis=0)
    added = 1e3 * float(np.median([s[0] - a[0] for s, a in zip(served, alone, strict=True)]))
    ratio = float(np.median([s[1] / a[1] for s, a in zip(served, alone, strict=True)]))
    yield Row(
        f"device server, {what}: time to first token beyond the engine's",
        "<= 5 ms" if judged == "first" else "",
        f"{added:.1f} ms ({1e3 * first:.1f} against {1e3 * first_alone:.1f} ms)",
        added <= 5 if judged == "first" else None,
    )
    yield Row(
        f"device server, {what}: decode rate of a stream against the engine's",
        ">= 0.97" if judged == "rate" else "",
        f"{ratio:.3f} ({rate:.1f} against {rate_alone:.1f} tok/s)",
        ratio >= 0.97 if judged == "rate" else None,
    )


def _by_engine(engine: Engine, session: Any, ids: list[int]) -> tuple[float, float]:
    """Seconds until the first token, and tokens a second after it."""
    started = time.perf_counter()
    stamps = []
    for _ in engine.stream(ids, session=session, max_new_tokens=TOKENS, ignore_eos=True):
        stamps.append(time.perf_counter())
    return stamps[0] - started, (len(stamps) - 1) / (stamps[-1] - stamps[0])


def _by_server(client: HTTPConnection, engine: Engine, ids: list[int]) -> tuple[float, float]:
    body = {"model": engine.bundle.model.name, "prompt": ids, "max_tokens": TOKENS, "stream": True, "logprobs": 0}
    stamps, tokens = [], 0
    content = json.dumps(body)
    client.close()  # the server may have closed an idle one
    client.connect()
    started = time.perf_counter()
    client.request("POST", "/v1/completions", content)
    response = client.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data: {"):
            stamps.append(time.perf_counter())
            logprobs = json.loads(line[6:])["choices"][0]["logprobs"]
            tokens += len(logprobs["tokens"]) if logprobs else 0
    assert tokens == TOKENS
    return stamps[0] - started, (tokens - 1) / (stamps[-2] - stamps[0])  # the last chunk says why it ended


def _crowd(bundle: Path) -> Row:
    """Clients that connect, ask, often go away early, and come back at once."""
    with Engine.load(bundle, threads=1) as engine, _serving(engine) as (url, answers):
        _in_a_process_of_its_own(url, engine.bundle.model.name, SECONDS / 4)
        gc.collect()
        before = _resident()
        outcomes = _in_a_process_of_its_own(url, engine.bundle.model.name, SECONDS)
        end = time.monotonic() + 5
        while answers.present and time.monotonic() < end:
            time.sleep(0.01)
        left = answers.present
        gc.collect()
        grown = _resident() - before
        answered = httpx.post(
            f"{url}/v1/completions", json={"model": engine.bundle.model.name, "prompt": "a", "max_tokens": 1}
        )
    wrong = {k: n for k, n in outcomes.items() if k not in ("answered", "cancelled", "busy")}
    met = not wrong and left == 0 and grown < 8e6 and answered.status_code == 200 and outcomes["answered"] > 0
    told = ", ".join(f"{n} {k}" for k, n in sorted(outcomes.items()))
    return Row(
        f"device server: {CLIENTS} clients that connect, cancel and come back for {SECONDS:.0f} s",
        "no error but 'busy', flat memory, every slot freed",
        f"{told}; memory {grown / 1e6:+.1f} MB; {left} slots held",
        met,
    )


def _in_a_process_of_its_own(url: str, model: str, seconds: float) -> Counter[str]:
    """What became of the requests of all clients, who must not share memory with the server."""
    program = "import sys; from benchmarks.device_server import crowd; crowd(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, url, model, str(seconds)], check=True, capture_output=True, text=True
    )
    return Counter(json.loads(done.stdout))


def crowd(url: str, model: str, seconds: str) -> None:
    """The program of that process."""
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + float(seconds)

    async def visit(host: str, port: int, rng: random.Random) -> str:
        body = json.dumps(
            {
                "model": model,
                "prompt": "set an alarm for " * rng.randrange(1, 20),
                "max_tokens": 40,
                "stream": rng.random() < 0.7,
            }
        ).encode()
        reader, writer = await asyncio.open_connection(host, port)
        try:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            patience = rng.choice([0.0, 0.005, 0.02, 0.1, 60.0])
            answer = b""
            try:
                async with asyncio.timeout(patience):
                    answer = await reader.read(1 << 20) if not patience else await reader.read(-1)
            except TimeoutError:
                return "cancelled"
            status = answer.partition(b" ")[2][:3]
            if status == b"503" and b'"busy"' in answer:
                await asyncio.sleep(rng.random() * 0.2)
                return "busy"
            whole = answer.rstrip().endswith((b"}", b"[DONE]", b"0")) and b'"error"' not in answer
            return "answered" if status == b"200" and whole else f"wrong: {answer[:200]!r}"
        finally:
            writer.close()

    async def client(i: int) -> None:
        rng = random.Random(i)
        host, _, port = url.removeprefix("http://").rpartition(":")
        while time.monotonic() < end:
            try:
                outcomes[await visit(host, int(port), rng)] += 1
            except OSError as e:
                outcomes[f"{type(e).__name__}: {e}"] += 1

    async def everybody() -> None:
        await asyncio.gather(*(client(i) for i in range(CLIENTS)))

    asyncio.run(everybody())
    print(json.dumps(outcomes))


@contextmanager
def _serving(engine: Engine, **options: Any) -> Iterator[tuple[str, Any]]:
    """The server of an engine, in a thread of this process: its address, and its answers."""
    app = create_app(engine, **options)
    with listen("127.0.0.1", 0) as listening:
        server = Server(app)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        _until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.answers
        finally:
            server.should_exit = True
            thread.join()


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def _resident() -> int:
    """Bytes of this process that are in memory."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
