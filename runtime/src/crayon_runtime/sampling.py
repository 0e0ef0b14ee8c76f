"""From logits to a token. This text is the specification: an implementation in any language gives the same tokens for a seed.

All of it is float32 where it says so, else float64. `z` are the V logits, float32.

0.  Where a constraint holds, only the tokens that it allows are there, in all that follows. It draws no random number.
1.  Repetition penalty p: for each token of the prompt and of the answer so far, once, z becomes z / p if z >= 0, else z * p. float32.
2.  Temperature 0 is greedy: the largest z, of several equal ones that with the smallest id. It draws no random number.
3.  Temperature t > 0: z becomes z / t, float32, and the candidates are all tokens, sorted by (z descending, id ascending).
4.  Top-k: keep the first k, and those that equal the k-th.
5.  Candidate i weighs w_i = exp(z_i - z_0); c_i is the sum of w_0 … w_i, added in this order. n candidates are left.
6.  Top-p: keep i if it is the first one, or if c_(i-1) < top_p * c_(n-1).
7.  Min-p: keep i if z_0 - z_i <= -ln(min_p); that is, if it is at least min_p times as likely as the first.
8.  Draw u. With the n candidates that are left, the token is the first i with c_i > u * c_(n-1); should rounding leave none, the first
    i with c_i = c_(n-1).

The order, and what each step keeps, are those of transformers' logits processors and warpers. Step 0 does what -inf as the logit of
all other tokens would do. The log-probability that is reported of a token is that of the plain softmax of all V logits, before step 0.

u is drawn once a token from SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014), in 64-bit integers that
wrap, from the state `seed`:

    state += 0x9E3779B97F4A7C15
    x = state
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    u = (x >> 11) * 2^-53

    seed 0        x = E220A8397B1DCDAF  6E789E6AA1B965F4  06C45D188009454F
                  u = 0.8833108082136426, 0.43152799704850997, 0.026433771592597743
    seed 1234567  x = 6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821
"""

from __future__ import annotations

import math
import secrets
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy as np

from crayon_runtime.errors import BackendError, InvalidInput

if TYPE_CHECKING:
    import numpy.typing as npt

    Bools = npt.NDArray[np.bool_]
    Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the next token is chosen. The default is greedy.

    Raises:
        InvalidInput: a value is out of range.
    """

    temperature: float = 0.0
    """0: always the most likely token; else at least 0.001."""
    top_k: int = 0
    """Only the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability; 1: all."""
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the most likely one; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the prompt or the answer already has become less likely (Keskar et al.: CTRL, 2019); 1: off."""
    seed: int | None = None
    """The same seed gives the same answer; None: another one each time."""

    def __post_init__(self) -> None:
        t = self.temperature
        _check("temperature", t, _is_number(t) and (t == 0 or 0.001 <= t <= 1000), "0, or from 0.001 to 1000")
        _check("top_k", self.top_k, is_integer(self.top_k) and self.top_k >= 0, "a whole number from 0")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            _check(name, value, _is_number(value) and 0 <= value <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, _is_number(penalty) and 0.01 <= penalty <= 100, "from 0.01 to 100")
        seed_fits = self.seed is None or (is_integer(self.seed) and 0 <= self.seed < 2**64)
        _check("seed", self.seed, seed_fits, "a whole number from 0 to 2^64 - 1")


class SplitMix64:
    """The generator of the module's specification."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def next(self) -> int:
        """64 random bits."""
        mask = 0xFFFF_FFFF_FFFF_FFFF
        self._state = x = (self._state + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    def uniform(self) -> float:
        """A float64 in [0, 1)."""
        return (self.next() >> 11) * 2.0**-53


class Sampler:
    """Chooses the tokens of one answer.

    All that grows with the vocabulary is allocated here, once; `sample` works in place, but for the ids that a constraint allows.

    Args:
        vocab_size: V.
    """

    log_probability = 0.0
    """Natural logarithm of the last token's probability in the plain softmax of its logits, before any option changed them."""

    def __init__(self, options: SamplingOptions, vocab_size: int) -> None:
        self._options = options
        self._best = self._log_sum = 0.0
        self._random = SplitMix64(secrets.randbits(64) if options.seed is None else int(options.seed))
        self._scores = np.empty(vocab_size, np.float32)
        self._scratch = np.empty(vocab_size, np.float32)
        self._kept = np.empty(vocab_size, np.float32)
        self._mask = np.empty(vocab_size, np.bool_)
        self._seen = np.zeros(vocab_size, np.bool_)
        sorts = options.temperature > 0
        self._distances = np.empty(vocab_size if sorts else 0, np.float64)
        self._weights = np.empty(vocab_size if sorts else 0, np.float64)

    def observe(self, tokens: int | npt.NDArray[np.int64]) -> None:
        """Tell of tokens of the prompt, for the repetition penalty. Sampled tokens are known already."""
        self._seen[tokens] = True

    @np.errstate(over="ignore")  # the lowest float32, a common mask, may become -inf
    def sample(self, logits: Floats, allowed: Bools | None = None) -> int:
        """Choose a token.

        Args:
            logits: float32 [V], left as they are. A token with -inf is never chosen.
            allowed: bool [V], of a constraint: the tokens to choose from; None: all.

        Raises:
            BackendError: there is a NaN or +inf among them, or nothing but -inf.
            InvalidInput: no allowed token has a logit above -inf.
        """
        best = float(logits.max())
        if not abs(best) < 1e30:  # NaN is not either
            raise BackendError(
                f"the model's logits are not usable: their maximum is {best}",
                do="`crayon verify` tells whether the bundle is damaged",
            )
        scores = self._penalize(logits)
        ids = None if allowed is None else allowed.nonzero()[0]
        if ids is not None:
            scores = scores.take(ids, out=self._kept[: ids.size], mode="clip")
            if not ids.size or scores.max() == -math.inf:
                raise InvalidInput(
                    "the model gives none of the tokens that the constraint allows a probability",
                    where="constraint",
                    do="allow something that the model can say",
                )
        chosen = int(scores.argmax()) if self._options.temperature == 0 else self._draw(scores)
        token = chosen if ids is None else int(ids[chosen])
        self._seen[token] = True
        self._best, self._log_sum = best, self._log_sum_of(logits, best)
        self.log_probability = float(logits[token]) - best - self._log_sum
        return token

    def most_likely(self, logits: Floats, count: int) -> Sequence[tuple[int, float]]:
        """The ids and log-probabilities of the likeliest tokens in the plain softmax of the logits that were last sampled from.

        Args:
            count: how many. One of probability 0 is not among them; of equally likely ones those with the smallest ids come first.
        """
        if not count:
            return ()
        place = max(logits.size - count, 0)
        least = np.partition(logits, place)[place]
        ids = np.flatnonzero(logits >= least)
        ids = ids[np.argsort(-logits[ids], kind="stable")][:count]
        return [(int(i), float(logits[i]) - self._best - self._log_sum) for i in ids if logits[i] > -math.inf]

    def _penalize(self, logits: Floats) -> Floats:
        penalty = np.float32(self._options.repetition_penalty)
        if penalty == 1:
            return logits
        scores, mask = self._scores, self._mask
        np.copyto(scores, logits)
        np.logical_and(np.greater_equal(scores, 0, out=mask), self._seen, out=mask)
        np.divide(scores, penalty, out=scores, where=mask)
        np.logical_and(np.less(scores, 0, out=mask), self._seen, out=mask)
        np.multiply(scores, penalty, out=scores, where=mask)
        return scores

    def _draw(self, scores: Floats) -> int:
        options = self._options
        scores = np.divide(scores, np.float32(options.temperature), out=self._scores[: scores.size])
        negated = self._candidates(scores)
        n = negated.size
        distances = self._distances[:n]
        np.copyto(distances, negated)
        np.subtract(distances, float(negated[0]), out=distances)
        weights = np.exp(np.negative(distances, out=self._weights[:n]), out=self._weights[:n])
        sums = np.cumsum(weights, out=weights)
        if options.top_p < 1:
            n = min(n, int(sums.searchsorted(options.top_p * sums[-1], "left")) + 1)
        if options.min_p > 0:
            n = min(n, int(distances.searchsorted(-math.log(options.min_p), "right")))
        sums = sums[:n]
        last = int(sums.searchsorted(sums[-1], "left"))
        drawn = min(int(sums.searchsorted(self._random.uniform() * sums[-1], "right")), last)
        return self._token_of(scores, negated, drawn)

    def _candidates(self, scores: Floats) -> Floats:
        """The scores that top-k keeps, negated and ascending: numpy sorts in that direction, and floats alone sort fastest."""
        negated = np.negative(scores, out=self._scratch[: scores.size])
        k = self._options.top_k
        if not 0 < k < negated.size:
            negated.sort()
            return negated
        negated.partition(k - 1)
        kept = int(np.count_nonzero(np.less_equal(negated, negated[k - 1], out=self._mask[: negated.size])))
        if kept > k:  # more tokens equal the k-th
            negated.partition(kept - 1)
        negated[:kept].sort()
        return negated[:kept]

    def _token_of(self, scores: Floats, negated: Floats, index: int) -> int:
        """The id of a candidate: of the tokens with its score, the smallest ids come first."""
        equal = np.equal(scores, -negated[index], out=self._mask[: scores.size])
        ties_before = index - int(negated.searchsorted(negated[index], "left"))
        if ties_before == 0:
            return int(equal.argmax())
        return bisect_left(range(equal.size), ties_before + 1, key=lambda i: int(np.count_nonzero(equal[: i + 1])))

    def _log_sum_of(self, logits: Floats, best: float) -> float:
        weights = np.subtract(logits, best, out=self._scratch)
        return math.log(np.exp(weights, out=weights).sum())


def is_integer(value: object) -> bool:
    """Whether it counts: a bool does not, nor does 3.0."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _check(name: str, value: object, holds: bool, wanted: str) -> None:
    if not holds:
        raise InvalidInput(f"{name} is {value!r}; it must be {wanted}", where=name)
