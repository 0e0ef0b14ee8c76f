"""A .pte at LLaMA-7B's and TinyLlama-1.1B's real shapes: what a template, an export and an adapter take, and the official exporter beside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.bundles import tokenizer
from benchmarks.checkpoints import sparse_checkpoint
from benchmarks.llama7b import decoding, exported
from benchmarks.table import Row
from crayon_export.adapters import convert_adapter
from crayon_runtime.backends.executorch import is_installed
from crayon_runtime.bundle import Bundle

GROUP_SIZE = 128
FORMS = {
    "switchable, adapter of rank 16": [],
    "merged": ["--merge"],
    "merged, single file": ["--merge", "--single-file"],
}
CONVERSIONS = 7
_MB = 1e6
_FORM = ["--backend", "executorch", "--group-size", str(GROUP_SIZE)]


def run(work: Path) -> Iterator[Row]:
    # Templates of these models are nothing that anybody wants to find in the user's cache.
    os.environ["XDG_CACHE_HOME"] = str((work / "cache").resolve())
    large, small = (sparse_checkpoint(work, name) for name in ("llama-7b", "tinyllama-1.1b"))
    yield from _template("LLaMA-7B", large, work, most_mb=4000, most_minutes=15)
    bundles = []
    for form, options in FORMS.items():
        out = work / f"llama-7b-{form.partition(',')[0]}{'-single' if 'single' in form else ''}.pte-bundle"
        report = exported(large, out, *_FORM, *options)
        peak, minutes = report["peak_rss_bytes"], report["seconds"] / 60
        yield Row(
            f"LLaMA-7B shapes for ExecuTorch, int4, with goldens, {form}: peak memory",
            "<= 1500 MB",
            f"{peak / _MB:.0f} MB",
            peak <= 1500 * _MB,
        )
        yield Row(f"its time, {form}", "<= 8 min", f"{minutes:.1f} min", minutes <= 8)
        bundles.append(out)
    switchable, merged, single = bundles
    yield _conversion("LLaMA-7B", large, switchable, 1.0)
    for unused in (merged, single):
        shutil.rmtree(unused)
    if is_installed():
        yield decoding(switchable, "executorch")
    shutil.rmtree(switchable)
    yield from _official(small, work)


class _Usage(NamedTuple):
    """Of a process, and of those that it waited for."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def _measured(*arguments: str) -> _Usage:
    """Run `crayon`. A process in between asks for its usage: the peak of a child of this one would be at least this one's memory."""
    command = [sys.executable, "-c", _MEASURE, sys.executable, "-m", "crayon_runtime", *arguments]
    return _Usage(*json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


_MEASURE = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""


def _template(shapes: str, model: Path, work: Path, *, most_mb: int, most_minutes: int) -> Iterator[Row]:
    """Make a template, as the first export of an architecture does, and leave it in the cache."""
    file = work / f"{model.name}.crayon-template"
    options = ["--tokenizer", str(tokenizer()), "--group-size", str(GROUP_SIZE), "--adapter", str(model / "adapter")]
    used = _measured("template", "export", str(model), str(file), *options)
    minutes = used.seconds / 60
    yield Row(
        f"template, {shapes} shapes, all methods: peak memory",
        f"<= {most_mb} MB",
        f"{used.peak_bytes / _MB:.0f} MB",
        used.peak_bytes <= most_mb * _MB,
    )
    yield Row(
        f"its time, once for an architecture; size ({shapes})", f"<= {most_minutes} min",
        f"{minutes:.1f} min ({used.cpu_seconds / 60:.1f} of CPU), {file.stat().st_size / _MB:.1f} MB", minutes <= most_minutes,
    )  # fmt: skip


def _conversion(shapes: str, model: Path, bundle: Path, most: float) -> Row:
    """Convert an adapter, several times in this process, in which everything is imported."""
    base, out, times = Bundle.open(bundle), bundle.with_suffix(".adapter"), []
    for _ in range(CONVERSIONS):
        started = time.perf_counter()
        convert_adapter(model / "adapter", base, out, replace=True)
        times.append(time.perf_counter() - started)
    shutil.rmtree(out)
    return Row(
        f"PEFT folder to an adapter bundle for ExecuTorch, rank 16, {shapes} shapes",
        f"<= {most * 1e3:.0f} ms",
        f"{median(times) * 1e3:.0f} ms ({min(times) * 1e3:.0f} to {max(times) * 1e3:.0f})",
        median(times) <= most,
    )


def _official(model: Path, work: Path) -> Iterator[Row]:
    """TinyLlama-1.1B from a template and by the official path: the same bytes."""
    yield from _template("TinyLlama-1.1B", model, work, most_mb=4000, most_minutes=15)
    ours, theirs = work / "tinyllama-filled.bundle", work / "tinyllama-official.bundle"
    command = ["export", str(model), *_FORM, "--tokenizer", str(tokenizer()), "--force"]
    filled = _measured(*command, "--out", str(ours))
    yield _conversion("TinyLlama-1.1B", model, ours, 0.15)
    official = _measured(*command, "--official", "--out", str(theirs))
    same = all(Bundle.open(ours).read(name) == Bundle.open(theirs).read(name) for name in ("model.pte", "model.ptd"))
    yield Row(
        "TinyLlama-1.1B, base alone: template filled / official exporter, time (of CPU) and peak memory",
        "",
        " / ".join(f"{u.seconds:.0f} s ({u.cpu_seconds:.0f}), {u.peak_bytes / _MB:.0f} MB" for u in (filled, official)),
    )
    yield Row("program and data of the two", "equal", "equal" if same else "different", same)
    for bundle in (ours, theirs):
        shutil.rmtree(bundle)
