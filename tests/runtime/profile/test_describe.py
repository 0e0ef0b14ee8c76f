from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from crayon_export import export
from crayon_export.architecture import linears
from crayon_export.estimate import weight_bytes
from crayon_export.quantize import Blockwise
from crayon_runtime.profile.describe import kv_bytes, operations, processor_name, read_bytes, total_memory
from crayon_server.models import load_nano
from tests.runtime.bundles import ARCHITECTURE


@pytest.mark.parametrize("quantize", ["int4", "int8", "none"])
def test_the_bytes_that_a_token_reads_are_those_of_the_estimate(tmp_path: Path, quantize: str) -> None:
    bundle = export(load_nano(), tmp_path / "nano", quantize=quantize).bundle
    kind = Blockwise.named(quantize, bundle.model.quantization.group_size or None) if quantize != "none" else None
    estimated = weight_bytes(bundle.model.architecture, kind)[1]
    assert read_bytes(bundle.model) == estimated


def test_operations_are_two_for_each_weight_of_the_linear_layers() -> None:
    a = msgspec.structs.replace(ARCHITECTURE, layer_repeats=2)
    weights = 2 * sum(layer.out_features * layer.in_features for layer in linears(a)) + a.vocab_size * a.hidden_size
    assert operations(a) == 2 * weights
    assert kv_bytes(a, "fp32") == 4 * kv_bytes(a, "int8") == 4 * 2 * 4 * a.kv_heads * a.head_size


def test_a_machine_is_named_by_its_processor_or_its_board(tmp_path: Path) -> None:
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text("Raspberry Pi 5\0")
    assert processor_name(tmp_path) == "Raspberry Pi 5"
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC\n")
    assert processor_name(tmp_path) == "AMD EPYC"
    (tmp_path / "proc/meminfo").write_text("MemFree: 1 kB\nMemTotal:  2 kB\n")
    assert (total_memory(tmp_path), total_memory(tmp_path / "none")) == (2048, None)
