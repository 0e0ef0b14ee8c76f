"""Servers for the Kotlin tests to talk to: a customization service that is real, some that lie, and a server LLM; `servers.json` says where."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from crayon_runtime import Engine
from crayon_runtime.customize import preview
from crayon_runtime.pool import Embedding, Pool
from crayon_runtime.remote import PoolClient
from crayon_runtime.signing import KeyStore, TrustedKeys
from tests.android_harness import calls, expected
from tests.runtime import bundles, pools
from tests.runtime.routing import upstreams
from tests.runtime.services import POOL, POST, PROJECTION, Fault, Handler, Listening, Service, answers, cut_at, real

EXAMPLES = [
    ("remind me to water the plants at 7:30\n", 'reminder.set(text="water the plants", time="7:30")'),
    ("set an alarm for six\n", 'alarm.set(time="6:00")'),
    ("how is the weather in Oslo\n", 'weather.get(place="Oslo")'),
]


@contextmanager
def serving(fixtures: Path) -> Iterator[None]:
    """Args: fixtures: what `expected.write` has filled."""
    folder = fixtures / "servers"
    folder.mkdir()
    store = KeyStore.open(fixtures / "store")
    pool = _pool(fixtures, folder / "pool", gain=0.02)
    with ExitStack() as stack:
        urls = {"real": stack.enter_context(real(pool, store, folder / "real"))}
        for name, service in _services(pool, _pool(fixtures, folder / "wild", gain=30.0), store, folder).items():
            urls[name] = stack.enter_context(service).url
        for name, upstream in _upstreams().items():
            urls[name] = stack.enter_context(upstream).url
        urls["files"] = stack.enter_context(Files(fixtures)).url
        with (
            Engine.load(fixtures / "nano", backend="onnx") as engine,
            PoolClient(urls["real"], trusted=TrustedKeys.read(fixtures / "keys.json")) as client,
        ):
            body = preview(engine, EXAMPLES, client)
        examples = [{"prompt": prompt, "completion": completion} for prompt, completion in EXAMPLES]
        (fixtures / "servers.json").write_text(json.dumps({"urls": urls, "examples": examples, "alpha": body["alpha"]}))
        yield


class Files(Listening):
    """Serves `/KIND/ANYTHING/NAME`, a file of the fixtures, and `/asked/KIND/ANYTHING/NAME`, the ranges that it was asked for.

    What it does depends on the kind, and on how often it was asked for this very path. `moved.KIND` redirects to that kind, and
    `elsewhere.KIND` to it under another name of this server.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._ranges: dict[str, list[str | None]] = defaultdict(list)

    def answer(self, to: Handler) -> None:
        path = to.path.partition("?")[0]
        if path.startswith("/asked/"):
            to.reply(200, json.dumps(self._ranges[path.removeprefix("/asked")]).encode())
            return
        _, kind, _, name = path.split("/")
        self._ranges[path].append(to.headers.get("range"))
        how, _, then = kind.partition(".")
        if then:
            server = self.url.replace("127.0.0.1", "localhost") if how == "elsewhere" else ""
            to.reply(302, Location=f"{server}{path.replace(kind, then, 1)}?signed")
            return
        steps = self._kinds((self._folder / name).read_bytes())[kind]
        steps[min(len(self._ranges[path]), len(steps)) - 1](to)

    def _kinds(self, whole: bytes) -> dict[str, list[Fault]]:
        """What answers the first request, the second, and so on; the last one answers all others too."""
        half, size = len(whole) // 2, len(whole)

        def part(to: Handler) -> None:
            self._part(to, whole, '"the file"')

        def cut(to: Handler) -> None:
            self._cut(to, whole, half, tagged=True)

        def keyed(to: Handler, *, wanted: bool) -> None:
            to.reply(*(200, whole) if ("authorization" in to.headers) == wanted else (401, b""))

        misplaced = answers(206, whole[7:], ETag='"the file"', Content_Range=f"bytes 7-{size - 1}/{size}")
        return {
            "plain": [part],
            "missing": [answers(404)],
            "wrong": [answers(200, bytes(size), ETag='"wrong"')],
            "short": [answers(200, whole[:half], ETag='"short"')],
            "long": [lambda to: self._cut(to, whole, size, tagged=False, more=1000)],
            "cut": [cut, part],
            "stops": [cut, answers(503, Retry_After=3600), part],
            "changed": [cut, answers(503, Retry_After=3600), lambda to: self._part(to, whole[::-1], '"another"')],
            "rangeless": [cut, answers(200, whole, ETag='"the file"')],
            "untagged": [lambda to: self._cut(to, whole, half, tagged=False), answers(200, whole)],
            "misplaced": [cut, misplaced, part],
            "keyed": [lambda to: keyed(to, wanted=True)],
            "keyless": [lambda to: keyed(to, wanted=False)],
            "circles": [lambda to: to.reply(301, Location=to.path)],
            "unencrypted": [answers(302, Location="http://example.org/a?signed")],
            "unfetchable": [answers(302, Location="ftp://example.org/a")],
            "nowhere": [answers(302)],
            "slow": [lambda to: self._cut(to, whole, 100_000, tagged=True, pause=30)],
        }

    @staticmethod
    def _cut(to: Handler, whole: bytes, length: int, *, tagged: bool, more: int = 0, pause: float = 0) -> None:
        to.head(200, Content_Length=len(whole) + more, **({"ETag": '"the file"'} if tagged else {}))
        to.wfile.write(whole[:length])
        to.wfile.flush()
        time.sleep(pause)
        to.cut()

    @staticmethod
    def _part(to: Handler, whole: bytes, tag: str) -> None:
        wanted = to.headers.get("range")
        if wanted is None or to.headers.get("if-range") != tag:
            to.reply(200, whole, ETag=tag)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(whole):
            to.reply(416, Content_Range=f"bytes */{len(whole)}")
        else:
            to.reply(206, whole[start:], ETag=tag, Content_Range=f"bytes {start}-{len(whole) - 1}/{len(whole)}")


def _pool(fixtures: Path, out: Path, *, gain: float) -> Pool:
    model = json.loads((fixtures / "nano/manifest.json").read_bytes())
    a = model["architecture"]
    width, d = a["heads"] * a["head_size"], a["hidden_size"]
    shapes = {"model.layers.0.self_attn.q_proj": (d, width), "model.layers.1.mlp.down_proj": (a["ffn_size"], d)}
    return pools.write(
        out,
        adapters=pools.loras(3, 2, shapes, gain=gain),
        located=pools.projection(3, d),
        base=model["base_fingerprint"],
        embedding=Embedding(model["tap"]["layer"], "answer", True),
        server=pools.prototypes(d=d),
    )


def _services(pool: Pool, wild: Pool, store: KeyStore, folder: Path) -> dict[str, Service]:
    """As they should not be."""

    def service(name: str, served: Pool = pool, keys: KeyStore | None = store, **always: Any) -> Service:
        (folder / name).mkdir()
        made = Service(served, keys, folder / name)
        made.always.update(always)
        return made

    made = {
        "unsigned": service("unsigned", keys=None),
        "worse": service("worse", wild),
        "other_base": service("other_base"),
        "changed": service("changed", **{POST: answers(409, b'{"error": {"what": "another pool", "do": null}}')}),
        "busy": service("busy", **{POOL: answers(503, Retry_After=3600)}),
        "elsewhere": service("elsewhere", **{POOL: answers(302, Location="https://evil.example")}),
        "nonsense": service("nonsense", **{POST: answers(200, b"no archive")}),
        "endless": service("endless", **{PROJECTION: answers(200, b"x" * (1 << 20))}),
        "cut": service("cut"),
    }
    made["other_base"].edit = lambda path: bundles.edit_manifest(path, lambda m: m.update(base_fingerprint="c" * 64))
    made["cut"].faults[POST] = [cut_at(1000)]
    return made


def _upstreams() -> dict[str, upstreams.Upstream]:
    said = {
        "answers": upstreams.streams("from ", "the\x07 server"),
        "whole": upstreams.completes("all at once"),
        "breaks": upstreams.sends(upstreams.chunk("from "), end=False),
        "refuses": upstreams.refuses(401, "no key"),
        "mumbles": upstreams.sends(b"data: {\n\n"),
        "html": upstreams.sends(b"<html>", content_type="text/html"),
        "empty": upstreams.streams(""),
        "floods": upstreams.streams(*["x" * 10_000] * 200),
        "slow": upstreams.streams(*["a"] * 60, pause=0.1),
    }
    made = {}
    for name, fault in said.items():
        made[name] = upstreams.Upstream()
        made[name].always = fault
    return made


if __name__ == "__main__":  # FIXTURES STORIES COMMAND…: make the fixtures, serve, and run a command beside that
    made = Path(sys.argv[1])
    made.mkdir()
    expected.write(made, Path(sys.argv[2]))
    calls.write_cases(made / "calls.json")
    with serving(made):
        sys.exit(subprocess.run(sys.argv[3:], cwd=expected.HARNESS, check=False).returncode)
