"""Traces of real models, and what is made of their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from crayon_export import export
from crayon_runtime.manifest import LINEARS
from crayon_runtime.profile import operators
from crayon_runtime.profile.etdump import read_etdump
from crayon_runtime.profile.jobs import Job, Trace
from crayon_runtime.profile.records import Operator
from crayon_runtime.profile.target import Local, results
from crayon_server.models import load_nano
from tests import programs
from tests.support import needs

TOKENS = 3


@pytest.mark.parametrize(
    "name, op_type, module, kind",
    [
        ("model.layers.3.mlp.down_proj", "MatMulNBits", "model.layers.3.mlp.down_proj", "linear"),
        ("model.layers.3.mlp.down_proj/base", "MatMulNBits", "model.layers.3.mlp.down_proj", "linear"),
        ("model.layers.3.mlp.down_proj/lora_A", "MatMul", "model.layers.3.mlp.down_proj", "adapter"),
        ("model.layers.3.mlp.down_proj", "Add", "model.layers.3.mlp.down_proj", "elementwise"),
        ("model.layers.0.self_attn.attention", "GroupQueryAttention", "model.layers.0.self_attn", "attention"),
        (
            "model.layers.0.input_layernorm",
            "SkipSimplifiedLayerNormalization",
            "model.layers.0.input_layernorm",
            "norm",
        ),
        ("model.layers.0.mlp/silu/QuickGeluFusion/", "QuickGelu", "model.layers.0.mlp", "elementwise"),
        ("model.embed_tokens", "GatherBlockQuantized", "model.embed_tokens", "embedding"),
        ("logits", "MatMulNBits", "lm_head", "linear"),
        ("tap_sum", "ReduceSum", None, "other"),
        ("7 elementwise", "elementwise", None, "elementwise"),
        ("37 native_call_custom_sdpa.out", "native_call_custom_sdpa.out", None, "attention"),
        ("39 Fully Connected (NC, F32) GEMM #1", "Fully Connected (NC, F32) GEMM #1", None, "linear"),
    ],
)
def test_kinds_and_modules(name: str, op_type: str, module: str | None, kind: str) -> None:
    assert (operators.module_of(name), operators.kind_of(name, op_type)) == (module, kind)


def traced(bundle: Path, backend: str) -> list[Operator]:
    work = Trace(depth=4, generate=TOKENS)
    job = Job(bundle=str(bundle), backend=backend, adapter=None, threads=1, cpus=None, process=0, work=work)
    found = list(results(Local(), job))
    assert all(isinstance(operator, Operator) for operator in found)
    return found  # type: ignore[return-value]


def linear_modules(found: list[Operator]) -> set[str]:
    """Of those that are computed as one, each."""
    modules = set()
    for operator in found:
        if operator.kind == "linear" and operator.module is not None:
            first, *more = operator.module.split(",")
            modules |= {first, *(f"{first.rpartition('.')[0]}.{name}" for name in more)}
    return modules


def expected(layers: int) -> set[str]:
    parts = [f"{'self_attn' if name in ('q_proj', 'k_proj', 'v_proj', 'o_proj') else 'mlp'}.{name}" for name in LINEARS]
    return {f"model.layers.{layer}.{part}" for layer in range(layers) for part in parts} | {"lm_head"}


def test_onnx_runtimes_profile_has_every_linear_layer_in_every_token(tmp_path: Path) -> None:
    bundle = export(load_nano(), tmp_path / "nano", quantize="int4").bundle
    found = traced(bundle.path, "onnx")
    assert linear_modules(found) == expected(bundle.model.architecture.layers)
    assert {len(operator.samples_ns) for operator in found} == {TOKENS}
    kinds = operators.by_kind(found)
    assert {"linear", "attention", "norm", "embedding", "adapter"} <= {kind.kind for kind in kinds}
    assert sum(kind.share for kind in kinds) == pytest.approx(1)
    assert sum(kind.p50_ns for kind in kinds) == pytest.approx(sum(operator.p50_ns for operator in found))


@pytest.mark.slow
def test_executorchs_trace_has_the_times_that_its_inspector_reads(tmp_path: Path) -> None:
    native = needs.native()
    made = programs.made()
    found = traced(made.bundle.path, "executorch")
    assert linear_modules(found) == expected(made.bundle.model.architecture.layers)
    assert {len(operator.samples_ns) for operator in found} == {TOKENS}
    attention = [operator.module for operator in found if "sdpa" in operator.event_name]
    assert attention == [f"model.layers.{i}.self_attn" for i in range(made.bundle.model.architecture.layers)]

    native.start(0)
    program = native.Program(made.bundle.file("model.pte"), [made.bundle.file("model.ptd")])
    cache = program.new_cache()
    cache.use(program, "forward_tap")
    path = tmp_path / "steps.etdump"
    cache.trace(path)
    for position in range(TOKENS):
        cache.step([1], position)
    cache.trace(None)
    steps = [step for step in read_etdump(path.read_bytes()) if any(e.name == "Method::execute" for e in step)]
    inspector = needs.module("executorch.devtools").Inspector(etdump_path=str(path))
    (block,) = [b for b in inspector.event_blocks if b.name == "Execute"]
    ours = sorted((e.name, e.end - e.start) for step in steps for e in step if not e.delegated)
    theirs = sorted((e.name, round(ms * 1e6)) for e in block.events if not e.is_delegated_op for ms in e.perf_data.raw)
    assert ours == theirs


@pytest.mark.parametrize(
    "content", [b"", b"no dump at all", b"\0" * 8 + b"ED00", b"\x10\0\0\0\xff\xff\0\0ED00" + b"\1" * 40]
)
def test_what_is_no_etdump(content: bytes) -> None:
    with pytest.raises(ValueError, match="ETDump"):
        read_etdump(content)
