"""Fetching files over HTTP from a server that may be broken, slow or hostile.

What is read is bounded by its caller, and every fetch has a deadline. Redirects are not followed, nothing is decompressed, no cookie is
kept. Where a connection is cut, the rest is fetched, if the server says by its ETag that the file is still the same.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from crayon_runtime._version import __version__
from crayon_runtime.errors import IntegrityError, PoolChanged, ServerError

if TYPE_CHECKING:
    import httpx

RETRIES = 4
"""How often a fetch is tried again without getting any further."""

BACK_OFF = 0.5
"""Seconds before the first retry; doubled before each further one."""

LONGEST_WAIT = 60.0
"""Seconds that a server may ask to wait."""

_LARGEST_ERROR = 4096
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


class Answer(NamedTuple):
    """What came of a fetch."""

    status: int
    """200, 304 (it is still the one that was known) or 404."""
    etag: str | None = None


class Connection:
    """To one server.

    Args:
        url: its address, to which paths are appended.
        api_key: sent as `Authorization: Bearer`.
        timeout: seconds without a byte after which a connection counts as cut.
        deadline: seconds that one fetch may take in all, retries included.
        direct: plain http without the proxies that the environment names; otherwise also its certificates are used.
    """

    def __init__(self, url: str, *, api_key: str | None, timeout: float, deadline: float, direct: bool) -> None:
        self.url = url
        self.sent_bytes = self.received_bytes = 0
        """Of the bodies of requests and answers, retries included."""
        self._headers = {"Accept-Encoding": "identity", "User-Agent": f"crayon-edge/{__version__}"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout, self._deadline, self._direct = timeout, deadline, direct
        self._client: httpx.Client | None = None
        self._socket: socket.socket | None = None
        self._expired = False
        self._answered = False

    def fetch(
        self,
        path: str,
        file: BinaryIO,
        largest: int,
        *,
        body: bytes | None = None,
        known: str | None = None,
        on_answer: Callable[[], object] = lambda: None,
        on_bytes: Callable[[int], object] = lambda _: None,
    ) -> Answer:
        """Fetch one file.

        Args:
            path: relative to the server's address.
            file: empty, open for reading and writing; what it holds is to be used only if the status is 200.
            largest: bytes; more is refused, whatever the server announces.
            body: JSON to post, which is the same however often it is posted; None: get.
            known: the ETag of what the caller has.
            on_answer: called when the answer begins to come.
            on_bytes: called with the number of bytes that came since the last call.

        Raises:
            PoolChanged: status 409.
            ServerError: the server cannot be reached, refuses, or did not get to the end within the deadline.
            IntegrityError: there is more than `largest`.
        """
        transfer = _Transfer(self, path, file, largest, body, known, on_answer, on_bytes)
        tries = furthest = 0
        with self._within_deadline() as remaining:
            while True:
                try:
                    answer = transfer.attempt()
                    if self._expired:  # where no length is announced, being cut looks like the end
                        raise _Cut("it was cut at the deadline")
                    return answer
                except _Cut as cut:
                    if self._expired:
                        raise ServerError(
                            f"the service did not get to the end within {self._deadline:g} s",
                            where=self.url,
                            do="try again when the network is better",
                        ) from None
                    got_further = transfer.resumable and file.tell() > furthest
                    furthest = max(furthest, file.tell())
                    tries = 0 if got_further else tries + 1
                    pause = cut.wait if cut.wait is not None else BACK_OFF * 2 ** max(tries - 1, 0)
                    if tries > RETRIES or not self._answered or pause > min(LONGEST_WAIT, remaining()):
                        raise ServerError(cut.problem, where=self.url, do=cut.do) from cut.__cause__
                    time.sleep(pause)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    @contextmanager
    def open(self, method: str, path: str, headers: dict[str, str], body: bytes | None) -> Iterator[httpx.Response]:
        """One request; its answer's body is still to be read. _Cut where the connection fails, also while it is read."""
        import httpx

        if self._client is None:
            timeout = httpx.Timeout(self._timeout, connect=min(self._timeout, 10.0))
            # Where nothing will be encrypted, reading certificates would be 0.1 s for nothing.
            self._client = httpx.Client(
                headers=self._headers, timeout=timeout, trust_env=not self._direct, verify=not self._direct
            )
        self.sent_bytes += len(body or b"")
        try:
            with self._client.stream(
                method, f"{self.url}/{path}", headers=headers, content=body, extensions={"trace": self._trace}
            ) as response:
                self._answered = True
                self._client.cookies.clear()
                yield response
        except httpx.TimeoutException as e:
            raise _Cut(f"the service did not answer for {self._timeout:g} s", do="try again later") from e
        except httpx.RequestError as e:
            do = "check the address and the network" if not self._answered else "try again later"
            raise _Cut(f"the connection failed: {e}", do=do) from e

    @contextmanager
    def _within_deadline(self) -> Iterator[Callable[[], float]]:
        """Cut the connection at the deadline, whatever it waits for. Yields how many seconds are left."""
        end = time.monotonic() + self._deadline
        self._expired = False
        timer = threading.Timer(self._deadline, self._cut)
        timer.daemon = True
        timer.start()
        try:
            yield lambda: end - time.monotonic()
        finally:
            timer.cancel()

    def _cut(self) -> None:
        self._expired = True
        if self._socket is not None:
            with suppress(OSError):  # not that of an SSLSocket, which pulls the encryption from under who reads
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """Called by httpx; remembers the socket in use."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
            if self._expired:
                self._cut()


class _Cut(Exception):
    """An attempt that failed in a way that another one may not."""

    def __init__(self, problem: str, *, wait: float | None = None, do: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.wait, self.do = problem, wait, do


class _Transfer:
    """One file on its way, over as many requests as it takes."""

    def __init__(
        self,
        connection: Connection,
        path: str,
        file: BinaryIO,
        largest: int,
        body: bytes | None,
        known: str | None,
        on_answer: Callable[[], object],
        on_bytes: Callable[[int], object],
    ) -> None:
        self._connection, self._path, self._file, self._largest = connection, path, file, largest
        self._body, self._known, self._on_answer, self._on_bytes = body, known, on_answer, on_bytes
        self._again: str | None = None
        """Where the same file can be got again."""
        self._etag: str | None = None

    @property
    def resumable(self) -> bool:
        return self._again is not None and self._etag is not None

    def attempt(self) -> Answer:
        """Fetch what is missing."""
        start = self._file.tell()
        if start and self.resumable:
            assert self._again is not None
            assert self._etag is not None
            method, path, body = "GET", self._again, None
            headers = {"Range": f"bytes={start}-", "If-Range": self._etag}
        else:
            self._start_over()
            method, path, body = "GET" if self._body is None else "POST", self._path, self._body
            headers = {"If-None-Match": self._known} if self._known else {}
            if body is not None:
                headers["Content-Type"] = "application/json"
        with self._connection.open(method, path, headers, body) as response:
            self._on_answer()
            return self._take(response, self._file.tell())

    def _start_over(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._again = self._path if self._body is None else None
        self._etag = None

    def _take(self, response: httpx.Response, start: int) -> Answer:
        status, headers = response.status_code, response.headers
        if start and status != 206 and status in (200, 404, 410, 412, 416):
            self._start_over()  # the server has no part of it, or another file now
            if status != 200:
                raise _Cut("the service does not have the rest of what it sent")
        if status in (304, 404) and not start and self._body is None:
            return Answer(status)
        if status == 206 and start:
            self._check_part(headers.get("content-range", ""), start, headers.get("etag"))
        elif status != 200:
            raise _refusal(response)
        else:
            self._etag = etag if (etag := headers.get("etag", "")).startswith('"') else None
            self._again = self._again or _name(headers.get("content-location", ""), self._path)
        if headers.get("content-encoding", "identity") != "identity":
            raise ServerError("the service sends what was not asked for: compressed data", where=self._connection.url)
        self._read(response)
        return Answer(200, headers.get("etag"))

    def _check_part(self, content_range: str, start: int, etag: str | None) -> None:
        if not content_range.startswith(f"bytes {start}-") or etag not in (None, self._etag):
            self._start_over()
            raise _Cut("the service sends another part than it was asked for")

    def _read(self, response: httpx.Response) -> None:
        announced = response.headers.get("content-length", "0")
        if not announced.isdecimal() or self._file.tell() + int(announced) > self._largest:
            raise self._too_large(announced)
        for chunk in response.iter_raw():  # of no given size, or what comes before a cut would be lost
            self._connection.received_bytes += len(chunk)
            if self._file.tell() + len(chunk) > self._largest:
                raise self._too_large("more")
            self._file.write(chunk)
            self._on_bytes(len(chunk))

    def _too_large(self, announced: str) -> IntegrityError:
        return IntegrityError(
            f"the service sends {announced[:20]} bytes; {self._largest} are the most that this can be",
            where=f"{self._connection.url}/{self._path}",
            do="do not use this service; it is broken or hostile",
        )


def _name(location: str, path: str) -> str | None:
    """A Content-Location, which must be below the path that was posted to, as a path relative to the server's address."""
    match = re.search(rf"(?:^|/)({re.escape(path)}/[0-9A-Za-z_-]{{1,128}})$", location)
    return match[1] if match else None


def _refusal(response: httpx.Response) -> Exception:
    """What to raise for a status."""
    status, where = response.status_code, str(response.url)
    what, do = _said(response)
    if status in _TRANSIENT:
        wait = retry_after(response.headers.get("retry-after"))
        later = "try again later" if wait is None else f"try again in {wait:.0f} s"
        return _Cut(f"the service cannot answer now: {what}", wait=wait, do=later)
    if status == 409:
        return PoolChanged(f"the service refuses: {what}", where=where, do=do or "customize again")
    if status in (401, 403):
        return ServerError(f"the service refuses: {what}", where=where, do="give the key of this service in a file")
    if status in (404, 405):
        return ServerError(f"there is no such service here: {what}", where=where, do="check the address")
    if response.is_redirect:
        to = plain(response.headers.get("location", "elsewhere"))
        return ServerError(f"the service redirects to {to}", where=where, do="give that address, if you trust it")
    return ServerError(f"the service refuses: {what}", where=where, do=do)


def _said(response: httpx.Response) -> tuple[str, str | None]:
    """What an error page says in the form of this project, or else the status."""
    body = b""
    for chunk in response.iter_raw():
        body += chunk
        if len(body) >= _LARGEST_ERROR:
            break
    try:
        error = json.loads(body[:_LARGEST_ERROR])["error"]
        what, do = error["what"], error["do"]
        return f"{plain(what)} ({response.status_code})", plain(do) if do else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"HTTP status {response.status_code}", None


def plain(text: str) -> str:
    """What a server says, short and without what would steer a terminal."""
    return "".join(c for c in str(text)[:300] if c.isprintable())


def retry_after(value: str | None) -> float | None:
    """Seconds, of either form of the header."""
    if value is None:
        return None
    if value.isdecimal():
        return float(value[:9])
    with suppress(ValueError, TypeError):
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    return None
