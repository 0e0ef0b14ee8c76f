"""How much a few texts belong to each cluster of a pool: from hidden states to alpha, in numpy.

    q(x)  = mean state of the text                                            (the Crayon paper's query)
    q(x)  = (answer - answer_mean) - (prompt - prompt_mean) @ ridge           (ours: the task residual)
    z     = (q - mean) @ projection                                           float32 [k]
    cos_n = z . indicator_n / |z|                                             float32 [N]
    alpha = softmax(cos / temperature)                                        float32 [N]; see `weights`

What is said in a text is predicted from its prompt; the residual is how the user wants it answered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from msgspec import Meta, Struct

from crayon_runtime.errors import InvalidInput

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

LARGEST_WEIGHT = 4.0
"""Alpha of a softmax is at most 1; noise, or the sum of raw cosines, leaves it well below this. Our choice."""


class Weighting(Struct, frozen=True):
    """How cosines become weights. The paper does not say; the softmax is our default."""

    kind: Literal["softmax", "relu", "topk", "raw"] = "softmax"
    temperature: Annotated[float, Meta(gt=0)] = 0.1
    top_k: Annotated[int, Meta(ge=1)] | None = None

    @property
    def signed(self) -> bool:
        """Whether weights may be negative."""
        return self.kind == "raw"


@dataclass(frozen=True)
class Projection:
    """Where a pool's clusters lie.

    Attributes:
        mean: float32 [d].
        projection: float32 [d, k].
        indicators: float32 [N, k], of unit length: the cluster centres.
        prompt_mean, answer_mean, ridge: float32 [d], [d] and [d, d], all three or none: what a query is freed of.
    """

    mean: Floats
    projection: Floats
    indicators: Floats
    prompt_mean: Floats | None = None
    answer_mean: Floats | None = None
    ridge: Floats | None = None

    @property
    def residual(self) -> bool:
        return self.ridge is not None

    def query(self, prompt_means: Floats | None, answer_means: Floats) -> Floats:
        """The query embeddings of n texts.

        Args:
            prompt_means: float [n, d], mean state of the prompt's tokens; needed for the task residual only.
            answer_means: float [n, d], mean state of the tokens that the pool's embedding is made of: of the answer, for the task
                residual.

        Returns:
            float32 [n, d].

        Raises:
            InvalidInput: an array has another shape, or holds NaN or infinity.
        """
        answers = self._checked("answer_means", answer_means)
        if self.ridge is None or self.prompt_mean is None or self.answer_mean is None:
            return answers
        if prompt_means is None:
            raise InvalidInput("the task residual needs the mean states of the prompts", where="prompt_means")
        prompts = self._checked("prompt_means", prompt_means)
        if len(prompts) != len(answers):
            raise InvalidInput(f"there are {len(prompts)} prompts and {len(answers)} answers", where="prompt_means")
        residual = (answers - self.answer_mean) - (prompts - self.prompt_mean) @ self.ridge
        return residual.astype(np.float32)

    def cosines(self, query: Floats) -> Floats:
        """The cosine between a query, float [d], and each indicator: float32 [N]. All 0 for a query that projects to nothing."""
        z: Floats = (self._checked("query", query[None])[0] - self.mean) @ self.projection
        length = float(np.linalg.norm(z))
        if length < np.finfo(np.float32).tiny:
            return np.zeros(len(self.indicators), np.float32)
        return np.clip(self.indicators @ (z / length), -1, 1).astype(np.float32)

    def _checked(self, name: str, states: Floats) -> Floats:
        states = np.asarray(states, np.float32)
        if states.ndim != 2 or states.shape[1] != len(self.mean) or not len(states):
            raise InvalidInput(f"states of shape {states.shape}; this pool takes [n, {len(self.mean)}]", where=name)
        if not np.isfinite(states).all():
            raise InvalidInput("a state holds NaN or infinity", where=name)
        return states


def weights(cosines: Floats, weighting: Weighting) -> Floats:
    """Alpha from cosines, float32 [N]; it sums to 1 unless it is raw.

    softmax: exp(cos / temperature), normalized. topk: the same over the `top_k` largest cosines (1 if not given), others 0.
    relu: max(cos, 0), normalized; uniform where no cosine is positive. raw: the cosines themselves, which are signed: with A and B
    blended separately, alpha and -alpha are the same adapter.
    """
    cosines = np.asarray(cosines, np.float32)
    if weighting.kind == "raw":
        return cosines.copy()
    if weighting.kind == "relu":
        alpha = np.maximum(cosines, 0)
        total = alpha.sum()
        return alpha / total if total > 0 else np.full_like(cosines, 1 / len(cosines))
    scaled = cosines / np.float32(weighting.temperature)
    alpha = np.exp(scaled - scaled.max())
    if weighting.kind == "topk":
        alpha[np.argsort(-cosines, kind="stable")[weighting.top_k or 1 :]] = 0
    normalized: Floats = alpha / alpha.sum()
    return normalized


def alpha(projection: Projection, weighting: Weighting, prompt_means: Floats | None, answer_means: Floats) -> Floats:
    """Alpha of n texts of one user, float32 [N]: the weights of their mean query. Arguments as `Projection.query`."""
    query: Floats = projection.query(prompt_means, answer_means).mean(0)
    return weights(projection.cosines(query), weighting)


def check_alpha(alpha: npt.ArrayLike, adapters: int, *, signed: bool = False) -> Floats:
    """float32 [N]: an alpha from elsewhere, which can be blended.

    Args:
        signed: whether negative weights are meant.

    Raises:
        InvalidInput: it has another length, or a weight is NaN, infinite, negative or larger than `LARGEST_WEIGHT`.
    """
    try:
        checked = np.asarray(alpha, np.float64)
    except (TypeError, ValueError, OverflowError) as e:
        raise InvalidInput(f"alpha is not a list of numbers: {e}", where="alpha") from None
    if checked.shape != (adapters,):
        raise InvalidInput(
            f"alpha has shape {list(checked.shape)}; this pool has {adapters} adapters",
            where="alpha",
            do="compute alpha with this pool's projection",
        )
    for n, value in enumerate(checked.tolist()):
        if not abs(value) <= LARGEST_WEIGHT or (value < 0 and not signed):
            lowest = -LARGEST_WEIGHT if signed else 0.0
            raise InvalidInput(
                f"weight {n} is {value}; it must be from {lowest:g} to {LARGEST_WEIGHT:g}", where="alpha"
            )
    return checked.astype(np.float32)
