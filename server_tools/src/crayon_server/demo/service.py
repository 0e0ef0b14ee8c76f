"""`crayon serve` in a process of its own, for as long as the demo needs it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from crayon_runtime.errors import BackendError
from crayon_server.demo.processes import ended

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START_SECONDS = 60.0


@contextmanager
def serving(pool: Path, keys: Path, log: Path, *, upstream: Path, cache: Path) -> Iterator[tuple[str, int]]:
    """Serve a pool on a free port of loopback, with adapters signed; the service ends with the block, whatever ends that.

    Args:
        log: the file for what it says.
        upstream: the server LLM, a Hugging Face folder.
        cache: the folder for its export and for finished adapters.

    Yields:
        Its host and port.

    Raises:
        BackendError: it does not start.
    """
    command = [sys.executable, "-m", "crayon_runtime", "serve", str(pool), "--port", "0", "--keys", str(keys)]
    command += ["--upstream", str(upstream), "--cache", str(cache)]
    with log.open("wb") as said, ended(subprocess.Popen(command, stdout=said, stderr=said)) as process:
        yield _address(process, log)


def _address(process: subprocess.Popen[bytes], log: Path) -> tuple[str, int]:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if found := re.search(r"http://([\d.]+):(\d+)", log.read_text(errors="replace")):
            return found[1], int(found[2])
        time.sleep(0.02)
    raise BackendError("the service did not start", where="crayon serve", do=log.read_text(errors="replace").strip())
