"""The runner against what ExecuTorch's own runtime answers, and against files and calls that are not what they should be."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.native import official
from tests.native.official import PROMPT, Programs
from tests.programs import CONTEXT
from tests.support import ROOT, needs

native = needs.native()
Status = native.Status


@pytest.fixture(scope="module")
def files() -> Programs:
    return official.exported()


@pytest.fixture
def model(files: Programs) -> Iterator[Any]:
    with native.Program(*files.model) as program:
        yield program


@pytest.fixture
def adapter(files: Programs) -> Iterator[Any]:
    with native.Program(*files.adapter) as program:
        yield program


def started(program: Any, method: str) -> Any:
    cache = program.new_cache()
    cache.use(program, method)
    return cache


def after_prompt(cache: Any, ids: tuple[int, ...] = (7,)) -> np.ndarray[Any, Any]:
    """Logits after PROMPT and these."""
    cache.step(PROMPT, 0)
    logits: np.ndarray[Any, Any] = cache.step(ids, len(PROMPT)).logits.copy()
    return logits


def refused(call: Callable[[], object]) -> Any:
    with pytest.raises(native.NativeError) as e:
        call()
    assert str(e.value)
    return e.value.status


def child(code: str, *arguments: object) -> str:
    """Runs `code` in a new process, with the modules that it needs imported."""
    head = "import os, sys, threading, numpy as np, crayon_native as native\n"
    run = subprocess.run(
        [sys.executable, "-c", head + code, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stderr == ""
    return run.stdout


# A float cache computes what the official runtime does. Over an int8 cache that one quantizes the attention's weights too.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, method, tolerance",
    [
        ("model", "forward_tap", 1e-4),
        ("adapter", "forward_tap", 1e-4),
        ("adapter", "lora_forward_tap", 1e-4),
        ("int8", "forward_tap", 0.5),
    ],
)
def test_greedy_decoding_is_the_official_runtime_s(files: Programs, name: str, method: str, tolerance: float) -> None:
    program = getattr(files, name)
    known = official.answer(program, method)
    cache = started(native.Program(*program), method)
    fed, position = list(PROMPT), 0
    for i, token in enumerate(known.tokens):
        logits, tap_sum, tap_last = cache.step(fed, position)
        np.testing.assert_allclose(logits, known.logits[i], atol=tolerance)
        np.testing.assert_allclose(tap_last, known.tap_last[i], atol=tolerance)
        np.testing.assert_allclose(tap_sum, known.tap_sum[i], atol=tolerance * len(fed))
        if tolerance < 0.1:
            assert int(logits.argmax()) == token
        position += len(fed)
        fed = [token]


def test_prefill_is_decode(model: Any) -> None:
    cache = started(model, "forward_tap")
    logits, tap_sum, tap_last = (x.copy() for x in cache.step(PROMPT, 0))
    total = np.zeros_like(tap_sum)
    for position, token in enumerate(PROMPT):
        one = cache.step([token], position)
        np.testing.assert_array_equal(one.tap_sum, one.tap_last)
        total += one.tap_sum
    np.testing.assert_allclose(one.logits, logits, atol=1e-4)
    np.testing.assert_allclose(one.tap_last, tap_last, atol=1e-4)
    np.testing.assert_allclose(total, tap_sum, atol=1e-4)


def test_the_tap_costs_no_accuracy(model: Any) -> None:
    plain, tapped = started(model, "forward"), started(model, "forward_tap")
    result = plain.step(PROMPT, 0)
    assert result.tap_sum is None
    assert result.tap_last is None
    np.testing.assert_array_equal(result.logits, tapped.step(PROMPT, 0).logits)


def test_methods_of_two_programs_go_on_from_one_cache(model: Any, adapter: Any) -> None:
    base, lora = after_prompt(started(model, "forward")), after_prompt(started(adapter, "lora_forward"))
    assert np.abs(base - lora).max() > 0.1
    # The prompt by the base, what follows by the adapter, in the adapter's program alone.
    mixed = started(adapter, "forward_tap")
    mixed.step(PROMPT, 0)
    mixed.use(adapter, "lora_forward")
    expected = mixed.step([7], len(PROMPT)).logits.copy()
    assert np.abs(expected - base).max() > 0.1
    assert np.abs(expected - lora).max() > 0.1

    cache = started(model, "forward")
    np.testing.assert_array_equal(after_prompt(cache), base)
    for method in ("lora_forward", "lora_forward_tap"):
        cache.use(adapter, method)
        np.testing.assert_array_equal(cache.step([7], len(PROMPT)).logits, expected)
    np.testing.assert_array_equal(after_prompt(cache), lora)
    cache.use(model, "forward_tap")
    np.testing.assert_array_equal(after_prompt(cache), base)


def test_many_methods_of_many_programs_take_turns(files: Programs, model: Any) -> None:
    cache = started(model, "forward")
    base = after_prompt(cache)
    for _ in range(6):
        with native.Program(*files.adapter) as program:
            cache.use(program, "lora_forward")
            assert np.abs(after_prompt(cache) - base).max() > 0.1
    cache.use(model, "forward")
    np.testing.assert_array_equal(after_prompt(cache), base)


def test_caches_do_not_mix(model: Any) -> None:
    one, other = started(model, "forward"), started(model, "forward")
    alone = after_prompt(one)
    one.step(PROMPT, 0)
    other.step([9] * 20, 0)
    np.testing.assert_array_equal(one.step([7], len(PROMPT)).logits, alone)


def test_a_smaller_position_takes_tokens_back(model: Any) -> None:
    cache = started(model, "forward")
    expected = after_prompt(cache)
    cache.step([3, 4, 5], len(PROMPT))
    np.testing.assert_array_equal(cache.step([7], len(PROMPT)).logits, expected)


def test_threads_may_have_caches_of_their_own(model: Any) -> None:
    expected = after_prompt(started(model, "forward"))
    found = []

    def decode() -> None:
        cache = started(model, "forward")
        found.extend(after_prompt(cache) for _ in range(5))

    workers = [threading.Thread(target=decode) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(found) == 20
    for logits in found:
        np.testing.assert_array_equal(logits, expected)


def test_caches_outlive_their_program(files: Programs) -> None:
    program = native.Program(*files.model)
    cache = started(program, "forward")
    expected = after_prompt(cache)
    program.close()
    np.testing.assert_array_equal(after_prompt(cache), expected)
    assert refused(lambda: cache.use(program, "forward")) == Status.BAD_ARGUMENT
    cache.close()
    assert refused(lambda: cache.step([1], 0)) == Status.BAD_ARGUMENT


def test_what_a_program_says_of_itself(files: Programs, model: Any, adapter: Any) -> None:
    assert [m for m in model.methods if "forward" in m] == ["forward", "forward_tap"]
    assert [m for m in adapter.methods if "lora" in m] == ["lora_forward", "lora_forward_tap"]
    assert model.methods == sorted(model.methods)
    assert model.constant("get_max_context_len") == CONTEXT
    assert model.constant("use_kv_cache") == 1
    assert refused(lambda: model.constant("get_max")) == Status.NO_METHOD
    assert refused(lambda: model.constant("forward")) == Status.BAD_PROGRAM


@pytest.mark.parametrize(
    "tokens, position, status",
    [
        ([], 0, Status.BAD_ARGUMENT),
        ([[1]], 0, Status.BAD_ARGUMENT),
        ([1], -1, Status.BAD_ARGUMENT),
        ([320], 0, Status.BAD_ARGUMENT),
        ([-1], 0, Status.BAD_ARGUMENT),
        ([1] * 257, 0, Status.BAD_ARGUMENT),  # more than the program takes at once
        ([1], CONTEXT, Status.CACHE_FULL),
        ([1, 2], CONTEXT - 1, Status.CACHE_FULL),
        ([1], 2**62, Status.CACHE_FULL),
    ],
)
def test_steps_that_cannot_be(model: Any, tokens: list[int], position: int, status: int) -> None:
    cache = started(model, "forward")
    expected = after_prompt(cache)
    assert refused(lambda: cache.step(tokens, position)) == status
    np.testing.assert_array_equal(cache.step([7], len(PROMPT)).logits, expected)


def test_methods_that_cannot_be_used(files: Programs, model: Any, adapter: Any) -> None:
    cache = model.new_cache()
    assert refused(lambda: cache.step([1], 0)) == Status.BAD_ARGUMENT
    assert refused(lambda: cache.use(model, "lora_forward")) == Status.NO_METHOD
    assert refused(lambda: cache.use(model, "get_max_context_len")) == Status.BAD_PROGRAM
    other = native.Program(*files.int8)  # whose keys and values lie elsewhere
    assert refused(lambda: cache.use(other, "forward")) == Status.BAD_PROGRAM
    assert refused(lambda: other.new_cache().use(model, "forward")) == Status.BAD_PROGRAM
    cache.use(adapter, "lora_forward")
    assert refused(lambda: cache.use(other, "forward")) == Status.BAD_PROGRAM
    after_prompt(cache)


class TestFiles:
    def run(self, program: Path, *data: Path) -> None:
        started(native.Program(program, data), "forward").step([1], 0)

    def test_missing(self, files: Programs, tmp_path: Path) -> None:
        none = tmp_path / "none"
        assert refused(lambda: self.run(none)) == Status.NO_FILE
        assert refused(lambda: self.run(files.model.path, none)) == Status.NO_FILE
        assert refused(lambda: self.run(tmp_path)) == Status.NO_FILE

    @pytest.mark.parametrize("content", [b"", b"\0", b"not a program" * 100])
    def test_foreign(self, files: Programs, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "file").write_bytes(content)
        assert refused(lambda: self.run(tmp_path / "file")) == Status.BAD_PROGRAM
        assert refused(lambda: self.run(files.model.path, tmp_path / "file")) == Status.BAD_DATA

    def test_exchanged(self, files: Programs) -> None:
        (data,) = files.model.data
        assert refused(lambda: self.run(data, files.model.path)) == Status.BAD_PROGRAM
        assert refused(lambda: self.run(files.model.path, files.model.path)) == Status.BAD_DATA

    def test_data_that_is_not_the_program_s(self, files: Programs) -> None:
        assert refused(lambda: self.run(files.model.path)) == Status.BAD_DATA
        assert refused(lambda: self.run(files.model.path, files.adapter.data[1])) == Status.BAD_DATA
        assert refused(lambda: self.run(files.model.path, *files.int8.data, *files.int8.data)) == Status.BAD_DATA
        base_only = native.Program(files.adapter.path, files.model.data)
        after_prompt(started(base_only, "forward"))
        assert refused(lambda: started(base_only, "lora_forward")) == Status.BAD_DATA

    def test_damage_in_one_program_leaves_others_alone(self, files: Programs, tmp_path: Path, model: Any) -> None:
        cache = started(model, "forward")
        expected = after_prompt(cache)
        content = files.model.path.read_bytes()
        (tmp_path / "cut.pte").write_bytes(content[: len(content) // 2])
        assert refused(lambda: self.run(tmp_path / "cut.pte", *files.model.data)) == Status.BAD_PROGRAM
        np.testing.assert_array_equal(after_prompt(cache), expected)


class TestThreads:
    def test_the_first_call_decides(self, files: Programs) -> None:
        says = child(
            """
native.start(3); print(native.threads())
native.start(1); print(native.threads())
p = native.Program(sys.argv[1], [sys.argv[2]])
try: native.start(2)
except native.NativeError as e: print(e.status.name)
native.start(0); native.start(1); print(native.threads())
c = p.new_cache(); c.use(p, "forward"); c.step([1], 0)
p.close()
native.start(2); print(native.threads()); c.step([1], 0)
try: native.start(-1)
except native.NativeError as e: print(e.status.name)
""",
            files.model.path,
            *files.model.data,
        )
        assert says.split() == ["3", "1", "BAD_ARGUMENT", "1", "2", "BAD_ARGUMENT"]

    def test_by_default_as_many_as_the_process_may_use(self, files: Programs) -> None:
        code = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
p = native.Program(sys.argv[1], [sys.argv[2]])
c = p.new_cache(); c.use(p, "forward"); c.step([1], 0)
print(native.threads())
"""
        assert child(code, files.model.path, *files.model.data).split() == ["1"]

    def test_the_number_changes_no_answer(self, files: Programs) -> None:
        code = """
native.start(int(sys.argv[3]))
p = native.Program(sys.argv[1], [sys.argv[2]])
c = p.new_cache(); c.use(p, "forward_tap")
print([float(x) for x in c.step(list(range(1, 65)), 0).logits])
"""
        one, two = (child(code, files.model.path, *files.model.data, n) for n in (1, 2))
        assert one == two


def test_no_memory_for_a_cache(files: Programs) -> None:
    says = child(
        """
import resource
p = native.Program(sys.argv[1], [sys.argv[2]])
c = p.new_cache(); c.use(p, "forward"); c.step([1], 0)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20),) * 2)
caches = []
try:
    while True: caches.append(p.new_cache())
except native.NativeError as e: print(e.status.name, len(caches) > 1)
caches.clear()
p.new_cache(); c.step([1], 1)
""",
        files.model.path,
        *files.model.data,
    )
    assert says.split() == ["NO_MEMORY", "True"]


def test_a_cache_takes_no_memory_before_it_is_written(files: Programs) -> None:
    says = child(
        """
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4
p = native.Program(sys.argv[1], [sys.argv[2]])
c = p.new_cache(); c.use(p, "forward"); c.step([1], 0)
before = resident()
more = [p.new_cache() for _ in range(500)]
print(resident() - before)
""",
        files.model.path,
        *files.model.data,
    )
    assert int(says) < 2000  # kB; written they would be 128 kB each and more


@pytest.mark.slow
def test_a_trace_has_the_time_of_every_operator(model: Any, tmp_path: Path) -> None:
    cache = started(model, "forward_tap")
    expected = after_prompt(cache)
    cache.trace(tmp_path / "steps.etdump")
    np.testing.assert_array_equal(after_prompt(cache), expected)
    assert not os.listdir(tmp_path)
    cache.trace(None)
    np.testing.assert_array_equal(after_prompt(cache), expected)
    cache.trace(None)

    inspector = needs.module("executorch.devtools").Inspector(etdump_path=str(tmp_path / "steps.etdump"))
    steps = [b for b in inspector.event_blocks if b.name == "Execute"]
    events = [e for b in steps for e in b.events]
    names = {e.name for e in events}
    assert {"native_call_custom_sdpa.out", "native_call_update_cache.out", "DELEGATE_CALL"} <= names
    assert any(e.is_delegated_op and "Fully Connected" in e.name for e in events)
    assert sum(len(b.events[0].perf_data.raw) for b in steps) == 2

    cache.trace(tmp_path / "none/steps.etdump")
    cache.step([1], 0)
    assert refused(lambda: cache.trace(None)) == Status.NO_FILE
    cache.step([1], 0)


def test_the_library_says_what_it_is() -> None:
    assert native.library.is_file()
    assert native.instruction_set() in ("baseline", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "neon", "dotprod")
    header = (ROOT / "runtime/native/src/crayon_native.h").read_text()
    for status in Status:
        assert f"CRAYON_NATIVE_{status.name} = {status.value}" in header
