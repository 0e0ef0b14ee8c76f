from __future__ import annotations

import pytest

from crayon_runtime.backends.patch import names, patch
from crayon_runtime.errors import InvalidInput

OLD, NEW, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4, "ab" * 32


def _string(text: str) -> bytes:
    return len(text).to_bytes(4, "little") + text.encode() + b"\0"


PROGRAM = b"ET12" + _string(OLD) + b"x" + _string(f"scale_{OLD}") + _string(OTHER) + _string(OLD) + b"end"


def test_a_name_is_replaced_wherever_it_occurs() -> None:
    patched = patch(PROGRAM, {OLD: NEW})
    assert patched == b"ET12" + _string(NEW) + b"x" + _string(f"scale_{OLD}") + _string(OTHER) + _string(NEW) + b"end"
    assert names(patched) == {NEW, OTHER, f"scale_{OLD}"}


def test_names_may_change_places() -> None:
    swapped = patch(PROGRAM, {OLD: OTHER, OTHER: OLD})
    assert patch(swapped, {OLD: OTHER, OTHER: OLD}) == PROGRAM
    assert swapped.count(OTHER.encode()) == 2


def test_what_only_looks_like_a_name_stays() -> None:
    longer = b"ET12" + _string(OLD + "00") + b"hash " + OLD.encode() + _string(OTHER)
    assert names(longer) == {OTHER}
    assert patch(longer, {OTHER: NEW}).count(OLD.encode()) == 2


@pytest.mark.parametrize(
    "replaced, says",
    [
        ({NEW: OLD}, "no weight fedc"),
        ({f"scale_{OTHER}": f"scale_{NEW}"}, "no weight scale_abab"),
        ({OLD: f"scale_{NEW}"}, "cannot stand for"),
        ({OLD: NEW[:-1] + "G"}, "cannot stand for"),
        ({f"scale_{OLD}": NEW + "000000"}, "cannot stand for"),
    ],
)
def test_what_is_not_there_or_is_no_name_is_refused(replaced: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        patch(PROGRAM, replaced)
