"""ExecuTorch's traces."""

from __future__ import annotations

import pytest

from crayon_runtime.profile.etdump import read_etdump
from tests import programs
from tests.runtime.traces import TOKENS, expected, linear_modules, traced
from tests.support import needs


@pytest.mark.slow
def test_executorchs_trace_has_every_linear_layer_and_attention_in_every_token() -> None:
    needs.native()
    bundle = programs.exported()
    found = traced(bundle.path, "executorch")
    assert linear_modules(found) == expected(bundle.model.architecture.layers)
    assert {len(operator.samples_ns) for operator in found} == {TOKENS}
    attention = [operator.module for operator in found if "sdpa" in operator.event_name]
    assert attention == [f"model.layers.{i}.self_attn" for i in range(bundle.model.architecture.layers)]


@pytest.mark.parametrize(
    "content", [b"", b"no dump at all", b"\0" * 8 + b"ED00", b"\x10\0\0\0\xff\xff\0\0ED00" + b"\1" * 40]
)
def test_what_is_no_etdump(content: bytes) -> None:
    with pytest.raises(ValueError, match="ETDump"):
        read_etdump(content)
