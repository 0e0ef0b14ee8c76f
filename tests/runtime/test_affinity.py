"""Judge: the definitions, written out in numpy, float64, one text at a time."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from crayon_runtime import affinity
from crayon_runtime.affinity import Projection, Weighting, check_alpha, weights
from crayon_runtime.errors import InvalidInput
from tests.runtime.pools import projection

PROMPTS, ANSWERS = np.random.default_rng(7).standard_normal((2, 5, 8)).astype(np.float32)
COSINES = np.array([0.9, -0.2, 0.3, 0.1], np.float32)


def defined_cosines(p: Projection) -> np.ndarray:
    queries = []
    for prompt, answer in zip(PROMPTS.astype(np.float64), ANSWERS.astype(np.float64), strict=True):
        if p.residual:
            answer = answer - p.answer_mean - p.ridge.T.astype(np.float64) @ (prompt - p.prompt_mean)  # type: ignore[union-attr]
        queries.append(answer)
    z = p.projection.T.astype(np.float64) @ (np.mean(queries, axis=0) - p.mean)
    return np.array([z @ c / np.linalg.norm(z) / np.linalg.norm(c) for c in p.indicators])


@pytest.mark.parametrize("residual", [True, False])
def test_alpha_of_several_texts(residual: bool) -> None:
    p = projection(residual=residual)
    cosines = defined_cosines(p)
    query = p.query(PROMPTS if residual else None, ANSWERS)
    assert (query.shape, query.dtype) == ((5, 8), np.float32)
    np.testing.assert_allclose(p.cosines(query.mean(0)), cosines, atol=1e-6)
    alpha = affinity.alpha(p, Weighting("softmax", 0.2), PROMPTS, ANSWERS)
    np.testing.assert_allclose(alpha, np.exp(cosines / 0.2) / np.exp(cosines / 0.2).sum(), rtol=1e-5)
    assert alpha.dtype == np.float32


@pytest.mark.parametrize(
    "weighting, expected",
    [
        (Weighting("softmax", 0.1), np.exp([9, -2, 3, 1]) / np.exp([9.0, -2, 3, 1]).sum()),
        (Weighting("topk", 0.1, 2), np.exp([9, -np.inf, 3, -np.inf]) / np.exp([9.0, 3]).sum()),
        (Weighting("topk"), [1, 0, 0, 0]),
        (Weighting("relu"), np.array([9, 0, 3, 1]) / 13),
        (Weighting("raw"), COSINES),
    ],
)
def test_weightings(weighting: Weighting, expected: Any) -> None:
    found = weights(COSINES, weighting)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == np.float32
    assert weighting.signed == bool((np.asarray(expected) < 0).any())


def test_a_tiny_temperature_does_not_overflow() -> None:
    np.testing.assert_array_equal(weights(COSINES, Weighting("softmax", 1e-4)), [1, 0, 0, 0])


@pytest.mark.parametrize("kind", ["softmax", "relu"])
def test_a_query_that_projects_to_nothing_is_equally_near_to_all(kind: Any) -> None:
    p = projection(residual=False)
    cosines = p.cosines(p.mean)
    np.testing.assert_array_equal(cosines, 0)
    np.testing.assert_allclose(weights(cosines, Weighting(kind)), 1 / 3)


def test_zero_states_have_an_alpha() -> None:
    alpha = affinity.alpha(projection(), Weighting(), 0 * PROMPTS, 0 * ANSWERS)
    assert alpha.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "prompts, answers, message",
    [
        (PROMPTS, ANSWERS[:, :4], r"states of shape \(5, 4\); this pool takes \[n, 8\]"),
        (PROMPTS[:2], ANSWERS, "2 prompts and 5 answers"),
        (None, ANSWERS, "needs the mean states of the prompts"),
        (PROMPTS, ANSWERS * np.nan, "NaN"),
        (PROMPTS[:0], ANSWERS[:0], "states of shape"),
    ],
)
def test_states_that_do_not_fit(prompts: Any, answers: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        projection().query(prompts, answers)


@pytest.mark.parametrize(
    "alpha, message",
    [
        ([0.5, 0.5], r"shape \[2\]; this pool has 3"),
        ([[0.5, 0.5, 0]], "shape"),
        ([0.5, float("nan"), 0.5], "weight 1 is nan"),
        ([float("inf"), 0, 0], "weight 0 is inf"),
        ([1e300, 0, 0], "weight 0 is 1e"),
        ([0, 0, 1e6], "weight 2 is 1000000"),
        ([0.5, 0.6, -0.1], "weight 2 is -0.1"),
        (["a", 0, 0], "not a list of numbers"),
        ([[1], [1, 2], 3], "not a list of numbers"),
        (None, "shape"),
    ],
)
def test_an_alpha_that_cannot_be_blended(alpha: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        check_alpha(alpha, 3)


def test_negative_weights_where_they_are_meant() -> None:
    np.testing.assert_array_equal(check_alpha([0.5, -1, 0], 3, signed=True), np.float32([0.5, -1, 0]))
    with pytest.raises(InvalidInput, match="from -4 to 4"):
        check_alpha([0.5, -5, 0], 3, signed=True)


def test_a_weighting_refuses_what_makes_no_sense() -> None:
    for document in (b'{"temperature": 0}', b'{"kind": "topk", "top_k": 0}', b'{"kind": "best"}'):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(document, type=Weighting)
