"""Prototypes S: embeddings of what the server LLM answers, for a device to compare its own answers with.

The server LLM answers inputs that are typical of each cluster of a pool, and the un-customized base embeds what it said: mean state at the
pool's tap over the answer's tokens, given the input, as devices embed their own answers. A pool holds all T prototypes, by cluster; an
adapter bundle the M of them that alpha picks. What was asked and said stays on the server.

    POOL/prototypes.safetensors       states float16 [T, D], clusters int32 [T] (ascending), mean float32 [D]
    ADAPTER/prototypes.safetensors    states float16 [M, D], mean float32 [D]

`mean` is that of all T. In their metadata both say what they are of: the base's fingerprint, and in an adapter the pool's version.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crayon_runtime.affinity import LARGEST_WEIGHT
from crayon_runtime.errors import AdapterError, IntegrityError, InvalidInput
from crayon_runtime.mapped import read_mapped

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.bundle.reader import Bundle

    Floats = npt.NDArray[np.float32]
    Indices = npt.NDArray[np.int64]

FILE = "prototypes.safetensors"
SIZE = 64
"""Of S, unless somebody asks for another. Our choice."""
_ORIGIN = (
    "origin"  # the only key: safetensors writes several in any order, and the same adapter must have the same bytes
)
_HEADER = 4096
_PARTS = 1_000_000  # that a weight is counted in


@dataclass(frozen=True)
class Prototypes:
    """S of one user.

    Attributes:
        states: float32 [M, D], M >= 1: mean tapped states over the tokens of an answer, as they are.
        mean: float32 [D]: of all prototypes of the pool.
        model: the server LLM's name, for people.
    """

    states: Floats
    mean: Floats
    model: str

    def to_bytes(self, base_fingerprint: str, pool_version: str | None) -> bytes:
        """The file of an adapter bundle. The same prototypes give the same bytes.

        Raises:
            InvalidInput: a state is NaN, or too large for float16.
        """
        return _save({"states": _half(self.states), "mean": self.mean}, _origin(base_fingerprint, pool_version))


@dataclass(frozen=True)
class ClusteredPrototypes:
    """All prototypes of a pool; those of a cluster begin with that of its most typical input.

    Attributes:
        states: float16 or float32 [T, D]; of a pool that was opened, in its file.
        clusters: int [T], ascending: the cluster of each.
        mean: float32 [D].
        model: the server LLM's name, for people.
    """

    states: npt.NDArray[Any]
    clusters: npt.NDArray[Any]
    mean: Floats
    model: str

    def picked(self, alpha: npt.ArrayLike, size: int = SIZE) -> Prototypes | None:
        """S for one alpha: `choose` of them, at most `size`; None if that is 0."""
        chosen = choose(alpha, self.clusters, size)
        return Prototypes(self.states[chosen].astype(np.float32), self.mean, self.model) if len(chosen) else None

    def to_bytes(self, base_fingerprint: str) -> bytes:
        """The file of a pool. The same prototypes give the same bytes.

        Raises:
            InvalidInput: a state is NaN, or too large for float16.
        """
        tensors: dict[str, npt.NDArray[Any]] = {
            "states": _half(self.states),
            "clusters": np.asarray(self.clusters, np.int32),
            "mean": self.mean,
        }
        return _save(tensors, _origin(base_fingerprint, None))


def choose(alpha: npt.ArrayLike, clusters: npt.ArrayLike, size: int) -> Indices:
    """Which prototypes are S for one alpha: min(size, T) of them. Our choice; in whole numbers, so that it is the same everywhere.

    Each cluster gives a share of its weight, where that is positive (largest remainder; the earlier cluster where these are equal), but
    no more than it has; what it lacks the others give, those without a weight last. A cluster gives its first ones.

    Args:
        alpha: float [N], in any range that can be blended.
        clusters: int [T], ascending.
        size: >= 0.

    Returns:
        int64, ascending: indices into `clusters`.

    Raises:
        InvalidInput: there are clusters that alpha knows nothing of, a weight is NaN or infinite, or the size is negative.
    """
    weights = np.asarray(alpha, np.float64)
    indices = np.asarray(clusters, np.int64)
    if (
        size < 0
        or not np.isfinite(weights).all()
        or (len(indices) and not 0 <= indices.min() <= indices.max() < len(weights))
    ):
        raise InvalidInput(f"{size} prototypes of clusters that {len(weights)} weights are for", where="prototypes")
    room = np.bincount(indices, minlength=len(weights)).tolist()
    parts = [max(0, round(weight * _PARTS)) for weight in np.clip(weights, 0, LARGEST_WEIGHT).tolist()]
    given = [0] * len(parts)
    left = min(size, sum(room))
    while left:
        shares = _shares(parts, given, room, left)
        given = [min(had + share, most) for had, share, most in zip(given, shares, room, strict=True)]
        left = min(size, sum(room)) - sum(given)
    firsts = np.searchsorted(indices, np.arange(len(parts)))
    return np.concatenate([first + np.arange(count) for first, count in zip(firsts, given, strict=True)]).astype(
        np.int64
    )


def read_prototypes(adapter: Bundle, size: int) -> Prototypes | None:
    """S that came with an adapter; None if none did.

    Args:
        size: D, of the model's tapped state.

    Raises:
        AdapterError: they are of another base, of another version of the pool, or of another size.
        IntegrityError: they hold NaN or infinity, or the file is damaged.
        ManifestError: the bundle is no adapter.
    """
    manifest = adapter.as_adapter
    if (info := manifest.prototypes) is None:
        return None
    path = adapter.file(info.file)
    if path.stat().st_size > 2 * size * info.count + 4 * size + _HEADER:
        raise AdapterError(
            f"{info.count} prototypes of states of {size} take less room than this", where=path, do="customize again"
        )
    tensors, metadata = read_mapped(path)
    version = manifest.pool.version if manifest.pool else None
    _check_origin(metadata, _origin(manifest.base_fingerprint, version), path)
    _check_shapes(tensors, {"states": (info.count, size), "mean": (size,)}, path)
    return Prototypes(_finite(tensors["states"], path), _finite(tensors["mean"], path), info.model)


def read_clustered(
    path: Path, base_fingerprint: str, *, model: str, count: int, adapters: int, size: int
) -> ClusteredPrototypes:
    """Read a pool's; the states stay in their file.

    Args:
        count: T.
        adapters: N.
        size: D.

    Raises:
        AdapterError: they are of another base, or of another size.
        IntegrityError: they hold NaN or infinity, their clusters are not in order or not there, or the file is damaged.
    """
    tensors, metadata = read_mapped(path)
    _check_origin(metadata, _origin(base_fingerprint, None), path)
    _check_shapes(tensors, {"states": (count, size), "clusters": (count,), "mean": (size,)}, path)
    clusters = tensors["clusters"].astype(np.int64)
    if clusters[0] < 0 or clusters[-1] >= adapters or (np.diff(clusters) < 0).any():
        raise IntegrityError(
            "the prototypes' clusters are not in order, or not there", where=path, do="fetch the pool again"
        )
    if not np.isfinite(tensors["states"]).all():
        raise _not_finite(path)
    return ClusteredPrototypes(tensors["states"], clusters, _finite(tensors["mean"], path), model)


def _shares(parts: list[int], given: list[int], room: list[int], left: int) -> list[int]:
    """`left` of them, by the largest remainder, among the clusters that have some left: those with a weight, if there are any."""
    open_ = [had < most for had, most in zip(given, room, strict=True)]
    weights = [part if is_open else 0 for part, is_open in zip(parts, open_, strict=True)]
    if not any(weights):
        weights = [int(is_open) for is_open in open_]
    total = sum(weights)
    shares = [left * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda n: (-(left * weights[n] % total), n))
    for n in by_remainder[: left - sum(shares)]:
        shares[n] += 1
    return shares


def _origin(base_fingerprint: str, pool_version: str | None) -> str:
    return base_fingerprint if pool_version is None else f"{base_fingerprint} {pool_version}"


def _half(states: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        halves = np.asarray(states).astype(np.float16)
    if not np.isfinite(halves).all():
        raise InvalidInput("a prototype holds NaN, or a number that is too large for float16", where="prototypes")
    return halves


def _save(tensors: dict[str, npt.NDArray[Any]], origin: str) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata={_ORIGIN: origin})


def _check_origin(metadata: dict[str, str], expected: str, path: Path) -> None:
    found = str(metadata.get(_ORIGIN, ""))
    if found == expected:
        return
    (base, _, version), (expected_base, _, expected_version) = found.partition(" "), expected.partition(" ")
    if base != expected_base:
        raise AdapterError(
            f"the prototypes are of another base ({base[:12]}…; expected {expected_base[:12]}…)",
            where=path,
            do="build it again; it was mixed from two builds",
        )
    raise AdapterError(
        f"the prototypes are of another version of the pool ({version[:16]}; expected {expected_version})",
        where=path,
        do="customize again",
    )


def _check_shapes(tensors: dict[str, npt.NDArray[Any]], shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != shapes:
        raise AdapterError(
            f"the prototypes are {found}; expected {shapes}",
            where=path,
            do="use prototypes that were made for this model, at its tap",
        )
    if any((tensor.dtype.kind == "i") != (name == "clusters") for name, tensor in tensors.items()):
        raise IntegrityError("the prototypes are no numbers of the kind that they should be", where=path)


def _finite(tensor: npt.NDArray[Any], path: Path) -> Floats:
    """A copy in memory, float32."""
    array = np.array(tensor, np.float32)
    if not np.isfinite(array).all():
        raise _not_finite(path)
    return array


def _not_finite(path: Path) -> IntegrityError:
    return IntegrityError("the prototypes hold NaN or infinity", where=path, do="make them again")
