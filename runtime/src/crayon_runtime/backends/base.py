"""The seam between the engine and whatever multiplies the matrices.

A backend is one loaded model. It hands out caches; a cache is one sequence of tokens: its keys and values, and the adapter
that computed them. The engine, the profiler and the servers know only the protocols below, and tests script them with
`crayon_runtime.backends.fake`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from crayon_runtime.errors import AdapterError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from crayon_runtime.bundle import Bundle

    Floats = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.int64]


class Step(NamedTuple):
    """What one backend call returns. The arrays are views of buffers that the next call on the same cache overwrites."""

    logits: Floats
    """float32 [V]: scores of the token after the last one fed."""
    tap_sum: Floats
    """float32 [D]: the tapped hidden state, summed over the tokens fed by this call."""
    tap_last: Floats
    """float32 [D]: the tapped hidden state of the last token fed."""


@runtime_checkable
class Adapter(Protocol):
    """An adapter that a backend has read. It may be used by any number of caches, also while others use another one."""

    @property
    def name(self) -> str: ...


@runtime_checkable
class Cache(Protocol):
    """One sequence of tokens. Not safe for threads; the engine never shares one between two running answers."""

    @property
    def length(self) -> int:
        """Tokens held."""

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that this sequence is computed with; fixed while `length` > 0."""

    def prefill(self, ids: Ids) -> Step:
        """Append int64 [S] tokens, S >= 1, and return the scores after the last of them."""

    def decode(self, token: int) -> Step:
        """Append one token. Allocates nothing that grows with vocabulary or context."""

    def rewind(self, length: int) -> None:
        """Forget every token from position `length` on."""

    def reset(self, adapter: Adapter | None) -> None:
        """Forget everything, and compute with `adapter` from now on."""

    def close(self) -> None:
        """Free the buffers."""


@runtime_checkable
class Backend(Protocol):
    """One loaded model.

    Implementations have a classmethod `load(bundle, *, threads=None)`; `crayon_runtime.backends.load` picks one by name.
    """

    @property
    def name(self) -> str:
        """The key of the manifest's `variants` that this backend runs."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_length(self) -> int:
        """The most tokens that a cache holds."""

    @property
    def tap_size(self) -> int:
        """D, the width of the tapped hidden state."""

    def read_adapter(self, bundle: Bundle) -> Adapter:
        """Read an adapter bundle into memory; `AdapterError` if it does not fit this model."""

    def new_cache(self, adapter: Adapter | None = None) -> Cache: ...

    def close(self) -> None: ...


def check_base(adapter: Bundle, base_fingerprint: str) -> None:
    """Refuse an adapter of another base model.

    Raises:
        AdapterError: says of which.
    """
    manifest = adapter.as_adapter
    if manifest.base_fingerprint != base_fingerprint:
        raise AdapterError(
            f"adapter {manifest.name!r} was made for another base model "
            f"({manifest.base_fingerprint[:12]}…; this one is {base_fingerprint[:12]}…)",
            where=adapter.path,
            do="convert the adapter again with `crayon adapter convert … --bundle` and this bundle",
        )
