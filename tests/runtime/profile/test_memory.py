from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from crayon_runtime.profile.memory import cached_bytes, drop_page_cache, memory
from tests.support import needs

SIZE = 4 << 20


def test_resident_and_mapped_memory(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(SIZE))
    before = memory(tmp_path)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[i] for i in range(0, SIZE, mmap.PAGESIZE)) == 0  # every page was touched
        held, mine = memory(tmp_path), np.ones(16 * SIZE, np.uint8)
        after = memory(tmp_path)
    assert before.mapped == 0
    assert held.mapped == SIZE
    assert memory(tmp_path / "elsewhere").mapped == 0
    assert None not in (before.rss, after.rss, after.pss, after.peak)
    assert after.rss - held.rss >= mine.nbytes / 2  # type: ignore[operator]
    assert after.peak >= after.rss > after.pss  # type: ignore[operator]


def test_a_system_without_smaps(tmp_path: Path) -> None:
    found = memory(tmp_path, proc=tmp_path)
    assert (found.rss, found.pss, found.mapped) == (None, None, None)


def test_what_is_dropped_is_not_in_the_page_cache(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "empty"]
    for path, size in zip(files, (SIZE, 5000, 0), strict=True):
        path.write_bytes(bytes(size))
    assert cached_bytes(files) == SIZE + 5000
    assert drop_page_cache(files) == cached_bytes(files)
    assert cached_bytes(files) < 0.05 * SIZE
    files[0].read_bytes()
    assert cached_bytes(files) >= SIZE


def test_a_file_system_in_memory_keeps_everything() -> None:
    with needs.tmpfs(2 * SIZE) as folder:
        file = folder / "weights"
        file.write_bytes(bytes(SIZE))
        assert drop_page_cache([file]) == SIZE
