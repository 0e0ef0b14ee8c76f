"""ExecuTorch's traces, against its own Inspector."""

from __future__ import annotations

from pathlib import Path

import pytest

from crayon_runtime.profile.etdump import read_etdump
from tests import programs
from tests.runtime.traces import TOKENS, expected, linear_modules, traced
from tests.support import needs


@pytest.mark.slow
def test_executorchs_trace_has_the_times_that_its_inspector_reads(tmp_path: Path) -> None:
    native = needs.native()
    made = programs.made()
    found = traced(made.bundle.path, "executorch")
    assert linear_modules(found) == expected(made.bundle.model.architecture.layers)
    assert {len(operator.samples_ns) for operator in found} == {TOKENS}
    attention = [operator.module for operator in found if "sdpa" in operator.event_name]
    assert attention == [f"model.layers.{i}.self_attn" for i in range(made.bundle.model.architecture.layers)]

    native.start(0)
    program = native.Program(made.bundle.file("model.pte"), [made.bundle.file("model.ptd")])
    cache = program.new_cache()
    cache.use(program, "forward_tap")
    path = tmp_path / "steps.etdump"
    cache.trace(path)
    for position in range(TOKENS):
        cache.step([1], position)
    cache.trace(None)
    steps = [step for step in read_etdump(path.read_bytes()) if any(e.name == "Method::execute" for e in step)]
    inspector = needs.module("executorch.devtools").Inspector(etdump_path=str(path))
    (block,) = [b for b in inspector.event_blocks if b.name == "Execute"]
    ours = sorted((e.name, e.end - e.start) for step in steps for e in step if not e.delegated)
    theirs = sorted((e.name, round(ms * 1e6)) for e in block.events if not e.is_delegated_op for ms in e.perf_data.raw)
    assert ours == theirs


@pytest.mark.parametrize(
    "content", [b"", b"no dump at all", b"\0" * 8 + b"ED00", b"\x10\0\0\0\xff\xff\0\0ED00" + b"\1" * 40]
)
def test_what_is_no_etdump(content: bytes) -> None:
    with pytest.raises(ValueError, match="ETDump"):
        read_etdump(content)
