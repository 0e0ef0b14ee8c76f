"""What every backend does alike, on a real, tiny model. That its numbers are right is for the golden cases."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest

from crayon_export.exporter import export
from crayon_runtime import Engine, backends, golden
from crayon_runtime.backends.base import Adapter, Backend, Cache
from crayon_runtime.backends.fake import FakeAdapter
from crayon_runtime.bundle import Bundle
from crayon_runtime.errors import AdapterError, BackendError, EngineClosed
from tests.programs import ADAPTERS, CONTEXT, exported, tiny_adapters, tiny_model


@pytest.fixture(
    scope="module",
    params=["onnx", pytest.param("executorch", marks=pytest.mark.slow)],
)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(name: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    if name == "executorch":
        return exported()
    folder = tmp_path_factory.mktemp("onnx")
    model = tiny_model(folder / "model")
    return export(model, folder / "bundle", adapters=tiny_adapters(model, folder), context_length=CONTEXT).bundle


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def backend(bundle: Bundle, name: str, cache_folder: None) -> Backend:
    return backends.load(bundle, name, threads=1)


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 320, 40)


def test_it_is_a_backend(backend: Backend, bundle: Bundle, name: str) -> None:
    assert isinstance(backend, Backend)
    assert (backend.name, backend.vocab_size, backend.context_length, backend.tap_size) == (name, 320, CONTEXT, 64)
    adapter = backend.read_adapter(bundle.adapter("alice"))
    assert isinstance(adapter, Adapter)
    assert adapter.name == "alice"
    cache = backend.new_cache(adapter)
    assert isinstance(cache, Cache)
    assert (cache.length, cache.adapter) == (0, adapter)


def test_the_golden_cases(bundle: Bundle, name: str) -> None:
    results = golden.replay(bundle, backend=name, threads=1)
    assert len(results) == 4 * (1 + len(ADAPTERS))
    assert {result.adapter for result in results} == {None, *ADAPTERS}
    assert [(r.name, r.problem) for r in results if not r.passed] == []
    assert {result.backend for result in results} == {name}


def test_a_decoded_token_allocates_nothing_that_grows_with_the_context(backend: Backend) -> None:
    cache = backend.new_cache()
    cache.prefill(np.full(CONTEXT - 100, 5, np.int64))
    cache.decode(7)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for token in range(20):
            cache.decode(token)
        grown = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert grown < CONTEXT  # an attention mask alone would be 8 bytes a token


def test_chunks_rewinds_and_resets_give_what_one_run_gives(backend: Backend, ids: np.ndarray) -> None:
    whole = backend.new_cache().prefill(ids)
    logits, taps, last = whole.logits.copy(), whole.tap_sum.copy(), whole.tap_last.copy()

    cache = backend.new_cache()
    sums = cache.prefill(ids[:17]).tap_sum.copy()
    cache.prefill(ids[17:33])
    cache.decode(3)
    cache.rewind(17)
    assert cache.length == 17
    sums += cache.prefill(ids[17:39]).tap_sum
    step = cache.decode(int(ids[39]))
    spread = logits.std()
    np.testing.assert_allclose(step.logits, logits, atol=0.1 * spread)  # int8 activations, rounded by chunk
    np.testing.assert_allclose(sums + step.tap_sum, taps, atol=0.05 * np.abs(taps).max())
    np.testing.assert_allclose(step.tap_last, last, atol=0.1 * np.abs(last).max())
    np.testing.assert_array_equal(step.tap_sum, step.tap_last)

    cache.reset(None)
    np.testing.assert_array_equal(cache.prefill(ids).logits, logits)


def test_a_cache_goes_from_one_adapter_to_another(backend: Backend, bundle: Bundle, ids: np.ndarray) -> None:
    adapters = {None: None, **{name: backend.read_adapter(bundle.adapter(name)) for name in ADAPTERS}}
    alone = {name: backend.new_cache(adapter).prefill(ids).logits.copy() for name, adapter in adapters.items()}
    cache = backend.new_cache()
    for name in ("alice", None, "bruno", "alice", "bruno", None):
        cache.prefill(ids[:5])
        cache.reset(adapters[name])
        assert (cache.length, cache.adapter) == (0, adapters[name])
        np.testing.assert_array_equal(cache.prefill(ids).logits, alone[name])
    for a, b in (("alice", None), ("bruno", None), ("alice", "bruno")):
        assert np.linalg.norm(alone[a] - alone[b]) > 0.5 * np.linalg.norm(alone[None])


def test_caches_do_not_disturb_each_other(backend: Backend, bundle: Bundle, ids: np.ndarray) -> None:
    alice = backend.read_adapter(bundle.adapter("alice"))
    alone = [backend.new_cache(adapter).prefill(ids).logits.copy() for adapter in (None, alice)]
    one, other = backend.new_cache(), backend.new_cache(alice)
    first = one.prefill(ids)
    other.prefill(ids[:20])
    np.testing.assert_array_equal(first.logits, alone[0])  # a view, and not of anything that the other cache writes
    one.decode(3)
    other.reset(alice)
    np.testing.assert_array_equal(other.prefill(ids).logits, alone[1])
    one.close()
    other.decode(3)


def test_what_a_step_returned_outlives_its_cache(backend: Backend, ids: np.ndarray) -> None:
    """Another thread may close the engine while the scores are read."""
    cache = backend.new_cache()
    step = cache.prefill(ids)
    kept = [array.copy() for array in step]
    cache.close()
    del cache
    backend.new_cache().prefill(ids[::-1])
    for array, before in zip(step, kept, strict=True):
        np.testing.assert_array_equal(array, before)


def test_threads_get_the_answers_that_they_would_get_alone(bundle: Bundle, name: str) -> None:
    prompts = [f"{name} tells of {i}" for i, name in enumerate(["a robot", "the sea", "an alarm", "milk"])]
    with Engine.load(bundle, backend=name, threads=1) as engine:
        alone = [engine.generate(p, max_new_tokens=24).token_ids for p in prompts]
        together: dict[int, list[int]] = {}

        def answer(i: int) -> None:
            together[i] = engine.generate(prompts[i], max_new_tokens=24).token_ids

        threads = [threading.Thread(target=answer, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [together[i] for i in range(len(prompts))] == alone


def test_a_swap_between_pieces_of_a_running_answer_is_for_the_next_one(bundle: Bundle, name: str) -> None:
    with Engine.load(bundle, backend=name, threads=1) as engine:
        alone = {}
        for adapter in (None, *ADAPTERS):
            engine.set_adapter(adapter)
            alone[adapter] = engine.generate("the sea", max_new_tokens=24).token_ids
        assert len({tuple(ids) for ids in alone.values()}) == 3

        engine.set_adapter("alice")
        stream = engine.stream("the sea", max_new_tokens=24)
        ids = [next(stream).token_id]
        engine.set_adapter("bruno")
        assert engine.generate("the sea", max_new_tokens=24).token_ids == alone["bruno"]
        ids += [piece.token_id for piece in stream]
        assert ids == alone["alice"]


def test_a_conversation_computes_only_what_is_new(bundle: Bundle, name: str) -> None:
    with Engine.load(bundle, backend=name, threads=1) as engine:
        fresh = engine.generate("the robot", max_new_tokens=40)
        session = engine.session()
        ids = engine.tokenizer.encode("the sea")
        first = engine.generate(ids, session=session, max_new_tokens=40)
        again = engine.generate([*ids, *first.token_ids, 9], session=session, max_new_tokens=4)
        assert again.reused_tokens == len(ids) + len(first.token_ids) - 1
        other = engine.generate(ids, session=session, adapter=engine.find_adapter("alice"), max_new_tokens=4)
        assert other.reused_tokens == 0
        assert engine.generate("the robot", session=session, max_new_tokens=40).token_ids == fresh.token_ids


def test_embeddings_of_parts_are_those_of_the_whole(bundle: Bundle, name: str) -> None:
    pair = ("the sea and the robot\n", "they sang.")
    with Engine.load(bundle, backend=name, threads=1) as engine:
        whole, prompt, answer = (engine.embed([pair], part=part)[0] for part in ("all", "prompt", "answer"))
        length = len(engine.tokenizer.encode("".join(pair)))
        share = len(engine.tokenizer.encode(pair[0])) / length
    spread = np.abs(whole).max()
    np.testing.assert_allclose(share * prompt + (1 - share) * answer, whole, atol=0.05 * spread)


def test_closing_an_engine_ends_its_answers(bundle: Bundle, name: str) -> None:
    engine = Engine.load(bundle, backend=name, threads=1)
    stream = engine.stream("the sea", max_new_tokens=24)
    next(stream)
    engine.close()
    with pytest.raises(EngineClosed):
        next(stream)


def test_more_tokens_than_the_cache_holds(backend: Backend) -> None:
    cache = backend.new_cache()
    with pytest.raises(BackendError, match=f"{CONTEXT + 1} tokens in a cache of {CONTEXT}"):
        cache.prefill(np.zeros(CONTEXT + 1, np.int64))
    assert cache.length == 0
    cache.prefill(np.full(CONTEXT, 5, np.int64))
    with pytest.raises(BackendError, match=f"{CONTEXT + 1} tokens in a cache of {CONTEXT}"):
        cache.decode(5)
    with pytest.raises(BackendError, match="cannot rewind"):
        cache.rewind(CONTEXT + 1)


def test_an_adapter_of_another_backend(backend: Backend) -> None:
    with pytest.raises(AdapterError, match="read by another backend"):
        backend.new_cache(FakeAdapter("alice"))
    cache = backend.new_cache()
    with pytest.raises(AdapterError, match="read by another backend"):
        cache.reset(FakeAdapter("alice"))
