"""What the measuring program is asked: one JSON object on its stdin, for one process."""

from __future__ import annotations

from msgspec import Struct


class Work(Struct, frozen=True, tag_field="work"):
    """What a process does."""


class Describe(Work, frozen=True, kw_only=True, tag="describe"):
    """Choose the backend, read the adapter, and say what there is: a `Header`."""


class Load(Work, frozen=True, kw_only=True, tag="load"):
    """Load the model after the system has forgotten the bundle's files."""

    first: bool
    """Check all hashes, as at the first start after the bundle was copied."""


class Measure(Work, frozen=True, kw_only=True, tag="measure"):
    """Load the model, and run every test."""

    prompts: list[int]
    depths: list[int]
    generate: int
    rounds: int
    more: bool
    """Also what has to be known once only: adapters, examples, routing."""


class Trace(Work, frozen=True, kw_only=True, tag="trace"):
    """The time of each operator of a decode."""

    depth: int
    generate: int


class Long(Work, frozen=True, kw_only=True, tag="long"):
    """Decode for so many seconds, and watch the machine."""

    seconds: float


AnyWork = Describe | Load | Measure | Trace | Long


class Job(Struct, frozen=True, kw_only=True):
    """One process of the measuring program."""

    bundle: str
    """A path on the target."""
    backend: str
    adapter: str | None
    threads: int | None
    cpus: list[int] | None
    """Cores to hold it on; None: all."""
    process: int
    work: AnyWork
