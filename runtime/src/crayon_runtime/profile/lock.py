"""One profile at a time on a device: two would measure each other."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crayon_runtime.errors import BackendError
from crayon_runtime.profile.board import LOCK


@contextmanager
def one_at_a_time(folder: Path | None = None) -> Iterator[None]:
    """Hold the lock of this device, which ends with this process whatever ends it.

    Args:
        folder: where the lock is; None: that for temporary files, which all users of a device share.

    Raises:
        BackendError: somebody else profiles.
    """
    path = (folder or Path(tempfile.gettempdir())) / LOCK
    try:
        # Not created where it exists: a system may refuse that for a file of another user in a folder of all.
        held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | (0 if path.exists() else os.O_CREAT), 0o644)
    except OSError as e:
        raise BackendError(
            f"the lock that keeps two profiles apart cannot be opened: {e.strerror}",
            where=path,
            do="remove it, or set TMPDIR to a folder that you may write to",
        ) from None
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackendError(
                "another profile is being made on this device, and the two would measure each other",
                where=path,
                do="wait until it has ended, or end it",
            ) from None
        yield
    finally:
        os.close(held)
