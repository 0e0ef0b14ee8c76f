"""From about ten examples to an adapter of one's own: alpha is computed on the device, and the pool's LoRAs are blended with it.

What is kept stands beside the model, and is replaced as a whole, so that a device that dies at any moment comes back with the old or
the new adapter:

    BUNDLE.customized/adapter/          an adapter bundle, for `Engine.set_adapter`
    BUNDLE.customized/examples.jsonl    the examples; they never leave the device
    BUNDLE.customized/state.json        `State`

A new adapter is proved before it takes the place of the old one: it must change what the model says, and the log-loss of the answers in
the examples must not get worse.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec import Struct

from crayon_runtime import affinity
from crayon_runtime.bundle import Bundle
from crayon_runtime.engine import Engine
from crayon_runtime.errors import AdapterError, CrayonError, InvalidInput, ManifestError, OutputError
from crayon_runtime.examples import Example, Score, check_examples, read_examples, score, to_jsonl
from crayon_runtime.files import atomic_directory
from crayon_runtime.manifest import Sha256, check_version
from crayon_runtime.pool import Mode, Pool, PoolManifest, write_adapter_bundle
from crayon_runtime.refine import refine as search
from crayon_runtime.sampling import is_integer

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.affinity import Projection
    from crayon_runtime.backends.base import Adapter

    Floats = npt.NDArray[np.float32]

NAME = "customized"
"""Of every adapter that is made here."""

ADAPTER, EXAMPLES, STATE = "adapter", "examples.jsonl", "state.json"

TOLERANCE = 0.01
"""Of its log-loss, relative, may an adapter be worse than what it replaces: less is noise of rounding. Our choice."""

SMALLEST_CHANGE = 1e-5
"""Of a logit. An adapter of zeros changes none at all."""


class State(Struct, frozen=True, kw_only=True):
    """state.json: where a customized adapter comes from."""

    schema_version: str = "1.0"
    base_fingerprint: Sha256
    pool_name: str
    pool_version: str
    alpha: list[float]
    refined: bool
    log_loss: float


@dataclass(frozen=True)
class Customization:
    """What came of it."""

    installed: bool
    """Whether the new adapter is in place; otherwise everything is as it was."""
    reason: str
    """Why, in a sentence."""
    adapter: Path | None
    """The adapter bundle that is in place now; None: the base model."""
    alpha: list[float]
    """What was blended, and would be sent."""
    sent: dict[str, Any]
    """The body that asks a server for the same adapter. All that would leave the device; it is a fingerprint of the user."""
    log_loss_base: float
    log_loss_before: float
    """With the adapter that was in place, if it fits this model; otherwise that of the base."""
    log_loss: float
    """With the new adapter. All of them: of the answers in the examples, nats per token."""
    log_loss_exact: float | None
    """With alpha before noise and rounding, if there were any."""
    logit_change: float
    """The largest difference to the base of any logit after a prompt."""


def customize(
    engine: Engine,
    examples: Sequence[Sequence[str]],
    pool: Pool,
    *,
    folder: Path | None = None,
    refine: bool = False,
    refine_evaluations: int = 60,
    seed: int = 0,
    digits: int | None = None,
    noise: float = 0.0,
    blend: Mode | None = None,
    rank: int | None = None,
    on_evaluation: Callable[[int], object] = lambda _: None,
) -> Customization:
    """Customize a model with a pool on this device, and answer with the new adapter from now on if it proved itself.

    Args:
        examples: n >= 1 pairs of a prompt and its answer.
        folder: where the adapter is kept; None: `state_folder` of the engine's bundle.
        refine: search alpha on the examples from there; see `crayon_runtime.refine`. `seed` is that of the search.
        digits, noise: of `disguise`, applied at the end.
        blend, rank: see `Pool.blend`.
        on_evaluation: called with 1 after each evaluation of the search.

    Raises:
        AdapterError: the pool is of another base model, or embeds at another tap.
        InvalidInput: an example or an option cannot be used.
        OutputError: the disk is full, or something else is in the place of the folder.
    """
    folder = folder or state_folder(_bundle(engine).path)
    examples = check_examples(examples)
    check_pool(engine, pool.manifest)
    base = score(engine, examples)  # first: it says which example is too long
    exact = alpha = alpha_of(engine, examples, pool.manifest, pool.projection)
    fingerprint = pool.manifest.base_fingerprint

    def write(weights: Floats, out: Path) -> Bundle:
        return write_adapter_bundle(
            pool.blend(weights, blend, rank), out, name=NAME, base_fingerprint=fingerprint, pool=pool.manifest.origin
        )

    def log_loss(weights: Floats) -> float:
        with tempfile.TemporaryDirectory(prefix="crayon-") as scratch:
            loss = score(engine, examples, engine.read_adapter(write(weights, Path(scratch, ADAPTER)))).log_loss
        on_evaluation(1)
        return loss

    if refine:
        exact = alpha = search(log_loss, alpha, evaluations=refine_evaluations, seed=seed)[0]
    disguised = digits is not None or noise > 0
    alpha = disguise(alpha, digits=digits, noise=noise, signed=pool.manifest.weighting.signed)
    state = State(
        base_fingerprint=fingerprint,
        pool_name=pool.manifest.name,
        pool_version=pool.manifest.version,
        alpha=_numbers(alpha),
        refined=refine,
        log_loss=0.0,
    )
    exact_loss = log_loss(exact) if disguised else None
    return install_adapter(engine, examples, base, state, lambda out: write(alpha, out), folder, exact_loss)


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
    if len(projection.mean) != engine.backend.tap_size:
        raise AdapterError(
            f"pool {pool.name!r} embeds states of {len(projection.mean)}; this model's have {engine.backend.tap_size}"
        )
    pairs = [(prompt, completion) for prompt, completion in examples]
    prompts = engine.embed(pairs, part="prompt", base=True) if pool.embedding.residual else None
    states = engine.embed(pairs, part=pool.embedding.part, base=True)
    return affinity.alpha(projection, pool.weighting, prompts, states)


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


def install_adapter(
    engine: Engine,
    examples: Sequence[Example],
    base: Score,
    state: State,
    write: Callable[[Path], object],
    folder: Path,
    log_loss_exact: float | None = None,
) -> Customization:
    """Write a new adapter, prove it, and put it in the place of the old one; or remove it again and say why.

    Args:
        base: the score of the un-customized model on the examples.
        state: what state.json will say; its `log_loss` is filled in.
        write: writes the adapter bundle to a path.
    """
    if folder.exists() and not (folder / STATE).is_file():
        raise OutputError("there is something else in the place of the customized adapter", where=folder)
    old, unusable = _read_old(engine, folder)
    before = score(engine, examples, old).log_loss if old else base.log_loss
    now = Score(float("nan"), base.first_logits)
    in_place = folder / ADAPTER if (folder / ADAPTER).exists() else None
    try:
        with atomic_directory(folder, replace=True) as new:
            write(new / ADAPTER)
            now = score(engine, examples, engine.read_adapter(Bundle.open(new / ADAPTER)))
            _prove(now, base, before, old is not None)
            (new / EXAMPLES).write_bytes(to_jsonl(examples))
            kept = msgspec.structs.replace(state, log_loss=now.log_loss)
            (new / STATE).write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")
        in_place, installed = folder / ADAPTER, True
        engine.set_adapter(in_place)
        reason = "it changes what the model says, and the log-loss of the examples did not get worse"
    except _Refused as refused:
        installed, reason = False, str(refused)
    return Customization(
        installed=installed,
        reason=reason + (f"; the earlier adapter does not fit this model: {unusable}" if unusable else ""),
        adapter=in_place,
        alpha=state.alpha,
        sent={
            "base_fingerprint": state.base_fingerprint,
            "pool_version": state.pool_version,
            "alpha": state.alpha,
        },
        log_loss_base=base.log_loss,
        log_loss_before=before,
        log_loss=now.log_loss,
        log_loss_exact=log_loss_exact,
        logit_change=_logit_change(now, base),
    )


def state_folder(bundle: str | os.PathLike[str]) -> Path:
    """Where the customized adapter of a bundle is kept: beside it."""
    path = Path(bundle).absolute()
    return path.with_name(f"{path.name}.customized")


def kept_examples(folder: Path) -> list[Example]:
    """The examples of the adapter in a folder, to customize again when the pool or the base is another one.

    Raises:
        InvalidInput: there are none.
    """
    return read_examples(folder / EXAMPLES)


def read_state(folder: Path) -> State:
    """Where the adapter in a folder comes from.

    Raises:
        ManifestError: there is none, or its state.json is damaged.
    """
    where = folder / STATE
    try:
        raw = json.loads(where.read_bytes())
        check_version(raw, str(where))
        return msgspec.convert(raw, State)
    except OSError as e:
        raise ManifestError(f"the model is not customized: {e.strerror}", where=where) from None
    except ValueError as e:  # also msgspec's
        raise ManifestError(str(e), where=where, do="customize the model again") from None


def _prove(now: Score, base: Score, before: float, customized: bool) -> None:
    if not np.isfinite(now.log_loss):
        raise _Refused("the log-loss of the examples is not a number with it")
    if _logit_change(now, base) < SMALLEST_CHANGE:
        raise _Refused("it does not change what the model says")
    if now.log_loss > before * (1 + TOLERANCE):
        earlier = "the earlier adapter's" if customized else "the base model's"
        raise _Refused(f"the log-loss of the examples is {now.log_loss:.4f} with it; {earlier} is {before:.4f}")


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
