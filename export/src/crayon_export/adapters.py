"""From a PEFT LoRA to an adapter bundle."""

from __future__ import annotations

from pathlib import Path

import msgspec

from crayon_export import lora
from crayon_export.executorch.programs import ProgramFiles
from crayon_export.lora import PeftAdapter
from crayon_export.onnx.adapter import onnx_tensors
from crayon_runtime.backends.onnx_adapter import write_onnx_adapter
from crayon_runtime.bundle import Bundle, BundleWriter
from crayon_runtime.bundle import write_adapter as write_tensors
from crayon_runtime.bundle.adapter import Slots
from crayon_runtime.errors import AdapterError
from crayon_runtime.manifest import (
    PRODUCER,
    SCHEMA_VERSION,
    AdapterManifest,
    AdapterTarget,
    AdapterVariants,
    ExecutorchAdapterVariant,
    ExecutorchVariant,
    OnnxAdapterVariant,
    OnnxVariant,
    ProgramDtype,
)


def convert_adapter(
    adapter: str | Path, bundle: str | Path | Bundle, out: str | Path, *, replace: bool = False
) -> Bundle:
    """Convert a PEFT folder into an adapter bundle, for each backend that its base is served by and that takes adapters.

    Raises:
        AdapterError: its shapes, targets or rank do not fit that base, it says that it belongs to another one, or the bundle has no
            adapter slots.
        UnsupportedModel: it is no plain LoRA; what it is instead is named.
        IntegrityError: the bundle's program with slots is damaged.
    """
    base = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    manifest = base.model
    executorch = manifest.variants.executorch
    slots = executorch.slots if isinstance(executorch, ExecutorchVariant) else None
    onnx = isinstance(manifest.variants.onnx, OnnxVariant) and manifest.adapter_slots is not None
    if not onnx and slots is None:
        raise AdapterError("the bundle has no adapter slots", where=base.path, do="export it again with adapter slots")
    opened = PeftAdapter.open(Path(adapter))
    lora.check(opened, manifest.architecture)
    return write_adapter(
        opened,
        manifest.base_fingerprint,
        Path(out),
        onnx=onnx,
        executorch=Slots(slots, base.read(slots.program)) if slots else None,
        replace=replace,
    )


def write_adapter(
    adapter: PeftAdapter,
    base_fingerprint: str,
    out: Path,
    *,
    onnx: bool = True,
    executorch: Slots | None = None,
    replace: bool = False,
) -> Bundle:
    """Write a PEFT LoRA as an adapter bundle that fits one base.

    Args:
        onnx: write the file that the ONNX graph takes.
        executorch: the slots of the base's program.

    Raises:
        AdapterError: the adapter says that it belongs to another base, or has no place in the slots.
    """
    check_base(adapter, base_fingerprint)
    return write_tensors(
        out,
        onnx_tensors(adapter),
        name=adapter.name,
        base_fingerprint=base_fingerprint,
        dtype="fp32" if onnx else None,
        executorch=executorch,
        replace=replace,
    )


def write_official(
    adapter: PeftAdapter, base_fingerprint: str, out: Path, made: ProgramFiles, dtype: ProgramDtype, *, onnx: bool
) -> Bundle:
    """Write a PEFT LoRA with the program that ExecuTorch's exporter made of it and its base.

    Args:
        dtype: of A and B in there.
        onnx: write the file that the ONNX graph takes, too.
    """
    check_base(adapter, base_fingerprint)
    variants = AdapterVariants(executorch=ExecutorchAdapterVariant(["adapter.ptd"], dtype, "adapter.pte"))
    with BundleWriter(out) as writer:
        assert made.data is not None, "a program in a single file takes no adapters"
        writer.add_file("adapter.pte", made.program)
        writer.add_file("adapter.ptd", made.data)
        if onnx:
            with writer.open("adapter.onnx_adapter") as file:
                write_onnx_adapter(file, onnx_tensors(adapter))
            variants = msgspec.structs.replace(variants, onnx=OnnxAdapterVariant("adapter.onnx_adapter"))
        writer.finish(
            AdapterManifest(
                schema_version=SCHEMA_VERSION,
                name=adapter.name,
                base_fingerprint=base_fingerprint,
                producer=PRODUCER,
                targets=[AdapterTarget(module, lora.rank) for module, lora in adapter.targets.items()],
                variants=variants,
                files=[],
            )
        )
    return Bundle.open(out)


def check_base(adapter: PeftAdapter, base_fingerprint: str) -> None:
    if adapter.base_fingerprint not in (None, base_fingerprint):
        raise AdapterError(
            f"adapter {adapter.name!r} was trained on another base ({str(adapter.base_fingerprint)[:12]}…; "
            f"this one is {base_fingerprint[:12]}…)",
            where=adapter.path,
            do="export the base that it was trained on",
        )
