"""What a model will need and how fast it will answer on a device, from its config alone and before anything is exported.

Decoding one token reads every weight and the keys and values so far, so its speed is bandwidth / bytes, times the share of
the bandwidth that the backend reaches. A block that is repeated counts once: its later passes find their weights in the CPU's caches,
if these are large enough. Sizes are exact for the tensors; speeds are estimates.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from crayon_export import architecture as arch
from crayon_export import hub, jsonfile
from crayon_export.plan import context
from crayon_export.quantize import Blockwise
from crayon_runtime.errors import InvalidInput
from crayon_runtime.manifest import Architecture
from crayon_runtime.probe import read_bandwidth

EFFICIENCY = 0.6
"""Share of the readable bandwidth that decoding reaches with 4-bit weights: 0.58 was measured for LLaMA-7B's widths on one x86
core. `make bench` prints the share of a machine."""

LAYER_SECONDS = 60e-6
"""What a layer costs per token however small it is, on an x86 core: what decoding stories260K takes."""

RUNTIME_BYTES = 60_000_000
"""Resident memory of a Python process that has imported the runtime and ONNX Runtime, before a model is loaded."""

PREFILL_TOKENS = 256
"""Tokens of a prompt that the engine feeds at a time."""

THIS_MACHINE = "this machine"

_COPY_IS_READ_AND_WRITE = 2
_TYPICAL_SHARE = 0.6
"""Of the peak that CPU cores reach, where nobody measured it: between the boards below (0.44, 0.65 and 0.73)."""


class Device(NamedTuple):
    """Memory that a device's CPU can read per second."""

    bandwidth: float
    """Bytes per second."""
    source: str


_REVIEWS = "tinymembench, C copy, counted as read and write: github.com/geerlingguy/sbc-reviews"

DEVICES: Mapping[str, Device] = {
    "raspberry-pi-4": Device(_COPY_IS_READ_AND_WRITE * 2.78e9, f"{_REVIEWS} #110; the peak is 12.8 GB/s"),
    "raspberry-pi-5": Device(_COPY_IS_READ_AND_WRITE * 5.6e9, f"{_REVIEWS} #21 and #60; the peak is 17.1 GB/s"),
    "orange-pi-5": Device(_COPY_IS_READ_AND_WRITE * 12.4e9, f"{_REVIEWS} #38 (RK3588); the peak is 34.1 GB/s"),
    "pixel-8": Device(_TYPICAL_SHARE * 68.3e9, "0.6 of the peak of 64-bit LPDDR5X-8533"),
    "galaxy-s24": Device(_TYPICAL_SHARE * 76.8e9, "0.6 of the peak of 64-bit LPDDR5X-9600 (Snapdragon 8 Gen 3)"),
}


@dataclass(frozen=True)
class Rate:
    """How fast a device is expected to decode."""

    device: str
    bandwidth: float
    """Bytes per second that its CPU reads."""
    tokens_per_second: float
    source: str


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes, and the expected speed of decoding on each device."""

    parameters: int
    quantize: str
    group_size: int
    context_length: int
    kv_dtype: str
    disk: int
    """The tensors of the bundle; tokenizer, graph and golden cases add a few MB."""
    kv_cache: int
    """At the full context."""
    activations: int
    runtime: int
    read_per_token: int
    """Weights, and the KV cache of half a context."""
    rates: list[Rate]

    @property
    def ram(self) -> int:
        return self.disk + self.kv_cache + self.activations + self.runtime

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ram": self.ram}

    def to_text(self) -> str:
        mb = 1e6
        lines = [
            f"{self.parameters / mb:.1f} M parameters, {self.quantize}, context {self.context_length}",
            f"disk  {self.disk / mb:8.1f} MB",
            f"RAM   {self.ram / mb:8.1f} MB: weights {self.disk / mb:.1f}, KV cache {self.kv_cache / mb:.1f} ({self.kv_dtype}),"
            f" activations {self.activations / mb:.1f}, runtime {self.runtime / mb:.1f}",
            f"each token reads {self.read_per_token / mb:.1f} MB; expected speed:",
        ]
        width = max(len(rate.device) for rate in self.rates)
        lines += [
            f"  {r.device:{width}}  {r.tokens_per_second:8.1f} tokens/s at {r.bandwidth / 1e9:5.1f} GB/s"
            for r in self.rates
        ]
        return "\n".join(lines)


def estimate(
    model: str | Path | Architecture,
    *,
    quantize: str = "int4",
    group_size: int | None = None,
    context_length: int | None = None,
    kv_dtype: str = "fp32",
    device: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Estimate:
    """Estimate an export with these options; of a model on the Hub only the config is downloaded.

    Args:
        model: a folder, a Hub id, or an architecture.
        quantize, group_size, context_length, kv_dtype: as `crayon_export.plan.plan`.
        device: a key of `DEVICES`, or "this machine", whose bandwidth is then measured; None: all of them.

    Raises:
        InvalidInput: an option has a value that there is not.
        CheckpointError, UnsupportedModel: as `architecture.read` and `hub.fetch`.
    """
    blockwise = Blockwise.named(quantize, group_size)
    if kv_dtype not in _KV_BYTES:
        raise InvalidInput(f"kv_dtype is {kv_dtype!r}, not one of {', '.join(_KV_BYTES)}")
    if device not in (None, THIS_MACHINE, *DEVICES):
        raise InvalidInput(f"there is no device {device!r}", do=f"use one of {', '.join([*DEVICES, THIS_MACHINE])}")
    a = model if isinstance(model, Architecture) else _read(model, context_length, revision, token)
    context_length = context(a, context_length)

    table, read = weight_bytes(a, blockwise)
    rotary = (2 if kv_dtype == "fp16" else 4) * context_length * a.head_size
    kv_cache = 2 * a.passes * a.kv_heads * a.head_size * _KV_BYTES[kv_dtype] * context_length
    read_per_token = read + kv_cache // 2
    return Estimate(
        parameters=arch.parameters(a),
        quantize=quantize,
        group_size=blockwise.group_size if blockwise else 0,
        context_length=context_length,
        kv_dtype=kv_dtype,
        disk=table + rotary + read,
        kv_cache=kv_cache,
        activations=_activations(a),
        runtime=RUNTIME_BYTES,
        read_per_token=read_per_token,
        rates=[
            Rate(
                name,
                d.bandwidth,
                1 / (read_per_token / (EFFICIENCY * d.bandwidth) + a.passes * LAYER_SECONDS),
                d.source,
            )
            for name, d in _devices(device, read_per_token)
        ],
    )


_KV_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


def _read(model: str | Path, context_length: int | None, revision: str | None, token: str | None) -> Architecture:
    config = hub.fetch(model, revision=revision, token=token, weights=False) / "config.json"
    return arch.read(jsonfile.read(config), where=config, context_length=context_length)


def weight_bytes(a: Architecture, blockwise: Blockwise | None) -> tuple[int, int]:
    """Bytes of an embedding table that is not the output layer, too, and of what each token reads."""
    norms = 4 * (2 * a.layers + 1) * a.hidden_size
    layers = [(x.out_features, x.in_features) for x in arch.linears(a)]
    head = a.vocab_size, a.hidden_size
    if blockwise is None:
        read = norms + 4 * sum(rows * width for rows, width in [*layers, head])
        return (0 if a.tied_embeddings else 4 * head[0] * head[1]), read
    shared = blockwise.shared(a.hidden_size) if a.tied_embeddings else None
    read = norms + sum(blockwise.nbytes(*shape) for shape in layers) + (shared or blockwise).nbytes(*head)
    return (0 if shared else 2 * head[0] * head[1]), read


def _activations(a: Architecture) -> int:
    """Bytes of what one block holds at once for a chunk of a prompt, and of the logits."""
    width = 4 * a.hidden_size + 3 * a.ffn_size + 2 * (a.heads + a.kv_heads) * a.head_size
    return 4 * (PREFILL_TOKENS * width + a.vocab_size)


def _devices(name: str | None, nbytes: int) -> list[tuple[str, Device]]:
    known = [(n, d) for n, d in DEVICES.items() if name in (None, n)]
    if name not in (None, THIS_MACHINE):
        return known
    threads = len(os.sched_getaffinity(0))
    measured = Device(read_bandwidth(nbytes, threads), f"measured: a streaming read by {threads} threads")
    return [*known, (THIS_MACHINE, measured)]
