"""The group size: what it costs on real weights, what it gains in speed. This is what the default was chosen by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.bundles import tinyllama
from benchmarks.measure import interleaved, rate
from benchmarks.parity import STORIES
from benchmarks.table import Row
from crayon_export import export
from crayon_runtime import Engine
from crayon_server.models import load_nano

SIZES, TOKENS = (32, 64, 128), 24


def run(work: Path) -> Iterator[Row]:
    models = {"stories260K": STORIES, "nano": load_nano()}
    kl = {
        (name, size): export(folder, work / f"{name}-g{size}.bundle", group_size=size, replace=True).report.mean_kl
        for name, folder in models.items()
        for size in SIZES
    }
    bundles = {size: tinyllama(work, group_size=size) for size in SIZES}
    engines = {size: Engine.load(bundle, threads=2) for size, bundle in bundles.items()}

    def generate(engine: Engine) -> Callable[[], None]:
        return lambda: engine.generate([1], max_new_tokens=TOKENS, ignore_eos=True) and None

    seconds = interleaved({str(size): generate(engine) for size, engine in engines.items()}, 9)
    for size, engine in engines.items():
        engine.close()
        measured = ", ".join(f"{name} {kl[name, size]:.2e}" for name in models)
        yield Row(
            f"int4 in groups of {size}: KL to float on real weights; decode and size at 1.1B shapes",
            "",
            f"{measured} nats; {rate(seconds[str(size)], TOKENS):.1f} tok/s, "
            f"{(bundles[size] / 'model.onnx.data').stat().st_size / 1e6:.0f} MB",
        )
