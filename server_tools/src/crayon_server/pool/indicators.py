"""Embeddings of texts -> indicators, the vectors that say which task each base LoRA of a pool is for.

    texts ──> embed ──> (residual) ──> PCA or LDA ──> k-means ──> Projection
              base       what is said      z = P(q - mean)   c_n, unit length
              model      is removed

All but `embed` are pure functions of arrays. PCA and k-means with k = N are the paper's; the task residual, whitening and the
group-aware LDA are ours. Shapes: n texts, d hidden size, k dimensions of the projection, N indicators.

Arrays of embeddings may be files, and larger than memory: they are read in blocks. Sums over blocks are exact; PCA and k-means have other,
approximate forms, which scikit-learn has for data that is too much for the exact ones.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from crayon_runtime.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import EllipsisType

    import numpy.typing as npt
    import torch

    from crayon_server.training import Tokens

    Floats = npt.NDArray[np.float32]
    Doubles = npt.NDArray[np.float64]
    Indices = npt.NDArray[np.int64]

RIDGE = 1e-4
"""Of the task residual, as a fraction of the mean variance of prompts."""
SHRINKAGE = 1e-3
"""Added to the covariance inside groups, as a fraction of the variance of all texts."""
SMALLEST = 1e-6
"""Directions whose deviation is less than this fraction of the largest are rounding, not data."""
ROUNDING = 1e-4
"""Equal texts in different batches differ by less than this fraction of the largest state."""
BLOCK = 8192
"""Texts whose embeddings are in memory at once."""
LARGEST_PCA = 1 << 27
"""Numbers in the matrix that is decomposed as a whole; a larger one is decomposed in blocks."""
LARGEST_K_MEANS = 200_000
"""Points that are clustered as a whole; more of them in batches."""
BATCH_TOKENS = 1 << 14
"""Of a batch that is embedded, padding included."""


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


class Rows(Protocol):
    """float32 [n, d]: an array, or what computes rows when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice | Indices | EllipsisType, /) -> Floats: ...


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
    if not texts:
        raise InvalidInput("there are no texts to embed")
    check_completions(texts)
    parts = [embed_batch(model, batch, tap_layer, pad_id=pad_id) for batch in batches(texts, batch_size)]
    prompts, answers, everything = np.moveaxis(np.concatenate(parts), 1, 0)
    return Embeddings(prompts, answers, everything)


def check_completions(texts: Sequence[Tokens]) -> None:
    """Raise InvalidInput if a completion has no tokens."""
    for i, text in enumerate(texts):
        if text.in_completion.index(True) == len(text.ids) - 1:
            raise InvalidInput("a completion is empty", where=f"text {i}")


def batches(texts: Sequence[Tokens], batch_size: int = 128) -> Iterator[list[Tokens]]:
    """The texts in their order, in batches of at most `batch_size`, and of at most `BATCH_TOKENS` tokens where texts are long."""
    batch: list[Tokens] = []
    longest = 0
    for text in texts:
        longest = max(longest, len(text.ids))
        if batch and (len(batch) == batch_size or longest * (len(batch) + 1) > BATCH_TOKENS):
            yield batch
            batch, longest = [], len(text.ids)
        batch.append(text)
    yield batch


def embed_batch(model: torch.nn.Module, batch: Sequence[Tokens], tap_layer: int, *, pad_id: int) -> Floats:
    """float32 [n, 3, d]: the fields of `Embeddings`. No completion may be empty."""
    import torch

    from crayon_server.training import collate

    ids = collate(batch, pad_id, 0.0).ids
    prompt, answer = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for row, text in enumerate(batch):
        begin, end = text.in_completion.index(True), len(text.ids) - 1
        prompt[row, :begin], answer[row, begin:end] = 1, 1
    device = next(model.parameters()).device
    with torch.no_grad(), _tapped(model, tap_layer) as states:
        model(input_ids=ids.to(device), use_cache=False, logits_to_keep=1)
    tapped = states[0].float().cpu()
    weights = (prompt, answer, prompt + answer)
    means = [torch.einsum("btd,bt->bd", tapped, w) / w.sum(1, keepdim=True) for w in weights]
    stacked: Floats = torch.stack(means, 1).numpy()
    return stacked


@contextmanager
def _tapped(model: torch.nn.Module, tap_layer: int) -> Iterator[list[torch.Tensor]]:
    """A list that the tapped states are in after a pass; those of all other layers are not kept."""
    decoder = model.get_decoder()  # type: ignore[operator]
    states: list[torch.Tensor] = []
    if tap_layer == len(decoder.layers):
        hook = decoder.norm.register_forward_hook(lambda _module, _inputs, output: states.append(output))
    else:
        hook = decoder.layers[tap_layer].register_forward_pre_hook(lambda _module, inputs: states.append(inputs[0]))
    try:
        yield states
    finally:
        hook.remove()


def blocks(rows: Rows) -> Iterator[Floats]:
    """`rows` in pieces of about equal size, at most `BLOCK`."""
    count = -(-len(rows) // BLOCK)
    for i in range(count):
        yield rows[i * len(rows) // count : (i + 1) * len(rows) // count]


def _mean(rows: Rows) -> Floats:
    """As numpy's, if there is one block."""
    mean: Floats = np.asarray(sum(b.mean(0).astype(np.float64) * len(b) for b in blocks(rows)) / len(rows), np.float32)
    return mean


def _exact_mean(rows: Rows) -> Doubles:
    mean: Doubles = np.asarray(sum(block.sum(0, dtype=np.float64) for block in blocks(rows)) / len(rows))
    return mean


def fit_residual(prompt: Floats, answer: Floats, ridge: float = RIDGE) -> Residual:
    """Ridge regression of answers' mean states on their prompts'. Our choice: what is left of an answer is how it is written.

    Args:
        prompt, answer: float32 [n, d].
        ridge: the penalty, as a fraction of the mean variance of prompts. Fewer texts need more: with n < d and little of it, nothing
            is left of the texts that it was fitted on.
    """
    prompt_mean, answer_mean = _exact_mean(prompt), _exact_mean(answer)
    covariance, shared = np.zeros((len(prompt_mean),) * 2), np.zeros((len(prompt_mean),) * 2)
    for prompts, answers in zip(blocks(prompt), blocks(answer), strict=True):
        x, y = prompts.astype(np.float64) - prompt_mean, answers.astype(np.float64) - answer_mean
        covariance += x.T @ x
        shared += x.T @ y
    penalty = ridge * np.trace(covariance) / len(covariance) + np.finfo(np.float64).tiny
    matrix = np.linalg.lstsq(covariance + penalty * np.eye(len(covariance)), shared, rcond=None)[0]
    return Residual(_mean(prompt), _mean(answer), matrix.astype(np.float32))


def residual(parts: Residual, prompt: Floats, answer: Floats) -> Floats:
    """What the prompts do not predict of the answers: float32 [n, d]."""
    return ((answer - parts.answer_mean) - (prompt - parts.prompt_mean) @ parts.ridge).astype(np.float32)


class Residuals:
    """`residual` of each text, computed when asked for: `Rows`."""

    def __init__(self, parts: Residual, prompt: Floats, answer: Floats) -> None:
        self._parts, self._prompt, self._answer = parts, prompt, answer
        self.shape = answer.shape

    def __len__(self) -> int:
        return len(self._answer)

    def __getitem__(self, where: slice | Indices | EllipsisType) -> Floats:
        return residual(self._parts, self._prompt[where], self._answer[where])


def fit_pca(queries: Rows, dimensions: int, *, whiten: bool) -> Axes:
    """The directions of the largest variance (the paper's). Whitened (our option), all of them have variance 1.

    More than `LARGEST_PCA` numbers are decomposed in blocks (`IncrementalPCA`), with four times the dimensions on the way.

    Returns:
        At most `dimensions` axes: no more than the data has.
    """
    n, d = queries.shape
    if in_blocks(queries):
        from sklearn.decomposition import IncrementalPCA

        fitted = IncrementalPCA(min(d, 4 * dimensions))
        for block in blocks(queries):
            fitted.partial_fit(block)
        mean, deviations, axes = fitted.mean_, fitted.singular_values_, fitted.components_
    else:
        whole = queries[...]
        mean = whole.mean(0, dtype=np.float64)
        _, deviations, axes = np.linalg.svd(whole - mean, full_matrices=False)
    kept = _kept(deviations, dimensions)
    projection = axes[:kept].T
    if whiten:
        projection = projection / (deviations[:kept] / np.sqrt(n))
    return Axes(mean.astype(np.float32), projection.astype(np.float32))


def in_blocks(queries: Rows) -> bool:
    """Whether PCA takes them in blocks."""
    n, d = queries.shape
    return n * d > LARGEST_PCA


def fit_lda(queries: Rows, groups: Sequence[Indices], dimensions: int, shrinkage: float = SHRINKAGE) -> Axes:
    """The directions in which groups differ most, in units of how much texts of one group differ (Fisher; our choice here).

    Args:
        groups: indices into `queries` of the texts that belong together.
        shrinkage: added to the covariance inside groups, as a fraction of the variance of all texts. Fewer texts need more.

    Returns:
        At most `dimensions` axes; never more than there are groups less one.

    Raises:
        InvalidInput: there are fewer than two groups.
    """
    if len(groups) < 2:
        raise InvalidInput("LDA needs texts of at least two groups", do="give every text its group, or use --no-groups")
    d = queries.shape[1]
    mean, means = _exact_mean(queries), np.zeros((len(groups), d))
    covariance, variance = np.zeros((d, d)), 0.0
    for some in _together(groups):
        for i, members in some:
            means[i] += queries[members].sum(0, dtype=np.float64) / len(groups[i])
    for some in _together(groups):
        inside = np.concatenate([queries[members].astype(np.float64) - means[i] for i, members in some])
        covariance += inside.T @ inside
    for block in blocks(queries):
        variance += float(((block.astype(np.float64) - mean.mean()) ** 2).sum()) / (len(queries) * d)
    covariance = covariance / sum(map(len, groups)) + shrinkage * variance * np.eye(d)
    variances, directions = np.linalg.eigh(covariance)
    whitening = directions / np.sqrt(variances)
    _, deviations, axes = np.linalg.svd((means - mean) @ whitening, full_matrices=False)
    kept = _kept(deviations, min(dimensions, len(groups) - 1))
    return Axes(mean.astype(np.float32), (whitening @ axes[:kept].T).astype(np.float32))


def _together(groups: Sequence[Indices]) -> Iterator[list[tuple[int, Indices]]]:
    """Groups with their numbers, in their order, as many together as have at most `BLOCK` texts; larger ones in pieces."""
    some: list[tuple[int, Indices]] = []
    count = 0
    for i, group in enumerate(groups):
        for piece in np.array_split(group, -(-len(group) // BLOCK)):
            if some and count + len(piece) > BLOCK:
                yield some
                some, count = [], 0
            some.append((i, piece))
            count += len(piece)
    yield some


def _kept(deviations: npt.NDArray[np.float64], dimensions: int) -> int:
    return min(dimensions, max(1, int((deviations > SMALLEST * deviations.max()).sum())))


def check_different(states: Floats) -> None:
    """Raise InvalidInput if all rows of `states` are equal, up to rounding: nothing then can be clustered."""
    pieces = [(block.min(0), block.max(0)) for block in blocks(states)]
    least, most = np.min([piece[0] for piece in pieces], axis=0), np.max([piece[1] for piece in pieces], axis=0)
    if (most - least).max() <= ROUNDING * max(np.abs(least).max(), np.abs(most).max()):
        raise InvalidInput("the texts do not differ: their embeddings are all equal", do="give texts of several tasks")


def different(states: Rows, most: int) -> int:
    """How many rows differ by more than rounding, counted up to `most`: what a text's state is depends on its batch, a little."""
    kept = np.empty((0, states.shape[1]), np.float32)
    for row in (row for block in blocks(states) for row in block):
        if len(kept) == most:
            break
        if (np.abs(kept - row).max(axis=1, initial=0) > ROUNDING * np.abs(row).max()).all():
            kept = np.vstack([kept, row])
    return len(kept)


def samples_of_groups(
    queries: Rows, groups: Sequence[Indices], size: int, each: int, generator: np.random.Generator
) -> Floats:
    """Means of `size` texts of one group (all of a smaller group), `each` of them from every group: what a device will send."""
    means = [_sample(queries, group, size, generator) for group in groups for _ in range(each)]
    return np.stack(means)


def _sample(queries: Rows, group: Indices, size: int, generator: np.random.Generator) -> Floats:
    mean: Floats = queries[generator.choice(group, min(size, len(group)), replace=False)].mean(0)
    return mean


def normalize(z: Floats) -> Floats:
    """Rows of unit length."""
    unit: Floats = z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return unit


def check_count(states: Rows, count: int) -> None:
    """Raise InvalidInput if fewer of the rows of `states` differ than there are to be clusters."""
    found = different(states, count)
    if found < count:
        raise InvalidInput(f"{count} clusters of {found} different texts", do=f"use --adapters {found} or fewer")


def cluster(z: Floats, count: int, seed: int) -> tuple[Floats, Indices]:
    """k-means over normalized z; of more than `LARGEST_K_MEANS` points in batches (`MiniBatchKMeans`).

    Returns:
        The centroids at unit length, float32 [count, k], and the cluster of each row of `z`, int64 [n].

    Raises:
        InvalidInput: as `check_count`.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    points = normalize(z)
    check_count(points, count)
    if len(points) > LARGEST_K_MEANS:
        k_means = MiniBatchKMeans(count, n_init=4, random_state=seed, batch_size=BLOCK)
    else:
        k_means = KMeans(count, n_init=4, random_state=seed)
    fitted = k_means.fit(points)
    return normalize(fitted.cluster_centers_.astype(np.float32)), fitted.labels_.astype(np.int64)
