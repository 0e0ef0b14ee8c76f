"""From signals to a route: a weighted sum against a threshold. All policies are such sums; they differ in their numbers.

score = bias + sum of weight * signal        (logistic: 1 / (1 + exp(-score)), the probability that the device's answer is right)
score < threshold -> the server answers

paper        the mean cosine to S (the Crayon paper's)
confidence   the mean log-probability of the answer
calibrated   log-odds, top-k cosine to S, nearness to the user's own examples; see `crayon_runtime.routing.calibration`
early        log-odds of the first few tokens, and the prompt's nearness to the examples' prompts: so what is not for the device costs
             little
always       the server, unless it fails
never        the device
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Final, Literal, NamedTuple

from msgspec import Meta, Struct

from crayon_runtime.errors import InvalidInput
from crayon_runtime.routing.signals import SIGNALS

Route = Literal["device", "server"]

EARLY: Final = 4
"""Tokens after which `early` decides. Our choice: of a call, that is about its function's name."""

CONFIDENT: Final = math.log(0.9)
"""The threshold of `confidence` where nothing is known: tokens of .9 in the geometric mean. Our choice."""


class Decision(NamedTuple):
    """Who answers, and why."""

    route: Route
    score: float
    """NaN: there was no usable signal."""
    threshold: float
    reason: str


class Policy(Struct, frozen=True):
    """When the device asks the server."""

    name: str
    weights: dict[str, float]
    """By signal; none: the same decision for every answer, and nothing is computed for it."""
    bias: float
    threshold: float
    after: Annotated[int, Meta(ge=2)] | None = None
    """Decide after so many tokens of the answer; None: at its end. From 2 on, as an answer has no state before its second token."""
    logistic: bool = False

    def __post_init__(self) -> None:
        for name in self.weights:
            if name not in SIGNALS:
                raise InvalidInput(
                    f"policy {self.name!r} weighs a signal {name!r}, which there is not",
                    where="policy",
                    do=f"choose of {', '.join(SIGNALS)}",
                )
        if not all(map(math.isfinite, (self.bias, self.threshold, *self.weights.values()))):
            raise InvalidInput(f"policy {self.name!r} holds NaN or infinity", where="policy")
        if self.after is not None and self.after < 2:
            raise InvalidInput(f"after is {self.after}; a policy can decide from the second token on", where="policy")

    def decide(self, signals: Mapping[str, float]) -> Decision:
        """Who answers.

        Args:
            signals: by name; those that the policy does not weigh are ignored.

        Raises:
            InvalidInput: one that it weighs is missing.
        """
        if not self.weights:
            route: Route = "device" if self.bias >= self.threshold else "server"
            return Decision(route, self.bias, self.threshold, f"the policy is {self.name!r}")
        score = self.score(signals)
        if not math.isfinite(score):
            return Decision("server", math.nan, self.threshold, "no usable signal")
        if score < self.threshold:
            reason = f"the score {score:.3f} is below the threshold {self.threshold:.3f}"
            return Decision("server", score, self.threshold, reason)
        reason = f"the score {score:.3f} is not below the threshold {self.threshold:.3f}"
        return Decision("device", score, self.threshold, reason)

    def score(self, signals: Mapping[str, float]) -> float:
        """Higher: rather the device. NaN if a signal is."""
        total = self.bias
        for name, weight in self.weights.items():
            if name not in signals:
                raise InvalidInput(
                    f"policy {self.name!r} needs the signal {name}, which is missing",
                    where="signals",
                    do="compute it with `crayon_runtime.routing.signals`, or choose another policy",
                )
            total += weight * signals[name]
        return _sigmoid(total) if self.logistic else total


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    power = math.exp(x)  # NaN comes here, and stays
    return power / (1 + power)


def paper(threshold: float) -> Policy:
    """The Crayon paper's: r(x) < r_th asks the server. Which r_th depends on the model; `crayon route calibrate` finds one."""
    return Policy("paper", {"prototypes_mean": 1.0}, 0.0, threshold)


def confidence(threshold: float = CONFIDENT) -> Policy:
    """Asks the server where the mean log-probability of the answer's tokens, in nats, is below the threshold."""
    return Policy("confidence", {"log_probability": 1.0}, 0.0, threshold)


def always() -> Policy:
    """Asks the server first; the device answers only if that fails."""
    return Policy("always", {}, 0.0, 1.0)


def never() -> Policy:
    """The device answers, whatever it is."""
    return Policy("never", {}, 0.0, -1.0)


WEIGHED: Final = {
    "paper": ("prototypes_mean",),
    "confidence": ("log_probability",),
    "calibrated": ("log_odds", "prototypes_top_k", "examples_nearness"),
    "early": ("log_odds", "prompts_nearness"),
    "always": (),
    "never": (),
}
"""The signals of each policy by name; a calibration leaves out those that an adapter has not."""

PLAIN: Final[dict[str, Callable[[], Policy]]] = {"confidence": confidence, "always": always, "never": never}
"""Those that need no calibration."""
