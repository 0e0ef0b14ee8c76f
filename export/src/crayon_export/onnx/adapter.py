"""A PEFT LoRA as an ONNX Runtime adapter file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from crayon_export.lora import PeftAdapter


def write_onnx_adapter(adapter: PeftAdapter, path: Path) -> None:
    """Write `.onnx_adapter`: for each target `MODULE.lora_A.weight` [in, r] and `MODULE.lora_B.weight` [r, out], float32.

    The scale alpha/r is multiplied into B, so that a graph needs no scalar for it.
    """
    tensors = {}
    for module in adapter.targets:
        tensors[f"{module}.lora_A.weight"] = adapter.a(module).T
        tensors[f"{module}.lora_B.weight"] = adapter.b(module).T * np.float32(adapter.scale(module))
    # `set_parameters` does not keep the values alive; this does, until the file is written.
    values = {
        name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(t, np.float32)) for name, t in tensors.items()
    }
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(values)
    file.export_adapter(str(path))
