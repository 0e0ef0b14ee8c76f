"""The time of each operator of a decode, by the trace of whatever computes it, with the modules of the model that they compute.

ONNX Runtime: its profile. The graph's nodes are named after modules, and a fused node after one of those that it was.
ExecuTorch: an ETDump. It names operators and not modules; the linear layers are told apart by the order in which the blocks compute them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from crayon_runtime import backends
from crayon_runtime.backends.executorch import ExecutorchBackend
from crayon_runtime.backends.onnx import OnnxBackend
from crayon_runtime.profile.etdump import Event, read_etdump
from crayon_runtime.profile.measure import feed, token_ids
from crayon_runtime.profile.records import Absent, Operator, OperatorKind
from crayon_runtime.profile.statistics import percentile

if TYPE_CHECKING:
    from crayon_runtime.backends.base import Adapter, Backend
    from crayon_runtime.bundle import Bundle
    from crayon_runtime.manifest import Architecture
    from crayon_runtime.profile.jobs import Job, Trace

_KINDS = (
    ("adapter", r"lora_[AB]"),
    ("linear", r"MatMul|Gemm|\blinear\b|Fully Connected"),
    ("attention", r"Attention|sdpa|update_cache|Rotary|Softmax"),
    ("embedding", r"embed|GatherBlockQuantized"),
    ("norm", r"Normalization|RMSNorm|\bnorm\b|native_call_mean|rsqrt"),
    ("elementwise", r"elementwise|Add|Mul|Sub|Gelu|Sigmoid|Silu|native_call_(add|mul|sigmoid)"),
)

_WRAPPERS = ("OPERATOR_CALL", "DELEGATE_CALL", "Method::", "Program::", "llama::")
"""Beginnings of the names of events that only enclose others."""


class _Timed(NamedTuple):
    """An operator in every token."""

    name: str
    op_type: str
    module: str | None
    delegate: str | None
    samples_ns: list[int]


def trace(bundle: Bundle, job: Job, asked: Trace, folder: Path) -> Iterator[Operator | Absent]:
    """Decode tokens, traced.

    Args:
        folder: an empty one, for the trace.
    """
    adapter = bundle.adapter(job.adapter) if job.adapter in bundle.adapter_names else None
    name = job.backend if job.backend != "auto" else backends.available(bundle)[0]
    if job.adapter and adapter is None:
        yield Absent(what="operators", reason="only adapters inside the bundle are traced")
        return
    if name == "onnx":
        backend: Backend = OnnxBackend.load(bundle, threads=job.threads, profile=folder / "onnx")
        _run(backend, asked, backend.read_adapter(adapter) if adapter else None)
        assert isinstance(backend, OnnxBackend)
        timed: Iterable[_Timed] = _onnx(json.loads(Path(backend.session.end_profiling()).read_bytes()), asked.generate)
    elif name == "executorch":
        backend = ExecutorchBackend.load(bundle, threads=job.threads)
        steps = _traced_steps(
            backend, asked, backend.read_adapter(adapter) if adapter else None, folder / "steps.etdump"
        )
        timed = _executorch(steps, bundle.model.architecture)
    else:
        yield Absent(what="operators", reason=f"there is no trace of the backend {name!r}")
        return
    backend.close()
    for operator in timed:
        ordered = sorted(operator.samples_ns)
        yield Operator(
            event_name=operator.name,
            module=operator.module,
            kind=kind_of(operator.name, operator.op_type),
            op_types=[operator.op_type],
            is_delegated_op=operator.delegate is not None,
            delegate_backend_name=operator.delegate,
            n_gen=asked.generate,
            avg_ns=fmean(ordered),
            p50_ns=percentile(ordered, 50),
            p90_ns=percentile(ordered, 90),
            samples_ns=operator.samples_ns,
        )


def kind_of(name: str, op_type: str) -> str:
    """What an operator does: one of linear, adapter, attention, norm, embedding, elementwise, other."""
    for kind, pattern in _KINDS:
        if re.search(pattern, name if kind == "adapter" else f"{op_type} {name.rpartition('/')[2]}"):
            return kind
    return "other"


def by_kind(operators: Sequence[Operator]) -> list[OperatorKind]:
    """Sums of medians, the largest first: one token that was interrupted does not count for an operator."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for operator in operators:
        grouped[operator.kind].append(operator.p50_ns)
    total = sum(operator.p50_ns for operator in operators) or 1.0
    kinds = [
        OperatorKind(kind=kind, operators=len(times), p50_ns=sum(times), share=sum(times) / total)
        for kind, times in grouped.items()
    ]
    return sorted(kinds, key=lambda kind: -kind.p50_ns)


def module_of(node: str) -> str | None:
    """The module that a node of a graph is named after; None: it is of no module.

    `model.layers.0.mlp.up_proj/base` is a part of that module, as `…/lora_A` is of its adapter.
    """
    module = node.partition("/")[0].removesuffix(".attention")
    return module if module.startswith(("model.", "lm_head")) else ("lm_head" if module == "logits" else None)


def _run(backend: Backend, asked: Trace, adapter: Adapter | None) -> None:
    """Fill a cache to the depth, warm up with a token, and decode."""
    cache = backend.new_cache(adapter)
    feed(cache, token_ids(asked.depth, backend.vocab_size))
    for token in token_ids(1 + asked.generate, backend.vocab_size, asked.depth).tolist():
        cache.decode(token)
    cache.close()


def _onnx(events: Sequence[Mapping[str, Any]], tokens: int) -> list[_Timed]:
    """Of the last runs of a profile, each of which is a token."""
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")[-tokens:]
    samples: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= runs[0][0]:
            name = event["name"].removesuffix("_kernel_time")
            samples[name, event["args"]["op_name"]].append(1000 * event["dur"])
    return [_Timed(name, op, module_of(name), None, times) for (name, op), times in samples.items()]


def _traced_steps(backend: ExecutorchBackend, asked: Trace, adapter: Adapter | None, path: Path) -> list[list[Event]]:
    cache = backend.new_cache(adapter)
    feed(cache, token_ids(asked.depth, backend.vocab_size))
    tokens = token_ids(1 + asked.generate, backend.vocab_size, asked.depth).tolist()
    cache.decode(tokens[0])
    cache.trace(path)
    cache.decode(tokens[0])  # packs what is packed at the first step of a method
    for token in tokens[1:]:
        cache.decode(token)
    cache.trace(None)
    cache.close()
    return [step for step in read_etdump(path.read_bytes()) if any(e.name == "Method::execute" for e in step)][1:]


def _executorch(steps: Sequence[Sequence[Event]], architecture: Architecture) -> list[_Timed]:
    """Each instruction of a program, by the time around its kernel or delegate."""
    samples: dict[tuple[int, str, str | None], list[int]] = defaultdict(list)
    for step in steps:
        parts = {e.instruction: e.name for e in step if e.delegated}
        for event in step:
            if event.name == "DELEGATE_CALL":
                name = parts.get(event.instruction, "delegate")
                ours = name.startswith(("linear", "elementwise"))
                key = event.instruction, name, "crayon_native" if ours else "XnnpackBackend"
                samples[key].append(event.end - event.start)
            elif not event.delegated and not event.name.startswith(_WRAPPERS):
                samples[event.instruction, event.name, None].append(event.end - event.start)
    modules = _modules([(at, name) for at, name, _ in sorted(samples, key=lambda key: key[0])], architecture)
    return [
        _Timed(f"{at} {name}", name, modules.get(at), delegate, times)
        for (at, name, delegate), times in sorted(samples.items(), key=lambda item: item[0][0])
    ]


def _modules(instructions: Sequence[tuple[int, str]], architecture: Architecture) -> dict[int, str]:
    """The modules of the linear layers and of attention, if there are as many as the blocks have: four linear layers each, as those with
    one input are computed as one, and the output layer."""
    blocks = [f"model.layers.{i // architecture.layer_repeats}" for i in range(architecture.passes)]
    parts = ("self_attn.q_proj,k_proj,v_proj", "self_attn.o_proj", "mlp.gate_proj,up_proj", "mlp.down_proj")
    linears = [at for at, name in instructions if kind_of(name, name) == "linear"]
    attentions = [at for at, name in instructions if "sdpa" in name]
    found: dict[int, str] = {}
    for places, names in (
        (linears, [*(f"{block}.{part}" for block in blocks for part in parts), "lm_head"]),
        (attentions, [f"{block}.self_attn" for block in blocks]),
    ):
        if len(places) == len(names):
            found |= dict(zip(places, names, strict=True))
    return found
