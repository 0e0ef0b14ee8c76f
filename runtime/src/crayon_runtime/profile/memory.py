"""What memory a process has, and how much of a bundle is in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crayon_runtime.probe import peak_memory


class Memory(NamedTuple):
    """Bytes; None where the system does not say."""

    rss: int | None
    pss: int | None
    """As `rss`, but of a page that several processes share only this one's part."""
    mapped: int | None
    """Resident pages of the files in a folder."""
    peak: int | None
    """The most that was resident at once."""


def memory(folder: Path, proc: Path = Path("/proc/self")) -> Memory:
    """The memory of this process. It takes milliseconds, so nothing is measured meanwhile.

    Args:
        folder: of the bundle, whose mapped files are counted.
        proc: of the process.
    """
    return Memory(_field(proc, "Rss"), _field(proc, "Pss"), _mapped(proc, folder.resolve()), peak_memory())


def cached_bytes(files: Iterable[Path]) -> int:
    """How much of some files is in the page cache: what `mincore` says of a mapping of each."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    total = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            failed = mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), pages)
            del view  # the mapping cannot be closed before
            if failed:
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            total += min(size, mmap.PAGESIZE * sum(page & 1 for page in pages))
    return total


KEPT = 0.05
"""Of a model's files, the share that may stay in the page cache after they were dropped from it."""


def drop_page_cache(files: list[Path]) -> int:
    """Have the system forget what it has cached of some files; how many bytes it kept all the same.

    Pages that a process has mapped stay, and those of file systems that are in memory.
    """
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are still to be written are not dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_bytes(files)


def _field(proc: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", (proc / "smaps_rollup").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _mapped(proc: Path, folder: Path) -> int | None:
    total, inside = 0, False
    try:
        lines = (proc / "smaps").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            path = line.split(maxsplit=5)[5:]
            inside = bool(path) and Path(path[0]).is_relative_to(folder)
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total
