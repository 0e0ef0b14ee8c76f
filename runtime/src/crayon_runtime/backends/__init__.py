"""The inference backends: ONNX Runtime, and a scripted fake for tests.

`load` is the only door: it opens the variant of a bundle that a backend runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crayon_runtime.backends.base import Adapter, Backend, Cache, Step
from crayon_runtime.errors import BackendError

if TYPE_CHECKING:
    from crayon_runtime.bundle import Bundle

__all__ = ["Adapter", "Backend", "Cache", "Step", "load"]


def load(bundle: Bundle, name: str = "auto", *, threads: int | None = None) -> Backend:
    """Load a model bundle.

    Args:
        name: "onnx", or "auto" for the best that is here and that the bundle serves.
        threads: how many cores to compute on; None: all physical ones, as the backend counts them.

    Raises:
        BackendError: the backend is unknown, not installed, or the bundle was not exported for it.
    """
    if name not in ("auto", "onnx"):
        raise BackendError(f"there is no backend {name!r}", do="use --backend onnx")
    from crayon_runtime.backends.onnx import OnnxBackend

    return OnnxBackend.load(bundle, threads=threads)
