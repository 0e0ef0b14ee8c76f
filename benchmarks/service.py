"""The customization service under a mixed load, its client beside it on the same cores."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.table import Row
from crayon_export import architecture, jsonfile
from crayon_runtime.affinity import Projection, Weighting
from crayon_runtime.pool import MANIFEST, Embedding, Pool, PoolManifest, write_pool
from crayon_server.models import load_nano

SECONDS = float(os.environ.get("CRAYON_BENCH_SECONDS", "60"))
CLIENTS = 4
ADAPTERS, RANK, KNOWN = 16, 4, 50


class Server(NamedTuple):
    """A running `crayon serve`."""

    address: str
    pid: int


@contextmanager
def serving(pool: Path, *options: str) -> Iterator[Server]:
    """`crayon serve` as a process."""
    command = [sys.executable, "-m", "crayon_runtime", "serve", str(pool), "--port", "0", *options]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            said = ""
            while "http://" not in said:
                time.sleep(0.05)
                log.seek(0)
                said = log.read()
                if process.poll() is not None:
                    raise RuntimeError(said)
            yield Server(said.partition("http://")[2].split()[0], process.pid)
        finally:
            process.terminate()


def run(work: Path) -> Iterator[Row]:
    pool = Pool.open(nano_pool(work))
    with serving(pool.path) as server:
        load = _Load(server.address, pool.manifest)
        clients = [threading.Thread(target=load.ask, args=(seed,)) for seed in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(SECONDS / 5)
        before = _resident(server.pid)
        time.sleep(SECONDS - SECONDS / 5)
        after = _resident(server.pid)
        load.over.set()
        for client in clients:
            client.join()
    for kind, seconds in sorted(load.seconds.items()):
        p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
        yield Row(
            f"nano pool, {SECONDS:.0f} s, {CLIENTS} clients, {kind}: p50, p99",
            "",
            f"{p50:.1f} ms, {p99:.1f} ms ({len(seconds)} requests)",
        )
    count = sum(map(len, load.seconds.values()))
    yield Row(
        "all of them: requests/s, errors", "no errors", f"{count / SECONDS:.0f}/s, {len(load.errors)}", not load.errors
    )
    yield Row(
        "resident memory of the service, after a fifth of the time and at the end",
        "flat",
        f"{before / 1e6:.1f} MB, {after / 1e6:.1f} MB",
        after <= 1.05 * before,
    )
    for error in sorted(set(load.errors))[:5]:
        yield Row("an error", "", error, False)


class _Load:
    """What clients ask, and how long the whole answer took."""

    def __init__(self, address: str, manifest: PoolManifest) -> None:
        self.over = threading.Event()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.errors: list[str] = []
        self._address = address
        self._asked = {"base_fingerprint": manifest.base_fingerprint, "pool_version": manifest.version}
        self._known = [_alpha(np.random.default_rng(n)) for n in range(KNOWN)]
        self._kinds = {
            "an alpha that was asked for before": 0.4,
            "a new alpha": 0.2,
            "the pool": 0.1,
            "the pool, unchanged": 0.1,
            "a bad request": 0.1,
            "the rest of a cut download": 0.1,
        }

    def ask(self, seed: int) -> None:
        """One client after another's answer, until it is over; each has one connection."""
        rng = np.random.default_rng(1000 + seed)
        client = http.client.HTTPConnection(self._address, timeout=60)
        tag, place, whole = "", "", b""
        for n in range(KNOWN // CLIENTS + 1):  # not measured
            response, whole = self._send(client, "POST", self._body(self._known[(seed + CLIENTS * n) % KNOWN]))
        place = response.headers["Content-Location"]
        while not self.over.is_set():
            kind = str(rng.choice(list(self._kinds), p=list(self._kinds.values())))
            started = time.perf_counter()
            try:
                if kind == "an alpha that was asked for before":
                    response, content = self._send(client, "POST", self._body(self._known[rng.integers(KNOWN)]))
                    right = response.status == 200 and len(content) == len(whole)
                elif kind == "a new alpha":
                    response, content = self._send(client, "POST", self._body(_alpha(rng)))
                    right = response.status == 200 and len(content) == len(whole)
                elif kind == "the pool":
                    response, content = self._send(client, "GET", path="/v1/pool")
                    tag = response.headers["ETag"]
                    right = response.status == 200
                elif kind == "the pool, unchanged":
                    response, content = self._send(client, "GET", path="/v1/pool", headers={"If-None-Match": tag})
                    right = response.status == (304 if tag else 200)
                elif kind == "a bad request":
                    response, content = self._send(client, "POST", self._body([float(rng.random())]))
                    right = response.status == 422
                else:
                    start = int(rng.integers(1, len(whole)))
                    response, content = self._send(client, "GET", path=place, headers={"Range": f"bytes={start}-"})
                    right = response.status == 206 and content == whole[start:]
            except (OSError, http.client.HTTPException) as e:
                self.errors.append(f"{kind}: {type(e).__name__}")
                client.close()
                continue
            self.seconds[kind].append(time.perf_counter() - started)
            if not right:
                self.errors.append(f"{kind}: {response.status}")

    def _body(self, alpha: list[float]) -> str:
        return json.dumps(self._asked | {"alpha": alpha})

    def _send(
        self,
        client: http.client.HTTPConnection,
        method: str,
        body: str | None = None,
        *,
        path: str = "/v1/customizations",
        headers: dict[str, str] | None = None,
    ) -> tuple[http.client.HTTPResponse, bytes]:
        client.request(method, path, body, headers or {})
        response = client.getresponse()
        return response, response.read()


def _alpha(rng: np.random.Generator) -> list[float]:
    weights: list[float] = rng.dirichlet(np.ones(ADAPTERS)).round(4).tolist()
    return weights


def _resident(pid: int) -> int:
    """Bytes of a process in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def nano_pool(work: Path) -> Path:
    """A pool of random LoRAs for nano: 16 of rank 4, as the pool of the demo. Kept in `work`."""
    out = work / "nano.pool"
    if (out / MANIFEST).is_file():
        return out
    nano = architecture.read(jsonfile.read(load_nano() / "config.json"))
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return (rng.standard_normal(shape) * 0.05).astype(np.float32)

    modules = {x.module: (x.in_features, x.out_features) for x in architecture.linears(nano)}
    indicators = np.eye(ADAPTERS, dtype=np.float32)
    d = nano.hidden_size
    projection = Projection(
        random(d), random(d, ADAPTERS), indicators, random(d), random(d), random(d, d)
    )  # fmt: skip
    manifest = PoolManifest(
        schema_version="1.0",
        name="nano",
        base_fingerprint="0" * 64,
        adapters=ADAPTERS,
        rank=RANK,
        scale=2.0,
        targets=list(modules),
        embedding=Embedding(nano.layers, "answer", residual=True),
        dimensions=ADAPTERS,
        weighting=Weighting(),
        blend="separate",
        grouped=True,
        settings={},
    )
    adapters = (
        (None, {m: (random(RANK, i), random(o, RANK)) for m, (i, o) in modules.items()}) for _ in range(ADAPTERS)
    )
    write_pool(out, manifest, projection, adapters)
    return out
