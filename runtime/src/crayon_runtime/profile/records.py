"""What a profile says, one JSON object a line: docs/profile.md is the description of these fields for readers.

Names are llama-bench's (`n_prompt`, `n_gen`, `n_depth`, `samples_ns`, `avg_ts`, …) and, of operators, those of ExecuTorch's Inspector
(`event_name`, `op_types`, `is_delegated_op`, …), where they have one. Times are in nanoseconds, sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from statistics import fmean, stdev
from typing import Literal

import msgspec
from msgspec import Struct

from crayon_runtime.manifest import check_version
from crayon_runtime.profile.statistics import percentile

SCHEMA_VERSION = "1.0"

TestName = Literal[
    "prefill",
    "decode",
    "ttft",
    "load_first",
    "load_cold",
    "load_warm",
    "first_token",
    "swap_none",
    "swap_read",
    "swap_file",
    "affinity",
    "routing_answer",
    "routing_score",
    "control_read",
    "control_matmul",
]


class Plan(Struct, frozen=True, kw_only=True):
    """What is measured."""

    prompts: list[int]
    """Tokens of each prefill, from position 0."""
    generate: int
    """Tokens of each decode."""
    depths: list[int]
    """Positions at which decodes begin."""
    threads: list[int | None]
    """Cores to compute on, one after the other; None: the backend chooses."""
    repetitions: int
    """Processes that measure everything anew."""
    rounds: int = 3
    """Samples of a test in each of them, after one that warms up."""
    long_seconds: float = 0.0
    """How long the run for heat and energy is; 0: there is none."""


class Core(Struct, frozen=True):
    """A core that this process may use."""

    cpu: int
    capacity: int | None
    """Of 1024, which is the fastest core's: Linux's `cpu_capacity`; None: the system does not say."""
    max_hz: int | None


class Record(Struct, frozen=True, tag_field="type"):
    """A line."""


class Header(Record, frozen=True, kw_only=True, tag="profile"):
    """The first line: what was measured, and on what."""

    schema_version: str = SCHEMA_VERSION
    test_time: str
    """When it began, in UTC."""
    target: str = "local"
    crayon_version: str
    versions: dict[str, str | None]
    """Of the libraries that compute, and Python's."""
    system: str
    cpu_info: str
    cores: list[Core]
    memory_bytes: int | None
    model_filename: str
    model_name: str
    model_type: str
    model_size: int
    """Of all files of the bundle."""
    base_fingerprint: str
    context_length: int
    type_k: str
    type_v: str
    backends: str
    adapter: str | None
    adapters: list[str]
    """Inside the bundle."""
    read_bytes: int
    """Weights that decoding a token reads."""
    kv_bytes: int
    """Keys and values of one token, in all layers."""
    operations: int
    """Multiplications and additions of all linear layers for one token."""
    plan: Plan | None = None


class Observation(Record, frozen=True, kw_only=True, tag="observation"):
    """What one process measured of a test. Not part of a profile, which has them together as a `Test`."""

    test: TestName
    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0
    adapter: str | None = None
    nbytes: int = 0
    """Bytes read by each sample, where that is what is measured."""
    warmup_ns: list[int] = []
    samples_ns: list[int]
    token_ns: list[list[int]] = []


class Test(Record, frozen=True, kw_only=True, tag="test"):
    """A test: all its samples, and what they say together."""

    test: TestName
    n_prompt: int
    n_gen: int
    n_depth: int
    n_threads: int | None
    """None: the backend chose."""
    cpu_mask: str
    """The cores that it was held on; "0x0": all."""
    backends: str
    adapter: str | None
    avg_ns: float
    stddev_ns: float
    avg_ts: float | None
    """Tokens a second; None where none are computed."""
    stddev_ts: float | None
    p50_ns: float | None
    """Of the tokens of a decode, in all processes; None for other tests."""
    p90_ns: float | None
    p99_ns: float | None
    bandwidth_share: float | None
    """Of a decode: bytes that a token reads, a second, of those that the same number of threads can read."""
    nbytes: int
    warmup_ns: list[int]
    samples_ns: list[int]
    samples_ts: list[float]
    token_ns: list[list[int]]
    """Of a decode: the time of each token, for each sample."""
    processes: list[int]
    """The process of each sample. Samples of one process are not independent."""

    @property
    def label(self) -> str:
        """The test, as llama-bench writes it: pp512, tg32 @ d1024; others by their names."""
        name = {"prefill": f"pp{self.n_prompt}", "decode": f"tg{self.n_gen}"}.get(self.test, self.test)
        name += f" {self.n_prompt}" if self.test == "ttft" else ""
        name += f" @ d{self.n_depth}" if self.n_depth else ""
        name += f", {self.n_threads} threads" if self.n_threads else ""
        name += f", cores {self.cpu_mask}" if self.cpu_mask != "0x0" else ""
        return name + (f", {self.adapter}" if self.adapter else "")


class Sample(Record, frozen=True, kw_only=True, tag="sample"):
    """The process and the machine at one moment."""

    process: int
    phase: Literal["started", "loaded", "prefill", "decode", "end", "long"]
    t_ns: int
    """Since the process began to measure."""
    rss_bytes: int | None
    pss_bytes: int | None
    mapped_bytes: int | None
    """Resident pages of the bundle's files."""
    peak_rss_bytes: int | None
    frequency_hz: list[int]
    """Of each core that says it."""
    temperature_c: dict[str, float]
    throttled: dict[str, int]
    """Counters and states that change when the system slows down."""
    energy_j: dict[str, float]
    """Counters, each from a moment of its own."""
    power_w: dict[str, float]
    avg_ts: float | None = None
    """Of the long run: tokens a second since the sample before."""


class LongRun(Record, frozen=True, kw_only=True, tag="long"):
    """The long run as a whole."""

    seconds: float
    n_gen: int
    first_ts: float
    """Tokens a second in the first tenth."""
    last_ts: float
    """In the last tenth."""
    energy_j: dict[str, float]
    """That was used, by sensor: counters, or power over time."""
    throttled: dict[str, int]
    """By how much the counters went up."""


class Operator(Record, frozen=True, kw_only=True, tag="operator"):
    """An operator of decoding, mean over the tokens that were traced. Tracing makes all of them slower."""

    event_name: str
    module: str | None
    """The module of the model that it computes, as `model.layers.3.mlp.down_proj`; None: the trace does not tell."""
    kind: str
    op_types: list[str]
    is_delegated_op: bool
    delegate_backend_name: str | None
    n_gen: int
    """Tokens that were traced."""
    avg_ns: float
    """Of one token."""
    p50_ns: float
    p90_ns: float
    samples_ns: list[int]


class OperatorKind(Record, frozen=True, kw_only=True, tag="operator_kind"):
    """All operators of one kind."""

    kind: str
    operators: int
    p50_ns: float
    """The sum of their medians."""
    share: float
    """Of that of all operators."""


class Absent(Record, frozen=True, kw_only=True, tag="absent"):
    """What this profile lacks, and why."""

    what: str
    reason: str


class Failure(Record, frozen=True, kw_only=True, tag="failure"):
    """Why a process could not measure. Not part of a profile."""

    error: str
    what: str
    where: str | None
    do: str | None


Line = Header | Test | Sample | LongRun | Operator | OperatorKind | Absent


def merge(
    observations: Sequence[tuple[int, Observation]],
    *,
    backends: str,
    n_threads: int | None,
    cpu_mask: str,
    bytes_per_second: float | None,
    read_bytes: int,
) -> Test:
    """All observations of one test.

    Args:
        observations: each with the number of its process.
        bytes_per_second: that so many threads can read; None: it was not measured.
        read_bytes: that each token of a decode reads.
    """
    first = observations[0][1]
    samples = [ns for _, seen in observations for ns in seen.samples_ns]
    processes = [process for process, seen in observations for _ in seen.samples_ns]
    tokens = [row for _, seen in observations for row in seen.token_ns]
    count = {"prefill": first.n_prompt, "decode": first.n_gen}.get(first.test, 0)
    speeds = [count * 1e9 / ns for ns in samples] if count else []
    each = sorted(chain.from_iterable(tokens))
    avg_ts = fmean(speeds) if speeds else None
    share = None
    if first.test == "decode" and bytes_per_second and avg_ts:
        share = read_bytes * avg_ts / bytes_per_second
    return Test(
        test=first.test, n_prompt=first.n_prompt, n_gen=first.n_gen, n_depth=first.n_depth, n_threads=n_threads,
        cpu_mask=cpu_mask, backends=backends, adapter=first.adapter, avg_ns=fmean(samples), stddev_ns=_deviation(samples),
        avg_ts=avg_ts, stddev_ts=_deviation(speeds) if speeds else None,
        p50_ns=percentile(each, 50) if each else None, p90_ns=percentile(each, 90) if each else None,
        p99_ns=percentile(each, 99) if each else None, bandwidth_share=share, nbytes=first.nbytes,
        warmup_ns=[ns for _, seen in observations for ns in seen.warmup_ns], samples_ns=samples, samples_ts=speeds,
        token_ns=tokens, processes=processes,
    )  # fmt: skip


def to_jsonl(records: Iterable[Line]) -> bytes:
    """As `from_jsonl` reads them."""
    return b"".join(msgspec.json.encode(record) + b"\n" for record in records)


def from_jsonl(content: bytes, where: str) -> list[Line]:
    """Read a profile; fields that this version does not know are ignored.

    Raises:
        SchemaTooNew: another version wrote it.
        ValueError: it is no profile.
    """
    lines = [line for line in content.splitlines() if line.strip()]
    first = msgspec.json.decode(lines[0]) if lines else None
    if not isinstance(first, dict) or first.get("type") != "profile":
        raise ValueError("its first line is not that of a profile")
    check_version(first, where)
    decoder = msgspec.json.Decoder(Line)
    return [decoder.decode(line) for line in lines]


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
