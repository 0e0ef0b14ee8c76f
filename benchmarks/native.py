"""The ExecuTorch runner at TinyLlama-1.1B's shapes, beside ONNX Runtime and llama.cpp."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import geometric_mean, median
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks import ggml
from benchmarks.bundles import exported, tinyllama
from benchmarks.checkpoints import sparse_checkpoint
from benchmarks.measure import Busy, interleaved, rate, speed_ratio, start
from benchmarks.parity import STORIES
from benchmarks.table import Row
from crayon_export import export
from crayon_export.architecture import EMBEDDING
from crayon_runtime import Engine, backends
from crayon_runtime.backends.executorch import is_installed, native
from crayon_runtime.bundle import Bundle
from crayon_runtime.golden import kl_divergence
from crayon_runtime.probe import read_bandwidth
from crayon_runtime.session import PREFILL_CHUNK
from crayon_server.models import load_nano

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

THREADS, TOKENS = 2, 24
CONTEXT = 2048
GROUPS = (128, 32)
POSITIONS = (16, 128, 2000)
PROMPTS = (128, 512)
LOADS, ROUNDS = 4, 4
"""Where weights lie in memory makes them up to 3 % faster or slower, so everything is loaded anew, in another order each time."""

PAUSE = 0.1
"""Seconds between two runners: after a call, threads of ONNX Runtime spin for some 45 ms, OpenMP's of llama.cpp for 10 ms."""

REAL_MODELS = {"nano": load_nano(), "stories260K": STORIES}
OURS, ONNX, LLAMA = "ExecuTorch", "ONNX Runtime", "llama.cpp"
_MB = 1e6


class Sequence(Protocol):
    """A sequence of tokens in one of the runners. Logits are float32 [V], until the next call."""

    def prefill(self, ids: Ids) -> Floats: ...

    def decode(self, token: int) -> Floats: ...

    def rewind(self, length: int) -> None: ...


class Runner(Protocol):
    """A loaded model."""

    def sequence(self) -> Sequence: ...

    def close(self) -> None: ...


class OurRunner:
    """A bundle in one of our backends."""

    def __init__(self, bundle: Path, backend: str) -> None:
        self.bundle = Bundle.open(bundle)
        self.backend = backends.load(self.bundle, backend, threads=THREADS)

    def sequence(self, adapter: str | None = None) -> OurSequence:
        read = self.backend.read_adapter(self.bundle.adapter(adapter)) if adapter else None
        return OurSequence(self.backend.new_cache(read))

    def close(self) -> None:
        self.backend.close()


class OurSequence:
    """A cache, fed with prompts in the chunks that the engine feeds."""

    def __init__(self, cache: backends.Cache) -> None:
        self._cache = cache

    def prefill(self, ids: Ids) -> Floats:
        steps = [self._cache.prefill(ids[i : i + PREFILL_CHUNK]) for i in range(0, len(ids), PREFILL_CHUNK)]
        return steps[-1].logits

    def decode(self, token: int) -> Floats:
        return self._cache.decode(token).logits

    def rewind(self, length: int) -> None:
        self._cache.rewind(length)


def run(work: Path) -> Iterator[Row]:
    if not is_installed():
        yield Row("ExecuTorch at 1.1B shapes", "", "not measured: crayon_native is not installed (make native)")
        return
    runner, peer = native(), ggml.available()
    ours = f"crayon-edge-native {runner.__version__} ({runner.instruction_set()})"
    yield Row("what is compared", "", f"{ours}; {f'llama.cpp not: {peer}' if peer else ggml.description()}")
    for group_size in GROUPS:
        yield from _against_peers(work, group_size)
    yield from _positions(work)
    yield from _adapter(work)
    yield from _process(work)


# What is measured


def executorch(
    work: Path, *, group_size: int = 128, kv_dtype: str = "fp32", adapter: bool = False, model: Path | None = None
) -> Path:
    """A bundle for ExecuTorch, made in a process of its own; where its template is not in the cache, minutes of CPU.

    Args:
        adapter: an adapter of rank 16 for all linears is inside.
        model: another one than TinyLlama-1.1B's shapes.
    """
    marks = [f"g{group_size}", *([f"{kv_dtype}-kv"] if kv_dtype != "fp32" else []), *(["adapter"] if adapter else [])]
    out = work / f"{model.name if model else 'tinyllama'}-executorch-{'-'.join(marks)}.bundle"
    if out.exists():
        return out
    source = model or sparse_checkpoint(work, "tinyllama-1.1b")
    options = ["--backend", "executorch", "--group-size", str(group_size), "--kv-dtype", kv_dtype]
    if adapter:
        options += ["--adapter", str(source / "adapter")]
    started = time.perf_counter()
    exported(source, out, *options)
    print(f"  exported {out.name} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
    return out


def _gguf(work: Path, model: Path) -> Path:
    folder = work / f"{model.name}-q4_0"
    return folder / ggml.FILE if folder.exists() else ggml.write_gguf(model, folder)


def _loaders(work: Path, group_size: int) -> dict[str, Callable[[], Runner]]:
    """The runners with the same weights; llama.cpp's groups are always of 32."""
    ours = executorch(work, group_size=group_size)
    onnx = tinyllama(work, group_size=group_size, slots=False)
    loaders: dict[str, Callable[[], Runner]] = {
        OURS: lambda: OurRunner(ours, "executorch"),
        ONNX: lambda: OurRunner(onnx, "onnx"),
    }
    if ggml.available() is None:
        gguf = _gguf(work, sparse_checkpoint(work, "tinyllama-1.1b"))
        loaders[LLAMA] = lambda: ggml.LlamaCpp(gguf, threads=THREADS, context_length=CONTEXT)
    return loaders


# Decode, prefill, and beside a busy process


class _Load(NamedTuple):
    """What was measured with one load of all runners."""

    decode: dict[str, list[float]]
    prefill: dict[int, dict[str, list[float]]]
    beside: dict[str, list[float]]
    alone: dict[str, list[float]]
    taken: dict[str, list[float]]
    """Share of the cores that the busy process had, for each round of `beside`."""
    bandwidth: float


def _against_peers(work: Path, group_size: int) -> Iterator[Row]:
    kl = _kl(work, group_size)
    nbytes = bytes_per_token(executorch(work, group_size=group_size))
    loaders = _loaders(work, group_size)
    with Busy() as busy:
        loads = [_measure(loaders, i, busy, nbytes) for i in range(LOADS)]
    peers = [name for name in loaders if name != OURS]

    where = f"1.1B shapes, int4 in groups of {group_size}, {THREADS} threads"
    speeds = {name: rate([s for load in loads for s in load.decode[name]], TOKENS) for name in loaders}
    for peer in peers:
        of = "" if peer == ONNX else " (Q4_0)"
        yield _ahead(f"decode, {where}: {OURS} against {peer}{of}", [load.decode for load in loads], peer, speeds, kl)
    share = median(rate(load.decode[OURS], TOKENS) * nbytes / load.bandwidth for load in loads)
    yield Row(
        f"decode, {where}: share of the read bandwidth",
        ">= 80 %",
        f"{share:.0%} of {median(load.bandwidth for load in loads) / 1e9:.1f} GB/s, {nbytes / _MB:.0f} MB a token",
        share >= 0.8,
    )
    for length in PROMPTS:
        prefills = [load.prefill[length] for load in loads]
        speeds = {name: rate([s for prefill in prefills for s in prefill[name]], length) for name in loaders}
        for peer in peers:
            yield _ahead(f"prefill of {length} tokens, {where}: against {peer}", prefills, peer, speeds, {})
    yield from _busy_rows(where, loads, list(loaders))


def _measure(loaders: Mapping[str, Callable[[], Runner]], load: int, busy: Busy, nbytes: int) -> _Load:
    names = list(loaders)
    turned = names[load % len(names) :] + names[: load % len(names)]
    gc.collect()  # two gigabytes that the last load left
    with ExitStack() as stack:
        sequences: dict[str, Sequence] = {}
        for name in turned:
            runner = loaders[name]()
            stack.callback(runner.close)
            sequences[name] = runner.sequence()
            sequences[name].prefill(random_ids(POSITIONS[0]))
        bandwidths = [read_bandwidth(nbytes, THREADS)]
        decodes = {name: decoding(sequences[name], POSITIONS[0]) for name in names}
        decode = interleaved(decodes, ROUNDS, pause=PAUSE)
        bandwidths.append(read_bandwidth(nbytes, THREADS))
        alone, beside, taken = _beside(decodes, busy)
        prefill = {
            length: interleaved({name: prefilling(sequences[name], length) for name in names}, 2, pause=PAUSE)
            for length in PROMPTS
        }
        bandwidths.append(read_bandwidth(nbytes, THREADS))
        return _Load(decode, prefill, beside, alone, taken, median(bandwidths))


def _beside(
    calls: Mapping[str, Callable[[], None]], busy: Busy
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each call alone and beside the busy process, in turns, and the share of the cores that that one had."""
    alone: dict[str, list[float]] = {name: [] for name in calls}
    beside: dict[str, list[float]] = {name: [] for name in calls}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    cores = min(THREADS, os.cpu_count() or THREADS)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            time.sleep(PAUSE)
            alone[name].append(_seconds(call))
            with busy.running():
                before, seconds = busy.cpu_seconds(), _seconds(call)
                taken[name].append((busy.cpu_seconds() - before) / seconds / cores)
            beside[name].append(seconds)
    return alone, beside, taken


def _busy_rows(where: str, loads: list[_Load], names: list[str]) -> Iterator[Row]:
    def lost(name: str) -> tuple[float, float]:
        ratios = [a / b for load in loads for a, b in zip(load.alone[name], load.beside[name], strict=True)]
        return 1 - median(ratios), median(share for load in loads for share in load.taken[name])

    shares = {name: lost(name) for name in names}
    ours, taken = shares[OURS]
    others = "; ".join(f"{name} {loss:.0%} of {share:.0%}" for name, (loss, share) in shares.items() if name != OURS)
    yield Row(
        f"decode, {where}, beside one busy process: speed lost, of the share of the {THREADS} cores that it took",
        "no more than that share",
        f"{ours:.0%} of {taken:.0%} ({others})",
        ours <= taken,
    )


def _ahead(
    what: str, loads: list[dict[str, list[float]]], peer: str, speeds: Mapping[str, float], kl: Mapping[str, str]
) -> Row:
    ratios = [speed_ratio(seconds, OURS, peer) for seconds in loads]
    ratio = geometric_mean(ratios)
    told = ", ".join(
        f"{name} {speeds[name]:.1f} tok/s" + (f" (KL {kl[name]})" if name in kl else "") for name in (OURS, peer)
    )
    return Row(what, "> 1", f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); {told}", ratio > 1)


def decoding(sequence: Sequence, position: int) -> Callable[[], None]:
    """Greedy tokens from a position on, which the sequence must have reached."""

    def call() -> None:
        sequence.rewind(position)
        token = 1
        for _ in range(TOKENS):
            token = int(sequence.decode(token).argmax())

    return call


def prefilling(sequence: Sequence, length: int) -> Callable[[], None]:
    ids = random_ids(length)

    def call() -> None:
        sequence.rewind(0)
        sequence.prefill(ids).argmax()

    return call


def random_ids(count: int) -> Ids:
    return np.random.default_rng(count).integers(3, 32000, count)


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def bytes_per_token(bundle: Path) -> int:
    """Bytes of weights that ExecuTorch reads for one token: all linear layers and the head; of the embedding, one row."""
    report = json.loads((bundle / "report.json").read_bytes())
    stored = [t for t in report["tensors"] if t["backend"] == "executorch" and t["name"] != EMBEDDING]
    return sum(t["bytes"] for t in stored)


# What quantization costs


def _kl(work: Path, group_size: int) -> dict[str, str]:
    """Mean KL to the float model in nats, as each runner really computes, over texts that the float model wrote; of real small models.

    At 1.1B the weights are random, and say nothing about it. Few layers of so small models are as wide as a group of 128; the others
    take the largest group that fits.
    """
    found: dict[str, list[str]] = {}
    for name, folder in REAL_MODELS.items():
        exact = export(folder, work / f"{name}-none.bundle", quantize="none", replace=True).bundle.path
        onnx = export(folder, work / f"{name}-g{group_size}.bundle", group_size=group_size, replace=True).bundle.path
        ours = executorch(work, group_size=group_size, model=folder)
        texts = _written(exact)
        reference = _logits(OurRunner(exact, "onnx"), texts)
        runners: list[tuple[str, Runner]] = [(OURS, OurRunner(ours, "executorch")), (ONNX, OurRunner(onnx, "onnx"))]
        if ggml.available() is None:
            file = _gguf(work, folder)
            runners.append((LLAMA, ggml.LlamaCpp(file, threads=THREADS, context_length=_WRITTEN + 1)))
        for runner_name, runner in runners:
            kl = float(kl_divergence(reference, _logits(runner, texts)).mean())
            found.setdefault(runner_name, []).append(f"{name} {kl:.4f}")
    return {runner: ", ".join(told) for runner, told in found.items()}


_WRITTEN = 96  # tokens of a text


def _written(bundle: Path) -> list[list[int]]:
    """Texts as a model writes them by itself, at temperature 1."""
    with Engine.load(bundle, backend="onnx", threads=THREADS) as engine:
        options = {"max_new_tokens": _WRITTEN, "temperature": 1.0}
        return [[1, *engine.generate([1], seed=seed, **options).token_ids] for seed in range(32)]  # type: ignore[arg-type]


def _logits(runner: Runner, texts: list[list[int]]) -> Floats:
    """After every token of the texts, fed one by one."""
    rows = []
    for ids in texts:
        sequence = runner.sequence()
        rows.append(sequence.prefill(np.array(ids[:1])).copy())
        rows += [sequence.decode(token).copy() for token in ids[1:-1]]
    runner.close()
    return np.stack(rows)


# Long contexts


def _positions(work: Path) -> Iterator[Row]:
    bundles = {kv: executorch(work, kv_dtype=kv) for kv in ("fp32", "int8")}
    loads = []
    for load in range(LOADS):
        with ExitStack() as stack:
            calls = {}
            for kv in list(bundles)[:: 1 if load % 2 else -1]:
                runner = OurRunner(bundles[kv], "executorch")
                stack.callback(runner.close)
                for position in POSITIONS:
                    sequence = runner.sequence()
                    sequence.prefill(random_ids(position))
                    calls[f"{kv} {position}"] = decoding(sequence, position)
            loads.append(interleaved(calls, ROUNDS))
    near, far = POSITIONS[0], POSITIONS[-1]
    for kv, reach in (("fp32", None), ("int8", 0.85)):
        ratios = [speed_ratio(seconds, f"{kv} {far}", f"{kv} {near}") for seconds in loads]
        speeds = [rate([s for seconds in loads for s in seconds[f"{kv} {p}"]], TOKENS) for p in POSITIONS]
        told = ", ".join(f"{speed:.1f} tok/s at {p}" for speed, p in zip(speeds, POSITIONS, strict=True))
        ratio = geometric_mean(ratios)
        yield Row(
            f"decode at position {far} against position {near}, {kv} cache",
            f">= {reach}" if reach else "",
            f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); {told}",
            ratio >= reach if reach else None,
        )


# Adapters


def _adapter(work: Path) -> Iterator[Row]:
    bundle = executorch(work, adapter=True)
    name = Bundle.open(bundle).adapter_names[0]
    loads = []
    for load in range(LOADS):
        runner = OurRunner(bundle, "executorch")
        calls = {}
        for adapter in (None, name)[:: 1 if load % 2 else -1]:
            sequence = runner.sequence(adapter)
            sequence.prefill(random_ids(POSITIONS[0]))
            calls[adapter or "base"] = decoding(sequence, POSITIONS[0])
        loads.append(interleaved(calls, ROUNDS))
        runner.close()
    ratios = [speed_ratio(seconds, name, "base") for seconds in loads]
    slower = 1 - geometric_mean(ratios)
    yield Row(
        "r = 16 adapter on all seven linears, decode: slower than without",
        "<= 8 %",
        f"{slower:.1%} ({1 - max(ratios):.1%} to {1 - min(ratios):.1%})",
        slower <= 0.08,
    )
    with Engine.load(bundle, backend="executorch", threads=THREADS) as engine:
        path = engine.bundle.adapter(name).path
        times = []
        for _ in range(9):
            engine.set_adapter(None)
            engine.generate([1], max_new_tokens=1)
            started = time.perf_counter()
            # An engine keeps what it has read; this reads the file each time.
            engine.set_adapter(engine.read_adapter(Bundle.open(path)))
            engine.generate([1], max_new_tokens=1)
            times.append(1e3 * (time.perf_counter() - started))
        yield Row(
            "adapter from its file to the first token with it, same engine",
            "<= 150 ms",
            f"{median(times):.0f} ms (first time {times[0]:.0f}, most {max(times):.0f})",
            median(times) <= 150,
        )


# Processes


def _process(work: Path) -> Iterator[Row]:
    bundle = executorch(work)
    starts = [start(bundle, "executorch", THREADS) for _ in range(6)][1:]  # the first one may read them from the disk
    seconds = median(each.load + each.init for each in starts)
    yield Row(
        "load at 1.1B shapes, and what the first token takes longer than the second",
        "<= 0.3 s",
        f"{seconds:.2f} s, of which load {median(each.load for each in starts):.2f} s",
        seconds <= 0.3,
    )
    command = [sys.executable, "-m", "crayon_runtime", "run", str(bundle), "set an alarm", "--backend", "executorch"]
    command += ["--threads", str(THREADS), "--max-new-tokens", "16", "--json"]
    most, whole, said = _beyond(command, (bundle,))
    answer, a = json.loads(said), Bundle.open(bundle).model.architecture
    positions = answer["prompt_tokens"] + answer["generated_tokens"]
    cache = positions * a.passes * 2 * a.kv_heads * a.head_size * 4
    yield Row(
        "process of crayon run, 1.1B shapes: memory beyond mapped weights and the KV cache, the most at once",
        "<= 80 MB",
        f"{(most - cache) / _MB:.1f} MB, and {cache / _MB:.1f} MB of keys and values; {whole / _MB:.0f} MB with the weights",
        most - cache <= 80 * _MB,
    )


def _beyond(command: list[str], weights: tuple[Path, ...]) -> tuple[int, int, str]:
    """The most resident bytes that a process has at once outside mappings of files in these folders, those of all its memory, and what
    it printed."""
    roots = tuple(str(path.resolve()) for path in weights)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    most = whole = 0
    while process.poll() is None:
        mapped = list(_mappings(process.pid))
        most = max(most, sum(size for path, size in mapped if not path.startswith(roots)))
        whole = max(whole, sum(size for _, size in mapped))
        time.sleep(0.005)
    said, told = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=told)
    return most, whole, said


def _mappings(pid: int) -> Iterator[tuple[str, int]]:
    """Path and resident bytes of each mapping of a process; nothing of one that has just ended."""
    path = ""
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            path = " ".join(line.split()[5:])
        elif line.startswith("Rss:"):
            yield path, int(line.split()[1]) * 1024
