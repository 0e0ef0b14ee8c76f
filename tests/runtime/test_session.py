"""Sessions: what is kept between two prompts, and that the sums of hidden states stay exact."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from crayon_runtime.backends.fake import FakeAdapter, FakeBackend
from crayon_runtime.errors import BackendError, EngineClosed
from crayon_runtime.session import CHECKPOINT_EVERY, PREFILL_CHUNK, Session

ALICE = FakeAdapter("alice")


def session(backend: FakeBackend) -> Session:
    return Session(
        backend.new_cache(), threading.RLock(), context_length=backend.context_length, tap_size=backend.tap_size
    )


def feed(s: Session, *ids: int, adapter: FakeAdapter | None = None) -> int:
    """Feed a prompt; how many of its tokens were kept."""
    array = np.array(ids)
    kept = s.begin(array, adapter)
    s.prefill(array[kept:])
    return kept


def test_a_prompt_that_continues_is_not_fed_again() -> None:
    backend = FakeBackend()
    s = session(backend)
    assert feed(s, 1, 2, 3) == 0
    assert feed(s, 1, 2, 3, 4, 5) == 3
    assert backend.prefilled == [3, 2]
    assert s.tokens == [1, 2, 3, 4, 5]
    assert "rewind" not in backend.calls


def test_it_goes_back_only_to_a_checkpoint() -> None:
    backend = FakeBackend()
    s = session(backend)
    feed(s, 1, 2, 3)
    feed(s, 1, 2, 3, 4, 5, 6)
    assert feed(s, 1, 2, 3, 4, 9) == 3
    assert s.tokens == [1, 2, 3, 4, 9]
    assert backend.calls["rewind"] == 1
    assert feed(s, 1, 9) == 0


def test_the_same_prompt_again_feeds_at_least_one_token() -> None:
    s = session(FakeBackend())
    feed(s, 1, 2)
    feed(s, 1, 2, 3)
    assert feed(s, 1, 2, 3) == 2
    assert feed(s, 1, 2) == 0


def test_another_adapter_keeps_nothing() -> None:
    backend = FakeBackend()
    s = session(backend)
    feed(s, 1, 2, 3)
    assert feed(s, 1, 2, 3, 4, adapter=ALICE) == 0
    assert feed(s, 1, 2, 3, 4, 5, adapter=ALICE) == 4
    assert feed(s, 1, 2, 3, 4, 5, 6) == 0
    assert np.array_equal(s.tap_sum, backend.hidden([1, 2, 3, 4, 5, 6]).sum(0))


def test_a_long_prompt_is_fed_in_chunks_that_are_checkpoints() -> None:
    backend = FakeBackend(context_length=1024)
    s = session(backend)
    ids = [*range(2 * PREFILL_CHUNK + 10)]
    feed(s, *ids)
    assert backend.prefilled == [PREFILL_CHUNK, PREFILL_CHUNK, 10]
    ids[PREFILL_CHUNK + 5] = 0
    assert feed(s, *ids) == PREFILL_CHUNK


def test_cancelling_stops_before_the_next_chunk_and_keeps_what_was_fed() -> None:
    backend = FakeBackend(context_length=1024)
    s = session(backend)
    ids = np.arange(600)
    s.begin(ids, None)
    assert s.prefill(ids, lambda: backend.calls["prefill"] == 1) is None
    assert s.length == PREFILL_CHUNK
    assert s.begin(ids, None) == PREFILL_CHUNK


def test_decoding_leaves_checkpoints() -> None:
    s = session(FakeBackend(context_length=1024))
    feed(s, 1, 2, 3)
    for token in range(100):
        s.decode(token)
    tokens = s.tokens
    assert s.begin(np.array([*tokens[:80], 500]), None) == 80 // CHECKPOINT_EVERY * CHECKPOINT_EVERY


def test_sums_are_exact_after_any_history() -> None:
    rng = random.Random(1)
    backend = FakeBackend(context_length=256)
    s = session(backend)
    for _ in range(150):
        adapter = rng.choice([None, None, ALICE])
        ids = [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
        if rng.random() < 0.6:
            ids = s.tokens[: rng.randrange(1, 200)] + ids
        feed(s, *ids[:200], adapter=adapter)
        for _ in range(rng.randrange(40)):
            s.decode(rng.randrange(2))
        if rng.random() < 0.7:
            s.checkpoint()
        assert np.array_equal(s.tap_sum, backend.hidden(s.tokens, adapter and adapter.name).sum(0, dtype=np.float64))
    assert backend.calls["rewind"] > 20


def test_after_a_failure_nothing_is_trusted() -> None:
    def script(ids: list[int], adapter: str | None) -> int:
        if len(ids) == 5:
            raise KeyboardInterrupt
        return 0

    backend = FakeBackend(script)
    s = session(backend)
    feed(s, 1, 2, 3, 4)
    with pytest.raises(KeyboardInterrupt):
        s.decode(5)
    s.checkpoint()
    assert feed(s, 1, 2, 3, 4, 5, 6) == 0
    assert np.array_equal(s.tap_sum, backend.hidden([1, 2, 3, 4, 5, 6]).sum(0))


def test_more_than_the_context_is_the_backends_error() -> None:
    s = session(FakeBackend(context_length=4))
    with pytest.raises(BackendError):
        feed(s, 1, 2, 3, 4, 5)
    assert s.length == 0


def test_closing_frees_the_cache_once() -> None:
    backend = FakeBackend()
    with session(backend) as s:
        feed(s, 1, 2)
        assert backend.open_caches == 1
    s.close()
    assert backend.open_caches == 0
    with pytest.raises(EngineClosed):
        s.decode(3)
    with pytest.raises(EngineClosed):
        s.begin(np.array([1]), None)
