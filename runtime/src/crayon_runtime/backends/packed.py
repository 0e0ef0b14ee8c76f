"""Where the weights are kept in the form in which ExecuTorch multiplies with them: made once on a device, and mapped from then on."""

from __future__ import annotations

import hashlib
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from crayon_runtime.probe import processor

if TYPE_CHECKING:
    from crayon_runtime.bundle import Bundle
    from crayon_runtime.manifest import ExecutorchVariant

_UNUSED = 30 * 86400
"""Seconds after which a file that nothing has loaded is removed."""

_ABANDONED = 86400
"""Seconds after which a file that was not finished is removed: whoever was writing it is gone."""

_NAME = re.compile(r"(?P<weights>[0-9a-f]{32})-(?P<processor>[0-9a-f]{16})-[0-9a-f]{16}\.packed")


def packed_weights(bundle: Bundle, variant: ExecutorchVariant) -> Path | None:
    """The path for a model's packed weights on this device; None where nothing can be written.

    Its name holds everything that they depend on: the hashes of program and weights, the processor, and the library. Files of the same
    weights for an earlier library are removed, and so is what was not loaded for a month. Whoever still maps such a file keeps it.
    """
    from platformdirs import user_cache_path

    hashes = {file.path: file.sha256 for file in bundle.manifest.files}
    weights = _digest(*(hashes[path] for path in (variant.program, *variant.data)))[:32]
    folder = user_cache_path("crayon", appauthor=False).absolute() / "packed"
    path = folder / f"{weights}-{processor()}-{_library()}.packed"
    with suppress(OSError):
        os.utime(path)  # it counts as used
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old(path)
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    return path if writable or path.exists() else None


def _library() -> str:
    """Tells the builds of the library apart: what it packs, another one may read otherwise."""
    import crayon_native

    status = crayon_native.library.stat()
    return _digest(
        crayon_native.__version__, crayon_native.instruction_set(), str(status.st_size), str(status.st_mtime_ns)
    )[:16]


def _remove_old(path: Path) -> None:
    now, wanted = time.time(), _NAME.fullmatch(path.name)
    for other in path.parent.iterdir():
        with suppress(OSError):
            age, name = now - other.stat().st_mtime, _NAME.fullmatch(other.name)
            if name is None:
                old = age > _ABANDONED
            else:
                replaced = wanted is not None and name.groups() == wanted.groups() and name[0] != wanted[0]
                old = replaced or age > _UNUSED
            if old:
                other.unlink()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
