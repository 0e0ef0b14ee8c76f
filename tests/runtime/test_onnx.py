"""What is ONNX Runtime's own about its backend: adapter files and graphs. What all backends do is in test_real_backends.py."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import pytest

from crayon_export.exporter import export
from crayon_runtime import backends
from crayon_runtime.backends.onnx import OnnxBackend
from crayon_runtime.backends.onnx_adapter import Tensor
from crayon_runtime.bundle import Bundle, BundleWriter, write_adapter
from crayon_runtime.errors import AdapterError, BackendError
from crayon_runtime.manifest import AdapterDtype, AdapterVariants, OnnxAdapterVariant
from tests.export.models import tiny_adapter, tiny_llama, tiny_tokenizer

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("onnx")
    model = tiny_tokenizer(tiny_llama(folder / "model"))
    return export(model, folder / "bundle", adapters=[tiny_adapter(model, folder / "alice")]).bundle


@pytest.fixture
def backend(bundle: Bundle) -> OnnxBackend:
    loaded = backends.load(bundle, "onnx", threads=1)
    assert isinstance(loaded, OnnxBackend)
    return loaded


def _zeros(*shape: int) -> Tensor:
    return (shape[0], shape[1]), lambda: np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            {f"{Q}.lora_A.weight": _zeros(63, 2), f"{Q}.lora_B.weight": _zeros(2, 64)},
            r"lora_A.weight has shape \[63, 2\]",
        ),
        ({f"{Q}.lora_A.weight": _zeros(64, 2), f"{Q}.lora_B.weight": _zeros(3, 64)}, "not of one rank"),
        ({f"{Q}.lora_A.weight": _zeros(64, 2)}, "not of one rank"),
        ({"lm_head.lora_A.weight": _zeros(64, 2), "lm_head.lora_B.weight": _zeros(2, 320)}, "no slot for lm_head"),
    ],
    ids=["width", "ranks", "half", "head"],
)
def test_an_adapter_that_does_not_fit(
    backend: OnnxBackend, bundle: Bundle, tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    base = bundle.model.base_fingerprint
    written = write_adapter(tmp_path / "adapter", tensors, name="mallory", base_fingerprint=base)
    with pytest.raises(AdapterError, match=message):
        backend.read_adapter(written)


def _random(rank: int = 2) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    shapes = {f"{Q}.lora_A.weight": (64, rank), f"{Q}.lora_B.weight": (rank, 64)}
    arrays = {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    return {name: (shapes[name], lambda name=name: arrays[name]) for name in shapes}


def test_adapters_in_fewer_bits_answer_alike(backend: OnnxBackend, bundle: Bundle, tmp_path: Path) -> None:
    ids = np.arange(3, 40, dtype=np.int64)
    logits = {None: backend.new_cache().prefill(ids).logits.copy()}
    for dtype in ("fp32", "fp16", "int8"):
        written = write_adapter(
            tmp_path / dtype, _random(), name="a", base_fingerprint=bundle.model.base_fingerprint, dtype=dtype
        )
        adapter = backend.read_adapter(written)
        assert {value.data_type() for value in adapter.tensors.values()} == {"tensor(float)"}
        logits[dtype] = backend.new_cache(adapter).prefill(ids).logits.copy()
    moved = np.linalg.norm(logits["fp32"] - logits[None])
    for dtype in ("fp16", "int8"):  # activations are rounded to int8 too, which makes more of any difference
        assert np.linalg.norm(logits[dtype] - logits["fp32"]) < 0.1 * moved


def _stored(path: Path, arrays: dict[str, np.ndarray]) -> bytes:
    """What ONNX Runtime's own writer makes of these."""
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    made = ort.AdapterFormat()
    made.set_parameters(values)
    made.export_adapter(str(path))
    return path.read_bytes()


A, B = f"{Q}.lora_A", f"{Q}.lora_B"
HALVES = {f"{A}.weight": np.ones((64, 2), np.float16), f"{B}.weight": np.ones((2, 64), np.float16)}
BYTES = {
    f"{A}.weight": np.ones((64, 2), np.int8),
    f"{A}.scale": np.ones(2, np.float32),
    f"{B}.weight": np.ones((2, 64), np.int8),
    f"{B}.scale": np.ones(2, np.float32),
}


@pytest.mark.parametrize(
    "dtype, arrays, message",
    [
        ("fp16", HALVES, None),
        ("int8", BYTES, None),
        ("fp32", HALVES, r"weight is tensor\(float16\), which is not of an adapter in fp32"),
        ("int8", HALVES, r"is tensor\(float16\), which is not of an adapter in int8"),
        ("fp16", BYTES, r"is tensor\(int8\), which is not of an adapter in fp16"),
        ("int8", {n: a for n, a in BYTES.items() if n != f"{B}.scale"}, "lora_B.scale is absent"),
        ("int8", BYTES | {"more.scale": np.ones(2, np.float32)}, r"more.scale is tensor\(float\)"),
        ("int8", BYTES | {f"{A}.scale": np.ones(3, np.float32)}, "not one scale for each rank"),
        ("int8", BYTES | {f"{A}.scale": np.ones((2, 1), np.float32)}, "not one scale for each rank"),
        ("int8", BYTES | {f"{A}.scale": np.ones(2, np.float64)}, r"tensor\(double\)"),
        ("int8", BYTES | {f"{B}.scale": np.array([1, np.nan], np.float32)}, "NaN or infinity"),
        ("int8", BYTES | {f"{B}.scale": np.array([1, -1], np.float32)}, "a scale that cannot be"),
        ("int8", BYTES | {f"{B}.scale": np.array([1, 3e38], np.float32)}, "a scale that cannot be"),
        ("fp16", HALVES | {f"{B}.weight": np.full((2, 64), np.inf, np.float16)}, "lora_B.weight holds NaN"),
        ("fp32", {n: np.full(a.shape, np.nan, np.float32) for n, a in HALVES.items()}, "weight holds NaN"),
        ("fp16", HALVES | {f"{A}.weight": np.ones(128, np.float16)}, r"shape \[128\]"),
        ("fp16", {n: a[:, :1] for n, a in HALVES.items()}, "shape"),
    ],
)
def test_an_adapter_file_that_lies(
    backend: OnnxBackend,
    bundle: Bundle,
    dtype: AdapterDtype,
    arrays: dict[str, np.ndarray],
    message: str | None,
    tmp_path: Path,
) -> None:
    written = write_adapter(
        tmp_path / "adapter", _random(), name="mallory", base_fingerprint=bundle.model.base_fingerprint
    ).as_adapter
    with BundleWriter(tmp_path / "lies") as writer:
        writer.add_bytes("lies.onnx_adapter", _stored(tmp_path / "stored", arrays))
        variants = AdapterVariants(onnx=OnnxAdapterVariant("lies.onnx_adapter", dtype))
        writer.finish(msgspec.structs.replace(written, variants=variants))
    lies = Bundle.open(tmp_path / "lies")
    if message is None:
        backend.read_adapter(lies)
        return
    with pytest.raises(AdapterError, match=message):
        backend.read_adapter(lies)


def test_a_graph_that_onnxruntime_refuses(bundle: Bundle, tmp_path: Path) -> None:
    """Every hash is right, and still it is no model: a broken exporter, say."""
    model = bundle.model
    with BundleWriter(tmp_path / "broken") as writer:
        for file in model.files:
            if file.path != "model.onnx" and not file.path.startswith("adapters/"):
                writer.add_file(file.path, bundle.file(file.path))
        writer.add_bytes("model.onnx", bundle.file("model.onnx").read_bytes()[:-500])
        writer.finish(msgspec.structs.replace(model, adapters=[]))
    with pytest.raises(BackendError, match="refuses the model"):
        backends.load(Bundle.open(tmp_path / "broken"))
