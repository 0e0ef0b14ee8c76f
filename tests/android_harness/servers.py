"""Servers for the Kotlin tests to talk to: a customization service that is real, some that lie, and a server LLM; `servers.json` says where."""

from __future__ import annotations

import json
import subprocess
import sys
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
from tests.runtime.services import POOL, POST, PROJECTION, Service, answers, cut_at, real

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
        with (
            Engine.load(fixtures / "nano", backend="onnx") as engine,
            PoolClient(urls["real"], trusted=TrustedKeys.read(fixtures / "keys.json")) as client,
        ):
            body = preview(engine, EXAMPLES, client)
        examples = [{"prompt": prompt, "completion": completion} for prompt, completion in EXAMPLES]
        (fixtures / "servers.json").write_text(json.dumps({"urls": urls, "examples": examples, "alpha": body["alpha"]}))
        yield


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
