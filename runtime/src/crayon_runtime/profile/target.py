"""Where the measuring program runs.

A target is one method: it runs a job in a new process on its device and hands over the lines of JSON that come out. Everything else,
what is measured and what is made of it, is the same for all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from crayon_runtime import errors
from crayon_runtime.errors import BackendError, CrayonError
from crayon_runtime.profile.jobs import Job
from crayon_runtime.profile.records import Absent, Failure, Header, LongRun, Observation, Operator, Sample

Result = Header | Observation | Sample | LongRun | Operator | Absent

PROGRAM = (sys.executable, "-P", "-m", "crayon_runtime.profile.worker")

_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


class Target(Protocol):
    """A device."""

    name: str

    def run(self, job: Job) -> Iterator[bytes]:
        """Run the measuring program in a new process, and give its output line by line. Leaving early ends the process.

        Raises:
            BackendError: the process died.
        """


class Local:
    """This machine.

    Args:
        program: the measuring program.
    """

    name = "local"

    def __init__(self, program: Sequence[str] = PROGRAM) -> None:
        self._program = program

    def run(self, job: Job) -> Iterator[bytes]:
        environment = os.environ | (dict.fromkeys(_THREADS, str(job.threads)) if job.threads else {})
        with tempfile.TemporaryFile() as said:
            # In a session of its own: Ctrl-C is for us, and we end it.
            process = subprocess.Popen(
                self._program,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=environment,
                start_new_session=True,
            )
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(msgspec.json.encode(job))
                process.stdin.close()
                yield from process.stdout
                code = process.wait()
            finally:
                process.kill()
                process.wait()
                process.stdout.close()
            said.seek(0)
            message = said.read()[-2000:].decode(errors="replace").strip()
        if code:
            what = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise BackendError(
                f"the process that measured {what}{f': {message}' if message else ''}",
                where=job.bundle,
                do="look for want of memory: `free -m`, `dmesg`" if code == -9 else None,
            )


def results(target: Target, job: Job) -> Iterator[Result]:
    """What a job gives.

    Raises:
        CrayonError: the process says that it cannot be done, and why.
        BackendError: it died, or says something else.
    """
    decoder = msgspec.json.Decoder(Result | Failure)
    for line in target.run(job):
        try:
            result = decoder.decode(line)
        except msgspec.DecodeError as e:
            raise BackendError(f"the process that measured said {line[:200]!r}: {e}", where=target.name) from None
        if isinstance(result, Failure):
            kind = getattr(errors, result.error, CrayonError)
            raise kind(result.what, where=result.where, do=result.do)
        yield result
