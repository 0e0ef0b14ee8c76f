"""Blending the LoRAs of a pool into one adapter, module by module, so that one module is in memory at a time.

    separate   A = sum_n alpha_n A_n, B = sum_n alpha_n B_n      rank r      the Crayon paper's; cross terms are part of its training
    concat     B A = sum_n alpha_n B_n A_n, exactly              rank N*r    A stacked, B side by side and scaled by alpha_n
    svd        the best rank-`rank` approximation of concat      rank        through Gram matrices of the factors, never forming B A

What a weight W gets is `scale * B A`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from crayon_runtime import half
from crayon_runtime.bundle import write_adapter
from crayon_runtime.errors import AdapterError, InvalidInput

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.backends.onnx_adapter import Tensor
    from crayon_runtime.bundle import Bundle
    from crayon_runtime.bundle.adapter import Slots
    from crayon_runtime.manifest import AdapterDtype, BlendedFrom
    from crayon_runtime.prototypes import Prototypes

    Floats = npt.NDArray[np.float32]
    Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]

Mode = Literal["separate", "concat", "svd"]
MODES: tuple[Mode, ...] = ("separate", "concat", "svd")

_ROUNDING = 1e-7
"""Singular values that are smaller than this part of the largest are not told from 0."""


@dataclass(frozen=True)
class Blended:
    """One adapter, blended of several. Made by `Pool.blend`; nothing is computed before it is asked for."""

    loras: Sequence[Mapping[str, Pair]]
    """Those whose weight is not 0."""
    alpha: Floats
    """float32: their weights."""
    scale: float
    mode: Mode
    rank: int
    """Of every module; less where a matrix is smaller than it."""

    @classmethod
    def of(
        cls, loras: Sequence[Mapping[str, Pair]], alpha: Floats, scale: float, mode: Mode, rank: int | None = None
    ) -> Blended:
        """Check what is asked for.

        Args:
            loras: N >= 1 of them, each by module A [r, in] and B [out, r].
            alpha: float32 [N].
            rank: of "svd", from 1 to r times the number of weights that are not 0; None: r.

        Raises:
            InvalidInput: there is no such mode, or the rank does not fit it.
        """
        if mode not in MODES:
            raise InvalidInput(f"blend is {mode!r}; it must be one of {', '.join(MODES)}", where="blend")
        used: list[int] = np.flatnonzero(alpha).tolist() or [0]
        own = max(a.shape[0] for a, _ in loras[0].values())
        exact = own * len(used)
        if rank is not None and mode != "svd":
            raise InvalidInput(f"a rank is for svd; {mode} has its own", where="rank")
        if rank is not None and not 1 <= rank <= exact:
            raise InvalidInput(f"rank is {rank}; it must be from 1 to {exact}", where="rank")
        ranks = {"separate": own, "concat": exact, "svd": rank or own}
        return cls([loras[n] for n in used], alpha[used], scale, mode, ranks[mode])

    def limited(self, rank: int) -> Blended:
        """This blend, truncated as svd truncates if its rank is above a limit.

        Args:
            rank: >= 1.
        """
        return self if self.rank <= rank else replace(self, rank=rank)

    @property
    def tensors(self) -> Mapping[str, tuple[Floats, Floats]]:
        """By module A float32 [rank, in] and B float32 [out, rank], without the scale; computed whenever it is asked for."""
        return _Modules(self.loras[0].keys(), self._module)

    def shape(self, module: str) -> tuple[int, int, int]:
        """(in, rank, out) of a module."""
        a, b = self.loras[0][module]
        rank = min(self.rank, a.shape[1], b.shape[0]) if self._truncates(module) else self.rank
        return a.shape[1], rank, b.shape[0]

    def _truncates(self, module: str) -> bool:
        own = self.loras[0][module][0].shape[0] * (1 if self.mode == "separate" else len(self.loras))
        return self.mode == "svd" or self.rank < own

    @cached_property
    def error(self) -> float:
        """|B A - sum_n alpha_n B_n A_n| / |sum_n alpha_n B_n A_n|, Frobenius norms over all modules; about 1e-8 is none."""
        wrong = right = 0.0
        for module, (a, b) in self.tensors.items():
            exact_a, exact_b = (x.astype(np.float64) for x in self._stacked(module))
            right += _square(exact_a, exact_b)
            wrong += _square(np.vstack([exact_a, a]), np.hstack([exact_b, -b.astype(np.float64)]))
        return math.sqrt(max(wrong, 0.0) / right) if right else 0.0

    def _module(self, module: str) -> tuple[Floats, Floats]:
        if self.mode == "separate":
            a, b = self._sum(module, 0), self._sum(module, 1)
        else:
            a, b = self._stacked(module)
        return _truncated(a, b, self.shape(module)[1]) if self._truncates(module) else (a, b)

    def _sum(self, module: str, side: int) -> Floats:
        """sum_n alpha_n A_n (side 0), or of B (side 1)."""
        total = np.zeros(self.loras[0][module][side].shape, np.float32)
        term = np.empty_like(total)
        for weight, lora in zip(self.alpha, self.loras, strict=True):
            _weigh(module, lora[module][side], weight, term)
            np.add(total, term, out=total)
        return total

    def _stacked(self, module: str) -> tuple[Floats, Floats]:
        """The factors of the exact blend: A [N*r, in], B [out, N*r] scaled by alpha."""
        (rank, inside), outside = self.loras[0][module][0].shape, self.loras[0][module][1].shape[0]
        a = np.empty((len(self.loras), rank, inside), np.float32)
        b = np.empty((outside, len(self.loras), rank), np.float32)
        part = np.empty((outside, rank), np.float32)
        for n, (weight, lora) in enumerate(zip(self.alpha, self.loras, strict=True)):
            _weigh(module, lora[module][0], 1.0, a[n])
            _weigh(module, lora[module][1], weight, part)
            b[:, n] = part
        return a.reshape(-1, inside), b.reshape(outside, -1)


def _weigh(module: str, matrix: npt.NDArray[Any], weight: float, out: Floats) -> None:
    """Write `weight * matrix` as float32; AdapterError if the matrix is not finite."""
    if matrix.dtype == np.float16:
        finite = half.to_float(matrix, out, weight)
    else:
        np.multiply(matrix, np.float32(weight), out=out)
        finite = bool(np.isfinite(out).all())
    if not finite:
        raise AdapterError(f"{module} holds NaN or infinity", do="fetch or build the pool again")


class _Modules(Mapping[str, "tuple[Floats, Floats]"]):
    """Computes a module when it is asked for."""

    def __init__(self, modules: Iterable[str], compute: Callable[[str], tuple[Floats, Floats]]) -> None:
        self._modules = tuple(modules)
        self._compute = compute

    def __getitem__(self, module: str) -> tuple[Floats, Floats]:
        if module not in self._modules:
            raise KeyError(module)
        return self._compute(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def write_adapter_bundle(
    blended: Blended,
    out: str | os.PathLike[str],
    *,
    name: str,
    base_fingerprint: str,
    dtype: AdapterDtype | None = "fp32",
    executorch: Slots | None = None,
    pool: BlendedFrom | None = None,
    prototypes: Prototypes | None = None,
    replace: bool = False,
) -> Bundle:
    """Write a blend as an adapter bundle, one module at a time; it appears at `out` when it is whole.

    Args:
        dtype, executorch, pool, prototypes: see `write_adapter`.

    Raises:
        OutputError: the target exists, or cannot be written.
        AdapterError: a module holds NaN, infinity or what the dtype cannot, or there is more than an adapter file holds.
    """
    return write_adapter(
        Path(out),
        onnx_tensors(blended),
        name=name,
        base_fingerprint=base_fingerprint,
        dtype=dtype,
        executorch=executorch,
        pool=pool,
        prototypes=prototypes,
        replace=replace,
    )


def onnx_tensors(blended: Blended) -> dict[str, Tensor]:
    """As `write_adapter` takes them: A [in, rank], and B [rank, out] with the scale in it."""
    waiting: dict[str, Floats] = {}  # B of the module whose A was written last

    def a(module: str) -> Floats:
        matrix, waiting[module] = blended.tensors[module]
        return matrix.T

    def b(module: str) -> Floats:
        scaled: Floats = waiting.pop(module).T * np.float32(blended.scale)
        return scaled

    tensors: dict[str, Tensor] = {}
    for module in blended.tensors:
        inside, rank, outside = blended.shape(module)
        tensors[f"{module}.lora_A.weight"] = (inside, rank), partial(a, module)
        tensors[f"{module}.lora_B.weight"] = (rank, outside), partial(b, module)
    return tensors


def _truncated(a: Floats, b: Floats, rank: int) -> tuple[Floats, Floats]:
    """The best approximation of b @ a of a rank (Eckart-Young); a [m, in], b [out, m]. Both get the root of the singular values.

    With A A^T = V_A S_A^2 V_A^T, B^T B = V_B S_B^2 V_B^T and S_B V_B^T V_A S_A = U s W^T, the singular values of B A are s, its right
    singular vectors times B A are B V_A S_A W, and its left ones are likewise U^T S_B V_B^T A: nothing is divided by S, and only
    matrices of [m, m] are decomposed. In float64, because Gram matrices square what they are made of.
    """
    v_a, s_a = _roots(a.astype(np.float64))
    v_b, s_b = _roots(b.T.astype(np.float64))
    left, right = s_b[:, None] * v_b.T, v_a * s_a
    u, s, wt = np.linalg.svd(left @ right)
    kept = s[:rank]
    inverse_root = np.divide(1.0, np.sqrt(kept), out=np.zeros_like(kept), where=kept > kept[0] * _ROUNDING)
    inner_a = inverse_root[:, None] * (u[:, :rank].T @ left)
    inner_b = (right @ wt[:rank].T) * inverse_root
    return inner_a.astype(np.float32) @ a, b @ inner_b.astype(np.float32)


def _roots(wide: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """V and S of `wide @ wide.T = V S^2 V^T`."""
    squares, v = np.linalg.eigh(wide @ wide.T)
    return v, np.sqrt(np.maximum(squares, 0.0))


def _square(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """|b @ a|^2, Frobenius, from the Gram matrices of the factors."""
    return float(np.sum((b.T @ b) * (a @ a.T)))
