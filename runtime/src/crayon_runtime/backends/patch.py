"""A program of ExecuTorch for other weights of the same shapes: only the names that it finds them by are replaced."""

from __future__ import annotations

import re
from collections.abc import Mapping

from crayon_runtime.errors import InvalidInput

_NAME = re.compile(rb"\x40\0\0\0([0-9a-f]{64})\0|\x46\0\0\0(scale_[0-9a-f]{64})\0")
"""A weight's name, and that of its scales, as a string of a FlatBuffer: the length, the letters, and a zero."""


def patch(program: bytes, names: Mapping[str, str]) -> bytes:
    """A program with other names in the place of some, wherever they occur: in its own tables, and in those of XNNPACK's graphs.

    Args:
        names: 64 hex digits, or those behind `scale_`, each by the name that it replaces, which is of the same kind.

    Raises:
        InvalidInput: a name is of another kind than the one that it replaces, or the program does not have one that shall be replaced.
    """
    wanted = {old.encode(): new.encode() for old, new in names.items()}
    for old, new in wanted.items():
        if not re.fullmatch(rb"(scale_)?[0-9a-f]{64}", new) or len(new) != len(old):
            raise InvalidInput(f"{new.decode()!r:.80} cannot stand for {old.decode()!r:.80} in a program")
    patched = bytearray(program)
    found = set()
    for match in _NAME.finditer(program):
        old = match[match.lastindex or 0]
        if old in wanted:
            patched[match.start(match.lastindex or 0) : match.end(match.lastindex or 0)] = wanted[old]
            found.add(old)
    if missing := wanted.keys() - found:
        raise InvalidInput(f"the program has no weight {min(missing).decode()}, and {len(missing) - 1} others")
    return bytes(patched)


def names(program: bytes) -> set[str]:
    """The names of weights that a program holds, of those that are made of their bytes."""
    return {match[match.lastindex or 0].decode() for match in _NAME.finditer(program)}
