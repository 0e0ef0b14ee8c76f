"""Traces of real models, and what is made of their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from crayon_export import export
from crayon_runtime.profile import operators
from crayon_server.models import load_nano
from tests.runtime.traces import TOKENS, expected, linear_modules, traced


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


def test_onnx_runtimes_profile_has_every_linear_layer_in_every_token(tmp_path: Path) -> None:
    bundle = export(load_nano(), tmp_path / "nano", quantize="int4").bundle
    found = traced(bundle.path, "onnx")
    assert linear_modules(found) == expected(bundle.model.architecture.layers)
    assert {len(operator.samples_ns) for operator in found} == {TOKENS}
    kinds = operators.by_kind(found)
    assert {"linear", "attention", "norm", "embedding", "adapter"} <= {kind.kind for kind in kinds}
    assert sum(kind.share for kind in kinds) == pytest.approx(1)
    assert sum(kind.p50_ns for kind in kinds) == pytest.approx(sum(operator.p50_ns for operator in found))
