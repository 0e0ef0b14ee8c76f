"""Indicators: what is fitted is what the equations say, on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from crayon_runtime.errors import InvalidInput
from crayon_server import models, training
from crayon_server.data import phone_assistant as pa
from crayon_server.pool import indicators
from tests.support import needs

torch = needs.module("torch")
transformers = needs.module("transformers")
needs.module("sklearn")

NANO = models.load_nano()


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def grouped(groups: int = 6, each: int = 40, d: int = 12) -> tuple[np.ndarray, list[np.ndarray]]:
    """Texts that vary most in a direction that says nothing of their group: axis 0. Groups differ along axes 1 and 2."""
    x = random(groups * each, d) * 0.3
    x[:, 0] *= 100
    members = [np.arange(i * each, (i + 1) * each) for i in range(groups)]
    for i, group in enumerate(members):
        x[group, 1:3] += 3 * np.array([np.cos(i * 2 * np.pi / groups), np.sin(i * 2 * np.pi / groups)], np.float32)
    return x, members


def test_means_are_those_of_each_text_alone() -> None:
    """Padding and batches change nothing; the ranges are bos + prompt, and completion without end of sequence."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(NANO)
    model = models.load(NANO, torch.float32)
    texts = [training.tokenize(tokenizer, e) for e in pa.benchmark().validation[0].examples]
    embedded = indicators.embed(model, texts, 3, pad_id=0, batch_size=4)
    for i, text in enumerate(texts):
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([text.ids]), output_hidden_states=True).hidden_states[3][0].numpy()
        begin = text.in_completion.index(True)
        for part, tokens in zip(embedded, (states[:begin], states[begin:-1], states[:-1]), strict=True):
            np.testing.assert_allclose(part[i], tokens.mean(0), atol=2e-5)


def test_what_cannot_be_embedded() -> None:
    with pytest.raises(InvalidInput, match="no texts"):
        indicators.embed(None, [], 0, pad_id=0)
    with pytest.raises(InvalidInput, match="completion is empty"):
        indicators.embed(None, [training.Tokens([1, 5, 2], [False, False, True])], 0, pad_id=0)


def test_the_residual_is_free_of_what_the_prompt_predicts() -> None:
    prompt, own = random(500, 8), random(500, 8, seed=1)
    answer = prompt @ random(8, 8, seed=2) + 5 + 0.1 * own
    left = indicators.residual(indicators.fit_residual(prompt, answer), prompt, answer)
    np.testing.assert_allclose(left, 0.1 * (own - own.mean(0)), atol=0.1)
    assert abs(np.corrcoef(prompt[:, 0], left[:, 0])[0, 1]) < 0.01


def test_the_residual_of_fewer_texts_than_dimensions_is_finite() -> None:
    parts = indicators.fit_residual(random(3, 16), random(3, 16, seed=1))
    assert all(np.isfinite(part).all() for part in parts)


def test_pca_is_that_of_scikit_learn() -> None:
    decomposition = needs.module("sklearn.decomposition")
    x = random(200, 10) * np.arange(1, 11, dtype=np.float32)
    for whiten in (False, True):
        axes = indicators.fit_pca(x, 4, whiten=whiten)
        z, expected = (x - axes.mean) @ axes.projection, decomposition.PCA(4, whiten=whiten).fit_transform(x)
        np.testing.assert_allclose(np.abs(z), np.abs(expected), rtol=6e-3, atol=1e-2)


def test_pca_has_no_more_axes_than_the_data() -> None:
    x = random(50, 2) @ random(2, 10)
    assert indicators.fit_pca(x, 8, whiten=True).projection.shape == (10, 2)


@pytest.mark.parametrize("block", [64, 300])
def test_sums_in_blocks_are_those_of_the_whole(monkeypatch, block: int) -> None:
    """Also groups that are larger than a block, and residuals that are computed when asked for."""
    x, members = grouped(groups=4, each=150)
    y = x @ random(12, 12) + random(600, 12, seed=2)
    parts = indicators.fit_residual(x, y)
    axes = indicators.fit_lda(indicators.residual(parts, x, y), members, 2)
    monkeypatch.setattr(indicators, "BLOCK", block)
    in_blocks = indicators.fit_residual(x, y)
    for one, other in zip(parts, in_blocks, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)
    rows = indicators.Residuals(in_blocks, x, y)
    assert rows.shape == (600, 12)
    for one, other in zip(axes, indicators.fit_lda(rows, members, 2), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3, rtol=1e-3)
    with pytest.raises(InvalidInput, match="do not differ"):
        indicators.check_different(np.ones((600, 4), np.float32))
    indicators.check_different(np.repeat([[1.0], [2.0]], 300, axis=0).astype(np.float32))


@pytest.mark.parametrize("whiten", [False, True])
def test_pca_in_blocks_finds_the_same_space(monkeypatch, whiten: bool) -> None:
    subspace_angles = needs.module("scipy.linalg").subspace_angles
    x = (random(900, 20) * 0.7 ** np.arange(20)) @ np.linalg.qr(random(20, 20, seed=1))[0]
    exact = indicators.fit_pca(x, 4, whiten=whiten)
    monkeypatch.setattr(indicators, "BLOCK", 200)
    monkeypatch.setattr(indicators, "LARGEST_PCA", 100)
    assert indicators.in_blocks(x)
    approximate = indicators.fit_pca(x, 4, whiten=whiten)
    np.testing.assert_allclose(approximate.mean, exact.mean, atol=1e-5)
    assert np.rad2deg(subspace_angles(exact.projection, approximate.projection)).max() < 2
    lengths = [np.linalg.norm(axes.projection, axis=0) for axes in (exact, approximate)]
    np.testing.assert_allclose(*lengths, rtol=0.01)


def test_k_means_in_batches_finds_the_same_clusters(monkeypatch) -> None:
    x, members = grouped()
    centres, _ = indicators.cluster(x[:, 1:3], 6, seed=0)
    monkeypatch.setattr(indicators, "LARGEST_K_MEANS", 100)
    in_batches, others = indicators.cluster(x[:, 1:3], 6, seed=0)
    assert [len(set(others[group])) for group in members] == [1] * 6
    np.testing.assert_allclose(np.sort(in_batches, axis=0), np.sort(centres, axis=0), atol=0.05)


def test_lda_finds_what_groups_differ_in_and_pca_does_not() -> None:
    x, members = grouped()
    lda, pca = indicators.fit_lda(x, members, 2), indicators.fit_pca(x, 2, whiten=False)
    assert abs(pca.projection[0]).max() > 0.99
    direction = lda.projection / np.linalg.norm(lda.projection, axis=0)
    assert abs(direction[0]).max() < 0.05
    assert np.linalg.norm(direction[1:3], axis=0).min() > 0.9


def test_lda_needs_groups() -> None:
    x, members = grouped()
    assert indicators.fit_lda(x, members[:3], 8).projection.shape == (12, 2)
    with pytest.raises(InvalidInput, match="two groups"):
        indicators.fit_lda(x, members[:1], 2)


def test_samples_stay_inside_their_group() -> None:
    x = np.repeat(np.eye(3, dtype=np.float32), [20, 20, 4], axis=0)
    members = [np.arange(20), np.arange(20, 40), np.arange(40, 44)]
    samples = indicators.samples_of_groups(x, members, 10, 2, np.random.default_rng(0))
    np.testing.assert_array_equal(samples, np.repeat(np.eye(3), 2, axis=0))


def test_clusters_are_found_and_indicators_have_unit_length() -> None:
    x, members = grouped()
    centres, labels = indicators.cluster(x[:, 1:3], 6, seed=0)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-6)
    assert [len(set(labels[group])) for group in members] == [1] * 6
    again, _ = indicators.cluster(x[:, 1:3], 6, seed=0)
    np.testing.assert_array_equal(centres, again)


def test_more_clusters_than_different_texts() -> None:
    with pytest.raises(InvalidInput, match="3 clusters of 2 different texts"):
        indicators.cluster(np.repeat(np.eye(2, dtype=np.float32), 5, axis=0), 3, seed=0)


def test_texts_that_are_all_equal() -> None:
    x = np.ones((5, 4), np.float32)
    with pytest.raises(InvalidInput, match="do not differ"):
        indicators.check_different(x * (1 + 1e-6 * random(5, 4)))
    indicators.check_different(x + 0.01 * random(5, 4))
