"""The measuring program: a job as JSON on stdin, records as JSON lines on stdout. `python -m crayon_runtime.profile.worker`

It needs nothing but the installed runtime and the bundle, so that a target can run it anywhere. One process does one job: a process
computes on one number of threads, and what loading costs is seen in a new one only.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter_ns
from typing import BinaryIO

import msgspec

from crayon_runtime.backends import available
from crayon_runtime.bundle import Bundle
from crayon_runtime.customized import state_folder
from crayon_runtime.engine import Engine
from crayon_runtime.errors import CrayonError
from crayon_runtime.profile.describe import describe, read_bytes
from crayon_runtime.profile.jobs import Describe, Job, Load, Long, Measure, Trace
from crayon_runtime.profile.measure import Watch, controls, files_of, long_run, measure
from crayon_runtime.profile.memory import KEPT, drop_page_cache
from crayon_runtime.profile.operators import trace
from crayon_runtime.profile.records import Absent, Failure, Observation, Record, TestName
from crayon_runtime.profile.sensors import Sensors

LoadEngine = Callable[[Path, Job], Engine]


def load_engine(path: Path, job: Job) -> Engine:
    """What a job measures."""
    return Engine.load(path, backend=job.backend, threads=job.threads, adapter=job.adapter)


def work(job: Job, load: LoadEngine = load_engine) -> Iterator[Record]:
    """Do a job.

    Args:
        load: makes the engine.

    Raises:
        CrayonError: it cannot be done.
    """
    cpus = job.cpus or sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus)
    sensors = Sensors(cpus)
    path = Path(job.bundle)
    match job.work:
        case Describe():
            with load(path, job) as engine:
                yield describe(engine, Bundle.open(path), sensors)
            yield from sensors.absent()
        case Load() as asked:
            yield _load(path, job, asked, load)
        case Measure() as asked:
            yield from _measure(path, job, asked, sensors, load)
        case Trace() as asked:
            with tempfile.TemporaryDirectory() as folder:
                yield from trace(Bundle.open(path), job, asked, Path(folder))
        case Long(seconds=seconds):
            watch = Watch(sensors, Bundle.open(path).path, job.process)
            with load(path, job) as engine:
                yield from long_run(engine, seconds, watch)


def main(stdin: BinaryIO, stdout: BinaryIO, load: LoadEngine = load_engine) -> int:
    """Do the job on `stdin`; an error that a user can do something about is a record too."""
    try:
        job = msgspec.json.decode(stdin.read(), type=Job)
        for record in work(job, load):
            stdout.write(msgspec.json.encode(record) + b"\n")
            stdout.flush()
    except CrayonError as e:
        failure = Failure(error=type(e).__name__, what=e.what, where=e.where, do=e.do)
        stdout.write(msgspec.json.encode(failure) + b"\n")
        return 1
    return 0


def _load(path: Path, job: Job, asked: Load, load: LoadEngine) -> Observation | Absent:
    test: TestName = "load_first" if asked.first else "load_cold"
    _import_libraries(path)
    files = files_of(Bundle.open(path))
    try:
        kept = drop_page_cache(files)
    except (OSError, AttributeError) as e:
        return Absent(what=test, reason=f"the page cache cannot be dropped here: {e}")
    if kept > KEPT * sum(file.stat().st_size for file in files):
        return Absent(
            what=test,
            reason=f"the system keeps {kept} bytes of the bundle in its page cache: another process has them mapped, "
            "or they are on a file system in memory",
        )
    began = perf_counter_ns()
    if asked.first:
        Bundle.open(path, verify=True)
    with load(path, job):
        return Observation(test=test, samples_ns=[perf_counter_ns() - began])


def _measure(path: Path, job: Job, asked: Measure, sensors: Sensors, load: LoadEngine) -> Iterator[Record]:
    _import_libraries(path)
    bundle = Bundle.open(path)
    watch = Watch(sensors, bundle.path, job.process)
    yield watch.sample("started")
    for file in files_of(bundle):
        _read_through(file)
    began = perf_counter_ns()
    with load(path, job) as engine:
        yield Observation(test="load_warm", samples_ns=[perf_counter_ns() - began])
        yield from measure(engine, asked, watch, state_folder(path))
    yield from controls(read_bytes(bundle.model), job.threads, asked.rounds)


def _read_through(file: Path) -> None:
    """Into the page cache, and not into memory."""
    buffer = bytearray(1 << 20)
    with file.open("rb", buffering=0) as content:
        while content.readinto(buffer):
            pass


def _import_libraries(path: Path) -> None:
    """Of the backends, so that loading them is not taken for loading the model."""
    if "onnx" in available(Bundle.open(path)):
        import onnxruntime  # noqa: F401


if __name__ == "__main__":
    sys.exit(main(sys.stdin.buffer, sys.stdout.buffer))
