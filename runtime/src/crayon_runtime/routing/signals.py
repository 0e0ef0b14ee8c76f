"""Numbers that say how good the device's own answer is, from what was computed while it was made: no forward pass is run for them.

    log_probability        mean log-probability of the answer's tokens, nats                              (ours)
    log_odds               log(p / (1 - p)) of p = exp(log_probability), at most .999: the same order, on a scale on which a logistic
                           regression fits better than on that of log-probabilities, whose tail of bad answers is long     (ours)
    least_log_probability  that of the least likely token                                                 (ours)
    prototypes_mean        mean over s in S of cos(e, s), e the answer's mean state                        (the Crayon paper's r(x))
    prototypes_max         the largest cos(e - m, s - m), m the mean of all the pool's prototypes          (ours)
    prototypes_top_k       mean of the five largest                                                       (ours)
    projected_mean, _max, _top_k    the same three in the pool's projected space, where its clusters lie   (ours)
    examples_top_k         as prototypes_top_k, to the answers of the user's own examples                  (ours)
    examples_nearness      -log(1.01 - the largest of these): ten examples of three tasks are three or four of each, and of these
                           the nearest tells most                                                         (ours)
    prompts_top_k          mean of the five largest cos(p, p'), p the prompt's mean state, p' those of the user's own examples:
                           known before the first token                                                   (ours)
    prompts_nearness       -log(1.01 - the largest of these)                                              (ours)

Higher is always better. With fewer than five to compare with, all of them count. What cannot be computed is NaN: an answer of which no
token was fed, or a state or log-probability that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np

from crayon_runtime.errors import InvalidInput

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.affinity import Projection
    from crayon_runtime.examples import ExampleStates
    from crayon_runtime.prototypes import Prototypes

    Floats = npt.NDArray[np.float32]

TOP_K: Final = 5
"""As in the trial in which these signals were compared."""

LARGEST_PROBABILITY: Final = 0.999
_NEAREST: Final = 0.01
"""Where log-odds and nearness end, so that an answer that is all but certain, or all but an example, does not outweigh everything else.
Our choice."""

SIGNALS: Final = (
    "log_probability",
    "log_odds",
    "least_log_probability",
    "prototypes_mean",
    "prototypes_max",
    "prototypes_top_k",
    "projected_mean",
    "projected_max",
    "projected_top_k",
    "examples_top_k",
    "examples_nearness",
    "prompts_top_k",
    "prompts_nearness",
)


class Said(Protocol):
    """What signals are computed of: a `Generation`, also one that is still running, or `States`."""

    @property
    def prompt_tap(self) -> Floats | None: ...

    @property
    def answer_tap(self) -> Floats | None: ...

    @property
    def log_probabilities(self) -> Sequence[float]: ...


class States(NamedTuple):
    """An answer that was made elsewhere; the fields are those of `Generation`."""

    prompt_tap: Floats | None
    answer_tap: Floats | None
    log_probabilities: Sequence[float]


@dataclass(frozen=True, slots=True)
class Reference:
    """What an answer is compared with, as rows of unit length. Made by `of`."""

    names: frozenset[str]
    """The signals that can be computed with it."""
    center: Floats
    """float32 [D]: what is subtracted from an answer's state, and was from those that it is compared with."""
    answers: Floats
    """float32 [M + n, D]: the prototypes, then the examples' answers, centred."""
    prototypes: int
    """M."""
    raw_mean: Floats
    """float32 [D]: mean of the prototypes, each of unit length and not centred, so that one product gives the paper's mean of cosines."""
    prompts: Floats
    """float32 [n, D]: of the examples."""
    projection: Projection | None
    projected: Floats
    """float32 [M, k]."""

    @classmethod
    def of(
        cls, prototypes: Prototypes | None, examples: ExampleStates | None, projection: Projection | None = None
    ) -> Reference:
        """Make ready what there is; signals of what there is not cannot be computed.

        Args:
            prototypes: S of this user.
            examples: states of the user's own examples.
            projection: of the pool; for the projected signals.

        Raises:
            InvalidInput: they are of different sizes.
        """
        names = {"log_probability", "log_odds", "least_log_probability"}
        states = np.empty((0, 0), np.float32) if prototypes is None else prototypes.states
        answers = np.empty((0, 0), np.float32) if examples is None else examples.answer
        prompts = np.empty((0, 0), np.float32) if examples is None else examples.prompt
        if len(states):
            names |= {"prototypes_mean", "prototypes_max", "prototypes_top_k"}
        if len(states) and projection is not None:
            names |= {"projected_mean", "projected_max", "projected_top_k"}
        if len(answers):
            names |= {"examples_top_k", "examples_nearness", "prompts_top_k", "prompts_nearness"}
        sizes = {part.shape[1] for part in (states, answers, prompts) if len(part)}
        sizes |= {len(projection.mean)} if projection is not None else set()
        if len(sizes) > 1:
            raise InvalidInput(
                f"prototypes, examples and projection are of states of different sizes: {sorted(sizes)}",
                where="reference",
                do="customize the model again",
            )
        size = max(sizes, default=0)
        # Hidden states have much in common whatever the text: without their mean, cosines tell of what is particular.
        center = np.zeros(size, np.float32) if prototypes is None else np.asarray(prototypes.mean, np.float32)
        rows = [units(part - center) for part in (states, answers) if len(part)]
        return cls(
            names=frozenset(names),
            center=center,
            answers=np.ascontiguousarray(np.concatenate(rows)) if rows else np.empty((0, size), np.float32),
            prototypes=len(states),
            raw_mean=units(states).mean(0) if len(states) else np.zeros(size, np.float32),
            prompts=units(prompts) if len(prompts) else np.empty((0, size), np.float32),
            projection=projection,
            projected=units(_project(projection, states))
            if projection and len(states)
            else np.empty((0, 0), np.float32),
        )

    def check(self, names: Iterable[str]) -> None:
        """Refuse, with InvalidInput, signals that nobody knows or that cannot be computed with this."""
        for name in names:
            if name in self.names:
                continue
            if name not in SIGNALS:
                raise InvalidInput(
                    f"there is no signal {name!r}", where="signals", do=f"choose of {', '.join(SIGNALS)}"
                )
            kind = name.partition("_")[0]
            what, do = _LACKING[kind]
            raise InvalidInput(f"the signal {name} needs {what}", where="signals", do=do)


_LACKING: Final = {
    "prototypes": (
        "prototypes, and this adapter came without any",
        "customize with a pool that has them (`crayon pool prototypes`), or choose another policy",
    ),
    "projected": (
        "prototypes and the pool's projection",
        "give the projection to `Reference.of`, or choose another policy",
    ),
    "examples": ("the user's own examples", "customize the model on this device, or choose another policy"),
    "prompts": ("the user's own examples", "customize the model on this device, or choose another policy"),
}


def signals(said: Said, reference: Reference, names: Iterable[str]) -> dict[str, float]:
    """The signals of an answer by name, in the order asked for.

    Args:
        said: an answer, whole or so far.
        names: which to compute.

    Returns:
        NaN for what cannot be computed of this answer.

    Raises:
        InvalidInput: a signal is not known, or the reference lacks what it needs.
    """
    names = tuple(names)
    if not reference.names.issuperset(names):
        reference.check(names)
    answer = said.answer_tap
    if answer is None:
        return dict.fromkeys(names, math.nan)
    computed: dict[str, float] = {}
    kinds = {name.partition("_")[0] for name in names}
    if not kinds.isdisjoint(("log", "least")):
        _log_probabilities(said.log_probabilities, computed)
    if not kinds.isdisjoint(("prototypes", "examples")):
        _answers(answer, reference, names, computed)
    if "prompts" in kinds:
        prompt = said.prompt_tap
        if prompt is None:
            computed["prompts_top_k"] = computed["prompts_nearness"] = math.nan
        else:
            _examples("prompts", reference.prompts @ unit(prompt), computed)
    if "projected" in kinds:
        assert reference.projection is not None  # otherwise it cannot give this signal
        cosines = reference.projected @ unit(_project(reference.projection, answer))
        _three("projected", cosines, computed)
    return {name: computed[name] for name in names}


_CENTRED: Final = frozenset({"prototypes_max", "prototypes_top_k", "examples_top_k", "examples_nearness"})


def _log_probabilities(each: Sequence[float], computed: dict[str, float]) -> None:
    mean = sum(each) / len(each) if each else math.nan
    usable = math.isfinite(mean)  # NaN and infinities of either sign spread to the mean
    computed["log_probability"] = mean if usable else math.nan
    computed["log_odds"] = odds(mean) if usable else math.nan
    computed["least_log_probability"] = min(each) if usable else math.nan


def _answers(answer: Floats, reference: Reference, names: tuple[str, ...], computed: dict[str, float]) -> None:
    """Cosines to prototypes and examples, both with one product."""
    if "prototypes_mean" in names:
        computed["prototypes_mean"] = float(reference.raw_mean @ unit(answer))
    if _CENTRED.isdisjoint(names):
        return
    cosines = reference.answers @ unit(answer - reference.center)
    count = reference.prototypes
    if "prototypes_top_k" in names:
        computed["prototypes_top_k"] = top_k(cosines[:count])
    if "prototypes_max" in names:
        computed["prototypes_max"] = float(cosines[:count].max())
    if "examples_top_k" in names or "examples_nearness" in names:
        _examples("examples", cosines[count:], computed)


def _examples(kind: str, cosines: Floats, computed: dict[str, float]) -> None:
    computed[f"{kind}_top_k"] = top_k(cosines)
    computed[f"{kind}_nearness"] = nearness(cosines)


def _three(kind: str, cosines: Floats, computed: dict[str, float]) -> None:
    computed[f"{kind}_mean"] = float(cosines.mean())
    computed[f"{kind}_max"] = float(cosines.max())
    computed[f"{kind}_top_k"] = top_k(cosines)


def top_k(cosines: Floats) -> float:
    """Mean of the `TOP_K` largest of float [n], or of all where there are fewer; NaN if one is NaN. Sorts them in place."""
    cosines.sort()  # NaN to the end; of numbers this few, a list's sum is the faster one
    largest: list[float] = cosines[-TOP_K:].tolist()
    return sum(largest) / len(largest)


def nearness(cosines: Floats) -> float:
    """-log(1.01 - the largest) of float [n], which are sorted."""
    return -math.log(1 + _NEAREST - min(float(cosines[-1]), 1.0))


def odds(log_probability: float) -> float:
    """log(p / (1 - p)) of a log-probability, p at most `LARGEST_PROBABILITY`."""
    capped = min(log_probability, math.log(LARGEST_PROBABILITY))
    return capped - math.log(-math.expm1(capped))


def unit(state: npt.NDArray[Any]) -> Floats:
    """A state, float [D], at unit length, float32; all NaN if it is not finite. One without a direction stays 0, and so do its cosines."""
    wide = state.astype(np.float64)  # in which no square overflows
    square = float(wide @ wide)
    if not square < math.inf:
        return np.full(len(state), math.nan, np.float32)
    row: Floats = (wide / math.sqrt(square) if square else wide).astype(np.float32)
    return row


def units(states: npt.NDArray[Any]) -> Floats:
    """States, float [n, D], each at unit length: float32 [n, D]."""
    lengths = np.linalg.norm(states, axis=1, keepdims=True)
    rows: Floats = (states / np.where(lengths, lengths, 1)).astype(np.float32)
    return rows


def _project(projection: Projection, answers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Answers' states, float [D] or [n, D], where the pool's clusters lie: float [k] or [n, k].

    A pool with the task residual frees a state of what its prompt explains; nobody keeps the prompts of prototypes, so here each counts
    as the mean prompt.
    """
    mean = projection.mean if projection.answer_mean is None else projection.mean + projection.answer_mean
    with np.errstate(invalid="ignore", over="ignore"):  # the caller makes NaN of what is not finite
        projected: npt.NDArray[Any] = (answers - mean) @ projection.projection
    return projected
