"""Judge: ONNX Runtime's own reader and writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from crayon_runtime.backends.onnx_adapter import Tensor, write_onnx_adapter
from crayon_runtime.errors import AdapterError


def _arrays(*shapes: tuple[int, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"layer.{'x' * i}.weight": rng.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: (array.shape, lambda array=array: array) for name, array in arrays.items()}


@pytest.mark.parametrize("shapes", [[(1, 1)], [(3, 5), (7, 1), (1, 9), (64, 16), (2, 2)], [(5, 3)] * 40])
def test_onnxruntime_reads_the_same_tensors(shapes: list[tuple[int, int]], tmp_path: Path) -> None:
    arrays = (
        _arrays(*shapes) if len(set(shapes)) > 1 else {f"t{i}": np.full(s, i, np.float32) for i, s in enumerate(shapes)}
    )
    path = tmp_path / "a.onnx_adapter"
    with path.open("wb") as file:
        write_onnx_adapter(file, _tensors(arrays))
    read = ort.AdapterFormat.read_adapter(str(path))
    assert (read.get_format_version(), read.get_adapter_version(), read.get_model_version()) == (1, 1, 1)
    values = read.get_parameters()
    assert set(values) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(values[name].numpy(), array)


def test_what_onnxruntime_writes_again_is_the_same_adapter(tmp_path: Path) -> None:
    arrays = _arrays((3, 5), (16, 8))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    with ours.open("wb") as file:
        write_onnx_adapter(file, _tensors(arrays))
    adapter = ort.AdapterFormat.read_adapter(str(ours))
    adapter.export_adapter(str(theirs))
    values = ort.AdapterFormat.read_adapter(str(theirs)).get_parameters()
    assert {name: value.numpy().tolist() for name, value in values.items()} == {
        n: a.tolist() for n, a in arrays.items()
    }


def test_a_tensor_that_is_not_what_was_said(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file, pytest.raises(AdapterError, match=r"t has shape \(2, 3\)"):
        write_onnx_adapter(file, {"t": ((3, 2), lambda: np.zeros((2, 3), np.float32))})


def test_more_than_the_format_holds(tmp_path: Path) -> None:
    huge = {f"t{i}": ((1 << 20, 300), lambda: np.zeros((1, 1), np.float32)) for i in range(2)}
    with (tmp_path / "a").open("wb") as file, pytest.raises(AdapterError, match="2 GiB"):
        write_onnx_adapter(file, huge)
    assert (tmp_path / "a").stat().st_size == 0
