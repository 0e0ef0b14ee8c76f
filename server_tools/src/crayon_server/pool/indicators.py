"""Embeddings of texts -> indicators, the vectors that say which task each base LoRA of a pool is for.

    texts ──> embed ──> (residual) ──> PCA or LDA ──> k-means ──> Projection
              base       what is said      z = P(q - mean)   c_n, unit length
              model      is removed

All but `embed` are pure functions of arrays. PCA and k-means with k = N are the paper's; the task residual, whitening and the
group-aware LDA are ours. Shapes: n texts, d hidden size, k dimensions of the projection, N indicators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crayon_runtime.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import torch

    from crayon_server.training import Tokens

    Floats = npt.NDArray[np.float32]
    Indices = npt.NDArray[np.int64]

RIDGE = 1e-4
"""Of the task residual, as a fraction of the mean variance of prompts."""
SHRINKAGE = 1e-3
"""Added to the covariance inside groups, as a fraction of the variance of all texts."""
SMALLEST = 1e-6
"""Directions whose deviation is less than this fraction of the largest are rounding, not data."""
ROUNDING = 1e-4
"""Equal texts in different batches differ by less than this fraction of the largest state."""


class Embeddings(NamedTuple):
    """Hidden states of n texts at the tap, float32 [n, d] each: means over the tokens of the prompt (bos included), of the
    answer (end of sequence excluded), and of both. These are the ranges of `Engine.embed`."""

    prompt: Floats
    answer: Floats
    everything: Floats


class Residual(NamedTuple):
    """What an answer's mean state is expected to be, given its prompt's: (prompt - prompt_mean) @ ridge + answer_mean."""

    prompt_mean: Floats
    answer_mean: Floats
    ridge: Floats


class Axes(NamedTuple):
    """z = (q - mean) @ projection, with mean float32 [d] and projection float32 [d, k]."""

    mean: Floats
    projection: Floats


def embed(
    model: torch.nn.Module, texts: Sequence[Tokens], tap_layer: int, *, pad_id: int, batch_size: int = 128
) -> Embeddings:
    """Embed texts with a base model that has no adapter.

    Args:
        tap_layer: index into transformers' hidden_states; the last one is after the final norm.

    Raises:
        InvalidInput: a completion has no tokens, or there are no texts.
    """
    import torch

    from crayon_server.training import collate

    if not texts:
        raise InvalidInput("there are no texts to embed")
    parts: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        ids = collate(batch, pad_id, 0.0).ids
        prompt, answer = torch.zeros(ids.shape), torch.zeros(ids.shape)
        for row, text in enumerate(batch):
            begin, end = text.in_completion.index(True), len(text.ids) - 1
            if begin == end:
                raise InvalidInput("a completion is empty", where=f"text {start + row}")
            prompt[row, :begin], answer[row, begin:end] = 1, 1
        with torch.inference_mode():
            states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[tap_layer].float()
        weights = (prompt, answer, prompt + answer)
        parts.append(tuple(torch.einsum("btd,bt->bd", states, w) / w.sum(1, keepdim=True) for w in weights))
    prompts, answers, everything = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Embeddings(prompts, answers, everything)


def fit_residual(prompt: Floats, answer: Floats) -> Residual:
    """Ridge regression of answers' mean states on their prompts'. Our choice: what is left of an answer is how it is written.

    Args:
        prompt, answer: float32 [n, d].
    """
    x = prompt.astype(np.float64) - prompt.mean(0, dtype=np.float64)
    y = answer.astype(np.float64) - answer.mean(0, dtype=np.float64)
    covariance = x.T @ x
    penalty = RIDGE * np.trace(covariance) / len(covariance) + np.finfo(np.float64).tiny
    ridge = np.linalg.lstsq(covariance + penalty * np.eye(len(covariance)), x.T @ y, rcond=None)[0]
    return Residual(prompt.mean(0), answer.mean(0), ridge.astype(np.float32))


def residual(parts: Residual, prompt: Floats, answer: Floats) -> Floats:
    """What the prompts do not predict of the answers: float32 [n, d]."""
    return ((answer - parts.answer_mean) - (prompt - parts.prompt_mean) @ parts.ridge).astype(np.float32)


def fit_pca(queries: Floats, dimensions: int, *, whiten: bool) -> Axes:
    """The directions of the largest variance (the paper's). Whitened (our option), all of them have variance 1.

    Returns:
        At most `dimensions` axes: no more than the data has.
    """
    mean = queries.mean(0, dtype=np.float64)
    _, deviations, axes = np.linalg.svd(queries - mean, full_matrices=False)
    kept = _kept(deviations, dimensions)
    projection = axes[:kept].T
    if whiten:
        projection = projection / (deviations[:kept] / np.sqrt(len(queries)))
    return Axes(mean.astype(np.float32), projection.astype(np.float32))


def fit_lda(queries: Floats, groups: Sequence[Indices], dimensions: int) -> Axes:
    """The directions in which groups differ most, in units of how much texts of one group differ (Fisher; our choice here).

    Args:
        groups: indices into `queries` of the texts that belong together.

    Returns:
        At most `dimensions` axes; never more than there are groups less one.

    Raises:
        InvalidInput: there are fewer than two groups.
    """
    if len(groups) < 2:
        raise InvalidInput("LDA needs texts of at least two groups", do="give every text its group, or use --no-groups")
    x = queries.astype(np.float64)
    mean = x.mean(0)
    means = np.stack([x[group].mean(0) for group in groups])
    inside = np.concatenate([x[group] - m for group, m in zip(groups, means, strict=True)])
    covariance = inside.T @ inside / len(inside) + SHRINKAGE * x.var() * np.eye(x.shape[1])
    variances, directions = np.linalg.eigh(covariance)
    whitening = directions / np.sqrt(variances)
    _, deviations, axes = np.linalg.svd((means - mean) @ whitening, full_matrices=False)
    kept = _kept(deviations, min(dimensions, len(groups) - 1))
    return Axes(mean.astype(np.float32), (whitening @ axes[:kept].T).astype(np.float32))


def _kept(deviations: npt.NDArray[np.float64], dimensions: int) -> int:
    return min(dimensions, max(1, int((deviations > SMALLEST * deviations.max()).sum())))


def check_different(states: Floats) -> None:
    """Raise InvalidInput if all rows of `states` are equal, up to rounding: nothing then can be clustered."""
    if np.ptp(states, axis=0).max() <= ROUNDING * np.abs(states).max():
        raise InvalidInput("the texts do not differ: their embeddings are all equal", do="give texts of several tasks")


def samples_of_groups(
    queries: Floats, groups: Sequence[Indices], size: int, each: int, generator: np.random.Generator
) -> Floats:
    """Means of `size` texts of one group (all of a smaller group), `each` of them from every group: what a device will send."""
    means = [_sample(queries, group, size, generator) for group in groups for _ in range(each)]
    return np.stack(means)


def _sample(queries: Floats, group: Indices, size: int, generator: np.random.Generator) -> Floats:
    mean: Floats = queries[generator.choice(group, min(size, len(group)), replace=False)].mean(0)
    return mean


def normalize(z: Floats) -> Floats:
    """Rows of unit length."""
    unit: Floats = z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return unit


def cluster(z: Floats, count: int, seed: int) -> tuple[Floats, Indices]:
    """k-means over normalized z.

    Returns:
        The centroids at unit length, float32 [count, k], and the cluster of each row of `z`, int64 [n].

    Raises:
        InvalidInput: there are fewer different rows than clusters.
    """
    from sklearn.cluster import KMeans

    points = normalize(z)
    different = len(np.unique(points.round(6), axis=0))
    if different < count:
        raise InvalidInput(
            f"{count} clusters of {different} different texts", do=f"use --adapters {different} or fewer"
        )
    fitted = KMeans(count, n_init=4, random_state=seed).fit(points)
    return normalize(fitted.cluster_centers_.astype(np.float32)), fitted.labels_.astype(np.int64)
