"""The build of the kernels that their tests call, with every instruction set that this CPU has.

``CRAYON_KERNELS_LIBRARY`` names another build of them: with AddressSanitizer, or for an ARM board.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from tests.support import needs

LIBRARY = ctypes.CDLL(str(needs.kernels_library()))
_ALL_SETS = ("baseline", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "neon", "dotprod")


@pytest.fixture(params=[s for s in _ALL_SETS if LIBRARY.test_use(s.encode()) == 0], autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """All tests of a module that has this name run once with each instruction set."""
    assert LIBRARY.test_use(request.param.encode()) == 0
    yield request.param
    LIBRARY.test_use(None)
