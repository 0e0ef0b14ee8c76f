"""Writing an adapter bundle from its tensors, one of them in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from crayon_runtime.backends.onnx_adapter import write_onnx_adapter
from crayon_runtime.bundle.reader import Bundle
from crayon_runtime.bundle.writer import BundleWriter
from crayon_runtime.manifest import (
    PRODUCER,
    SCHEMA_VERSION,
    AdapterManifest,
    AdapterTarget,
    AdapterVariants,
    BlendedFrom,
    OnnxAdapterVariant,
)

if TYPE_CHECKING:
    from crayon_runtime.backends.onnx_adapter import Tensor

_FILE = "adapter.onnx_adapter"
_A = ".lora_A.weight"


def write_adapter(
    out: Path,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    base_fingerprint: str,
    pool: BlendedFrom | None = None,
    replace: bool = False,
) -> Bundle:
    """Write an adapter bundle that fits one base; it appears at `out` when it is whole.

    Args:
        tensors: for each target `MODULE.lora_A.weight` [in, r] and `MODULE.lora_B.weight` [r, out], with alpha/r in B.
        pool: that it was blended from.

    Raises:
        OutputError: the target exists, or cannot be written.
        AdapterError: a tensor is not what its shape says, or there is more than an adapter file holds.
    """
    ranks = {key.removesuffix(_A): shape[1] for key, (shape, _) in tensors.items() if key.endswith(_A)}
    with BundleWriter(out, replace=replace) as writer:
        with writer.open(_FILE) as file:
            write_onnx_adapter(file, tensors)
        writer.finish(
            AdapterManifest(
                schema_version=SCHEMA_VERSION,
                name=name,
                base_fingerprint=base_fingerprint,
                producer=PRODUCER,
                targets=[AdapterTarget(module, rank) for module, rank in ranks.items()],
                variants=AdapterVariants(onnx=OnnxAdapterVariant(_FILE)),
                pool=pool,
                files=[],
            )
        )
    return Bundle.open(out)
