"""What was sent to a server, kept on the device for its user to read.

    BUNDLE.sent.jsonl        two lines a query: what is sent, written before it is; and what came of it
    BUNDLE.sent.jsonl.old    the ones before, when that had grown to 10 MiB

Where the first line cannot be written, nothing is sent. So what was sent is in it even if the device went down right after.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from msgspec import UNSET, Struct, UnsetType

from crayon_runtime.errors import InvalidInput, OutputError

LARGEST = 10 << 20
"""Bytes at which a new file is begun."""

NOT_KNOWN = "not known"
"""The outcome of a query whose second line is missing: the program has ended before, or is not done."""


class Sent(Struct, frozen=True, kw_only=True):
    """One query that was sent."""

    time: str
    """ISO 8601, UTC."""
    server: str
    query: str
    """As it was sent: after redaction."""
    bytes: int
    """Of the requests."""
    outcome: str = NOT_KNOWN
    """"answered", or why not."""
    seconds: float | None = None
    """From the request to the end of the answer."""


class SentLog:
    """The log of one bundle. Any number of programs may write to it at once.

    Args:
        path: of the file; it is made when something is sent, for its owner alone to read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def sending(self, server: str, query: str, size: int) -> str:
        """Write down what is about to be sent.

        Args:
            server: its address.
            query: as it will be sent.
            size: bytes of the request.

        Returns:
            A name for this entry, for `ended`.

        Raises:
            OutputError: it cannot be written, so nothing must be sent.
            InvalidInput: the query is no text in Unicode.
        """
        name = os.urandom(8).hex()
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._append(_Line(id=name, time=now, server=server, query=query, bytes=size))
        return name

    def ended(self, name: str, outcome: str, *, size: int, seconds: float) -> None:
        """Write down what came of it. Where that cannot be written, it stays `NOT_KNOWN`.

        Args:
            name: of the entry.
            outcome: "answered", or why not.
            size: bytes of requests that did leave the device.
            seconds: what it took.
        """
        with suppress(OutputError):
            self._append(_Line(id=name, outcome=outcome, bytes=size, seconds=round(seconds, 3)))

    def read(self) -> list[Sent]:
        """What was sent, the oldest first. A line that is damaged is left out.

        Raises:
            InvalidInput: the file is there, but cannot be read.
        """
        entries: dict[str, _Line] = {}
        for path in (self._older, self.path):
            for line in _lines(path):
                known = entries.get(line.id)
                if known is None:
                    entries[line.id] = line
                else:
                    entries[line.id] = msgspec.structs.replace(
                        known, outcome=line.outcome, bytes=line.bytes, seconds=line.seconds
                    )
        sent = []
        for entry in entries.values():
            with suppress(msgspec.ValidationError):  # its first line is gone
                sent.append(msgspec.convert(msgspec.to_builtins(entry), Sent))
        return sent

    @property
    def _older(self) -> Path:
        return self.path.with_name(f"{self.path.name}.old")

    def _append(self, line: _Line) -> None:
        try:
            content = msgspec.json.encode(line) + b"\n"
        except UnicodeEncodeError:
            raise InvalidInput("the query is no text in Unicode", where="query") from None
        with self._output_errors(), self._locked(len(content)) as fd:
            end = os.fstat(fd).st_size
            if end and os.pread(fd, 1, end - 1) != b"\n":  # what a device that went down left half-written
                content = b"\n" + content
            try:
                if os.write(fd, content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    os.ftruncate(fd, end)
                raise

    @contextmanager
    def _locked(self, size: int) -> Iterator[int]:
        """The file to append so many bytes to, which nobody else appends to meanwhile."""
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(fd, fcntl.LOCK_EX)
                found = os.fstat(fd)
                if not self._is(found):
                    continue  # somebody else began a new one
                if found.st_size and found.st_size + size > LARGEST:
                    self.path.rename(self._older)
                    continue
                if stat.S_ISREG(found.st_mode):
                    os.fchmod(fd, 0o600)
                yield fd
                return
            finally:
                os.close(fd)

    def _is(self, found: os.stat_result) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(self.path.lstat(), found)
        return False

    @contextmanager
    def _output_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            full = e.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if full else f"the log of what is sent cannot be written: {e.strerror or e}"
            do = "free some space" if full else "make it a file that you may write to"
            raise OutputError(what, where=self.path, do=f"{do}; nothing is sent without it") from e


def sent_log_path(bundle: str | os.PathLike[str]) -> Path:
    """BUNDLE.sent.jsonl, beside the bundle."""
    path = Path(bundle).absolute()
    return path.with_name(f"{path.name}.sent.jsonl")


class _Line(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The first line of an entry has the query, the second one the outcome."""

    id: str
    time: str | UnsetType = UNSET
    server: str | UnsetType = UNSET
    query: str | UnsetType = UNSET
    bytes: int
    outcome: str | UnsetType = UNSET
    seconds: float | UnsetType = UNSET


def _lines(path: Path) -> Iterator[_Line]:
    try:
        with path.open("rb") as file:
            for line in file:
                with suppress(ValueError, RecursionError):
                    yield msgspec.json.decode(line, type=_Line)
    except FileNotFoundError:
        return
    except OSError as e:
        raise InvalidInput(f"it cannot be read: {e.strerror or e}", where=path) from None
