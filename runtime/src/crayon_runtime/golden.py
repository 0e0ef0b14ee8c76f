"""Golden cases: what the model must answer, recorded at export and replayed on the device.

`golden.json` holds the cases below and the tolerances, `golden.safetensors` two arrays a case:

    NAME.logits   float32 [steps, V]   scores after the token at each of the case's `steps`
    NAME.taps     float32 [2, D]       mean tapped hidden state over the prompt's tokens, and over the rest

They come from a float32 reference that uses the *dequantized* weights, so what is left is how a backend computes: the order of
sums, and int8 activations. Errors are root mean squares, relative to the spread of the reference: the differences of a step's logits
over their standard deviation, the differences of a tap over its root mean square. Where the reference's best token leads by more than
ten times what the tolerance allows, a backend must choose the same one.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from crayon_runtime.errors import BundleError, IntegrityError

if TYPE_CHECKING:
    from crayon_runtime.backends.base import Adapter, Backend
    from crayon_runtime.bundle import Bundle

Floats = npt.NDArray[np.float32]

_TINY = 1e-12  # outputs that are all zero differ from themselves by nothing
_CLEAR_LEAD = 10  # of two logits, each several root mean squares off, one may overtake the other up to here


class Case(Struct, frozen=True, kw_only=True):
    """Token ids, fed as a prompt and then one by one."""

    name: str
    adapter: str | None
    """The adapter inside the bundle that answers; None: the base."""
    text: str | None
    """What `ids` are the tokens of; None: the ids are not those of a text."""
    ids: list[int]
    prompt_length: int
    steps: list[int]
    """Positions in `ids` after which the logits are recorded; none before the end of the prompt."""
    kl_to_float: list[float]
    """At each step, KL(float model || this one) in nats: the price of quantization, for the reader. Nothing is held against it."""
    backend: str | None = None
    """The only backend whose weights the case is of; None: those of all."""


class Tolerance(Struct, frozen=True):
    """How far a backend may be from the reference, relative to its spread."""

    backend: str
    isa: str
    """"x86-64", "aarch64", or "any"."""
    logits: float
    tap: float


class Golden(Struct, frozen=True):
    cases: list[Case]
    tolerances: list[Tolerance]


@dataclass(frozen=True, slots=True)
class CaseResult:
    """How one case went."""

    name: str
    adapter: str | None
    passed: bool
    logit_error: float
    """Largest over the steps, relative."""
    tap_error: float
    kl: float
    """KL(reference || backend) in nats, the largest over the steps."""
    tolerance: Tolerance
    backend: str
    problem: str | None = None


def read(bundle: Bundle) -> tuple[Golden, dict[str, Floats]]:
    """The cases of a bundle, and their arrays. Empty where the bundle has none."""
    files = bundle.model.golden
    if files is None:
        return Golden([], []), {}
    from safetensors.numpy import load_file

    where = bundle.file(files.cases)
    try:
        golden = msgspec.json.decode(where.read_bytes(), type=Golden)
        arrays = load_file(bundle.file(files.tensors))
    except Exception as e:  # safetensors has its own error type
        raise IntegrityError(f"the golden cases cannot be read: {e}", where=where) from e
    return golden, arrays


def replay(
    bundle: Bundle,
    *,
    backend: str = "auto",
    threads: int | None = None,
    on_case: Callable[[CaseResult], None] | None = None,
) -> list[CaseResult]:
    """Run the golden cases of a bundle.

    Args:
        backend: what runs those that are its own or everybody's; "auto": one after the other, each that is here and that the bundle serves.
        on_case: called after each.

    Raises:
        BackendError, AdapterError: the model or an adapter does not load.
        IntegrityError: the recorded cases are damaged.
    """
    from crayon_runtime import backends

    golden, arrays = read(bundle)
    if not golden.cases:
        return []
    names = backends.available(bundle) if backend == "auto" else []
    results = []
    for name in names or [backend]:
        loaded = backends.load(bundle, name, threads=threads)
        try:
            results += _replay_all(bundle, golden, arrays, loaded, on_case or (lambda _: None))
        finally:
            loaded.close()
    return results


def _replay_all(
    bundle: Bundle, golden: Golden, arrays: dict[str, Floats], loaded: Backend, on_case: Callable[[CaseResult], None]
) -> list[CaseResult]:
    from crayon_runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer(bundle.model.tokenizer, bundle.file(bundle.model.tokenizer.file))
    tolerance = _tolerance(golden, loaded.name, bundle)
    adapters: dict[str | None, Adapter | None] = {None: None}
    results = []
    for case in golden.cases:
        if case.backend not in (None, loaded.name):
            continue
        if case.adapter not in adapters:
            adapters[case.adapter] = loaded.read_adapter(bundle.adapter(case.adapter or ""))
        try:
            logits, taps = arrays[f"{case.name}.logits"], arrays[f"{case.name}.taps"]
        except KeyError as e:
            raise IntegrityError(f"golden case {case.name!r} has no array {e}", where=bundle.path) from None
        result = _replay(case, logits, taps, loaded, adapters[case.adapter], tolerance)
        if result.passed and case.text is not None and tokenizer.encode(case.text) != case.ids:
            result = CaseResult(
                case.name, case.adapter, False, result.logit_error, result.tap_error, result.kl, tolerance, loaded.name,
                problem="the tokenizer gives other ids for its text",
            )  # fmt: skip
        results.append(result)
        on_case(result)
    return results


def isa() -> str:
    """The instruction set of this machine, as tolerances name it."""
    machine = platform.machine().lower()
    return {"x86_64": "x86-64", "amd64": "x86-64", "arm64": "aarch64"}.get(machine, machine)


def _tolerance(golden: Golden, backend: str, bundle: Bundle) -> Tolerance:
    for wanted in (isa(), "any"):
        for t in golden.tolerances:
            if t.backend == backend and t.isa == wanted:
                return t
    raise BundleError(f"the golden cases have no tolerance for {backend} on {isa()}", where=bundle.path)


def _replay(
    case: Case, logits: Floats, taps: Floats, backend: Backend, adapter: Adapter | None, tolerance: Tolerance
) -> CaseResult:
    ids = np.array(case.ids, np.int64)
    cache = backend.new_cache(adapter)
    try:
        step = cache.prefill(ids[: case.prompt_length])
        sums = [step.tap_sum.copy(), np.zeros_like(step.tap_sum)]
        outputs = {case.prompt_length - 1: step.logits.copy()}
        for position in range(case.prompt_length, len(ids)):
            step = cache.decode(int(ids[position]))
            sums[1] += step.tap_sum
            if position in case.steps:
                outputs[position] = step.logits.copy()
    finally:
        cache.close()
    lengths = (case.prompt_length, len(ids) - case.prompt_length)
    means = np.stack([s / np.float32(max(n, 1)) for s, n in zip(sums, lengths, strict=True)])
    got = np.stack([outputs[p] for p in case.steps])

    spread = logits.std(axis=1) + _TINY
    logit_errors = _rms(got - logits) / spread
    tap_error = float((_rms(means - taps) / (_rms(taps) + _TINY)).max())
    second, best = np.sort(logits, axis=1)[:, -2:].T
    clear = best - second > _CLEAR_LEAD * tolerance.logits * spread
    problem = None
    if not np.isfinite(got).all() or not np.isfinite(means).all():
        problem = "the outputs are not finite"
    elif (logit_errors > tolerance.logits).any():
        problem = f"logits are {logit_errors.max():.2g} off; allowed are {tolerance.logits:.2g}"
    elif tap_error > tolerance.tap:
        problem = f"taps are {tap_error:.2g} off; allowed are {tolerance.tap:.2g}"
    elif (clear & (got.argmax(axis=1) != logits.argmax(axis=1))).any():
        problem = "another token is the most likely one"
    kl = float(kl_divergence(logits, got).max())
    return CaseResult(
        case.name,
        case.adapter,
        problem is None,
        float(logit_errors.max()),
        tap_error,
        kl,
        tolerance,
        backend.name,
        problem,
    )


def _rms(x: Floats) -> Floats:
    return np.asarray(np.sqrt(np.mean(x * x, axis=1)))


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64."""
    z = logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))


def kl_divergence(reference: Floats, other: Floats) -> npt.NDArray[np.float64]:
    """KL(reference || other) in nats over the last axis of two arrays of logits."""
    p, q = log_softmax(reference), log_softmax(other)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1))
