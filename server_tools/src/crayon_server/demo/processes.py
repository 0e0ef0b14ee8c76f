"""The demo's other processes: each ends with its block, whatever ends that."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from crayon_runtime.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterator

STOP_SECONDS = 10.0


@contextmanager
def running(module: str, job: msgspec.Struct, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module that reads a job from stdin; it ends with the block.

    Args:
        environment: variables in which its own differs from ours.

    Raises:
        BackendError: it has failed.
    """
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
        stdin.write(msgspec.json.encode(job))
        stdin.seek(0)
        command = [sys.executable, "-m", module]
        theirs = {**os.environ, **environment}
        popen = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, env=theirs)
        with ended(popen) as process:
            yield process
            if process.returncode:
                stderr.seek(0)
                said = stderr.read().decode(errors="replace").strip()
                raise BackendError(f"{module} ended with exit code {process.returncode}:\n{said}")


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """End a process with the block."""
    with process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
