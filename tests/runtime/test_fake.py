"""The fake backend: users test with it too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crayon_runtime.backends.base import Adapter, Backend, Cache
from crayon_runtime.backends.fake import FakeAdapter, FakeBackend
from crayon_runtime.bundle import Bundle
from crayon_runtime.errors import BackendError
from tests.runtime.bundles import write_adapter

IDS = np.array([5, 3, 9, 3, 7])


def logits_after(ids: np.ndarray, adapter: str | None = None) -> list[float]:
    cache = FakeBackend().new_cache(FakeAdapter(adapter) if adapter else None)
    return cache.prefill(ids).logits.tolist()  # type: ignore[no-any-return]


def test_it_is_a_backend() -> None:
    backend = FakeBackend()
    assert isinstance(backend, Backend)
    assert isinstance(backend.new_cache(), Cache)
    assert isinstance(FakeAdapter("alice"), Adapter)


def test_a_sequence_is_said_after_every_prefill() -> None:
    cache = FakeBackend([7, 8, 9]).new_cache()
    for prompt in ([1], [2, 3]):
        said = [int(cache.prefill(np.array(prompt)).logits.argmax())]
        said += [int(cache.decode(said[-1]).logits.argmax()) for _ in range(4)]
        assert said == [7, 8, 9, 9, 9]


def test_a_function_sees_all_tokens_and_the_adapter() -> None:
    def script(ids: list[int], adapter: str | None) -> int:
        return len(ids) + (100 if adapter else 0)

    backend = FakeBackend(script)
    assert backend.new_cache().prefill(IDS).logits.argmax() == 5
    assert backend.new_cache(FakeAdapter("alice")).prefill(IDS).logits.argmax() == 105


def test_a_function_may_give_logits() -> None:
    wanted = np.arange(512, dtype=np.float32)
    cache = FakeBackend(lambda ids, adapter: wanted).new_cache()
    assert np.array_equal(cache.prefill(IDS).logits, wanted)


def test_noise_depends_on_the_whole_prefix_its_order_and_the_adapter() -> None:
    kinds = [
        logits_after(IDS),
        logits_after(IDS[::-1]),
        logits_after(IDS[1:]),
        logits_after(np.array([6, *IDS[1:]])),
        logits_after(IDS, "alice"),
        logits_after(IDS, "bob"),
    ]
    assert all(a != b for i, a in enumerate(kinds) for b in kinds[:i])
    assert logits_after(IDS) == kinds[0]


def test_runs_of_any_length_make_no_difference() -> None:
    backend = FakeBackend()
    whole = backend.new_cache().prefill(IDS)
    cache = backend.new_cache()
    cache.prefill(IDS[:2])
    middle = cache.prefill(IDS[2:4])
    assert np.array_equal(middle.tap_sum, backend.hidden(IDS.tolist())[2:4].sum(0))
    last = cache.decode(7)
    assert np.array_equal(last.logits, whole.logits)
    assert np.array_equal(last.tap_last, whole.tap_last)
    assert np.array_equal(whole.tap_sum, backend.hidden(IDS.tolist()).sum(0))


def test_rewinding_and_resetting() -> None:
    backend = FakeBackend()
    cache = backend.new_cache()
    cache.prefill(IDS)
    cache.rewind(3)
    assert cache.length == 3
    assert cache.prefill(IDS[3:]).logits.tolist() == logits_after(IDS)
    cache.reset(FakeAdapter("alice"))
    assert (cache.length, cache.adapter) == (0, FakeAdapter("alice"))
    assert cache.prefill(IDS).logits.tolist() == logits_after(IDS, "alice")
    assert backend.calls == {"new_cache": 1, "prefill": 3, "rewind": 1, "reset": 1}
    assert backend.prefilled == [5, 2, 5]


def test_it_refuses_what_a_real_one_could_not_do() -> None:
    backend = FakeBackend(context_length=4)
    cache = backend.new_cache()
    with pytest.raises(BackendError):
        cache.prefill(IDS)
    with pytest.raises(BackendError):
        cache.prefill(IDS[:0])
    with pytest.raises(BackendError):
        cache.rewind(1)
    with backend.call("prefill"), pytest.raises(BackendError, match="while another call was running"):
        cache.decode(1)
    cache.close()
    assert backend.open_caches == 0
    with pytest.raises(BackendError):
        cache.decode(1)
    backend.close()
    with pytest.raises(BackendError, match="after close"):
        backend.new_cache()


def test_an_adapter_is_its_name(tmp_path: Path) -> None:
    adapter = FakeBackend().read_adapter(Bundle.open(write_adapter(tmp_path / "a", "alice")))
    assert adapter == FakeAdapter("alice")
