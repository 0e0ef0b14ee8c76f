"""Writing so that nothing half-written is ever visible, and hashing.

Everything is written under a hidden name beside its target, flushed to the disk, and renamed at the end. The hidden name is locked
while its writer lives, whatever kills it, so the next writer of the same target knows what is left over and removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from crayon_runtime.errors import OutputError

CHUNK = 1 << 20
"""Bytes read or written at once."""


@contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Fill a new folder that appears at `target` only when it is whole.

    Yields:
        An empty folder beside the target. It becomes the target when the block ends, and is removed when the block raises.

    Args:
        replace: an existing target is swapped against the new one at the end, and stays what it was if there is no new one.

    Raises:
        OutputError: the target exists (without `replace`), cannot be written, or the disk is full.
    """
    target = Path(target).absolute()
    if not replace and os.path.lexists(target):
        raise _exists(target)
    with _output_errors(target):
        _prepare(target)
        partial, lock = _create(target, _new_directory)
    try:
        with _output_errors(target, within=partial):
            yield partial
        with _output_errors(target):
            _sync_tree(partial)
            _move(partial, target, replace)
            _sync(target.parent)
    finally:
        _remove(partial)  # what was not finished, or the old target that the new one was swapped against
        os.close(lock)


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """Write a file that appears at `target`, in place of an older one, only when it is whole.

    Raises:
        OutputError: the target is a folder, cannot be written, or the disk is full.
    """
    target = Path(target).absolute()
    if target.is_dir():
        raise OutputError("there is a folder in the place of the file to write", where=target, do="choose another path")
    with _output_errors(target):
        _prepare(target)
        partial, lock = _create(target, _new_file)
    try:
        with _output_errors(target, within=partial):
            with open(lock, "w+b", closefd=False) as file:
                yield file
            os.fsync(lock)
        with _output_errors(target):
            partial.replace(target)
            _sync(target.parent)
    finally:
        _remove(partial)
        os.close(lock)


def recover(target: Path) -> None:
    """Put back what a dead writer had moved aside to replace it. Where the system can exchange two paths, there is never anything.

    `atomic_directory` does so itself; it is for who reads a target first.
    """
    target = Path(target).absolute()
    aside = re.compile(re.escape(f".{target.name}.replaced-") + "[0-9a-f]{8}")
    with suppress(FileNotFoundError):
        for name in os.listdir(target.parent):
            if aside.fullmatch(name):
                if os.path.lexists(target):
                    _remove(target.parent / name)
                else:
                    (target.parent / name).rename(target)


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a file, in lower-case hex.

    Args:
        on_bytes: called with the number of bytes read since the last call.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with Path(path).open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            if on_bytes:
                on_bytes(size)
    return digest.hexdigest()


def _prepare(target: Path) -> None:
    """Make the folder for the target, and remove what dead writers of this target left there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    leftover = re.compile(re.escape(f".{target.name}.partial-") + r"\d+-[0-9a-f]{8}")
    for name in os.listdir(target.parent):
        if leftover.fullmatch(name):
            with suppress(OSError):
                path = target.parent / name
                lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(path)
                finally:
                    os.close(lock)


def _create(target: Path, create: Callable[[Path], int]) -> tuple[Path, int]:
    """A new path beside the target, and the open file descriptor that locks it."""
    while True:
        path = target.with_name(f".{target.name}.partial-{os.getpid()}-{os.urandom(4).hex()}")
        try:
            lock = create(path)
        except FileNotFoundError:
            if not target.parent.exists():
                raise
            continue  # another writer took it for a leftover before it was locked
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # the same, and it is being removed
            os.close(lock)
            continue
        except OSError:  # a file system without locks; leftovers stay there too
            return path, lock
        if path.exists():
            return path, lock
        os.close(lock)


def _new_directory(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def _move(partial: Path, target: Path, replace: bool) -> None:
    try:
        partial.rename(target)
    except OSError as e:
        if e.errno not in _TAKEN:
            raise
        if not replace:
            raise _exists(target) from None
        if not _exchange(partial, target):
            aside = target.with_name(f".{target.name}.replaced-{os.urandom(4).hex()}")
            target.rename(aside)
            try:
                partial.rename(target)
            except OSError:
                aside.rename(target)
                raise
            with suppress(FileNotFoundError):  # another writer removed it as a leftover
                aside.rename(partial)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    if renameat2 is None:
        return False
    if renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL:  # some file systems cannot flush a folder
            raise
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)

_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, or choose a path on another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose a path on another disk"),
    errno.EFBIG: ("the file system takes no file this large", "choose a path on another disk; FAT stops at 4 GB"),
    errno.EROFS: ("the file system is read-only", "choose a path that you may write to"),
    errno.EACCES: ("writing is not permitted", "choose a path that you may write to"),
    errno.EPERM: ("writing is not permitted", "choose a path that you may write to"),
}


@contextmanager
def _output_errors(target: Path, *, within: Path | None = None) -> Iterator[None]:
    """Turn the operating system's errors into OutputError.

    Args:
        within: the block is the caller's, who may also read; only errors that can come from nothing but writing, or that concern
            a path under this one, are turned.
    """
    try:
        yield
    except OSError as e:
        writing = (
            within is None
            or e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
            or (isinstance(e.filename, str | os.PathLike) and Path(e.filename).is_relative_to(within))
        )
        if not writing:
            raise
        what, do = _REASONS.get(e.errno or 0, (f"it cannot be written: {e.strerror or e}", None))
        raise OutputError(what, where=target, do=do) from e


def _exists(target: Path) -> OutputError:
    return OutputError(
        "the target exists already",
        where=target,
        do="choose another path, or replace it with --force (in Python, replace=True)",
    )
