"""Where the measuring program runs.

A target is a device that is held for one profile, and then runs jobs: each in a new process, whose lines of JSON it hands over.
Everything else, what is measured and what is made of it, is the same for all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import msgspec

from crayon_runtime import errors
from crayon_runtime.errors import BackendError, CrayonError
from crayon_runtime.profile.jobs import Job
from crayon_runtime.profile.lock import one_at_a_time
from crayon_runtime.profile.records import Absent, Failure, Header, LongRun, Observation, Operator, Sample

Result = Header | Observation | Sample | LongRun | Operator | Absent

MODULE = "crayon_runtime.profile.worker"
PROGRAM = (sys.executable, "-P", "-m", MODULE)

_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


OnStep = Callable[[str], None]


class Asked(NamedTuple):
    """What all jobs of a profile have in common."""

    bundle: str
    backend: str
    adapter: str | None
    """The name of one inside the bundle, or a path."""


class Target(Protocol):
    """A device."""

    name: str

    def hold(self, asked: Asked, on_step: OnStep) -> AbstractContextManager[Asked]:
        """Have the device to oneself, and on it what the jobs need.

        Args:
            asked: with paths of this machine.
            on_step: is told what takes a while.

        Returns:
            The same, with paths of the device.

        Raises:
            DeviceError: it cannot be reached, or lacks something.
            BackendError: somebody else profiles on it, or the bundle has nothing that it can run.
            BundleError, AdapterError: there is no such bundle or adapter.
        """

    def run(self, job: Job) -> Iterator[bytes]:
        """Run the measuring program in a new process, and give its output line by line. Leaving early ends the process.

        Raises:
            BackendError: the process died. DeviceError: the device was lost.
        """


class Local:
    """This machine.

    Args:
        program: the measuring program.
    """

    name = "local"

    def __init__(self, program: Sequence[str] = PROGRAM) -> None:
        self._program = program

    @contextmanager
    def hold(self, asked: Asked, on_step: OnStep) -> Iterator[Asked]:  # noqa: ARG002, nothing here takes a while
        with one_at_a_time():
            yield asked

    def run(self, job: Job) -> Iterator[bytes]:
        environment = os.environ | environment_of(job)
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
        check_end(code, message, job)


def environment_of(job: Job) -> dict[str, str]:
    """What the libraries of its process look at before any code of ours runs."""
    return dict.fromkeys(_THREADS, str(job.threads)) if job.threads else {}


def check_end(code: int, message: str, job: Job) -> None:
    """BackendError if the measuring program ended with another code than 0; one below it is the signal that killed it."""
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
            raise error_of(result)
        yield result


def error_of(failure: Failure) -> CrayonError:
    """What another process could not do, as the error that it would be here."""
    kind = getattr(errors, failure.error, None)
    if not (isinstance(kind, type) and issubclass(kind, CrayonError)) or kind is errors.MissingExtra:
        kind = CrayonError  # of another version, or one that is made of other parts
    return kind(failure.what, where=failure.where, do=failure.do)
