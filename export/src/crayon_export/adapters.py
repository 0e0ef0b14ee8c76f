"""From a PEFT LoRA to an adapter bundle for a base bundle."""

from __future__ import annotations

from pathlib import Path

from crayon_export import lora
from crayon_export.exporter import write_adapter
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
    opened = lora.PeftAdapter.open(Path(adapter))
    lora.check(opened, model.architecture)
    return write_adapter(opened, model.base_fingerprint, Path(out), replace=replace)
