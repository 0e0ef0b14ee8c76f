"""Profiling a bundle, from top to bottom.

    profile      checks what is asked for, holds the device, writes the folder when everything is there
    _Run         one job after the other: describe, load, measure, trace, the long run
    Target       runs each in a new process

Configurations, which are numbers of threads and sets of cores, take turns within each repetition, so that a machine that slows down does
so for all of them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec

from crayon_runtime.backends import NAMES
from crayon_runtime.errors import BackendError, ContextOverflow, InvalidInput, OutputError
from crayon_runtime.files import atomic_directory
from crayon_runtime.profile.document import Profile
from crayon_runtime.profile.jobs import AnyWork, Describe, Job, Load, Long, Measure, Trace
from crayon_runtime.profile.operators import by_kind
from crayon_runtime.profile.records import (
    Absent,
    Header,
    Line,
    Observation,
    Operator,
    Plan,
    Test,
    merge,
)
from crayon_runtime.profile.sensors import clusters
from crayon_runtime.profile.target import Asked, Local, OnStep, Result, Target, results
from crayon_runtime.sampling import is_integer

PROMPTS, DEPTHS, GENERATE = (64, 512), (0, 1024), 32
"""What is measured where nothing else is asked for, as far as the context reaches."""

TRACED = 16
"""Tokens whose operators are traced."""


class Configuration(NamedTuple):
    """What a process computes on."""

    threads: int | None
    cpus: tuple[int, ...] | None
    """None: all."""

    @property
    def mask(self) -> str:
        """As llama-bench writes it."""
        return hex(sum(1 << cpu for cpu in self.cpus or ()))


def profile(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backend: str = "auto",
    adapter: str | None = None,
    prompts: Sequence[int] | None = None,
    generate: int = GENERATE,
    depths: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    repetitions: int = 5,
    long_seconds: float = 0.0,
    replace: bool = False,
    target: Target | None = None,
    on_step: OnStep = lambda _: None,
) -> Profile:
    """Measure a bundle, and write the profile to a folder that appears when it is whole.

    Args:
        bundle: its folder or archive, here; a target elsewhere gets it.
        out: the new folder.
        backend: as `Engine.load`; "auto" is decided once.
        adapter: compute everything with it: the name of one inside the bundle, or a path.
        prompts: tokens of each prefill; None: `PROMPTS`.
        generate: tokens of each decode.
        depths: positions where decodes begin; None: `DEPTHS`.
        threads: numbers of cores to compute on; None: what the backend chooses.
        repetitions: processes that measure everything anew.
        long_seconds: of a run at the end, for heat, throttling and energy; 0: none.
        replace: an existing folder is replaced at the end.
        target: the device; None: this machine.
        on_step: is told what is done next.

    Raises:
        InvalidInput: a number is out of range; ContextOverflow: sizes beyond the model's context.
        BundleError, BackendError, AdapterError: as `Engine.load`; BackendError also if another profile is being made.
        DeviceError: the target cannot be reached, was lost, or lacks something.
        OutputError: the folder exists, or cannot be written.
    """
    target = target or Local()
    _check(backend, prompts, generate, depths, threads, repetitions, long_seconds)
    if not replace and os.path.lexists(out):
        raise OutputError(
            "the target exists already",
            where=out,
            do="choose another path, or replace it with --force (in Python, replace=True)",
        )
    wanted = Asked(str(Path(bundle).absolute()), backend, adapter)
    with atomic_directory(Path(out), replace=replace) as folder, target.hold(wanted, on_step) as asked:
        run = _Run(target, asked, on_step)
        header = run.describe()
        plan = Plan(
            prompts=_sizes(prompts, PROMPTS, "prompt", header.context_length, 0, run.lines),
            generate=generate,
            depths=_sizes(depths, DEPTHS, "depth", header.context_length, generate, run.lines),
            threads=list(threads) if threads else [None],
            repetitions=repetitions,
            long_seconds=long_seconds,
        )
        run.everything(plan, header)
        made = Profile([msgspec.structs.replace(header, plan=plan, target=target.name), *run.lines])
        made.write(folder)
    return made


class _Run:
    """What has been measured so far."""

    def __init__(self, target: Target, asked: Asked, on_step: OnStep) -> None:
        self._target = target
        self._asked = asked
        self._on_step = on_step
        self.lines: list[Line] = []

    def describe(self) -> Header:
        """What there is, and the backend that measures everything from here on."""
        self._on_step("what is measured")
        found: list[Header] = []
        for result in self._results(Configuration(None, None), Describe()):
            if isinstance(result, Header):
                found.append(result)
            elif isinstance(result, Absent):
                self.lines.append(result)
        if not found:
            raise BackendError("the process that measures did not say what it has loaded", where=self._target.name)
        self._asked = self._asked._replace(backend=found[0].backends)
        return found[0]

    def everything(self, plan: Plan, header: Header) -> None:
        """Repetition by repetition, then what is known after one look."""
        configurations = self._configurations(plan, header)
        first = configurations[0]
        seen: dict[Configuration, list[tuple[int, Observation]]] = {c: [] for c in configurations}
        for repetition in range(plan.repetitions):
            self._on_step(f"repetition {repetition + 1} of {plan.repetitions}")
            for load in (Load(first=True), Load(first=False)):
                seen[first] += self._observed(first, load, repetition)
            for configuration in configurations:
                work = Measure(
                    prompts=plan.prompts,
                    depths=plan.depths,
                    generate=plan.generate,
                    rounds=plan.rounds,
                    more=configuration == first,
                )
                seen[configuration] += self._observed(configuration, work, repetition)
        for configuration, observations in seen.items():
            self.lines += tests_of(observations, configuration, header)
        self._operators(first, plan, header)
        if plan.long_seconds:
            self._on_step(f"the long run, {plan.long_seconds:g} s")
            self._observed(first, Long(seconds=plan.long_seconds), plan.repetitions)
        else:
            self._lack("throttling, heat and energy of a long run", "none was asked for: --long SECONDS")

    def _configurations(self, plan: Plan, header: Header) -> list[Configuration]:
        found = [Configuration(threads, None) for threads in plan.threads]
        groups = clusters(header.cores)
        if len(groups) > 1:
            return found + [Configuration(len(group), tuple(group)) for group in groups]
        known = any(core.capacity is not None or core.max_hz is not None for core in header.cores)
        self._lack(
            "sweep over kinds of cores",
            "all cores are alike" if known else "the system says neither capacity nor highest frequency of its cores",
        )
        return found

    def _operators(self, configuration: Configuration, plan: Plan, header: Header) -> None:
        self._on_step("operators")
        depth = min(plan.depths)
        work = Trace(depth=depth, generate=max(1, min(TRACED, header.context_length - depth - 1)))
        try:
            self._observed(configuration, work, plan.repetitions)
        except BackendError as e:
            self._lack("operators", e.what)
        operators = [line for line in self.lines if isinstance(line, Operator)]
        self.lines += by_kind(operators)
        if operators and all(operator.module is None for operator in operators):
            self._lack(
                "modules of operators", "the trace names no modules, and the order of its layers is not a known one"
            )

    def _observed(self, configuration: Configuration, work: AnyWork, process: int) -> list[tuple[int, Observation]]:
        """Run a job; everything but observations is a line of the profile."""
        observations = []
        for result in self._results(configuration, work, process):
            if isinstance(result, Observation):
                observations.append((process, result))
            elif isinstance(result, Absent):
                self._lack(result.what, result.reason)
            else:
                self.lines.append(result)
        return observations

    def _lack(self, what: str, reason: str) -> None:
        absent = Absent(what=what, reason=reason)
        if absent not in self.lines:  # every process says so
            self.lines.append(absent)

    def _results(self, configuration: Configuration, work: AnyWork, process: int = 0) -> Iterator[Result]:
        job = Job(
            **self._asked._asdict(),
            threads=configuration.threads,
            cpus=None if configuration.cpus is None else list(configuration.cpus),
            process=process,
            work=work,
        )
        return results(self._target, job)


def tests_of(
    observations: Sequence[tuple[int, Observation]], configuration: Configuration, header: Header
) -> list[Test]:
    """All that was seen of each test, together."""
    grouped: dict[tuple[object, ...], list[tuple[int, Observation]]] = defaultdict(list)
    for process, seen in observations:
        grouped[seen.test, seen.n_prompt, seen.n_gen, seen.n_depth, seen.adapter].append((process, seen))
    reads = [(o.nbytes * 1e9 / ns) for _, o in observations if o.test == "control_read" for ns in o.samples_ns]
    return [
        merge(
            group,
            backends=header.backends,
            n_threads=configuration.threads,
            cpu_mask=configuration.mask,
            bytes_per_second=median(reads) if reads else None,
            read_bytes=header.read_bytes + header.kv_bytes * group[0][1].n_depth,
        )
        for group in grouped.values()
    ]


def _sizes(
    asked: Sequence[int] | None, usual: Sequence[int], name: str, context: int, more: int, lines: list[Line]
) -> list[int]:
    """Those that the context has room for: all that were asked for, or of the usual ones as many as there are."""
    wanted = usual if asked is None else asked
    beyond = [size for size in wanted if size + more > context]
    if beyond and asked is not None:
        raise ContextOverflow(
            f"--{name} {beyond[0]}{f' and {more} tokens after it' if more else ''}: the context holds {context}",
            where=name,
            do="measure less, or export the model with a longer --context-length",
        )
    lines += [Absent(what=f"{name} {size}", reason=f"the context holds {context}") for size in beyond]
    fitting = [size for size in wanted if size not in beyond]
    if not fitting:
        raise ContextOverflow(
            f"none of the usual sizes fits: the context holds {context}", where=name, do=f"choose some with --{name}"
        )
    return list(dict.fromkeys(fitting))


def _check(
    backend: str,
    prompts: Sequence[int] | None,
    generate: int,
    depths: Sequence[int] | None,
    threads: Sequence[int] | None,
    repetitions: int,
    long_seconds: float,
) -> None:
    if backend not in ("auto", *NAMES):
        raise BackendError(f"there is no backend {backend!r}", do=f"use one of: auto, {', '.join(NAMES)}")
    for name, values, least in (
        ("prompt", prompts, 1),
        ("generate", [generate], 2),
        ("depth", depths, 0),
        ("threads", threads, 1),
        ("repetitions", [repetitions], 1),
    ):
        for value in values if values is not None else ():
            if not is_integer(value) or value < least:
                raise InvalidInput(f"{name} is {value!r}; it must be a whole number from {least}", where=name)
        if values is not None and not values:
            raise InvalidInput("there is nothing to measure", where=name, do="give at least one number")
    if not 0 <= long_seconds < 86_400:
        raise InvalidInput(f"long is {long_seconds!r}; it must be seconds, less than a day", where="long")
