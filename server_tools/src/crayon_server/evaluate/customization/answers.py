"""What is recorded of the answers to the benchmark's queries, and what a row says of them."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crayon_server.data.phone_assistant import score
from crayon_server.evaluate.exact_match import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from crayon_server.data.phone_assistant import Example, User
    from crayon_server.evaluate.float_model import FloatModel
    from crayon_server.pool.joint import JointLoras
    from crayon_server.training import Tokens

    Floats = npt.NDArray[np.float32]
    Bools = npt.NDArray[np.bool_]


class Answers(NamedTuple):
    """One row of one seed, an element per query.

    Attributes:
        exact: bool, the answer is the reference.
        intent: bool, the right function is called, in whatever convention.
        structure: bool, all but the values is as it should be.
        log_loss: float32, of the reference, nats per token.
    """

    exact: Bools
    intent: Bools
    structure: Bools
    log_loss: Floats


def answer(
    model: FloatModel,
    queries: Sequence[Example],
    texts: Sequence[Tokens],
    loras: JointLoras | None = None,
    alphas: Floats | None = None,
) -> Answers:
    """Answer queries, tokenized as `texts`, with the float model; see `FloatModel.force` for the rest.

    What is exactly right is found without generating it; only the wrong answers are then generated, to know what they got right.
    """
    exact, log_loss = model.force(texts, loras, alphas)
    intent, structure = exact.copy(), exact.copy()
    wrong: list[int] = np.flatnonzero(~exact).tolist()
    of_wrong = None if alphas is None else alphas[wrong]
    generated = model.generate([texts[i] for i in wrong], MAX_NEW_TOKENS, loras, of_wrong)
    for i, text in zip(wrong, generated, strict=True):
        judged = score(text, queries[i])
        intent[i], structure[i] = judged.intent, judged.structure
    return Answers(exact, intent, structure, log_loss)


@dataclass(frozen=True)
class Row:
    """Shares of the queries from 0 to 1, and log-loss in nats per answer token; means over seeds.

    Attributes:
        em: exact match. `em_seen` and `em_unseen`: of users whose convention training has or has not; None without such users.
        em_seeds: of each seed; one number where nothing was trained.
        em_deviation: between users (population standard deviation of their exact match).
        intent, structure: see `Answers`.
    """

    em: float
    em_seen: float | None
    em_unseen: float | None
    em_seeds: list[float]
    em_deviation: float
    intent: float
    structure: float
    log_loss: float


def summary(users: Sequence[User], seeds: Sequence[Answers]) -> Row:
    """A row from its answers with each seed; the users have equally many queries."""
    exact = np.stack([answers.exact for answers in seeds]).astype(np.float64)
    of_users = exact.reshape(len(seeds), len(users), -1).mean(2)
    seen = np.array([user.seen for user in users])
    return Row(
        em=float(exact.mean()),
        em_seen=float(of_users[:, seen].mean()) if seen.any() else None,
        em_unseen=float(of_users[:, ~seen].mean()) if not seen.all() else None,
        em_seeds=exact.mean(1).tolist(),
        em_deviation=fmean(pstdev(row) for row in of_users.tolist()),
        intent=fmean(float(answers.intent.mean()) for answers in seeds),
        structure=fmean(float(answers.structure.mean()) for answers in seeds),
        log_loss=fmean(float(answers.log_loss.mean()) for answers in seeds),
    )
