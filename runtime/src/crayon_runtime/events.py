"""Server-sent events, taken apart as their bytes come, with a bound on what is kept of one."""

from __future__ import annotations

import re

LARGEST_EVENT = 1 << 20
"""Bytes."""

_LINE_END = re.compile(rb"\r\n|\n|\r(?=[^\n])")  # a \r at the end may be half of a \r\n that is still to come


class EventTooLarge(Exception):
    """An event is larger than `LARGEST_EVENT`."""


class EventReader:
    """Finds the events in a stream. Of an event only its data counts; comments and other fields are left out."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._searched = 0
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of each event that ends in these bytes; several lines of data become one, with spaces between them.

        Raises:
            EventTooLarge: an event does not end soon enough.
        """
        self._rest += chunk
        found, start = [], 0
        for end in _LINE_END.finditer(self._rest, self._searched):
            data = self._take(bytes(self._rest[start : end.start()]))
            start = end.end()
            if data is not None:
                found.append(data)
        del self._rest[:start]
        self._searched = max(len(self._rest) - 1, 0)
        if self._size + len(self._rest) > LARGEST_EVENT:
            raise EventTooLarge
        return found

    def _take(self, line: bytes) -> bytes | None:
        """The data of the event that this line ends."""
        if not line:
            data, self._data, self._size = self._data, [], 0
            return b" ".join(data) if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._size += len(line)
        return None
