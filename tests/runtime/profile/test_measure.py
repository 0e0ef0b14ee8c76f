"""The measurements, over the fake backend: what was fed, and what came out of it."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter_ns

import numpy as np
import pytest

from crayon_runtime.customized import state_folder
from crayon_runtime.profile import measure as m
from crayon_runtime.profile.jobs import Measure
from crayon_runtime.profile.records import Absent, LongRun, Observation, Sample
from crayon_runtime.profile.sensors import Sensors
from tests.runtime import tiny
from tests.runtime.tiny import fake

ASKED = Measure(prompts=[8, 300], depths=[0, 40], generate=6, rounds=2, more=True)


def watch(folder: Path) -> m.Watch:
    return m.Watch(Sensors([0], folder / "no system"), folder, process=3)


def test_every_test_is_measured_and_the_cache_is_filled_once(tmp_path: Path) -> None:
    with tiny.engine(bundle=tiny.bundle(tmp_path)) as engine:
        seen = list(m.measure(engine, ASKED, watch(tmp_path), tmp_path))
        prefilled = fake(engine).prefilled
        assert fake(engine).open_caches == 1  # the engine's idle one
    observed = [o for o in seen if isinstance(o, Observation)]
    sizes = [(o.test, o.n_prompt, o.n_gen, o.n_depth, len(o.warmup_ns), len(o.samples_ns)) for o in observed]
    assert sizes == [
        ("first_token", 1, 0, 0, 0, 1),
        ("prefill", 8, 0, 0, 1, 2),
        ("prefill", 300, 0, 0, 1, 2),
        ("decode", 0, 6, 40, 1, 2),
        ("decode", 0, 6, 0, 1, 2),
        ("ttft", 8, 1, 0, 1, 2),
        ("ttft", 300, 1, 0, 1, 2),
        ("swap_none", 1, 1, 0, 1, 2),
        ("swap_read", 1, 1, 0, 1, 2),
        ("swap_file", 1, 1, 0, 1, 2),
    ]
    assert [s.phase for s in seen if isinstance(s, Sample)] == ["loaded", "prefill", "decode", "end"]
    assert all(s.process == 3 for s in seen if isinstance(s, Sample))
    assert {a.what for a in seen if isinstance(a, Absent)} == {"affinity of ten examples", "routing overhead"}
    assert prefilled[1:11] == [8] * 3 + [256, 44] * 3 + [40]  # chunks as the engine's, then the depth, once


def test_the_tokens_of_a_decode_make_up_its_samples() -> None:
    with tiny.engine() as engine:
        cache = engine.backend.new_cache()
        m.feed(cache, m.token_ids(10, engine.backend.vocab_size))
        began = perf_counter_ns()
        observed = m.decode(cache, 10, 5, 3, engine.backend.vocab_size)
        spent = perf_counter_ns() - began
        assert cache.length == 15
    assert [sum(tokens) for tokens in observed.token_ns] == observed.samples_ns
    assert all(len(tokens) == 5 and min(tokens) > 0 for tokens in observed.token_ns)
    assert 0 < sum(observed.samples_ns) + sum(observed.warmup_ns) <= spent


def test_ttft_computes_the_whole_prompt_each_time() -> None:
    with tiny.engine() as engine:
        m.first_tokens(engine, 20, rounds=3)
        assert fake(engine).prefilled == [20] * 4


def test_swaps_leave_the_adapter_as_it_was(tmp_path: Path) -> None:
    with tiny.engine(bundle=tiny.bundle(tmp_path)) as engine:
        engine.set_adapter("bob")
        tests = [o.test for o in m.swaps(engine, 2) if isinstance(o, Observation)]
        assert tests == ["swap_none", "swap_read", "swap_file"]
        assert engine.adapter == "bob"
        assert fake(engine).calls["read_adapter"] == 2 + 3  # bob and alice once, and alice from its file each time


def test_a_damaged_customization_is_absent_with_its_reason(tmp_path: Path) -> None:
    bundle = tiny.bundle(tmp_path)
    folder = state_folder(bundle.path)
    folder.mkdir()
    (folder / "examples.jsonl").write_text("{}\n")
    with tiny.engine(bundle=bundle) as engine:
        (absent,) = m.customized(engine, folder, 2)
    assert isinstance(absent, Absent)
    assert 'its "prompt" is missing' in absent.reason


def test_a_customized_model_has_affinity_and_routing(tmp_path: Path) -> None:
    bundle = tiny.bundle(tmp_path)
    folder = state_folder(bundle.path)
    folder.mkdir()
    (folder / "examples.jsonl").write_text('{"prompt": "the alarm", "completion": "a b"}\n' * 12)
    (tmp_path / "alice").rename(folder / "adapter")
    with tiny.engine(bundle=bundle) as engine:
        observed = list(m.customized(engine, folder, 2))
        prompts = len(fake(engine).prefilled)
    assert [o.test for o in observed if isinstance(o, Observation)] == ["affinity", "routing_answer", "routing_score"]
    assert all(len(o.samples_ns) == 2 and min(o.samples_ns) > 0 for o in observed if isinstance(o, Observation))
    assert prompts == 3 * 10 + 3  # ten examples, not twelve; and three answers


def test_controls_measure_the_machine() -> None:
    read, product = m.controls(1 << 20, 1, rounds=2)
    assert 1e8 < read.nbytes * 1e9 / np.median(read.samples_ns) < 1e13
    assert (product.nbytes, len(product.samples_ns)) == (2 * 512**3, 2)


@pytest.mark.parametrize("context_length", [7, 1000])
def test_a_long_run_goes_on_past_the_context(tmp_path: Path, context_length: int) -> None:
    with tiny.engine(context_length=context_length) as engine:
        *samples, run = m.long_run(engine, 0.05, watch(tmp_path))
        assert fake(engine).open_caches == 0
    assert isinstance(run, LongRun)
    assert run.seconds >= 0.05
    assert run.n_gen > 20
    assert run.first_ts > 0
    assert run.last_ts > 0
    assert [s.avg_ts is None for s in samples if isinstance(s, Sample)] == [True] + [False] * (len(samples) - 1)
