"""The search of alpha, on functions whose best is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crayon_runtime.errors import InvalidInput
from crayon_runtime.refine import refine

BEST = np.array([0.7, 0.2, 0.05, 0.05], np.float32)
UNIFORM = np.full(4, 0.25, np.float32)


class Distance:
    """The square distance to the best, and every alpha that it was asked for."""

    def __init__(self) -> None:
        self.asked: list[np.ndarray] = []

    def __call__(self, alpha: Any) -> float:
        self.asked.append(alpha)
        return float(((alpha - BEST) ** 2).sum())


@pytest.mark.parametrize("seed", range(5))
def test_it_comes_near_the_best_within_its_budget(seed: int) -> None:
    distance = Distance()
    alpha, loss = refine(distance, UNIFORM, evaluations=100, seed=seed)
    assert len(distance.asked) == 100
    assert loss == min(map(Distance(), distance.asked))
    assert loss < 0.02
    assert (alpha.dtype, alpha.sum()) == (np.float32, pytest.approx(1))
    assert (alpha >= 0).all()


def test_the_start_is_the_first_evaluation_and_stays_where_nothing_is_better() -> None:
    distance = Distance()
    alpha, loss = refine(distance, BEST, evaluations=20)
    np.testing.assert_array_equal(distance.asked[0], BEST)
    np.testing.assert_array_equal(alpha, BEST)
    assert loss == 0
    assert refine(distance, UNIFORM, evaluations=1)[0] is UNIFORM


def test_a_weight_of_zero_can_be_left() -> None:
    wrong = np.array([0, 1, 0, 0], np.float32)
    alpha, _ = refine(Distance(), wrong, evaluations=200)
    assert alpha[0] > 0.5


def test_a_log_loss_that_is_no_number_is_never_better() -> None:
    alpha, loss = refine(lambda a: 1.0 if a is UNIFORM else float("nan"), UNIFORM, evaluations=10)
    assert alpha is UNIFORM
    assert loss == 1


def test_the_same_seed_gives_the_same_search() -> None:
    first, second, other = (refine(Distance(), UNIFORM, evaluations=30, seed=seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_what_is_not_searched() -> None:
    with pytest.raises(InvalidInput, match="negative weights"):
        refine(Distance(), UNIFORM - 0.5)
    with pytest.raises(InvalidInput, match="at least 1"):
        refine(Distance(), UNIFORM, evaluations=0)
