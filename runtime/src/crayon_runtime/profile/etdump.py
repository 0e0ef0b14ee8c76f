"""An ETDump, ExecuTorch's trace, read without torch: the time of each operator of each step.

A FlatBuffer of etdump_schema_flatcc.fbs of ExecuTorch 1.5, of which this is read:

    table ProfileEvent { name: string; chain_index: int; instruction_id: int; delegate_debug_id_int: int; delegate_debug_id_str: string;
                         delegate_debug_metadata: [ubyte]; start_time: ulong; end_time: ulong; }
    table Event        { profile_event: ProfileEvent; … }
    table RunData      { name: string; bundled_input_index: int; allocators: [Allocator]; events: [Event]; }
    table ETDump       { version: ulong; run_data: [RunData]; }
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_SIZE = 4
"""Bytes of the size in front of the buffer, from whose end offsets count."""


class Event(NamedTuple):
    """An operator that ran."""

    name: str
    instruction: int
    """Its place in the program."""
    delegated: bool
    """Whether it is a part of what a delegate computes in one instruction."""
    start: int
    end: int
    """Of the instruction, in the device's ticks. A delegate's own events may count in another clock."""


def read_etdump(content: bytes) -> list[list[Event]]:
    """The events of each step.

    Raises:
        ValueError: it is no ETDump.
    """
    if content[8:12] != b"ED00" or _u32(content, 0) != len(content) - _SIZE:
        raise ValueError("this is no ETDump, or not a whole one")
    try:
        root = _Table(content, _SIZE + _u32(content, _SIZE))
        return [[event for event in _events(run) if event] for run in root.tables(1)]
    except (struct.error, UnicodeDecodeError, IndexError) as e:
        raise ValueError(f"the ETDump is damaged: {e}") from None


def _events(run: _Table) -> Iterator[Event | None]:
    for event in run.tables(3):
        profiled = event.table(0)
        if profiled is None:
            yield None
            continue
        name, delegate = profiled.text(0), profiled.text(4)
        yield Event(
            name=name or delegate,
            instruction=profiled.number(2, "<i", -1),
            delegated=bool(delegate) or profiled.number(3, "<i", -1) >= 0,
            start=profiled.number(6, "<Q", 0),
            end=profiled.number(7, "<Q", 0),
        )


class _Table:
    """A table of a FlatBuffer: its fields are found through its vtable."""

    def __init__(self, content: bytes, at: int) -> None:
        self._content = content
        self._at = at
        self._vtable = at - struct.unpack_from("<i", content, at)[0]
        self._fields = (struct.unpack_from("<H", content, self._vtable)[0] - 4) // 2

    def number(self, field: int, form: str, default: int) -> int:
        place = self._place(field)
        return default if place is None else int(struct.unpack_from(form, self._content, place)[0])

    def text(self, field: int) -> str:
        place = self._place(field)
        if place is None:
            return ""
        start = place + _u32(self._content, place)
        return self._content[start + 4 : start + 4 + _u32(self._content, start)].decode()

    def table(self, field: int) -> _Table | None:
        place = self._place(field)
        return None if place is None else _Table(self._content, place + _u32(self._content, place))

    def tables(self, field: int) -> Iterator[_Table]:
        place = self._place(field)
        if place is None:
            return
        start = place + _u32(self._content, place)
        for i in range(_u32(self._content, start)):
            entry = start + 4 + 4 * i
            yield _Table(self._content, entry + _u32(self._content, entry))

    def _place(self, field: int) -> int | None:
        if field >= self._fields:
            return None
        offset = struct.unpack_from("<H", self._content, self._vtable + 4 + 2 * field)[0]
        return self._at + offset if offset else None


def _u32(content: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", content, at)[0])
