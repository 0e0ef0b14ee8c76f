"""Embeddings in pieces and on disk are those of one pass; those of a bundle are what its devices will see."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from crayon_runtime.errors import AdapterError, IntegrityError, InvalidInput, OutputError
from crayon_server import models, training
from crayon_server.data import phone_assistant as pa
from crayon_server.pool import embeddings, indicators
from crayon_server.pool.build import Pair, Settings, build
from crayon_server.pool.data import Corpus
from tests.support import needs

torch = needs.module("torch")
transformers = needs.module("transformers")
export = needs.module("crayon_export").export

NANO = models.load_nano()
TEXTS = [Pair(e.prompt, e.completion) for user in pa.benchmark().train[:4] for e in user.examples[:6]]


@pytest.fixture(scope="module")
def nano() -> SimpleNamespace:
    tokenizer = transformers.AutoTokenizer.from_pretrained(NANO)
    model = models.load(NANO, torch.float32)
    corpus = Corpus(tokenizer, TEXTS, 512)
    place = training.accelerator()
    embedder = embeddings.with_model(model, corpus, 3, pad_id=0)
    expected = indicators.embed(model, list(corpus), 3, pad_id=0)
    return SimpleNamespace(corpus=corpus, place=place, embedder=embedder, expected=expected, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """In float32, whose tap is layer 3."""
    path = tmp_path_factory.mktemp("bundles") / "nano"
    return export(NANO, path, quantize="none", tap_layer=3).bundle.path


@pytest.mark.parametrize("on_disk", [False, True])
def test_pieces_are_the_whole_in_the_order_of_the_texts(nano, tmp_path, monkeypatch, on_disk: bool) -> None:
    monkeypatch.setattr(embeddings, "PIECE", 7)
    counts: list[int] = []
    folder = tmp_path / "e" if on_disk else None
    embedded = embeddings.embed(nano.embedder, nano.corpus, nano.place, folder=folder, on_texts=counts.append)
    assert counts == [7, 7, 7, 3]
    for part, expected in zip(embedded, nano.expected, strict=True):
        np.testing.assert_allclose(part, expected, atol=2e-5)
        assert isinstance(part, np.memmap) == on_disk
    if on_disk:
        again = embeddings.embed(lambda *_: pytest.fail("embedded again"), nano.corpus, nano.place, folder=folder)
        for first, second in zip(embedded, again, strict=True):
            np.testing.assert_array_equal(first, second)


def test_what_was_not_finished_is_written_again(nano, tmp_path, monkeypatch) -> None:
    """Killed within a write: a file is longer than the progress says."""
    monkeypatch.setattr(embeddings, "PIECE", 7)
    folder = tmp_path / "e"
    whole = [np.array(part) for part in embeddings.embed(nano.embedder, nano.corpus, nano.place, folder=folder)]
    (folder / "progress.json").write_text('{"done": 7, "size": 96}')
    with (folder / "answer.npy").open("r+b") as file:
        file.truncate(embeddings.HEADER + 4 * 96 * 9)
        file.seek(-10, 2)
        file.write(b"\xff" * 10)
    counts: list[int] = []
    again = embeddings.embed(nano.embedder, nano.corpus, nano.place, folder=folder, on_texts=counts.append)
    assert counts == [7, 7, 7, 3]
    for first, second in zip(whole, again, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "progress", ["", "{}", '{"done": 99, "size": 96}', '{"done": -1, "size": 96}', '{"done": 24, "size": 9600}']
)
def test_a_damaged_folder(nano, tmp_path, progress: str) -> None:
    embeddings.embed(nano.embedder, nano.corpus, nano.place, folder=tmp_path / "e")
    (tmp_path / "e/progress.json").write_text(progress)
    with pytest.raises(IntegrityError):
        embeddings.embed(nano.embedder, nano.corpus, nano.place, folder=tmp_path / "e")


def test_a_full_disk(nano) -> None:
    with needs.tmpfs(16384) as disk, pytest.raises(OutputError):
        embeddings.embed(nano.embedder, nano.corpus, nano.place, folder=disk / "e")


def test_states_that_are_not_finite(nano) -> None:
    def embedder(texts: list[int], _: object) -> np.ndarray:
        return np.full((len(texts), 3, 4), np.nan, np.float32)

    with pytest.raises(InvalidInput, match="not finite"):
        embeddings.embed(embedder, nano.corpus, nano.place)


def test_long_texts_make_small_batches() -> None:
    texts = [training.Tokens([1] * n, [True] * n) for n in (9000, 9000, 100, *[10] * 300)]
    sizes = [len(batch) for batch in indicators.batches(texts, 128)]
    assert sizes == [1, 1, 128, 128, 45]


def test_a_bundle_embeds_what_the_model_does(nano, bundle) -> None:
    fingerprint = training.base_fingerprint(NANO)
    with embeddings.open_engine(bundle, fingerprint, None, 1) as engine:
        embedded = embeddings.embed(embeddings.with_engine(engine, nano.corpus, TEXTS), nano.corpus, nano.place)
    for part, expected in zip(embedded, nano.expected, strict=True):
        np.testing.assert_allclose(part, expected, atol=1e-4)


def test_a_pool_that_is_embedded_with_a_bundle(bundle, tmp_path) -> None:
    settings = Settings(adapters=3, rank=2, steps=1, batch_size=4, threads=1)
    pool = build(NANO, TEXTS, tmp_path / "p", settings=settings, embed_with=bundle)
    assert pool.manifest.embedding.tap_layer == 3
    assert pool.manifest.settings["embedded_with"] == "the bundle"
    with pytest.raises(AdapterError, match="tap is layer 3, not 4"):
        build(NANO, TEXTS, tmp_path / "q", settings=dataclasses.replace(settings, tap_layer=4), embed_with=bundle)
    models.create("nano", tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="another base"):
        build(tmp_path / "other", TEXTS, tmp_path / "q", settings=settings, embed_with=bundle)
    assert not (tmp_path / "q").exists()
