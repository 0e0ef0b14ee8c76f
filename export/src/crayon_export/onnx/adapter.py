"""A PEFT LoRA as the tensors of an ONNX Runtime adapter."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from crayon_export.lora import PeftAdapter
from crayon_runtime.backends.onnx_adapter import Tensor


def onnx_tensors(adapter: PeftAdapter) -> dict[str, Tensor]:
    """For each target `MODULE.lora_A.weight` [in, r] and `MODULE.lora_B.weight` [r, out], float32.

    The scale alpha/r is multiplied into B, so that a graph needs no scalar for it.
    """
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in adapter.tensors.items():
        tensors[f"{module}.lora_A.weight"] = (a.shape[1], a.shape[0]), partial(_a, adapter, module)
        tensors[f"{module}.lora_B.weight"] = (b.shape[1], b.shape[0]), partial(_b, adapter, module)
    return tensors


def _a(adapter: PeftAdapter, module: str) -> npt.NDArray[np.float32]:
    return adapter.a(module).T


def _b(adapter: PeftAdapter, module: str) -> npt.NDArray[np.float32]:
    return adapter.b(module).T * np.float32(adapter.scale(module))
