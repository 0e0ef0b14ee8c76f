"""From ten examples to a customized model, over a service on loopback: time by part, and what goes over the network."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bundles
from benchmarks.service import serving
from benchmarks.table import Row
from crayon_export import architecture, export
from crayon_runtime import Engine
from crayon_runtime.affinity import Projection, Weighting
from crayon_runtime.bundle import Bundle
from crayon_runtime.customize import Customization, Settings, customize
from crayon_runtime.customized import current, made_from
from crayon_runtime.pool import Embedding, PoolManifest, write_pool
from crayon_runtime.remote import PoolClient
from crayon_runtime.signing import KeyStore
from crayon_server.data.phone_assistant import benchmark
from crayon_server.models import load_nano

RANK, DIMENSIONS = 8, 16
_GAIN = 1e-4
"""Of the random LoRAs: too little to make the log-loss worse, so that each adapter is put in place."""


def run(work: Path) -> Iterator[Row]:
    nano = export(load_nano(), work / "customize-nano.bundle", replace=True).bundle
    yield from _rows(nano, "nano, 16 LoRAs", 16, work, repetitions=7, reach=1.0)
    yield from _rows(nano, "nano, 64 LoRAs", 64, work, repetitions=3)
    tinyllama = Bundle.open(bundles.tinyllama(work))
    yield from _rows(tinyllama, "TinyLlama-1.1B shapes, 8 LoRAs", 8, work, repetitions=1)


def _rows(
    bundle: Bundle, name: str, adapters: int, work: Path, *, repetitions: int, reach: float | None = None
) -> Iterator[Row]:
    folder = work / f"customize-{bundle.path.stem}-{adapters}"
    shutil.rmtree(folder, ignore_errors=True)
    keys = KeyStore.create(folder / "keys")
    pool = write_random_pool(folder / "pool", bundle, adapters)
    users = [[(e.prompt, e.completion) for e in user.examples] for user in benchmark().validation]
    with serving(pool, "--keys", str(keys.path)) as server, Engine.load(bundle) as engine:

        def one(user: int, device: Path) -> tuple[float, Customization]:
            started = time.perf_counter()
            cache = device.with_name(f"{device.name}.cache")
            with PoolClient(f"http://{server.address}", trusted=keys.trusted, cache=cache) as client:
                done = customize(engine, users[user], client, folder=device)
            assert done.installed, done.reason
            return time.perf_counter() - started, done

        if repetitions > 1:
            one(0, folder / "warm-up")
        runs = [one(1 + n, folder / f"device-{n}") for n in range(repetitions)]
        total, typical = sorted(runs, key=lambda run: run[0])[repetitions // 2]
        again_total, again = one(1 + repetitions, folder / "device-0")
        started = time.perf_counter()
        with PoolClient(f"http://{server.address}", trusted=keys.trusted, cache=folder / "device-0.cache") as client:
            settings = Settings().checked(client)
            made = made_from(bundle.model.base_fingerprint, users[1 + repetitions], client.manifest, settings)
            assert current(folder / "device-0", made, keys.trusted)
            unchanged, received = time.perf_counter() - started, client.received_bytes
    shutil.rmtree(folder)
    yield Row(
        f"{name}: ten examples to the customized model, on loopback",
        f"<= {reach:g} s" if reach else "",
        f"{total:.2f} s{_median(repetitions)}",
        total <= reach if reach else None,
    )
    yield Row("its parts", "", ", ".join(f"{part} {seconds * 1e3:.0f} ms" for part, seconds in typical.seconds.items()))
    yield Row("body sent up", "<= 1 KB", f"{typical.sent_bytes} B", typical.sent_bytes <= 1000)
    yield Row("pool and adapter down", "", _megabytes(typical.received_bytes))
    yield Row("another alpha later: time, down", "", f"{again_total:.2f} s, {_megabytes(again.received_bytes)}")
    yield Row("nothing changed: time, down", "", f"{unchanged * 1e3:.0f} ms, {received} B")


def write_random_pool(out: Path, bundle: Bundle, adapters: int) -> Path:
    """Float16 LoRAs of all linear layers of a bundle's base, and a projection with the task residual."""
    model, rng = bundle.model, np.random.default_rng(0)
    modules = {x.module: (x.in_features, x.out_features) for x in architecture.linears(model.architecture)}
    d = model.tap.size

    def random(*shape: int, scale: float = 1.0) -> Any:
        return rng.standard_normal(shape, np.float32) * np.float32(scale)

    def lora() -> dict[str, tuple[Any, Any]]:
        return {
            module: (
                random(RANK, inside, scale=inside**-0.5).astype(np.float16),
                random(outside, RANK, scale=_GAIN).astype(np.float16),
            )
            for module, (inside, outside) in modules.items()
        }

    indicators = random(adapters, DIMENSIONS)
    indicators /= np.linalg.norm(indicators, axis=1, keepdims=True)
    residual = random(d, scale=0.1), random(d, scale=0.1), random(d, d, scale=1 / d)
    manifest = PoolManifest(
        schema_version="1.0",
        name="random",
        base_fingerprint=model.base_fingerprint,
        adapters=adapters,
        rank=RANK,
        scale=2.0,
        targets=list(modules),
        embedding=Embedding(model.tap.layer, "answer", True),
        dimensions=DIMENSIONS,
        weighting=Weighting(temperature=0.2),
        blend="separate",
        grouped=True,
        settings={},
    )
    projection = Projection(random(d, scale=0.1), random(d, DIMENSIONS), indicators, *residual)
    return write_pool(out, manifest, projection, ((None, lora()) for _ in range(adapters))).path


def _median(repetitions: int) -> str:
    return f" (median of {repetitions} users)" if repetitions > 1 else ""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
