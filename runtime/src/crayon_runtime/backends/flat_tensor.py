"""The `.ptd` file, ExecuTorch's FlatTensor, written as a stream: no tensor is ever in memory whole.

A program finds a weight by its name, and those that XNNPACK computes with are named by the SHA-256 of their bytes, so the names are
known last although the file begins with them. They are as long as all others, so everything has its place beforehand. Only where two
weights turn out to be equal, which are stored once, is what follows moved up at the end.

The file is the one that `FlatTensorSerializer` of ExecuTorch 1.5 writes, byte for byte: a FlatBuffer of its flat_tensor.fbs,

    table TensorLayout { scalar_type: byte; sizes: [int32]; dim_order: [uint8]; }
    table DataSegment  { offset: uint64; size: uint64; }
    table NamedData    { key: string; segment_index: uint32; tensor_layout: TensorLayout; }
    table FlatTensor   { version: uint32; segments: [DataSegment]; named_data: [NamedData]; }
    root_type FlatTensor; file_identifier "FT01";

with a header of 40 bytes behind its first 8, then the segments.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

ALIGNMENT = 128
"""Of segments, in bytes."""

BY_HASH = "{sha256}"
"""In a name: the SHA-256 of the weight's own bytes."""

FLOAT32, INT8 = 6, 1
"""ExecuTorch's numbers for types."""

_NUMBER = re.compile(rb"0{48}[0-9a-f]{16}")
"""An entry's, in hexadecimal, where the SHA-256 of its bytes will be."""

_HEADER = struct.Struct("<4sIQQQQ8x")
_COPIED = 1 << 22


class Layout(NamedTuple):
    """What a weight is as a tensor, row by row."""

    scalar_type: int
    sizes: tuple[int, ...]


class Entry(NamedTuple):
    """A weight that a file will hold."""

    name: str
    """`BY_HASH` in it stands for the SHA-256 of its bytes."""
    nbytes: int
    layout: Layout | None = None
    """None: bytes that a backend knows how to read."""


class FlatTensorWriter:
    """A `.ptd` that is being written; the weights may come in any order, and several at a time in pieces.

    Args:
        file: empty, open for reading and writing. Nothing of it is mapped, so what is written does not count as memory of the process.
        entries: in the order in which the file shall hold them.
    """

    def __init__(self, file: BinaryIO, entries: Sequence[Entry]) -> None:
        self._fd = file.fileno()
        self._entries = entries
        self._digests = [hashlib.sha256() for _ in entries]
        self._written = [0] * len(entries)
        unhashed = [(entry.name.replace(BY_HASH, f"{i:064x}"), i, entry.layout) for i, entry in enumerate(entries)]
        self._header = _head([entry.nbytes for entry in entries], unhashed)
        self._offsets = _offsets([entry.nbytes for entry in entries])

    def write(self, index: int, data: ReadableBuffer) -> None:
        """The next bytes of a weight; a contiguous array is taken as it lies in memory.

        Args:
            index: into the entries.

        Raises:
            ValueError: it becomes longer than its entry says.
        """
        piece = memoryview(data).cast("B")
        if self._written[index] + len(piece) > self._entries[index].nbytes:
            raise ValueError(f"{self._entries[index].name} has more than its {self._entries[index].nbytes} bytes")
        self._digests[index].update(piece)
        write_at(self._fd, piece, len(self._header) + self._offsets[index] + self._written[index])
        self._written[index] += len(piece)

    def finish(self) -> list[str]:
        """Write what the file begins with, after all weights.

        Returns:
            The name of each entry. Equal names stand for equal bytes.

        Raises:
            ValueError: bytes of an entry are missing, or other bytes would have the same name.
        """
        for entry, written in zip(self._entries, self._written, strict=True):
            if written != entry.nbytes:
                raise ValueError(f"{entry.name} has {written} of its {entry.nbytes} bytes")
        hashes = [digest.hexdigest() for digest in self._digests]
        names = [entry.name.replace(BY_HASH, sha256) for entry, sha256 in zip(self._entries, hashes, strict=True)]
        kept: dict[str, int] = {}  # the first entry of each content
        named: dict[str, tuple[str, int, Layout | None]] = {}
        for i, (name, sha256) in enumerate(zip(names, hashes, strict=True)):
            kept.setdefault(sha256, i)
            if name in named and hashes[named[name][1]] != sha256:
                raise ValueError(f"two weights are called {name}")
            named.setdefault(name, (name, i, self._entries[i].layout))
        segments = {sha256: number for number, sha256 in enumerate(kept)}
        sizes = [self._entries[i].nbytes for i in kept.values()]
        offsets = _offsets(sizes)
        if len(sizes) == len(self._entries):
            head = _NUMBER.sub(lambda match: hashes[int(match[0], 16)].encode(), self._header)
        else:
            head = _head(sizes, [(name, segments[hashes[i]], layout) for name, i, layout in named.values()])
            self._move(list(kept.values()), [len(head) + offset for offset in offsets])
        write_at(self._fd, memoryview(head), 0)
        os.ftruncate(self._fd, len(head) + (offsets[-1] + sizes[-1] if sizes else 0))
        return names

    def _move(self, kept: Sequence[int], places: Sequence[int]) -> None:
        """Move segments towards the beginning, the first one first; what lay between them becomes zeros."""
        buffer = memoryview(bytearray(_COPIED))
        end = 0
        for i, place in zip(kept, places, strict=True):
            write_at(self._fd, memoryview(bytes(place - end)) if end else memoryview(b""), end)
            start, size = len(self._header) + self._offsets[i], self._entries[i].nbytes
            for done in range(0, size, _COPIED):
                piece = buffer[: min(_COPIED, size - done)]
                _read_at(self._fd, piece, start + done)
                write_at(self._fd, piece, place + done)
            end = place + size


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Where segments of these sizes begin, after the first one."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end + -end % ALIGNMENT)
        end = offsets[-1] + size
    return offsets


def _head(sizes: Sequence[int], named: Sequence[tuple[str, int, Layout | None]]) -> bytes:
    """All before the segments.

    Args:
        sizes: of the segments.
        named: names, each with the index of its segment.
    """
    table = _Tables()
    segments = []
    offsets = _offsets(sizes)
    for offset, size in zip(offsets, sizes, strict=True):
        segments.append(table.table([(0, "<Q", offset), (1, "<Q", size)]))
    at_segments = table.vector(segments)
    entries = []
    for name, segment, layout in named:
        key = table.string(name)
        shape = _layout(table, layout) if layout else 0
        entries.append(table.table([(0, None, key), (1, "<I", segment), (2, None, shape)]))
    at_named = table.vector(entries)
    flatbuffer = table.finish(table.table([(1, None, at_segments), (2, None, at_named)]), b"FT01")
    begin = 8 + _HEADER.size + len(flatbuffer) - 8
    begin += -begin % ALIGNMENT
    total = offsets[-1] + sizes[-1] if sizes else 0
    # The first offset counts from the beginning of the file, so it skips the header too.
    root = struct.unpack_from("<I", flatbuffer)[0] + _HEADER.size
    header = _HEADER.pack(b"FH01", 40, _HEADER.size, len(flatbuffer), begin, total)
    return (struct.pack("<I", root) + flatbuffer[4:8] + header + flatbuffer[8:]).ljust(begin, b"\0")


def _layout(table: _Tables, layout: Layout) -> int:
    sizes = table.scalars("i", layout.sizes)
    order = table.scalars("B", range(len(layout.sizes)))
    return table.table([(0, "<b", layout.scalar_type), (1, None, sizes), (2, None, order)])


class _Tables:
    """A FlatBuffer as the C++ `FlatBufferBuilder` lays it out: from its end to its beginning. Positions count from the end."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._alignment = 1
        self._vtables: dict[bytes, int] = {}

    def string(self, text: str) -> int:
        encoded = text.encode()
        self._align(4, len(encoded) + 1)
        self._push(encoded + b"\0")
        return self._push(struct.pack("<I", len(encoded)))

    def scalars(self, kind: str, values: Sequence[int]) -> int:
        packed = struct.pack(f"<{len(values)}{kind}", *values)
        self._align(4, len(packed))
        self._push(packed)
        return self._push(struct.pack("<I", len(values)))

    def vector(self, tables: Sequence[int]) -> int:
        self._align(4, 0)
        for table in reversed(tables):
            self._push(struct.pack("<I", self._size + 4 - table))
        return self._push(struct.pack("<I", len(tables)))

    def table(self, fields: Sequence[tuple[int, str | None, int]]) -> int:
        """A table of fields (number, struct format, value); None: the value is a position. What is 0 is left out.

        The larger come first in the table, and among those of one size the later ones.
        """
        start = self._size
        places: dict[int, int] = {}
        for width in (8, 4, 2, 1):
            for number, kind, value in reversed(fields):
                if value and struct.calcsize(kind or "<I") == width:
                    self._align(width, 0)
                    packed = struct.pack(kind, value) if kind else struct.pack("<I", self._size + 4 - value)
                    places[number] = self._push(packed)
        self._align(4, 0)
        here = self._size + 4
        slots = [here - places[number] if number in places else 0 for number in range(max(places, default=-1) + 1)]
        vtable = struct.pack(f"<{2 + len(slots)}H", 4 + 2 * len(slots), here - start, *slots)
        known = self._vtables.get(vtable)
        at = known or here + len(vtable)
        self._push(struct.pack("<i", at - here))
        if known is None:
            self._vtables[vtable] = self._push(vtable)
        return here

    def finish(self, root: int, identifier: bytes) -> bytes:
        self._align(self._alignment, 8)
        self._push(identifier)
        self._push(struct.pack("<I", self._size + 4 - root))
        return b"".join(reversed(self._pieces))

    def _align(self, to: int, then: int) -> None:
        """Pad until, `then` bytes further on, the size is a multiple of `to`."""
        self._alignment = max(self._alignment, to)
        self._push(bytes(-(self._size + then) % to))

    def _push(self, piece: bytes) -> int:
        self._pieces.append(piece)
        self._size += len(piece)
        return self._size


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write bytes at an offset of an open file, whose position stays."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _read_at(fd: int, into: memoryview, offset: int) -> None:
    while into:
        size = os.preadv(fd, [into], offset)
        if not size:
            raise OSError("a file became shorter while it was written")
        into, offset = into[size:], offset + size
