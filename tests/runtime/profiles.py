"""Profiles without a model: the fake backend in this process, and profiles whose samples are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from crayon_runtime.bundle import Bundle
from crayon_runtime.engine import Engine
from crayon_runtime.profile import Profile
from crayon_runtime.profile.jobs import Job
from crayon_runtime.profile.records import Header, Observation, Plan, TestName, merge
from crayon_runtime.profile.target import Local
from crayon_runtime.profile.worker import work
from tests.runtime import tiny

HEADER = Header(
    test_time="2026-01-01T00:00:00Z", crayon_version="0", versions={}, system="s", cpu_info="c", cores=[], memory_bytes=None,
    model_filename="m", model_name="m", model_type="llama int4", model_size=1, base_fingerprint="b" * 64, context_length=64,
    type_k="fp32", type_v="fp32", backends="fake", adapter=None, adapters=[], read_bytes=1000, kv_bytes=10, operations=2000,
    plan=Plan(prompts=[4], generate=4, depths=[0], threads=[None], repetitions=5),
)  # fmt: skip

METRICS: list[tuple[TestName, int, int, int]] = [
    ("prefill", 64, 0, 0), ("prefill", 512, 0, 0), ("decode", 0, 32, 0), ("decode", 0, 32, 1024), ("ttft", 64, 1, 0),
    ("ttft", 512, 1, 0), ("load_cold", 0, 0, 0), ("load_warm", 0, 0, 0), ("first_token", 1, 1, 0), ("control_read", 0, 0, 0),
]  # fmt: skip


def fake_engine(path: Path, job: Job) -> Engine:
    engine = tiny.engine(bundle=Bundle.open(path), context_length=256)
    engine.set_adapter(job.adapter)
    return engine


class InProcess(Local):
    """A target that is this process, with the fake backend."""

    name = "here"

    def __init__(self, load: Callable[[Path, Job], Engine] = fake_engine) -> None:
        super().__init__()
        self.jobs: list[Job] = []
        self._load = load

    def run(self, job: Job) -> Iterator[bytes]:
        self.jobs.append(job)
        for record in work(job, self._load):
            yield msgspec.json.encode(record)


def drawn(
    random: np.random.Generator,
    *,
    slower: float = 1.0,
    between: float = 0.015,
    within: float = 0.02,
    processes: int = 5,
) -> Profile:
    """A profile of `METRICS`: each process has a factor of its own, and each of its samples another. Now and then one is interrupted."""
    tests = []
    for number, (test, n_prompt, n_gen, n_depth) in enumerate(METRICS, 1):
        observations = []
        for process in range(processes):
            own = np.exp(random.normal(0, between))
            noise = np.exp(random.normal(0, within, 3)) * (1 + (random.random(3) < 0.1) * random.exponential(0.5, 3))
            factor = 1.0 if test == "control_read" else slower
            samples = (1e6 * number * factor * own * noise).astype(int).tolist()
            observations.append(
                (process, Observation(test=test, n_prompt=n_prompt, n_gen=n_gen, n_depth=n_depth, samples_ns=samples))
            )
        tests.append(
            merge(observations, backends="fake", n_threads=None, cpu_mask="0x0", bytes_per_second=None, read_bytes=1)
        )
    return Profile([HEADER, *tests])
