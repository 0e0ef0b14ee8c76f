"""From a PEFT LoRA to an adapter bundle."""

from __future__ import annotations

from pathlib import Path

from crayon_export import lora
from crayon_export.lora import PeftAdapter
from crayon_export.onnx.adapter import onnx_tensors
from crayon_runtime import bundle as bundles
from crayon_runtime.bundle import Bundle
from crayon_runtime.errors import AdapterError


def convert_adapter(
    adapter: str | Path, bundle: str | Path | Bundle, out: str | Path, *, replace: bool = False
) -> Bundle:
    """Convert a PEFT folder into an adapter bundle, bound to the base that `bundle` was exported from.

    Raises:
        AdapterError: its shapes or targets do not fit that base, it says that it belongs to another one, or the bundle has no
            adapter slots.
        UnsupportedModel: it is no plain LoRA; what it is instead is named.
    """
    base = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    model = base.model
    if model.adapter_slots is None:
        raise AdapterError("the bundle has no adapter slots", where=base.path, do="export it again with adapter slots")
    opened = PeftAdapter.open(Path(adapter))
    lora.check(opened, model.architecture)
    return write_adapter(opened, model.base_fingerprint, Path(out), replace=replace)


def write_adapter(adapter: PeftAdapter, base_fingerprint: str, out: Path, *, replace: bool = False) -> Bundle:
    """Write a PEFT LoRA as an adapter bundle that fits one base.

    Raises:
        AdapterError: the adapter says that it belongs to another base.
    """
    check_base(adapter, base_fingerprint)
    return bundles.write_adapter(
        out, onnx_tensors(adapter), name=adapter.name, base_fingerprint=base_fingerprint, replace=replace
    )


def check_base(adapter: PeftAdapter, base_fingerprint: str) -> None:
    if adapter.base_fingerprint not in (None, base_fingerprint):
        raise AdapterError(
            f"adapter {adapter.name!r} was trained on another base ({str(adapter.base_fingerprint)[:12]}…; "
            f"this one is {base_fingerprint[:12]}…)",
            where=adapter.path,
            do="export the base that it was trained on",
        )
