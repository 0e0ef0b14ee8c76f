"""A model of this machine as the server LLM: a process of its own that serves it, for as long as a block runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from crayon_runtime.errors import BackendError, InvalidInput, MissingExtra

STOP_SECONDS = 15.0
LONGEST_PAUSE = 60.0
"""Seconds before a process that ended is started again: at first none, then one, doubled each time until it has run for so long."""

_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")

_log = logging.getLogger("crayon.service")


class Local(NamedTuple):
    """Where a model is served."""

    url: str
    api_key: str


@contextmanager
def serving(bundle: Path, *, waiting: int) -> Iterator[Local]:
    """Serve a bundle on a free port of loopback. The process is started again if it ends, and ends with this one, however that ends.

    Args:
        waiting: how many requests may wait while one is answered.

    Raises:
        BackendError: it does not start.
    """
    child = _Child(bundle, waiting)
    try:
        yield child.started()
    finally:
        child.stop()


def as_bundle(place: Path, cache: Path, *, on_bytes: Callable[[int], None] | None = None) -> Path:
    """A bundle as it is, or a Hugging Face folder exported in float, once for each state of its files.

    Args:
        cache: the folder where exports are kept; of each model the last one.
        on_bytes: told the bytes of float32 weight that were handled.

    Raises:
        InvalidInput: there is neither.
        MissingExtra: what exports is not installed.
        CrayonError: the folder cannot be exported.
    """
    if place.is_file() or (place / "manifest.json").is_file():
        return place
    if not (place / "config.json").is_file():
        raise InvalidInput(
            "there is no model here",
            where=place,
            do="give the address of an OpenAI-compatible endpoint, a bundle, or a Hugging Face folder",
        )
    try:
        from crayon_export.exporter import export
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("crayon_"):
            raise
        raise MissingExtra("export", "serving a Hugging Face folder") from e
    of_model = cache / hashlib.sha256(os.fsencode(place.resolve())).hexdigest()[:16]
    target = of_model / _state(place)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        export(place, target, replace=True, quantize="none", on_bytes=on_bytes)
        for other in of_model.iterdir():
            if other != target and not other.name.startswith("."):  # who serves it has it open
                shutil.rmtree(other, ignore_errors=True)
    return target


def _state(folder: Path) -> str:
    """What changes with the files of a folder."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    facts = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


class _Child:
    """The process, and a thread that reads what it says and starts it again."""

    def __init__(self, bundle: Path, waiting: int) -> None:
        self._bundle, self._waiting = bundle, waiting
        self._key = secrets.token_hex(32)
        self._port = 0
        self._said: deque[str] = deque(maxlen=20)
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._starting = threading.Lock()
        self._process = self._start()
        self._thread = threading.Thread(target=self._keep, name="crayon-upstream", daemon=True)
        self._thread.start()

    def started(self) -> Local:
        """Wait until it listens."""
        self._ready.wait()
        if not self._port:
            raise BackendError("the server LLM does not start", where=self._bundle, do="".join(self._said).strip())
        return Local(f"http://127.0.0.1:{self._port}", self._key)

    def stop(self) -> None:
        with self._starting:
            self._stopping.set()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._thread.join()

    def _start(self) -> subprocess.Popen[str]:
        read, write = os.pipe()  # the key is in no file and on no command line
        os.write(write, self._key.encode())
        os.close(write)
        command = [sys.executable, "-m", "crayon_server.upstream.child", str(self._bundle)]
        command += ["--serve", f"127.0.0.1:{self._port}", "--api-key-file", f"/dev/fd/{read}"]
        command += ["--waiting", str(self._waiting)]
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                pass_fds=[read],
                process_group=0,  # Ctrl-C is for this process, which ends it
            )
        finally:
            os.close(read)

    def _keep(self) -> None:
        """Read what it says until it ends; then start it again, on the same port."""
        pause = 0.0
        while True:
            started = time.monotonic()
            with self._process as process:
                self._listen(process)
            if self._stopping.is_set() or not self._port:
                self._ready.set()
                return
            if time.monotonic() - started > LONGEST_PAUSE:
                pause = 0.0
            _log.warning("the server LLM ended with status %d; it is started again", process.returncode)
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause or 1.0, LONGEST_PAUSE)
            with self._starting:
                if self._stopping.is_set():
                    return
                self._process = self._start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if found := _ADDRESS.search(line):
                self._port = int(found[1])
                self._ready.set()
            elif not line.startswith("{"):  # the log of requests, which the service has too
                self._said.append(line)
                if self._ready.is_set():
                    _log.warning("the server LLM: %s", line.rstrip())
