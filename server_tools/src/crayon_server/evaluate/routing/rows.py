"""The rows of the benchmark: every signal and policy, what it is worth as a score, and what its threshold does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from crayon_runtime.routing.calibration import fit, without_labels
from crayon_runtime.routing.policies import EARLY
from crayon_runtime.routing.signals import SIGNALS
from crayon_server.evaluate.routing.answers import AFTER, PARTS
from crayon_server.evaluate.routing.metrics import (
    apgr,
    auroc_difference,
    auroc_interval,
    call_performance_threshold,
    calls_saved_at_equal_accuracy,
    curve,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from crayon_runtime.routing.policies import Policy
    from crayon_server.data.phone_assistant import User
    from crayon_server.evaluate.qa.intervals import Estimate
    from crayon_server.evaluate.routing.answers import Judged, Recorded

    Floats = npt.NDArray[np.float64]
    Bools = npt.NDArray[np.bool_]

Measure = Literal["exact", "useful", "oracle_server"]

BUDGET = 0.3
"""The share of calls that the policies' thresholds are found for, on other users than those that are reported."""
SHARES = np.linspace(0, 1, 21)
"""Of calls, at which the curves are written down."""


@dataclass(frozen=True)
class Row:
    """What a score is worth, means over the seeds. None: there is no such number.

    Attributes:
        auroc, auroc_in_task, auroc_other_domain: of "the device's answer is wrong", over all queries or those of one part.
        auroc_out_of_task: of "the query is not of what the device is customized for".
        apgr, cpt_50, cpt_80, calls_saved: see `metrics`.
        calls, accuracy: of a policy, with the threshold that it has: for `BUDGET`, from other users.
    """

    auroc: Estimate | None = None
    auroc_in_task: Estimate | None = None
    auroc_other_domain: Estimate | None = None
    auroc_out_of_task: Estimate | None = None
    apgr: float | None = None
    cpt_50: float | None = None
    cpt_80: float | None = None
    calls_saved: float | None = None
    calls: float | None = None
    accuracy: float | None = None


class Seed(NamedTuple):
    """What one pool gave: to the users that policies are fitted on, and to those that are reported."""

    fitted: Recorded
    reported: Recorded


class Scored(NamedTuple):
    """A row of one seed.

    Attributes:
        scores: float64 [n], of the reported queries, not NaN.
        to_server: bool [n], what the threshold says; None: there is no threshold.
    """

    scores: Floats
    to_server: Bools | None = None


class Asked(NamedTuple):
    """Of the reported queries: the name of who asks, and the part."""

    users: list[str]
    parts: npt.NDArray[np.str_]


def asked(users: Sequence[User]) -> Asked:
    """Of users whose queries are those of `answers.asking`."""
    parts = [part for part, count in PARTS.items() for _ in range(count)]
    return Asked([user.name for user in users for _ in parts], np.array(parts * len(users)))


def report(seeds: Sequence[Seed], server: Judged, oracle_server: Judged, asked: Asked) -> dict[str, Any]:
    """All numbers, as JSON: see `crayon_server.evaluate.routing.run`."""
    result: dict[str, Any] = {"rows": {}, "differences": {}, "early": {}, "curves": {}}
    measures: dict[Measure, tuple[Callable[[Judged], Bools], Bools]] = {
        "exact": (lambda judged: judged.exact, server.exact),
        "useful": (lambda judged: judged.useful, server.useful),
        "oracle_server": (lambda judged: judged.exact, oracle_server.exact),
    }
    for measure, (right, by_server) in measures.items():
        device = np.stack([right(seed.reported.judged) for seed in seeds])
        scored = [_scored(seed, right, by_server) for seed in seeds]
        rows = {name: [of_seed[name] for of_seed in scored] for name in scored[0]}
        result["rows"][measure] = {
            "always_small": asdict(Row(calls=0.0, accuracy=float(device.mean()))),
            "always_large": asdict(Row(calls=1.0, accuracy=float(by_server.mean()))),
        } | {name: asdict(_row(row, device, by_server, asked)) for name, row in rows.items()}
        result["differences"][measure] = _differences(rows, device, asked)
        result["early"][measure] = [_early(after, seeds, rows, device, by_server, right) for after in AFTER]
        result["curves"][measure] = {"calls": SHARES.tolist()} | {
            name: np.mean([_accuracies(*one, by_server) for one in zip(row, device, strict=True)], axis=0).tolist()
            for name, row in rows.items()
        }
    result["accuracy"] = _accuracy([seed.reported.judged for seed in seeds], server, oracle_server, asked)
    return result


def _scored(seed: Seed, right: Callable[[Judged], Bools], server: Bools) -> dict[str, Scored]:
    """Every row of one seed."""
    n = len(server)
    device = right(seed.reported.judged)
    ends, soon = named(seed.reported.signals), named(seed.reported.early[EARLY])
    known = named(seed.fitted.signals)
    fitted = fit(
        known,
        right(seed.fitted.judged).tolist(),
        budget=BUDGET,
        early=named(seed.fitted.early[EARLY]),
        after=EARLY,
    )
    labelled = {policy.name: policy for policy in fitted.policies}
    blind = next(policy for policy in without_labels(known, budget=BUDGET).policies if policy.name == "calibrated")
    return {
        "random": Scored(np.zeros(n)),
        "oracle": Scored(device.astype(np.float64) - server),
        **{name: Scored(_usable(seed.reported.signals[:, i])) for i, name in enumerate(SIGNALS)},
        "paper": _decided([labelled["paper"]] * n, ends),
        "confidence": _decided([labelled["confidence"]] * n, ends),
        "calibrated": _decided([labelled["calibrated"]] * n, ends),
        "without_labels": _decided([blind] * n, ends),
        "uncalibrated": _decided(seed.reported.uncalibrated, ends),
        "early": _decided([labelled["early"]] * n, soon),
    }


def named(signals: Floats) -> list[dict[str, float]]:
    """The signals of each answer by name, from float64 [n, `SIGNALS`]."""
    return [dict(zip(SIGNALS, row, strict=True)) for row in signals.tolist()]


def _decided(policies: Sequence[Policy], rows: Sequence[dict[str, float]]) -> Scored:
    decisions = [policy.decide(row) for policy, row in zip(policies, rows, strict=True)]
    scores = np.array([decision.score for decision in decisions])
    return Scored(_usable(scores), np.array([decision.route == "server" for decision in decisions]))


def _usable(scores: Floats) -> Floats:
    """Without a usable signal the server answers."""
    return np.where(np.isnan(scores), -np.inf, scores)


def _row(seeds: Sequence[Scored], device: Bools, server: Bools, asked: Asked) -> Row:
    """One row.

    Args:
        seeds: of each seed.
        device: bool [seeds, n], whether the device is right.
        server: bool [n].
    """
    scores = np.stack([scored.scores for scored in seeds])
    of_seeds = list(zip(scores, device, strict=True))
    routed = [
        (scored.to_server.mean(), np.where(scored.to_server, server, right).mean())
        for scored, right in zip(seeds, device, strict=True)
        if scored.to_server is not None
    ]
    return Row(
        auroc=_found(scores, ~device, asked),
        auroc_in_task=_found(scores, ~device, asked, "in_task"),
        auroc_other_domain=_found(scores, ~device, asked, "other_domain"),
        auroc_out_of_task=_found(scores, np.broadcast_to(asked.parts != "in_task", device.shape), asked),
        apgr=_mean([apgr(*one, server) for one in of_seeds]),
        cpt_50=_mean([call_performance_threshold(*one, server, 0.5) for one in of_seeds]),
        cpt_80=_mean([call_performance_threshold(*one, server, 0.8) for one in of_seeds]),
        calls_saved=_mean([calls_saved_at_equal_accuracy(*one, server) for one in of_seeds]),
        calls=float(np.mean([calls for calls, _ in routed])) if routed else None,
        accuracy=float(np.mean([accuracy for _, accuracy in routed])) if routed else None,
    )


def _found(scores: Floats, positives: Bools, asked: Asked, part: str | None = None) -> Estimate | None:
    """How well low scores tell the positives."""
    chosen = np.ones(len(asked.parts), np.bool_) if part is None else asked.parts == part
    groups = [user for user, is_chosen in zip(asked.users, chosen, strict=True) if is_chosen]
    return auroc_interval(-scores[:, chosen], positives[:, chosen], groups)


def _differences(rows: dict[str, list[Scored]], device: Bools, asked: Asked) -> dict[str, Estimate | None]:
    """How much better the calibrated policy finds wrong answers than log-probability alone."""
    calibrated, alone = (
        -np.stack([scored.scores for scored in rows[name]]) for name in ("calibrated", "log_probability")
    )
    within = asked.parts == "in_task"
    groups = [user for user, is_chosen in zip(asked.users, within, strict=True) if is_chosen]
    return {
        "all": auroc_difference(calibrated, alone, ~device, asked.users),
        "in_task": auroc_difference(calibrated[:, within], alone[:, within], ~device[:, within], groups),
    }


def _early(
    after: int,
    seeds: Sequence[Seed],
    rows: dict[str, list[Scored]],
    device: Bools,
    server: Bools,
    right: Callable[[Judged], Bools],
) -> dict[str, Any]:
    """The policy that decides after some tokens, beside the calibrated one that decides at the end.

    tokens: how many are decoded of answers that are then not shown, relative to deciding at the end, by the share of calls.
    """
    early, tokens = [], []
    for seed, whole in zip(seeds, rows["calibrated"], strict=True):
        soon = named(seed.fitted.early[after])
        labels = right(seed.fitted.judged).tolist()
        fitted = fit(named(seed.fitted.signals), labels, budget=BUDGET, early=soon, after=after)
        policy = next(policy for policy in fitted.policies if policy.name == "early")
        scores = _decided([policy] * len(server), named(seed.reported.early[after])).scores
        early.append(scores)
        tokens.append(
            _wasted(scores, np.minimum(seed.reported.tokens, after)) / _wasted(whole.scores, seed.reported.tokens)
        )
    scored = list(zip(early, device, strict=True))
    at_the_end = [(whole.scores, of_seed) for whole, of_seed in zip(rows["calibrated"], device, strict=True)]
    return {
        "after": after,
        "apgr": _mean([apgr(*one, server) for one in scored]),
        "apgr_at_the_end": _mean([apgr(*one, server) for one in at_the_end]),
        "tokens": dict(zip(map(str, BUDGETS), np.mean(tokens, axis=0).tolist(), strict=True)),
    }


BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5)


def _wasted(scores: Floats, tokens: npt.NDArray[np.int64]) -> Floats:
    """Tokens of the answers with the lowest scores, for each of `BUDGETS`."""
    spent = np.cumsum(tokens[np.argsort(scores, kind="stable")])
    return np.array([spent[max(1, round(budget * len(scores))) - 1] for budget in BUDGETS], np.float64)


def _accuracies(scored: Scored, device: Bools, server: Bools) -> Floats:
    routed = curve(scored.scores, device, server)
    return np.interp(SHARES, routed.calls, routed.accuracy)


def _accuracy(device: Sequence[Judged], server: Judged, oracle_server: Judged, asked: Asked) -> dict[str, Any]:
    """Shares of right answers: by who answers, measure and part."""
    of_device = {
        measure: np.mean([getattr(judged, measure) for judged in device], axis=0) for measure in ("exact", "useful")
    }
    by = {"device": of_device, "server": server._asdict(), "oracle_server": oracle_server._asdict()}
    parts = {"all": np.ones(len(asked.parts), np.bool_)} | {part: asked.parts == part for part in PARTS}
    return {
        who: {
            measure: {part: float(np.mean(answers[chosen])) for part, chosen in parts.items()}
            for measure, answers in measures.items()
        }
        for who, measures in by.items()
    }


def _mean(numbers: Sequence[float | None]) -> float | None:
    there = [number for number in numbers if number is not None]
    return fmean(there) if len(there) == len(numbers) else None
