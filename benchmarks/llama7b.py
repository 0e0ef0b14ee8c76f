"""LLaMA-7B at its real shapes: what the exporter needs, and what the bundle does here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import bundles
from benchmarks.bundles import bytes_per_token
from benchmarks.checkpoints import sparse_checkpoint
from benchmarks.table import Row
from crayon_runtime import Engine
from crayon_runtime.probe import read_bandwidth

_MB = 1e6


def run(work: Path) -> Iterator[Row]:
    model = sparse_checkpoint(work, "llama-7b")
    shallow = sparse_checkpoint(work, "llama-7b", layers=4)
    peaks = {}
    for mode, options in (("switchable", []), ("--merge", ["--merge"])):
        bundle = work / f"llama-7b-{mode.strip('-')}.bundle"
        report = exported(model, bundle, *options)
        peaks[mode] = report["peak_rss_bytes"]
        yield Row(
            f"LLaMA-7B shapes, int4, with goldens, {mode}: peak memory of the exporter",
            "<= 1500 MB",
            f"{peaks[mode] / _MB:.0f} MB",
            peaks[mode] <= 1500 * _MB,
        )
        yield Row(f"its time, {mode}", "<= 10 min", f"{report['seconds'] / 60:.1f} min", report["seconds"] <= 600)
    small = exported(shallow, work / "llama-7b-4-layers.bundle")["peak_rss_bytes"]
    growth = peaks["switchable"] / small
    yield Row("peak memory, 32 layers against 4", "no growth", f"{growth:.2f} x", growth <= 1.25)
    yield decoding(work / "llama-7b-switchable.bundle", "onnx")


def exported(model: Path, bundle: Path, *options: str) -> dict[str, Any]:
    """`bundles.exported` with the model's adapter."""
    return bundles.exported(model, bundle, "--adapter", str(model / "adapter"), *options)


def decoding(bundle: Path, backend: str) -> Row:
    """How fast a bundle generates here, against the limit that reading its weights sets."""
    threads, tokens = 2, 16
    nbytes, answers, bandwidth = bytes_per_token(bundle), [], 0.0
    with Engine.load(bundle, backend=backend, threads=threads) as engine:
        for _ in range(4):
            answers.append(engine.generate([1], max_new_tokens=tokens, ignore_eos=True))
            bandwidth = max(bandwidth, read_bandwidth(nbytes, threads))
    best = max(answer.decode_tokens_per_second for answer in answers)
    share = best * nbytes / bandwidth
    return Row(
        f"that bundle generates here in {engine.backend.name}: decode, and share of the read bandwidth",
        "runs",
        f"{best:.2f} tok/s, {share:.0%} of {bandwidth / 1e9:.1f} GB/s",
        all(answer.generated_tokens == tokens for answer in answers),
    )
