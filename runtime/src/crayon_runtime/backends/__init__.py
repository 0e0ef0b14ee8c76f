"""The inference backends: ONNX Runtime, ExecuTorch, and a scripted fake for tests.

`load` is the only door: it opens the variant of a bundle that a backend runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import UNSET

from crayon_runtime.backends.base import Adapter, Backend, Cache, Step
from crayon_runtime.errors import BackendError

if TYPE_CHECKING:
    from crayon_runtime.bundle import Bundle

__all__ = ["NAMES", "Adapter", "Backend", "Cache", "Step", "available", "load", "served"]

NAMES = ("onnx", "executorch")
"""The backends that there are, by their keys in a manifest's `variants`."""


def load(bundle: Bundle, name: str = "auto", *, threads: int | None = None, adapter: Bundle | None = None) -> Backend:
    """Load a model bundle.

    Args:
        name: "onnx", "executorch", or "auto" for the one that is faster here, of those that are here and that the bundle serves. Where
            that are several, the first time they are measured, which takes some seconds; what came out is kept in the user's cache.
        threads: how many cores to compute on; None: all physical ones, as the backend counts them.
        adapter: an adapter that it will be used with: "auto" takes a backend that can run it.

    Raises:
        BackendError: the backend is unknown, not installed, or the bundle was not exported for it.
        BundleError: a file that the backend reads is damaged.
    """
    if name != "auto":
        return _load(bundle, name, threads)
    from crayon_runtime.backends.choice import choose

    names = available(bundle)
    if adapter is not None:
        names = [name for name in names if name in served(adapter)] or names
    if not names:
        wanted = served(bundle)
        if not wanted:
            raise BackendError(
                "the bundle has no variant that runs here", where=bundle.path, do="export the model again"
            )
        return _load(bundle, wanted[0], threads)  # says what is missing
    return choose(bundle, names, lambda name: _load(bundle, name, threads), threads=threads)


def served(bundle: Bundle) -> list[str]:
    """The backends that a model or an adapter was exported for."""
    return [name for name in NAMES if getattr(bundle.manifest.variants, name) is not UNSET]


def available(bundle: Bundle) -> list[str]:
    """The backends that a model was exported for and that are installed here."""
    from crayon_runtime.backends import executorch

    return [name for name in served(bundle) if name != "executorch" or executorch.is_installed()]


def _load(bundle: Bundle, name: str, threads: int | None) -> Backend:
    if name == "onnx":
        from crayon_runtime.backends.onnx import OnnxBackend

        return OnnxBackend.load(bundle, threads=threads)
    if name == "executorch":
        from crayon_runtime.backends.executorch import ExecutorchBackend

        return ExecutorchBackend.load(bundle, threads=threads)
    raise BackendError(f"there is no backend {name!r}", do=f"use one of: auto, {', '.join(NAMES)}")
