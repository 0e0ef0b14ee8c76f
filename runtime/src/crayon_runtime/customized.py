"""What is kept of a customization beside its model: the adapter, the examples that it was made of, and how it was made.

BUNDLE.customized/adapter/                an adapter bundle, for `Engine.set_adapter`
BUNDLE.customized/examples.jsonl          the examples; they never leave the device
BUNDLE.customized/examples.safetensors    what the customized model makes of them, `ExampleStates`; neither do these
BUNDLE.customized/state.json              `State`
BUNDLE.customized/routing.json            when to ask the server LLM, if that was calibrated: `crayon_runtime.routing.calibration`
BUNDLE.customized/keys.json               those that a service has to sign with, if any were given
BUNDLE.customized.cache/                  what `PoolClient` keeps, and the last `Refusal`; it may be removed
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from crayon_runtime import backends
from crayon_runtime.bundle import Bundle
from crayon_runtime.errors import CrayonError, InvalidInput, ManifestError, ServerError
from crayon_runtime.examples import Example, ExampleStates, check_examples, read_examples
from crayon_runtime.files import atomic_file
from crayon_runtime.manifest import (
    MOST_PROTOTYPES,
    AdapterDtype,
    ExecutorchSlots,
    ExecutorchVariant,
    Serial,
    Sha256,
    check_version,
)
from crayon_runtime.pool import Mode, Pool, PoolManifest
from crayon_runtime.prototypes import SIZE
from crayon_runtime.remote import PoolClient
from crayon_runtime.sampling import is_integer
from crayon_runtime.signing import KEYS, TrustedKeys, verify_signature

ADAPTER, EXAMPLES, STATES, STATE = "adapter", "examples.jsonl", "examples.safetensors", "state.json"
ROUTING = "routing.json"

DECIMALS = 4
"""More of alpha is not sent: a service rounds to as many."""


class Settings(Struct, frozen=True, kw_only=True):
    """How an adapter is made of examples and a pool; see `customize`."""

    digits: int | None = None
    noise: float = 0.0
    refine: bool = False
    refine_evaluations: int = 60
    seed: int = 0
    blend: Mode | None = None
    rank: int | None = None
    dtype: AdapterDtype | None = None
    rank_limit: int | None = None
    prototypes: int = SIZE
    backend: str = "onnx"
    """That answers with the adapter."""

    def checked(self, pool: Pool | PoolClient) -> Settings:
        """These settings as they apply to a pool, with those that do nothing left at their defaults.

        Raises:
            InvalidInput: one is not for such a pool, or out of range.
        """
        wrong: dict[str, object]
        if isinstance(pool, Pool):
            wrong = {"dtype": self.dtype, "rank_limit": self.rank_limit}
            where, do = "a pool on this device", "leave it out"
        else:
            wrong = {"refine": self.refine or None, "blend": self.blend, "rank": self.rank}
            where, do = "a service", "customize with a pool on this device"
        if not is_integer(self.prototypes) or not 0 <= self.prototypes <= MOST_PROTOTYPES:
            raise InvalidInput(
                f"prototypes is {self.prototypes!r}; it must be from 0 to {MOST_PROTOTYPES}", where="prototypes"
            )
        for name, value in wrong.items():
            if value is not None:
                raise InvalidInput(f"{name} is not for {where}", where=name, do=do)
        plain = self if self.refine else msgspec.structs.replace(self, refine_evaluations=60, seed=0)
        if isinstance(pool, Pool):
            return plain
        digits = DECIMALS if self.digits is None else min(self.digits, DECIMALS)
        return msgspec.structs.replace(plain, digits=digits)


class State(Struct, frozen=True, kw_only=True):
    """state.json: where a customized adapter comes from."""

    schema_version: str = "1.0"
    base_fingerprint: Sha256
    pool_name: str
    pool_version: str
    made_from: str = ""
    """See `made_from`."""
    newest_serial: Serial = 0
    """Of the pools that were accepted from a service."""
    settings: Settings = Settings()
    alpha: list[float]
    refined: bool
    log_loss: float


def state_folder(bundle: str | os.PathLike[str]) -> Path:
    """Where the customized adapter of a bundle is kept: beside it."""
    path = Path(bundle).absolute()
    return path.with_name(f"{path.name}.customized")


def backend_for(model: Bundle, backend: str, folder: Path) -> str:
    """The backend to load where a model is customized, or may be: "auto" is then one that the adapter in place was made for, or if there
    is none one that takes adapters.

    Args:
        folder: where the adapter is kept.
    """
    if backend != "auto":
        return backend
    try:
        able = backends.served(Bundle.open(folder / ADAPTER))
    except CrayonError:
        slots = slots_of(model)
        able = [name for name in backends.NAMES if name != "executorch" or slots is not None]
    usable = backends.available(model)
    chosen = [name for name in usable if name in able]
    return chosen[0] if chosen and chosen != usable else backend


def slots_of(model: Bundle) -> ExecutorchSlots | None:
    """The slots for adapters in a model's program for ExecuTorch."""
    variant = model.model.variants.executorch
    return variant.slots if isinstance(variant, ExecutorchVariant) else None


def cache_folder(folder: Path) -> Path:
    """What belongs to such a folder, and may be removed: beside it."""
    return folder.with_name(f"{folder.name}.cache")


def made_from(
    base_fingerprint: str, examples: Iterable[Sequence[str]], pool: PoolManifest, settings: Settings
) -> Sha256:
    """The SHA-256 of all that an adapter depends on.

    Args:
        settings: as `Settings.checked` gives them.
    """
    texts = [example._asdict() for example in check_examples(examples)]
    return hashlib.sha256(msgspec.json.encode([base_fingerprint, texts, pool, settings])).hexdigest()


def current(folder: Path, made_from: str, trusted: TrustedKeys | None = None) -> State | None:
    """The state of the adapter in place, if it was made from the same, and is whole.

    Args:
        trusted: keys, of which one that is not revoked must have signed it.
    """
    try:
        state = read_state(folder)
        adapter = Bundle.open(folder / ADAPTER)
        if trusted is not None:
            verify_signature(adapter, trusted)
    except CrayonError:
        return None
    same = state.made_from == made_from and adapter.as_adapter.base_fingerprint == state.base_fingerprint
    return state if same else None


class Refusal(Struct, frozen=True):
    """refused.json: the last adapter that did not prove itself, so that it is not fetched again every day."""

    made_from: str
    instead_of: str
    """What the adapter in place was made from; empty if there was none."""
    reason: str


def remember_refusal(folder: Path, made_from: str, reason: str) -> None:
    """Raises OutputError if the disk is full."""
    with atomic_file(cache_folder(folder) / _REFUSED) as file:
        file.write(msgspec.json.encode(Refusal(made_from, _in_place(folder), reason)))


def refused_before(folder: Path, made_from: str) -> str | None:
    """Why an adapter that was made from the same was refused the last time; None if it was not, or another one was in place."""
    try:
        last = msgspec.json.decode((cache_folder(folder) / _REFUSED).read_bytes(), type=Refusal)
    except (OSError, ValueError, RecursionError):
        return None
    return last.reason if (last.made_from, last.instead_of) == (made_from, _in_place(folder)) else None


def check_serial(pool: PoolManifest, folder: Path, *, allow_older: bool = False) -> None:
    """Refuse, with ServerError, a pool of a service that is older than one that was accepted for this folder before."""
    newest = newest_serial(folder)
    if pool.serial < newest and not allow_older:
        raise ServerError(
            f"the service offers pool {pool.name} {pool.version} with serial {pool.serial}; "
            f"one with serial {newest} was accepted before",
            where=folder,
            do="ask whoever runs the service; if it went back to an older pool on purpose, use --allow-older",
        )


def newest_serial(folder: Path) -> Serial:
    """Of the pools that were accepted from a service; 0 if there was none, or the state is damaged."""
    try:
        return read_state(folder).newest_serial
    except ManifestError:
        return 0


def pinned_keys(folder: Path) -> TrustedKeys | None:
    """The keys that were given when the model was customized; None if none were.

    Raises:
        InvalidInput: they cannot be read.
    """
    return TrustedKeys.read(folder / KEYS) if (folder / KEYS).exists() else None


def kept_examples(folder: Path) -> list[Example]:
    """The examples of the adapter in a folder, to customize again when the pool or the base is another one.

    Raises:
        InvalidInput: there are none.
    """
    if not (folder / EXAMPLES).exists():
        raise InvalidInput(
            "the examples cannot be read: none are kept, as this model was not customized before",
            where=folder,
            do="give some with --examples FILE",
        )
    return read_examples(folder / EXAMPLES)


def example_states(folder: Path) -> ExampleStates | None:
    """What the customized model in a folder made of its examples; None if it was customized before such states were kept.

    Raises:
        IntegrityError: they are damaged.
    """
    return ExampleStates.read(folder / STATES) if (folder / STATES).exists() else None


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


def _in_place(folder: Path) -> str:
    try:
        return read_state(folder).made_from
    except ManifestError:
        return ""


_REFUSED = "refused.json"
