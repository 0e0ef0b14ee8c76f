"""What is measured, and on what: the first line of a profile."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from crayon_runtime._version import __version__
from crayon_runtime.profile.records import Core, Header

if TYPE_CHECKING:
    from crayon_runtime.bundle import Bundle
    from crayon_runtime.engine import Engine
    from crayon_runtime.manifest import Architecture, ModelManifest
    from crayon_runtime.profile.sensors import Sensors

_LIBRARIES = ("onnxruntime", "crayon-edge-native", "numpy")
_KV_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
_WEIGHT_BYTES = {"int4": 0.5, "int8": 1.0, "none": 4.0}


def describe(engine: Engine, bundle: Bundle, sensors: Sensors) -> Header:
    """The machine that this process runs on, and the model in the engine."""
    return header_of(
        bundle,
        versions={"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}},
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu_info=processor_name(),
        cores=sensors.cores(),
        memory_bytes=total_memory(),
        context_length=engine.backend.context_length,
        backends=engine.backend.name,
        adapter=engine.adapter,
    )


def header_of(
    bundle: Bundle,
    *,
    versions: dict[str, str | None],
    system: str,
    cpu_info: str,
    cores: list[Core],
    memory_bytes: int | None,
    context_length: int,
    backends: str,
    adapter: str | None,
) -> Header:
    """A model on a machine."""
    model, architecture = bundle.model, bundle.model.architecture
    return Header(
        test_time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        crayon_version=__version__,
        versions=versions,
        system=system,
        cpu_info=cpu_info,
        cores=cores,
        memory_bytes=memory_bytes,
        model_filename=bundle.path.name,
        model_name=model.name,
        model_type=f"{architecture.model_type} {model.quantization.weights}",
        model_size=bundle.size,
        base_fingerprint=model.base_fingerprint,
        context_length=context_length,
        type_k=model.kv_dtype,
        type_v=model.kv_dtype,
        backends=backends,
        adapter=adapter,
        adapters=bundle.adapter_names,
        read_bytes=read_bytes(model),
        kv_bytes=kv_bytes(architecture, model.kv_dtype),
        operations=operations(architecture),
    )


def read_bytes(model: ModelManifest) -> int:
    """Bytes of weights and their scales, one of four bytes a group, that decoding a token reads: all linear layers, the output layer, and
    norms. Of the embedding it is one row. A block that is repeated counts once."""
    a, q = model.architecture, model.quantization
    scale = 4 / q.group_size if q.group_size else 0.0
    weight = _WEIGHT_BYTES[q.weights] + scale
    shared = (
        a.tied_embeddings and q.weights != "none" and q.embedding == "int8"
    )  # one tensor, as the embedding is stored
    head = a.vocab_size * a.hidden_size * (1 + scale if shared else weight)
    norms = 4 * (2 * a.layers + 1) * a.hidden_size
    return round(a.layers * block_weights(a) * weight + head + norms)


def block_weights(a: Architecture) -> int:
    """Weights of the linear layers of one block."""
    return a.hidden_size * (a.head_size * (2 * a.heads + 2 * a.kv_heads) + 3 * a.ffn_size)


def kv_bytes(a: Architecture, dtype: str) -> int:
    """Keys and values of one token, in all passes."""
    return a.passes * 2 * a.kv_heads * a.head_size * _KV_BYTES.get(dtype, 4)


def operations(a: Architecture) -> int:
    """Multiplications and additions of all linear layers and the output layer, for one token."""
    return 2 * (a.passes * block_weights(a) + a.vocab_size * a.hidden_size)


def processor_name(root: Path = Path("/"), machine: str = platform.machine()) -> str:
    """The processor's name; of a board, whose kernel does not name it, the board's; otherwise `machine`."""
    for line in _lines(root / "proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    board = _lines(root / "proc/device-tree/model")
    return board[0].rstrip("\0") if board else machine


def total_memory(root: Path = Path("/")) -> int | None:
    """Bytes; None where the system does not say."""
    line = next((line for line in _lines(root / "proc/meminfo") if line.startswith("MemTotal:")), None)
    return int(line.split()[1]) * 1024 if line else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
