"""One profile at a time on a device: two would measure each other."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crayon_runtime.errors import BackendError
from crayon_runtime.profile.board import LOCK, Refused, hold_lock


@contextmanager
def one_at_a_time(folder: Path | None = None) -> Iterator[None]:
    """Hold the lock of this device, which ends with this process whatever ends it.

    Args:
        folder: where the lock is; None: that for temporary files, which all users of a device share.

    Raises:
        BackendError: somebody else profiles.
    """
    folder = folder or Path(tempfile.gettempdir())
    try:
        held = hold_lock(folder)
    except Refused as e:
        refused = e.args[0]
        raise BackendError(refused["what"], where=folder / LOCK, do=refused["do"]) from None
    except OSError as e:
        raise BackendError(
            f"the lock that keeps two profiles apart cannot be opened: {e.strerror}",
            where=folder / LOCK,
            do="remove it, or set TMPDIR to a folder that you may write to",
        ) from None
    try:
        yield
    finally:
        os.close(held)
