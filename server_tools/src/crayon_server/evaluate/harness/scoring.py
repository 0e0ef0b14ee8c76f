"""Log-likelihoods of many texts with one KV cache: what a text has in common with others is computed once.

The texts are taken in lexicographic order of their tokens. Then all that share a beginning follow each other, so the cache goes back
from one to the next by what they do not share, and a position's scores are used, while they are there, for every text that runs
through it: the choices of a question cost its prompt once, and choices of one token cost nothing more.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crayon_runtime.session import PREFILL_CHUNK, common_prefix
from crayon_server.evaluate.harness.rows import rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from crayon_runtime import Engine

    Ids = npt.NDArray[np.int64]


class Text(NamedTuple):
    """A sequence, and what of it is scored.

    Attributes:
        ids: int64 [S], S >= 2; S - 1 <= the context length.
        start: the first token that is scored, 1 <= start < S.
    """

    ids: Ids
    start: int


class Score(NamedTuple):
    """Of the scored tokens of a text.

    Attributes:
        log_likelihood: natural logarithm of their probability after those before them.
        is_greedy: whether each was the likeliest.
    """

    log_likelihood: float
    is_greedy: bool


class Scorer:
    """Scores texts with an engine's present adapter.

    Args:
        reuse: compute what texts have in common once; False is for measuring what that saves.
    """

    def __init__(self, engine: Engine, *, reuse: bool = True) -> None:
        self._cache = engine.backend.new_cache(engine.present_adapter)
        self._reuse = reuse
        self.asked, self.computed = 0, 0
        """Tokens of all texts so far, and how many of them were computed."""

    def score(self, texts: Sequence[Text], on_text: Callable[[int], None] = lambda _: None) -> list[Score]:
        """In the order of the texts.

        Args:
            on_text: called with 1 when a text is done.
        """
        fed = [text.ids[:-1] for text in texts]  # nothing is asked of what follows the last token
        order = sorted(range(len(texts)), key=lambda i: fed[i].tolist())
        shared = [common_prefix(fed[a], fed[b]) if self._reuse else 0 for a, b in pairwise(order)]
        self._sums, self._greedy = np.zeros(len(texts)), np.ones(len(texts), np.bool_)
        for at, i in enumerate(order):
            begin, end = shared[at - 1] if at else 0, len(fed[i])
            self.asked += end
            if begin < end or not at:
                # Those that run through what is computed now, and how far.
                through, common, later = [(i, end)], end, at
                while later < len(shared) and (common := min(common, shared[later])) > begin:
                    later += 1
                    through.append((order[later], common))
                self._compute(texts, fed[i], begin, through)
            on_text(1)
        return [Score(float(total), bool(all_best)) for total, all_best in zip(self._sums, self._greedy, strict=True)]

    def _compute(self, texts: Sequence[Text], fed: Ids, begin: int, through: Sequence[tuple[int, int]]) -> None:
        """Feed one text from `begin` on, and score all that run through it."""
        self._cache.rewind(begin)
        self.computed += len(fed) - begin
        wanted = [(i, max(texts[i].start - 1, begin), end) for i, end in through]
        first = min(start for _, start, end in wanted if start < end)
        for start in range(begin, len(fed), PREFILL_CHUNK):
            chunk = fed[start : start + PREFILL_CHUNK]
            if first >= start + len(chunk):
                self._cache.prefill(chunk)
                continue
            skipped = max(first - start, 0)
            logits, position = rows(self._cache, chunk, skipped), start + skipped
            best, largest = logits.argmax(1), logits.max(1)
            totals = largest + np.log(np.exp(logits - largest[:, None]).sum(1, dtype=np.float64))
            for i, own, end in wanted:
                here = np.arange(max(own, position), min(end, start + len(chunk)))
                if len(here):
                    tokens, row = texts[i].ids[here + 1], here - position
                    self._sums[i] += (logits[row, tokens] - totals[row]).sum()
                    self._greedy[i] &= bool((best[row] == tokens).all())

    def close(self) -> None:
        self._cache.close()
