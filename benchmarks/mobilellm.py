"""MobileLLM at its real shapes: what shared layers cost, what exports take, and how fast every size is in both backends."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, NamedTuple

from benchmarks import bundles, native
from benchmarks.checkpoints import sparse_checkpoint
from benchmarks.measure import Start, interleaved, rate, speed_ratio, start
from benchmarks.native import THREADS, TOKENS, OurRunner
from benchmarks.table import Row
from crayon_runtime.backends.executorch import is_installed
from crayon_runtime.probe import read_bandwidth
from crayon_server import svg

SIZES = ("125m", "350m", "600m", "1b", "1.5b")
PLAIN, SHARED, UNSHARED = "30 layers", "30 shared, computed twice", "60 layers"
DEPTHS = {PLAIN: ("mobilellm-125m", None), SHARED: ("mobilellm-ls-125m", None), UNSHARED: ("mobilellm-125m", 60)}
PAPER = {SHARED: ("+2.2 %", "+2.6 %"), UNSHARED: ("+143 %", "+86 %")}
"""Load and initialization, and execution, against the plain model: arXiv:2402.14905, table 7 (iPhone 13, float16)."""

DATA = {"onnx": "model.onnx.data", "executorch": "model.ptd"}
NAMES = {"onnx": "ONNX Runtime", "executorch": "ExecuTorch"}
POSITION, PROMPT = 16, 128
LOADS, ROUNDS, PROCESSES = 3, 4, 7
_MB = 1e6


def run(work: Path) -> Iterator[Row]:
    # Templates of these models are nothing that anybody wants to find in the user's cache.
    os.environ["XDG_CACHE_HOME"] = str((work / "cache").resolve())
    backends = [name for name in DATA if name == "onnx" or is_installed()]
    yield from _logits()
    for backend in backends:
        yield from _export(work, backend)
    for backend in backends:
        yield from _shared(work, backend)
    for backend in backends:
        yield _int8(work, backend)
    measured = {backend: {size: _measure(work, backend, size) for size in SIZES} for backend in backends}
    for backend, speeds in measured.items():
        for size, speed in speeds.items():
            yield Row(f"MobileLLM-{size.upper()} shapes, int4, {NAMES[backend]}, {THREADS} threads", "", speed.told)
    plot = work / "mobilellm.svg"
    plot.write_bytes(draw(measured))
    yield Row("the same as a plot", "", str(plot))


def bundle(work: Path, name: str, backend: str, *, layers: int | None = None, quantize: str = "int4") -> Path:
    """A bundle for one backend, without slots for adapters, made in a process of its own."""
    model = sparse_checkpoint(work, name, layers=layers)
    out = work / f"{model.name}-{quantize}.{backend}-bundle"
    if not out.exists():
        bundles.exported(model, out, "--backend", backend, "--quantize", quantize, "--no-adapter-slots")
    return out


# The classes


def _logits() -> Iterator[Row]:
    """Ours, and transformers' LLaMA over the same weights; of shared layers, as many layers as are computed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from crayon_server import models

    for size in SIZES:
        worst = 0.0
        for family in ("mobilellm", "mobilellm-ls"):
            ours = models.initialize(f"{family}-{size}").eval()
            repeats: int = ours.config.layer_repeats  # type: ignore[attr-defined]
            fields = ours.config.to_dict() | {"num_hidden_layers": repeats * ours.config.num_hidden_layers}
            state = {}
            for name, tensor in ours.state_dict().items():
                block, _, rest = name.removeprefix("model.layers.").partition(".")
                passes = range(repeats * int(block), repeats * int(block) + repeats) if block.isdigit() else ()
                state |= {f"model.layers.{i}.{rest}": tensor for i in passes} or {name: tensor}
            wanted = {key: value for key, value in fields.items() if key in LlamaConfig().to_dict()} | {
                "model_type": "llama"
            }
            with torch.device("meta"):
                theirs = LlamaForCausalLM(LlamaConfig(**wanted))
            theirs.load_state_dict(state, assign=True)
            theirs.tie_weights()
            theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # its tables are no weights
            ids = torch.randint(3, 32000, (1, 24), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                worst = max(worst, float((ours(ids).logits - theirs.eval()(ids).logits).abs().max()))
            del ours, theirs, state
            gc.collect()
        yield Row(
            f"MobileLLM-{size.upper()} and -LS-{size.upper()}: logits against transformers' LLaMA with the same weights",
            "<= 1e-5",
            f"{worst:.1e}",
            worst <= 1e-5,
        )


# Exports


def _export(work: Path, backend: str) -> Iterator[Row]:
    shutil.rmtree(bundle(work, "mobilellm-1.5b", backend))  # the first export may have made the template
    report = json.loads((bundle(work, "mobilellm-1.5b", backend) / "report.json").read_bytes())
    peak, seconds = report["peak_rss_bytes"], report["seconds"]
    yield Row(
        f"export of MobileLLM-1.5B shapes, int4, {NAMES[backend]}: peak memory and time",
        "<= 1500 MB, <= 5 min",
        f"{peak / _MB:.0f} MB, {seconds / 60:.1f} min",
        peak <= 1500 * _MB and seconds <= 300,
    )


# Shared layers


def _shared(work: Path, backend: str) -> Iterator[Row]:
    made = {depth: bundle(work, name, backend, layers=layers) for depth, (name, layers) in DEPTHS.items()}
    sizes = {depth: (path / DATA[backend]).stat().st_size for depth, path in made.items()}
    larger = sizes[SHARED] / sizes[PLAIN] - 1
    yield Row(
        f"MobileLLM-125M shapes, {NAMES[backend]}: file of the weights, shared layers against plain",
        "within 1 %",
        f"{larger:+.2%} of {sizes[PLAIN] / _MB:.1f} MB; 60 layers {sizes[UNSHARED] / sizes[PLAIN] - 1:+.0%}",
        abs(larger) <= 0.01,
    )
    starts = _starts(made, backend)
    memory = {depth: median(each.resident for each in starts[depth]) for depth in made}
    first = {depth: [each.load + max(0.0, each.init) for each in starts[depth]] for depth in made}
    tokens = _tokens(made, backend)
    for depth in (SHARED, UNSHARED):
        load = median(a / b for a, b in zip(first[depth], first[PLAIN], strict=True)) - 1
        ratios = [1 / speed_ratio(seconds, depth, PLAIN) for seconds in tokens]
        milliseconds = {d: 1e3 * median(s for load in tokens for s in load[d]) / TOKENS for d in (depth, PLAIN)}
        yield Row(
            f"MobileLLM-125M shapes, int4, {NAMES[backend]}: {depth} against plain: load and first token / time per token / memory",
            f"printed; the paper {' / '.join(PAPER[depth])}",
            f"{load:+.0%} ({1e3 * median(first[depth]):.0f} to {1e3 * median(first[PLAIN]):.0f} ms) / "
            f"{geometric_mean(ratios) - 1:+.0%} (between loads {min(ratios) - 1:+.0%} to {max(ratios) - 1:+.0%}; "
            f"{milliseconds[depth]:.1f} to {milliseconds[PLAIN]:.1f} ms) / "
            f"{(memory[depth] - memory[PLAIN]) / _MB:+.1f} MB of {memory[PLAIN] / _MB:.1f} MB",
        )


def _starts(made: Mapping[str, Path], backend: str) -> dict[str, list[Start]]:
    """Of each bundle, in turns; a first time warms the page cache."""
    rounds = [{name: start(path, backend, THREADS) for name, path in made.items()} for _ in range(1 + PROCESSES)]
    return {name: [started[name] for started in rounds[1:]] for name in made}


def _tokens(made: Mapping[str, Path], backend: str) -> list[dict[str, list[float]]]:
    """Seconds of `TOKENS` tokens in each bundle, interleaved; loaded anew each time, in another order."""
    loads = []
    for load in range(LOADS):
        names = list(made)
        with ExitStack() as stack:
            calls = {}
            for depth in names[load % len(names) :] + names[: load % len(names)]:
                runner = OurRunner(made[depth], backend)
                stack.callback(runner.close)
                sequence = runner.sequence()
                sequence.prefill(native.random_ids(POSITION))
                calls[depth] = native.decoding(sequence, POSITION)
            loads.append(interleaved(calls, ROUNDS, pause=native.PAUSE if backend == "onnx" else 0))
    return loads


# int8


def _int8(work: Path, backend: str) -> Row:
    path = bundle(work, "mobilellm-125m", backend, quantize="int8")
    nbytes = native.bytes_per_token(path) if backend == "executorch" else bundles.bytes_per_token(path)
    shares, speeds, bandwidths = [], [], []
    for _ in range(LOADS):
        runner = OurRunner(path, backend)
        sequence = runner.sequence()
        sequence.prefill(native.random_ids(POSITION))
        for _ in range(ROUNDS):
            bandwidths.append(read_bandwidth(nbytes, THREADS))
            speeds.append(rate(interleaved({"": native.decoding(sequence, POSITION)}, 1)[""], TOKENS))
            shares.append(speeds[-1] * nbytes / bandwidths[-1])
        runner.close()
    speed, bandwidth, share = median(speeds), median(bandwidths), median(shares)
    return Row(
        f"MobileLLM-125M shapes, int8, {NAMES[backend]}: decode, and share of the read bandwidth",
        ">= 60 %",
        f"{speed:.1f} tok/s, {share:.0%} ({min(shares):.0%} to {max(shares):.0%}) of {bandwidth / 1e9:.1f} GB/s, {nbytes / _MB:.0f} MB a token",
        share >= 0.6,
    )


# Every size


class Speed(NamedTuple):
    """A size in a backend."""

    load: float
    """Seconds to load it in a new process."""
    init: float
    """Seconds that its first token takes longer than the second."""
    prefill: float
    """Tokens a second of a prompt of 128."""
    decode: float
    """Tokens a second from position 16 on."""
    memory: int
    """Bytes that a new process has resident after two tokens, with the weights."""

    @property
    def told(self) -> str:
        return (
            f"load {1e3 * self.load:.0f} ms, init {1e3 * self.init:.0f} ms, prefill {self.prefill:.0f} tok/s, "
            f"decode {self.decode:.1f} tok/s, memory {self.memory / _MB:.0f} MB"
        )


def _measure(work: Path, backend: str, size: str) -> Speed:
    path = bundle(work, f"mobilellm-{size}", backend)
    starts = _starts({size: path}, backend)[size]
    runner = OurRunner(path, backend)
    sequence = runner.sequence()
    prefill = interleaved({"": native.prefilling(sequence, PROMPT)}, ROUNDS)[""]
    sequence.rewind(0)
    sequence.prefill(native.random_ids(POSITION))
    decode = interleaved({"": native.decoding(sequence, POSITION)}, ROUNDS)[""]
    runner.close()
    load, init, resident = (median(column) for column in zip(*starts, strict=True))
    return Speed(load, max(0.0, init), rate(prefill, PROMPT), rate(decode, TOKENS), int(resident))


def draw(measured: Mapping[str, Mapping[str, Speed]]) -> bytes:
    """An SVG of all sizes: speed, start and memory by parameters."""
    from matplotlib.figure import Figure

    from crayon_export import architecture
    from crayon_server import models

    parameters = {
        size: architecture.parameters(architecture.read(models.config(f"mobilellm-{size}").to_dict())) / 1e6
        for size in SIZES
    }
    panels: dict[str, Any] = {
        "prefill, tokens/s": lambda s: s.prefill,
        "decode, tokens/s": lambda s: s.decode,
        "load and init, ms": lambda s: 1e3 * (s.load + s.init),
        "memory, MB": lambda s: s.memory / _MB,
    }
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for backend, speeds in measured.items():
            x = [parameters[size] for size in speeds]
            axes.plot(x, [value(speed) for speed in speeds.values()], marker="o", label=NAMES[backend])
        axes.set(title=title, xlabel="million parameters", xscale="log", yscale="log")
        axes.set_xticks([parameters[size] for size in SIZES], [size.upper() for size in SIZES])
        axes.minorticks_off()
        axes.grid(color="0.9")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(measured))
    return svg.render(figure)
