"""What is different between two profiles, and by how much.

Two profiles are not interleaved: what changed on the machine between them is in every difference, and no statistic can take it out. The
controls, which measure the machine without the model, say when that was so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from crayon_runtime.errors import InvalidInput
from crayon_runtime.profile.document import Profile
from crayon_runtime.profile.records import Test
from crayon_runtime.profile.statistics import TOLERANCE, Comparison, compare_groups, holm, percentile

LEVEL = 0.05
"""Of all differences together that are none, one is reported in at most so many comparisons."""

FEWEST = 3
"""Processes of a profile that can be compared."""


@dataclass(frozen=True)
class Difference:
    """A metric in two profiles. Less is better, in all of them."""

    metric: str
    unit: str
    """ "ns" or "bytes"."""
    control: bool
    """Whether it is of the machine, without the model."""
    before: float
    after: float
    """Means over processes."""
    compared: Comparison
    p: float
    """After Holm's correction."""

    @property
    def significant(self) -> bool:
        return self.p < LEVEL

    @property
    def change(self) -> float:
        """.1: it takes 10 % more."""
        return self.compared.ratio - 1


@dataclass(frozen=True)
class Compared:
    """Two profiles."""

    differences: list[Difference]
    notes: list[str]
    """What else is different, and what it makes of the rest."""

    @property
    def significant(self) -> list[Difference]:
        """Those of the model, and not of the machine."""
        return [d for d in self.differences if d.significant and not d.control]

    def regressions(self, most: float) -> list[Difference]:
        """Those that are worse for sure, and by more than `most`: .1 is 10 %."""
        return [difference for difference in self.significant if difference.change > most]


def compare(before: Profile, after: Profile, *, tolerance: float = TOLERANCE) -> Compared:
    """Compare every metric that both have.

    Args:
        tolerance: what is no difference: .03 is 3 %.

    Raises:
        InvalidInput: they have nothing in common, or too few processes to tell anything.
    """
    a, b = _metrics(before), _metrics(after)
    common = [name for name in a if name in b]
    if not common:
        raise InvalidInput("the two profiles have no metric in common", do="measure the same sizes and threads")
    enough = [name for name in common if min(len(a[name]), len(b[name])) >= FEWEST]
    if not enough:
        raise InvalidInput(
            f"a profile has fewer than {FEWEST} repetitions, which tells nothing about how sure it is",
            do="profile with --repetitions 5 or more",
        )
    found = [(name, compare_groups(a[name], b[name], tolerance)) for name in enough]
    adjusted = holm([comparison.p for _, comparison in found])
    differences = [
        Difference(
            metric=name,
            unit="bytes" if name.endswith("memory") else "ns",
            control=name.startswith("control"),
            before=fmean(a[name]),
            after=fmean(b[name]),
            compared=comparison,
            p=p,
        )
        for (name, comparison), p in zip(found, adjusted, strict=True)
    ]
    return Compared(differences, [*_other(before, after), *_left_out(a, b, enough), *_machine(differences)])


def _metrics(profile: Profile) -> dict[str, list[float]]:
    """One number for each process and metric: the tenth percentile of a decode's tokens, and the least of other samples. What else a machine
    does only slows them down, and where others share its cores, by half for seconds: then a median says who was there."""
    found: dict[str, list[float]] = {}
    for test in profile.tests:
        if test.test not in ("swap_none", "routing_answer"):  # these are there to be subtracted from others
            found[test.label] = _of_processes(test)
    last = [sample for sample in profile.samples if sample.phase == "end"]
    for name, values in (
        ("peak resident memory", [s.peak_rss_bytes for s in last]),
        ("proportional memory", [s.pss_bytes for s in last]),
    ):
        known = [float(value) for value in values if value]
        if known:
            found[name] = known
    return found


def _of_processes(test: Test) -> list[float]:
    grouped: dict[int, list[float]] = defaultdict(list)
    for i, process in enumerate(test.processes):
        grouped[process] += test.token_ns[i] if test.token_ns else [test.samples_ns[i]]
    percent = 10 if test.token_ns else 0
    return [max(percentile(sorted(values), percent), 1.0) for values in grouped.values()]


def _other(before: Profile, after: Profile) -> list[str]:
    names = {
        "cpu_info": "processors",
        "backends": "backends",
        "adapter": "adapters",
        "base_fingerprint": "base models",
        "model_type": "kinds of model",
        "model_size": "sizes of bundle",
        "system": "systems",
        "versions": "versions",
    }
    a, b = before.header, after.header
    return [
        f"different {what}: {getattr(a, field)} and {getattr(b, field)}"
        for field, what in names.items()
        if getattr(a, field) != getattr(b, field)
    ]


def _left_out(a: dict[str, list[float]], b: dict[str, list[float]], kept: Sequence[str]) -> list[str]:
    names = [name for name in {**a, **b} if name not in kept]
    return [f"not compared, as one of the two has too little of it: {', '.join(names)}"] if names else []


def _machine(differences: Sequence[Difference]) -> list[str]:
    return [
        f"the machine was not the same: {d.metric} took {d.change:+.0%}, without any model; differences of this size say nothing about it"
        for d in differences
        if d.control and d.significant
    ]
