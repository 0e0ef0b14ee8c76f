"""How sure is sure enough: the numbers of a policy from answers whose signals are known, and where they are kept.

    fit               answers that are known to be right or wrong: logistic regression over the signals, then a threshold
    without_labels    answers of which that is not known: a sum of signals with fixed weights, and a quantile of it
    uncalibrated      nothing but the user's own examples: the same sum, and a threshold a bit below what they have

BUNDLE.customized/routing.json    `Calibration`: of one adapter, and ignored with another one
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct

from crayon_runtime.customized import ROUTING
from crayon_runtime.errors import InvalidInput, ManifestError
from crayon_runtime.files import atomic_file
from crayon_runtime.manifest import Sha256, check_version
from crayon_runtime.routing.policies import EARLY, WEIGHED, Policy
from crayon_runtime.routing.signals import Reference, nearness, odds, units

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.examples import ExampleStates

    Doubles = npt.NDArray[np.float64]
    Rows = Sequence[Mapping[str, float]]

PENALTY: Final = 1.0
"""On the squared weights of standardized signals, against the sum of log-losses: scikit-learn's default."""

SMALLEST: Final = {"log_odds": 0.5, "examples_nearness": 0.25, "prompts_nearness": 0.25}
SMALLEST_COSINE: Final = 0.05
"""What signals are divided by at least, as the answers may all be alike. Our choice."""

WORTH: Final = {"log_odds": 1.0, "examples_nearness": 0.5, "prompts_nearness": 0.5}
"""The weights where no labels say them. Both kinds are logarithms of a distance: to certainty, and to the nearest example. Chosen on the
benchmark's validation users, where the sum finds wrong answers as well as log-odds alone (AUROC .944 against .946; in task .848 against
.819), and queries out of task better (.879 against .767)."""

MARGIN: Final = 2.0
"""How far below the median of the user's own examples the threshold is, where there is nothing else. Each is compared with the others, of
which there are fewer than a new answer will have, and its log-probability is that of what the user wants said. On the validation users the
server gets 5 % of the queries in task, 14 % of those of other domains that the device knows too, and 91 % of those that only it can answer."""

_LARGEST = 1 << 20
_POINTS = 101

WITHOUT_LABELS: Final = {
    "calibrated": ("log_odds", "examples_nearness"),
    "early": ("log_odds", "prompts_nearness"),
    "confidence": WEIGHED["confidence"],
    "paper": WEIGHED["paper"],
}
"""Log-probability with the out-of-task check."""


class Point(Struct, frozen=True):
    """One threshold of the calibrated policy."""

    calls: float
    """Share of queries that go to the server."""
    accuracy: float | None
    """Share of answers that are right, where that is known. A server's answer counts as right unless the data say otherwise."""
    threshold: float


class Fit(NamedTuple):
    """What data say."""

    policies: list[Policy]
    curve: list[Point]
    """Of the policy "calibrated", from no calls to nothing but calls."""


class Calibration(Struct, frozen=True, kw_only=True):
    """routing.json."""

    schema_version: str = "1.0"
    adapter: Annotated[Sha256, Meta(description="of the manifest.json of the adapter that it was made with")]
    budget: float | None
    """The share of calls that was asked for; None: an accuracy was."""
    target_accuracy: float | None
    labelled: bool
    n: int
    """Answers that it was made of."""
    policies: list[Policy]
    curve: list[Point]

    def policy(self, name: str) -> Policy | None:
        return next((policy for policy in self.policies if policy.name == name), None)

    def write(self, folder: Path) -> Path:
        """Keep it beside the adapter. Raises OutputError: it cannot be written."""
        path = folder / ROUTING
        with atomic_file(path) as file:
            file.write(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        return path


def read_calibration(folder: Path) -> Calibration | None:
    """What is kept in a folder; None if there is nothing.

    Raises:
        ManifestError: it is damaged.
        SchemaTooNew: a newer version has written it.
    """
    path = folder / ROUTING
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ManifestError(f"it cannot be read: {e.strerror or e}", where=path) from None
    try:
        if len(content) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        raw = json.loads(content)
        check_version(raw, str(path))
        return msgspec.convert(raw, Calibration)
    except (ValueError, RecursionError, InvalidInput) as e:  # also msgspec's, and what a policy refuses
        what = e.what if isinstance(e, InvalidInput) else str(e)
        raise ManifestError(what, where=path, do="calibrate again with `crayon route calibrate`") from None


def adapter_sha256(adapter: Path) -> Sha256:
    """What tells the adapter bundle in a folder apart: the SHA-256 of its manifest.json."""
    return hashlib.sha256((adapter / "manifest.json").read_bytes()).hexdigest()


def fit(
    rows: Rows,
    correct: Sequence[bool],
    *,
    budget: float | None = None,
    target_accuracy: float | None = None,
    server_correct: Sequence[bool] | None = None,
    early: Rows | None = None,
    after: int = EARLY,
) -> Fit:
    """Policies from n answers that are known to be right or wrong.

    Args:
        rows: the signals of each answer.
        correct: whether the device's answer was right.
        budget: the share of queries that may go to the server, 0 to 1; or
        target_accuracy: the share of answers that shall be right, with as few calls as it takes.
        server_correct: whether the server's answer would be right; None: it always is.
        early: the signals after `after` tokens, for the policy "early".

    Returns:
        Every policy whose signals are there, with a threshold.

    Raises:
        InvalidInput: there are no answers, or no signals that all of them have; or that accuracy is not reached.
    """
    data = _Data(rows, correct, server_correct, budget, target_accuracy)
    policies = []
    for name, source, at in _sources(rows, early, after):
        names = _common(source, WEIGHED[name])
        if not names:
            continue
        policy = _summed(name, names, at)
        if name not in _ALONE:
            policy = _logistic(policy, names, source, correct)
        try:
            policies.append(data.with_threshold(policy, source))
        except _NotReached:
            if name == "calibrated":
                raise
    return Fit(policies, data.curve(policies, rows))


def without_labels(rows: Rows, *, budget: float, early: Rows | None = None, after: int = EARLY) -> Fit:
    """As `fit`, where nobody knows which answers are right: log-probability with the out-of-task check."""
    data = _Data(rows, None, None, budget, None)
    policies = []
    for name, source, at in _sources(rows, early, after):
        names = _common(source, WITHOUT_LABELS[name])
        if names:
            policies.append(data.with_threshold(_summed(name, names, at), source))
    return Fit(policies, data.curve(policies, rows))


def uncalibrated(reference: Reference, examples: ExampleStates) -> list[Policy]:
    """Policies from nothing but the user's own examples, which the device shall answer: what a device has right after it was customized.

    The examples' own answers were scored, not answers that the device gave, and each is compared with all others.

    Args:
        reference: with these examples.
    """
    rows = _examples_rows(reference, examples)
    policies = []
    for name in ("calibrated", "early", "paper"):
        names = _common(rows, WITHOUT_LABELS[name])
        if names:
            policy = _summed(name, names, EARLY if name == "early" else None)
            scores = [policy.score(row) for row in rows]
            threshold = min(scores) if name in _ALONE else float(np.median(scores)) - MARGIN
            policies.append(msgspec.structs.replace(policy, threshold=threshold))
    return policies


_ALONE = ("paper", "confidence")  # one signal as it is, so that thresholds mean something to people


class _NotReached(InvalidInput):
    """A target accuracy."""


class _Data:
    """What is asked of a threshold, and what it is found with."""

    def __init__(
        self,
        rows: Rows,
        correct: Sequence[bool] | None,
        server_correct: Sequence[bool] | None,
        budget: float | None,
        target_accuracy: float | None,
    ) -> None:
        if not rows:
            raise InvalidInput("there are no answers to calibrate with", where="data")
        if (budget is None) == (target_accuracy is None):
            raise InvalidInput("either a budget or a target accuracy is wanted", where="budget")
        for name, share in (("budget", budget), ("target accuracy", target_accuracy)):
            if share is not None and not 0 <= share <= 1:
                raise InvalidInput(f"the {name} is {share}; it must be from 0 to 1", where=name)
        if not any(any(map(math.isfinite, row.values())) for row in rows):
            do = "see that the model answers these prompts"
            raise InvalidInput("no answer has usable signals", where="data", do=do)
        n = len(rows)
        for each in (correct, server_correct):
            if each is not None and len(each) != n:
                raise InvalidInput(f"there are {n} answers, and {len(each)} labels", where="data")
        self.correct = None if correct is None else np.asarray(correct, bool)
        self._server = np.ones(n, bool) if server_correct is None else np.asarray(server_correct, bool)
        self._budget, self._target = budget, target_accuracy

    def with_threshold(self, policy: Policy, rows: Rows) -> Policy:
        order, scores = _ordered(policy, rows)
        return msgspec.structs.replace(policy, threshold=_threshold(scores, self._calls(order)))

    def curve(self, policies: Sequence[Policy], rows: Rows) -> list[Point]:
        policy = next((policy for policy in policies if policy.name == "calibrated"), None)
        if policy is None:
            return []
        order, scores = _ordered(policy, rows)
        n = len(rows)
        counts = sorted({round(n * i / (_POINTS - 1)) for i in range(_POINTS)})
        right = self._right(order)
        return [
            Point(count / n, None if right is None else float(right[count]) / n, _threshold(scores, count))
            for count in counts
        ]

    def _calls(self, order: npt.NDArray[np.int64]) -> int:
        """How many of n go to the server."""
        n = len(order)
        if self._budget is not None:
            return math.floor(self._budget * n + 1e-9)
        assert self._target is not None
        right = self._right(order)
        assert right is not None  # only labelled answers have a target
        enough = np.flatnonzero(right >= self._target * n - 1e-9)
        if not len(enough):
            raise _NotReached(
                f"the accuracy {self._target:g} is not reached; the most is {right.max() / n:.3f}",
                where="target accuracy",
                do="ask for less, or for a budget",
            )
        return int(enough[0])

    def _right(self, order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """int64 [n + 1]: right answers when the first 0 … n in this order go to the server."""
        if self.correct is None:
            return None
        gain = self._server[order].astype(np.int64) - self.correct[order]
        return int(self.correct.sum()) + np.concatenate([[0], np.cumsum(gain)])


def _sources(rows: Rows, early: Rows | None, after: int) -> list[tuple[str, Rows, int | None]]:
    """Name, rows and moment of each policy."""
    at_the_end: list[tuple[str, Rows, int | None]] = [
        (name, rows, None) for name in ("calibrated", "confidence", "paper")
    ]
    return at_the_end if early is None else [*at_the_end, ("early", early, after)]


def _common(rows: Rows, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if all(name in row for row in rows))


def _matrix(rows: Rows, names: Sequence[str]) -> Doubles:
    return np.array([[row[name] for name in names] for row in rows], np.float64).reshape(len(rows), len(names))


def _standard(x: Doubles, names: Sequence[str]) -> tuple[Doubles, Doubles]:
    """Mean and deviation of each signal, over the rows that are usable."""
    usable = x[np.isfinite(x).all(1)]
    return usable.mean(0), np.maximum(usable.std(0), [SMALLEST.get(name, SMALLEST_COSINE) for name in names])


def _summed(name: str, names: Sequence[str], after: int | None) -> Policy:
    """The sum of signals of known worth, or one signal alone as it is."""
    weights = {signal: WORTH[signal] for signal in names if signal in WORTH}
    return Policy(name, weights or dict.fromkeys(names, 1.0), 0.0, 0.0, after)


def _logistic(summed: Policy, names: Sequence[str], rows: Rows, correct: Sequence[bool]) -> Policy:
    """P(right) by logistic regression, its weights folded back to signals that are not standardized.

    Of every signal more is better by its definition; one that would weigh the other way says nothing, and is left out.
    """
    names = [*names]
    x = _matrix(rows, names)
    usable = np.isfinite(x).all(1)
    y = np.asarray(correct, np.float64)[usable]
    if len({*y.tolist()}) < 2:  # all right, or all wrong: they do not tell what tells these apart
        return summed
    mean, deviation = _standard(x, names)
    z = (x[usable] - mean) / deviation
    while True:
        bias, w = _regression(z, y)
        if not len(w) or w.min() >= 0:
            break
        kept = np.arange(len(w)) != w.argmin()
        z, mean, deviation = z[:, kept], mean[kept], deviation[kept]
        names = [name for name, keep in zip(names, kept, strict=True) if keep]
    if not names:  # none of them helps
        return summed
    weights = w / deviation
    return msgspec.structs.replace(
        summed,
        weights=dict(zip(names, weights.tolist(), strict=True)),
        bias=bias - float(weights @ mean),
        logistic=True,
    )


def _regression(x: Doubles, y: Doubles) -> tuple[float, Doubles]:
    """Bias, and weights float64 [d]: the minimum of log-loss + PENALTY / 2 |w|^2, by Newton's method.

    Args:
        x: float64 [n, d], standardized.
        y: float64 [n], 0 or 1, both of which occur.
    """
    design = np.hstack([np.ones((len(x), 1)), x])
    penalty = np.full(design.shape[1], PENALTY)
    penalty[0] = 0.0
    w = np.zeros(design.shape[1])

    def loss(w: Doubles) -> float:
        z = design @ w
        return float((np.logaddexp(0, z) - y * z).sum() + 0.5 * (penalty * w * w).sum())

    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ w, -500, 500)))
        gradient = design.T @ (p - y) + penalty * w
        hessian = (design.T * (p * (1 - p))) @ design + np.diag(penalty) + 1e-9 * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        size, now = 1.0, loss(w)
        while loss(w - size * step) > now and size > 1e-6:
            size /= 2
        w = w - size * step
        if np.abs(step).max() < 1e-9:
            break
    return float(w[0]), w[1:]


def _ordered(policy: Policy, rows: Rows) -> tuple[npt.NDArray[np.int64], Doubles]:
    """Rows from the lowest score to the highest, and the scores so: what has none goes to the server first."""
    scores = np.array([policy.score(row) for row in rows], np.float64)
    scores[~np.isfinite(scores)] = -np.inf
    order = np.argsort(scores, kind="stable")
    return order, scores[order]


def _threshold(scores: Doubles, calls: int) -> float:
    """What the lowest `calls` of ascending scores are below, and the others are not; of equal ones none goes."""
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        return 0.0
    calls = max(calls - (len(scores) - len(finite)), 0)
    if calls == len(finite):
        return float(np.nextafter(finite[-1], np.inf))
    kept = float(finite[calls])
    below = finite[:calls][finite[:calls] < kept]
    return kept if not len(below) else max((float(below[-1]) + kept) / 2, float(np.nextafter(below[-1], np.inf)))


def _examples_rows(reference: Reference, examples: ExampleStates) -> list[dict[str, float]]:
    """The signals of each example that a sum or "paper" weighs, compared with the others."""
    own = reference.answers[reference.prototypes :]
    rows = []
    for i, log_probability in enumerate(examples.log_probability.tolist()):
        row = {"log_odds": odds(log_probability)}
        if reference.prototypes:
            row["prototypes_mean"] = float(reference.raw_mean @ units(examples.answer[i : i + 1])[0])
        if len(own) > 1:
            for kind, cosines in (("examples", own @ own[i]), ("prompts", reference.prompts @ reference.prompts[i])):
                row[f"{kind}_nearness"] = nearness(np.sort(np.delete(cosines, i)))
        rows.append(row)
    return rows
