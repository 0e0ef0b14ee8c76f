"""Blending the LoRAs of a pool into one adapter, module by module, so that one module is in memory at a time.

    separate   A = sum_n alpha_n A_n, B = sum_n alpha_n B_n      rank r      the Crayon paper's; cross terms are part of its training
    concat     B A = sum_n alpha_n B_n A_n, exactly              rank N*r    A stacked, B side by side and scaled by alpha_n
    svd        the best rank-`rank` approximation of concat      rank        through QR of the stacked factors, never forming B A

What a weight W gets is `scale * B A`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from crayon_runtime.bundle import write_adapter
from crayon_runtime.errors import AdapterError, InvalidInput

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.backends.onnx_adapter import Tensor
    from crayon_runtime.bundle import Bundle
    from crayon_runtime.manifest import BlendedFrom

    Floats = npt.NDArray[np.float32]
    Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]

Mode = Literal["separate", "concat", "svd"]
MODES: tuple[Mode, ...] = ("separate", "concat", "svd")


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

    @property
    def tensors(self) -> Mapping[str, tuple[Floats, Floats]]:
        """By module A float32 [rank, in] and B float32 [out, rank], without the scale; computed whenever it is asked for."""
        return _Modules(self.loras[0].keys(), self._module)

    def shape(self, module: str) -> tuple[int, int, int]:
        """(in, rank, out) of a module."""
        a, b = self.loras[0][module]
        rank = min(self.rank, a.shape[1], b.shape[0]) if self.mode == "svd" else self.rank
        return a.shape[1], rank, b.shape[0]

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
        # Overflow (float16 stores, huge values) is checked below, for every mode.
        with np.errstate(over="ignore", invalid="ignore"):
            if self.mode == "separate":
                a, b = self._sum(module, 0), self._sum(module, 1)
            else:
                a, b = self._stacked(module)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise AdapterError(f"{module} holds NaN or infinity", do="fetch or build the pool again")
        return _truncated(a, b, self.shape(module)[1]) if self.mode == "svd" else (a, b)

    def _sum(self, module: str, side: int) -> Floats:
        """sum_n alpha_n A_n (side 0), or of B (side 1)."""
        total = np.zeros(self.loras[0][module][side].shape, np.float32)
        term = np.empty_like(total)
        for weight, lora in zip(self.alpha, self.loras, strict=True):
            np.copyto(term, lora[module][side])
            np.multiply(term, weight, out=term)
            np.add(total, term, out=total)
        return total

    def _stacked(self, module: str) -> tuple[Floats, Floats]:
        """The factors of the exact blend: A [N*r, in], B [out, N*r] scaled by alpha."""
        a = np.vstack([lora[module][0] for lora in self.loras], dtype=np.float32)
        b = np.hstack([lora[module][1] for lora in self.loras], dtype=np.float32)
        b *= np.repeat(self.alpha, b.shape[1] // len(self.alpha))
        return a, b


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
    pool: BlendedFrom | None = None,
    replace: bool = False,
) -> Bundle:
    """Write a blend as an adapter bundle, one module at a time; it appears at `out` when it is whole.

    Raises:
        OutputError: the target exists, or cannot be written.
        AdapterError: a module holds NaN or infinity, or there is more than an adapter file holds.
    """
    shapes = {module: blended.shape(module) for module in blended.tensors}
    return write_adapter(
        Path(out),
        _onnx_tensors(blended, shapes),
        name=name,
        base_fingerprint=base_fingerprint,
        pool=pool,
        replace=replace,
    )


def _onnx_tensors(blended: Blended, shapes: Mapping[str, tuple[int, int, int]]) -> dict[str, Tensor]:
    """As an ONNX adapter names them: A [in, rank], and B [rank, out] with the scale in it."""
    waiting: dict[str, Floats] = {}  # B of the module whose A was written last

    def a(module: str) -> Floats:
        matrix, waiting[module] = blended.tensors[module]
        return matrix.T

    def b(module: str) -> Floats:
        scaled: Floats = waiting.pop(module).T * np.float32(blended.scale)
        return scaled

    tensors: dict[str, Tensor] = {}
    for module, (inside, rank, outside) in shapes.items():
        tensors[f"{module}.lora_A.weight"] = (inside, rank), partial(a, module)
        tensors[f"{module}.lora_B.weight"] = (rank, outside), partial(b, module)
    return tensors


def _truncated(a: Floats, b: Floats, rank: int) -> tuple[Floats, Floats]:
    """The best approximation of b @ a of a rank (Eckart-Young); a [m, in], b [out, m]. Both get the root of the singular values."""
    q_a, r_a = np.linalg.qr(a.T)
    q_b, r_b = np.linalg.qr(b)
    u, s, vt = np.linalg.svd(r_b.astype(np.float64) @ r_a.T.astype(np.float64))
    root = np.sqrt(s[:rank])
    inner_a, inner_b = root[:, None] * vt[:rank], u[:, :rank] * root
    return (inner_a.astype(np.float32) @ q_a.T), (q_b @ inner_b.astype(np.float32))


def _square(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """|b @ a|^2, Frobenius, from the Gram matrices of the factors."""
    return float(np.sum((b.T @ b) * (a @ a.T)))
