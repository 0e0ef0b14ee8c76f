"""What it costs to make alpha less of a fingerprint, and how much of one it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crayon_runtime.customize import disguise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

NOISE = (0.02, 0.05, 0.1)
DIGITS = (4, 3, 2, 1)


@dataclass(frozen=True)
class Disguised:
    """What users lose and gain if noise is added to alpha, or it is rounded.

    Attributes:
        noise, digits: of `disguise`; 0 and None: alpha as it is.
        em: exact match, 0 to 1.
        recognized: share of the users whose alpha of ten other examples is most like (in cosine) their own alpha of the benchmark's
            examples, among those of all users; both are disguised.
    """

    noise: float
    digits: int | None
    em: float
    recognized: float


def privacy(
    alphas: Floats, again: Floats, exact_match: Callable[[Floats], float], *, seed: int, signed: bool
) -> Iterator[Disguised]:
    """Measure every noise and rounding.

    Args:
        alphas: float32 [users, N].
        again: the same users', of other examples.
        exact_match: of all queries, answered with such alphas.
        seed: of the noise.
        signed: whether alphas may be negative.
    """
    for noise, digits in [(0.0, None), *((noise, None) for noise in NOISE), *((0.0, digits) for digits in DIGITS)]:
        first, second = (
            np.stack([disguise(alpha, digits=digits, noise=noise, signed=signed, seed=start + i) for i, alpha in rows])
            for start, rows in ((2000 * seed, enumerate(alphas)), (2000 * seed + 1000, enumerate(again)))
        )
        yield Disguised(noise, digits, exact_match(first), recognized(first, second))


def recognized(alphas: Floats, again: Floats) -> float:
    """Share of the rows i of `again` whose largest cosine is that to row i of `alphas`, both float32 [users, N]."""
    cosines = _unit(again) @ _unit(alphas).T
    return float((cosines.argmax(1) == np.arange(len(alphas))).mean())


def _unit(rows: Floats) -> Floats:
    unit: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return unit
