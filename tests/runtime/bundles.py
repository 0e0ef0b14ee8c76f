"""Small valid bundles whose files are not models: for everything that handles bundles and runs none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crayon_runtime import manifest as m
from crayon_runtime.bundle import Bundle, BundleWriter

BASE = "b" * 64
"""The fingerprint of the base model that `write_model` pretends to hold."""

PRODUCER = m.Producer("crayon-edge", "0.0.0")

ARCHITECTURE = m.Architecture(
    model_type="llama", layers=2, hidden_size=8, heads=2, kv_heads=1, head_size=4, ffn_size=16, vocab_size=32,
    tied_embeddings=True, norm_eps=1e-5, rope=m.Rope(theta=10000.0), trained_context_length=64,
)  # fmt: skip

MODEL = m.ModelManifest(
    schema_version=m.SCHEMA_VERSION,
    name="tiny",
    base_fingerprint=BASE,
    producer=PRODUCER,
    architecture=ARCHITECTURE,
    quantization=m.Quantization("int4", 32, "int8"),
    context_length=64,
    kv_dtype="fp32",
    tokenizer=m.Tokenizer("tokenizer.json", vocab_size=32, add_bos=True, bos=1, eos=[2]),
    variants=m.Variants(onnx=m.OnnxVariant("model.onnx", ["model.onnx.data"])),
    adapter_slots=m.AdapterSlots(["q_proj"], rank_limit=None),
    tap=m.Tap(layer=2, size=8),
    golden=m.Golden("golden.json", "golden.safetensors"),
    files=[],
)

FILES = {
    "tokenizer.json": b'{"model": {}}',
    "model.onnx": b"\x08\x0a" + b"graph" * 20,
    "model.onnx.data": bytes(range(256)) * 30,
    "golden.json": b'{"cases": [], "tolerances": []}',
    "golden.safetensors": (2).to_bytes(8, "little") + b"{}",
    "report.json": b'{"report": true}',
}
EVERY_FILE = [*FILES, "adapters/alice/adapter.onnx_adapter", "adapters/alice/manifest.json", "manifest.json"]
ADAPTER_FILE = b"\x0c\0\0\0TORT" + b"lora" * 50


def write_adapter(target: Path, name: str = "alice", base: str = BASE) -> Path:
    """An adapter bundle of one file."""
    with BundleWriter(target) as writer:
        writer.add_bytes("adapter.onnx_adapter", ADAPTER_FILE)
        writer.finish(
            m.AdapterManifest(
                schema_version=m.SCHEMA_VERSION,
                name=name,
                base_fingerprint=base,
                producer=PRODUCER,
                targets=[m.AdapterTarget("model.layers.0.self_attn.q_proj", 4)],
                variants=m.AdapterVariants(onnx=m.OnnxAdapterVariant("adapter.onnx_adapter")),
                files=[],
            )
        )
    return target


def write_model(target: Path, *, weights: bytes = FILES["model.onnx.data"], replace: bool = False) -> Path:
    """A model bundle with every kind of file, and the adapter `alice` inside."""
    adapter = target.with_name(f"{target.name}-alice")
    if not adapter.exists():
        write_adapter(adapter)
    with BundleWriter(target, replace=replace) as writer:
        for path, content in (FILES | {"model.onnx.data": weights}).items():
            writer.add_bytes(path, content)
        writer.add_bundle("adapters/alice", Bundle.open(adapter))
        writer.finish(MODEL)
    return target


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Change the parsed manifest.json in place, as one who made the bundle would: without a stamp that says otherwise."""
    path = bundle / "manifest.json"
    document = json.loads(path.read_bytes())
    edit(document)
    path.write_text(json.dumps(document))
    (bundle / ".installed.json").unlink(missing_ok=True)
    return bundle


def flip_byte(path: Path, position: int = -1) -> None:
    """Change one byte of a file, and neither its size nor its modification time."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[position] ^= 0x01
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder except install stamps, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".installed.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
