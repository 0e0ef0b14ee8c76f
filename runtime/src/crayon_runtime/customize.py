"""From about ten examples to an adapter of one's own: alpha is computed on the device, and LoRAs are blended with it, here or by a service.

What is kept (see `crayon_runtime.customized`) stands beside the model, and is replaced as a whole, so that a device that dies at any
moment comes back with the old or the new adapter.

A new adapter is proved before it takes the place of the old one: it must change what the model says, and the log-loss of the answers in
the examples must not get worse.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from crayon_runtime import affinity
from crayon_runtime.bundle import Bundle
from crayon_runtime.bundle.adapter import Slots
from crayon_runtime.customized import (
    ADAPTER,
    DECIMALS,
    EXAMPLES,
    ROUTING,
    STATE,
    STATES,
    Settings,
    State,
    check_serial,
    kept_examples,
    made_from,
    newest_serial,
    read_state,
    slots_of,
    state_folder,
)
from crayon_runtime.engine import Engine
from crayon_runtime.errors import (
    AdapterError,
    CrayonError,
    InvalidInput,
    OutputError,
    PoolChanged,
)
from crayon_runtime.examples import Example, Score, check_examples, score, to_jsonl
from crayon_runtime.files import atomic_directory
from crayon_runtime.manifest import AdapterDtype, ExecutorchSlots
from crayon_runtime.pool import Mode, Pool, PoolManifest, write_adapter_bundle
from crayon_runtime.prototypes import SIZE, read_prototypes
from crayon_runtime.refine import refine as search
from crayon_runtime.remote import PoolClient
from crayon_runtime.sampling import is_integer
from crayon_runtime.signing import KEYS

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.affinity import Projection
    from crayon_runtime.backends.base import Adapter
    from crayon_runtime.engine import Part

    Floats = npt.NDArray[np.float32]

__all__ = [
    "ADAPTER",
    "DECIMALS",
    "PARTS",
    "Customization",
    "Settings",
    "State",
    "alpha_of",
    "check_pool",
    "customize",
    "disguise",
    "kept_examples",
    "preview",
    "read_state",
    "state_folder",
]

NAME = "customized"
"""Of every adapter that is blended here."""

TOLERANCE = 0.01
"""Of its log-loss, relative, may an adapter be worse than what it replaces: less is noise of rounding. Our choice."""

SMALLEST_CHANGE = 1e-5
"""Of a logit. An adapter of zeros changes none at all."""

PARTS = ("pool", "embed", "alpha", "blend", "request", "download", "verify", "prove", "swap")
"""What is timed, in this order. embed: the base model runs over the examples, which also gives their log-loss."""


@dataclass(frozen=True)
class Customization:
    """What came of it."""

    installed: bool
    """Whether the new adapter is in place; otherwise everything is as it was."""
    reason: str
    """Why, in a sentence."""
    adapter: Path | None
    """The adapter bundle that is in place now, and fits; None: the base model."""
    alpha: list[float]
    """What was blended."""
    sent: dict[str, Any]
    """The body that asks a service for the same adapter: all that leaves the device, or would. It is a fingerprint of the user."""
    sent_bytes: int
    received_bytes: int
    """Of all bodies that went to a service, and came from it."""
    prototypes_bytes: int
    """Of the new adapter's prototypes; 0 if it has none."""
    log_loss_base: float
    log_loss_before: float
    """With the adapter that was in place, if it fits this model; otherwise that of the base."""
    log_loss: float
    """With the new adapter. All of them: of the answers in the examples, nats per token."""
    log_loss_exact: float | None
    """With alpha before noise and rounding, if there were any; None with a service, which would have to be told that alpha too."""
    logit_change: float
    """The largest difference to the base of any logit after a prompt."""
    seconds: dict[str, float]
    """By part; see `PARTS`."""


def customize(
    engine: Engine,
    examples: Sequence[Sequence[str]],
    pool: Pool | PoolClient,
    *,
    folder: Path | None = None,
    refine: bool = False,
    refine_evaluations: int = 60,
    seed: int = 0,
    digits: int | None = None,
    noise: float = 0.0,
    blend: Mode | None = None,
    rank: int | None = None,
    dtype: AdapterDtype | None = None,
    rank_limit: int | None = None,
    prototypes: int = SIZE,
    allow_older: bool = False,
    on_evaluation: Callable[[int], object] = lambda _: None,
) -> Customization:
    """Customize a model, and answer with the new adapter from now on if it proved itself.

    Args:
        examples: n >= 1 pairs of a prompt and its answer. They do not leave the device, whatever the pool.
        pool: on this device; or of a service, which is sent `Customization.sent`.
        folder: where the adapter is kept; None: `state_folder` of the engine's bundle.
        refine: search alpha on the examples from there; see `crayon_runtime.refine`. `seed` is that of the search. Only with a local
            pool, as a service would see every step.
        digits, noise: of `disguise`, applied at the end. A service is sent at most `DECIMALS`, which is also its default.
        blend, rank: see `Pool.blend`; for a local pool.
        dtype, rank_limit: what to ask a service for; None: its default.
        prototypes: how many of the pool's come with the adapter, at most; see `crayon_runtime.prototypes`.
        allow_older: take a pool from a service that is older than one accepted before.
        on_evaluation: called with 1 after each evaluation of the search.

    Raises:
        AdapterError: the pool is of another base model, or embeds at another tap.
        InvalidInput: an example or an option cannot be used.
        ServerError: the service offers an older pool; and whatever else `PoolClient` raises. Everything is as it was.
        OutputError: the disk is full, or something else is in the place of the folder.
    """
    settings = Settings(
        digits=digits,
        noise=noise,
        refine=refine,
        refine_evaluations=refine_evaluations,
        seed=seed,
        blend=blend,
        rank=rank,
        dtype=dtype,
        rank_limit=rank_limit,
        prototypes=prototypes,
        backend="executorch" if engine.backend.name == "executorch" else "onnx",
    ).checked(pool)
    _slots(engine, settings)
    work = _Work(
        engine, check_examples(examples), folder or state_folder(_bundle(engine).path), settings, on_evaluation
    )
    if isinstance(pool, PoolClient):
        check_serial(pool.manifest, work.folder, allow_older=allow_older)
    check_pool(engine, pool.manifest)
    with work.part("embed"):
        base = score(engine, work.examples)  # says which example is too long, before anything is sent
    try:
        return work.run(pool, base)
    except PoolChanged:
        if not isinstance(pool, PoolClient):
            raise
    pool.refresh()  # it changed between two requests; if that happens again, something else is wrong
    check_serial(pool.manifest, work.folder, allow_older=allow_older)
    check_pool(engine, pool.manifest)
    return work.run(pool, base)


def preview(engine: Engine, examples: Sequence[Sequence[str]], pool: Pool | PoolClient) -> dict[str, Any]:
    """What `customize` would send with these examples: the same body, computed in the same way, and sent to nobody.

    Raises:
        As `customize`, before it sends anything.
    """
    settings = Settings(backend="executorch" if engine.backend.name == "executorch" else "onnx").checked(pool)
    folder = state_folder(_bundle(engine).path)
    work = _Work(engine, check_examples(examples), folder, settings, lambda _: None)
    check_pool(engine, pool.manifest)
    alpha = _alpha(score(engine, work.examples).means, pool.manifest, pool.projection)
    told = disguise(alpha, digits=settings.digits, signed=pool.manifest.weighting.signed)
    return work._body(pool, told)


def check_pool(engine: Engine, pool: PoolManifest) -> None:
    """Refuse, with AdapterError, a pool of another base model or tap than the engine's."""
    bundle = _bundle(engine)
    model = bundle.model
    if pool.base_fingerprint != model.base_fingerprint:
        raise AdapterError(
            f"pool {pool.name!r} was built for another base model "
            f"({pool.base_fingerprint[:12]}…; this one is {model.base_fingerprint[:12]}…)",
            where=bundle.path,
            do="use the pool of this model, or export the model that the pool was built for",
        )
    if pool.embedding.tap_layer != model.tap.layer:
        raise AdapterError(
            f"pool {pool.name!r} embeds at layer {pool.embedding.tap_layer}; this bundle's tap is layer {model.tap.layer}",
            where=bundle.path,
            do=f"export the model with its tap at layer {pool.embedding.tap_layer}",
        )


def alpha_of(engine: Engine, examples: Sequence[Sequence[str]], pool: PoolManifest, projection: Projection) -> Floats:
    """Alpha of examples, float32 [N], computed with the un-customized model.

    Raises:
        AdapterError: the projection is for states of another size.
    """
    pairs = [(prompt, completion) for prompt, completion in examples]
    parts: set[Part] = {pool.embedding.part} | ({"prompt"} if pool.embedding.residual else set())
    return _alpha({part: engine.embed(pairs, part=part, base=True) for part in parts}, pool, projection)


def _alpha(means: Mapping[Part, Floats], pool: PoolManifest, projection: Projection) -> Floats:
    """Of mean states, float32 [n, D] by part."""
    states = means[pool.embedding.part]
    if len(projection.mean) != states.shape[1]:
        raise AdapterError(
            f"pool {pool.name!r} embeds states of {len(projection.mean)}; this model's have {states.shape[1]}"
        )
    return affinity.alpha(projection, pool.weighting, means.get("prompt"), states)


def disguise(
    alpha: Floats, *, digits: int | None = None, noise: float = 0.0, signed: bool = False, seed: int | None = None
) -> Floats:
    """Make alpha less of a fingerprint: add normal noise of deviation `noise`, cut off what is negative, round to decimal `digits`.

    Args:
        signed: negative weights are meant, and stay.
        seed: of the noise; None: unpredictable, as it must be to disguise anything.

    Raises:
        InvalidInput: `digits` or `noise` is not a number that makes sense.
    """
    if digits is not None and (not is_integer(digits) or not 0 <= digits <= 9):
        raise InvalidInput(f"digits is {digits!r}; it must be a whole number from 0 to 9", where="round")
    if not 0 <= noise <= 1:
        raise InvalidInput(f"noise is {noise}; it must be from 0 to 1", where="noise")
    changed = alpha.astype(np.float64)
    if noise:
        changed += noise * np.random.default_rng(seed).standard_normal(len(changed))
        changed = changed if signed else np.maximum(changed, 0)
    return (changed if digits is None else np.round(changed, digits)).astype(np.float32)


class _Work:
    """One customization."""

    def __init__(
        self,
        engine: Engine,
        examples: list[Example],
        folder: Path,
        settings: Settings,
        on_evaluation: Callable[[int], object],
    ) -> None:
        self.engine, self.examples, self.folder, self.settings = engine, examples, folder, settings
        self._on_evaluation = on_evaluation
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of a block to that of a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def run(self, pool: Pool | PoolClient, base: Score) -> Customization:
        """Make the adapter, prove it, and put it in the place of the old one; or remove it again and say why."""
        engine, folder = self.engine, self.folder
        if folder.exists() and not (folder / STATE).is_file():
            raise OutputError("there is something else in the place of the customized adapter", where=folder)
        with self.part("prove"):
            old, unusable = _read_old(engine, folder)
            before = score(engine, self.examples, old).log_loss if old else base.log_loss
        manifest, projection = pool.manifest, pool.projection  # what a client fetches is timed as a part of its own
        with self.part("alpha"):
            alpha = _alpha(base.means, manifest, projection)
        now, exact, refusal = base._replace(log_loss=float("nan")), None, None
        prototypes_bytes = 0
        try:
            with atomic_directory(folder, replace=True) as new:
                alpha, exact = self._refined_and_disguised(alpha, pool, new)
                with self.part("blend") if isinstance(pool, Pool) else nullcontext():
                    made = self._make(pool, alpha, new / ADAPTER)
                with self.part("prove"):
                    prototypes_bytes = _checked_prototypes(made, engine.backend.tap_size)
                    now = score(engine, self.examples, engine.read_adapter(Bundle.open(new / ADAPTER)))
                    _prove(now, base, before, old is not None)
                self._write_state(new, pool, alpha, now)
                swapping = time.perf_counter()
            engine.set_adapter(folder / ADAPTER)
            self._seconds["swap"] = time.perf_counter() - swapping
        except _Refused as e:
            refusal = str(e)
        reason = refusal or "it changes what the model says, and the log-loss of the examples did not get worse"
        fetched = pool.seconds if isinstance(pool, PoolClient) else {}
        seconds = self._seconds | fetched
        return Customization(
            installed=refusal is None,
            reason=reason + (f"; the earlier adapter does not fit this model: {unusable}" if unusable else ""),
            adapter=folder / ADAPTER if refusal is None or old is not None else None,
            alpha=_numbers(alpha),
            sent=self._body(pool, alpha),
            sent_bytes=pool.sent_bytes if isinstance(pool, PoolClient) else 0,
            received_bytes=pool.received_bytes if isinstance(pool, PoolClient) else 0,
            prototypes_bytes=prototypes_bytes,
            log_loss_base=base.log_loss,
            log_loss_before=before,
            log_loss=now.log_loss,
            log_loss_exact=exact,
            logit_change=_logit_change(now, base),
            seconds={part: seconds[part] for part in PARTS if part in seconds},
        )

    def _refined_and_disguised(self, alpha: Floats, pool: Pool | PoolClient, new: Path) -> tuple[Floats, float | None]:
        """Alpha as it is blended; and the log-loss of what it was before, where that can be told."""
        settings, exact = self.settings, None

        def log_loss(weights: Floats) -> float:
            trial = self._make(pool, weights, new / "trial")
            loss = score(self.engine, self.examples, self.engine.read_adapter(trial)).log_loss
            self._on_evaluation(1)
            return loss

        with self.part("alpha"):
            if settings.refine:
                alpha, exact = search(log_loss, alpha, evaluations=settings.refine_evaluations, seed=settings.seed)
            signed = pool.manifest.weighting.signed
            told = disguise(alpha, digits=settings.digits, noise=settings.noise, signed=signed)
            disguised = isinstance(pool, Pool) and (settings.digits is not None or settings.noise > 0)
            if disguised and exact is None:
                exact = log_loss(alpha)
        shutil.rmtree(new / "trial", ignore_errors=True)
        return told, exact if disguised else None

    def _make(self, pool: Pool | PoolClient, alpha: Floats, out: Path) -> Bundle:
        if isinstance(pool, PoolClient):
            return pool.adapter(self._body(pool, alpha), out)
        blended = pool.blend(alpha, self.settings.blend, self.settings.rank)
        slots = _slots(self.engine, self.settings)
        if slots is not None:
            blended = blended.limited(slots.rank)
        picked = pool.prototypes.picked(alpha, self.settings.prototypes) if pool.prototypes else None
        return write_adapter_bundle(
            blended,
            out,
            name=NAME,
            base_fingerprint=pool.manifest.base_fingerprint,
            dtype="fp32" if slots is None else None,
            executorch=None if slots is None else Slots(slots),
            pool=pool.manifest.origin,
            prototypes=picked,
            replace=True,
        )

    def _body(self, pool: Pool | PoolClient, alpha: Floats) -> dict[str, Any]:
        """What a service is sent."""
        size = self.settings.prototypes
        asked: dict[str, Any] = {
            "dtype": self.settings.dtype,
            "rank_limit": self.settings.rank_limit,
            "prototypes": size if size != SIZE else None,
        }
        slots = _slots(self.engine, self.settings)
        if slots is not None:
            shape = {name: value for name, value in msgspec.to_builtins(slots).items() if name != "program"}
            asked |= {"backend": "executorch", "slots": shape}
        return {
            "base_fingerprint": pool.manifest.base_fingerprint,
            "pool_version": pool.manifest.version,
            "alpha": _numbers(alpha),
        } | {name: value for name, value in asked.items() if value is not None}

    def _write_state(self, new: Path, pool: Pool | PoolClient, alpha: Floats, now: Score) -> None:
        manifest, newest = pool.manifest, newest_serial(self.folder)
        (new / EXAMPLES).write_bytes(to_jsonl(self.examples))
        (new / STATES).write_bytes(now.states.to_bytes())
        if (self.folder / ROUTING).is_file():  # of the same adapter, or it is ignored, and that is said
            (new / ROUTING).write_bytes((self.folder / ROUTING).read_bytes())
        if isinstance(pool, PoolClient):
            newest = max(newest, manifest.serial)
            if pool.trusted is not None:
                pool.trusted.write(new / KEYS)
        elif (self.folder / KEYS).is_file():
            (new / KEYS).write_bytes((self.folder / KEYS).read_bytes())
        state = State(
            base_fingerprint=manifest.base_fingerprint,
            pool_name=manifest.name,
            pool_version=manifest.version,
            made_from=made_from(manifest.base_fingerprint, self.examples, manifest, self.settings),
            newest_serial=newest,
            settings=self.settings,
            alpha=_numbers(alpha),
            refined=self.settings.refine,
            log_loss=now.log_loss,
        )
        (new / STATE).write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n")


def _slots(engine: Engine, settings: Settings) -> ExecutorchSlots | None:
    """Those that an adapter is made for; None where it is for ONNX Runtime.

    Raises:
        AdapterError: ExecuTorch's program has none.
        InvalidInput: the settings want what slots decide.
    """
    if settings.backend != "executorch":
        return None
    slots = slots_of(_bundle(engine))
    if slots is None:
        raise AdapterError(
            "this bundle's program for ExecuTorch has no slots for adapters",
            where=_bundle(engine).path,
            do="export the model again, without --official, --merge and --single-file; or customize it with --backend onnx",
        )
    if settings.dtype is not None:
        raise InvalidInput(
            "dtype is not for ExecuTorch: its program says what it takes", where="dtype", do="leave it out"
        )
    return slots


def _prove(now: Score, base: Score, before: float, customized: bool) -> None:
    if not np.isfinite(now.log_loss):
        raise _Refused("the log-loss of the examples is not a number with it")
    if not all(np.isfinite(means).all() for means in now.means.values()):
        raise _Refused("the states of the examples are not numbers with it")
    if _logit_change(now, base) < SMALLEST_CHANGE:
        raise _Refused("it does not change what the model says")
    if now.log_loss > before * (1 + TOLERANCE):
        earlier = "the earlier adapter's" if customized else "the base model's"
        raise _Refused(f"the log-loss of the examples is {now.log_loss:.4f} with it; {earlier} is {before:.4f}")


def _checked_prototypes(adapter: Bundle, size: int) -> int:
    """Bytes of the prototypes that came with an adapter, which are those of its base and pool, and finite."""
    read_prototypes(adapter, size)
    info = adapter.as_adapter.prototypes
    return adapter.file(info.file).stat().st_size if info else 0


def _logit_change(now: Score, base: Score) -> float:
    return float(np.abs(now.first_logits - base.first_logits).max())


def _read_old(engine: Engine, folder: Path) -> tuple[Adapter | None, str | None]:
    """The adapter in place, or why it cannot be used."""
    if not (folder / ADAPTER).exists():
        return None, None
    try:
        return engine.read_adapter(Bundle.open(folder / ADAPTER)), None
    except CrayonError as e:
        return None, e.what


def _bundle(engine: Engine) -> Bundle:
    if engine.bundle is None:
        raise InvalidInput("an engine without a bundle cannot be customized", do="make it with Engine.load")
    return engine.bundle


def _numbers(alpha: Floats) -> list[float]:
    """With as few digits as a float32 needs."""
    return [float(str(value)) for value in alpha]


class _Refused(Exception):
    """Why an adapter is not installed."""
