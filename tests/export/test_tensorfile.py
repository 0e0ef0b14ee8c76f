"""Judges: the safetensors library for files, numpy and torch for numbers."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from crayon_export.tensorfile import Tensor, read_safetensors
from crayon_runtime.errors import CheckpointError, UnsupportedModel

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def one_tensor(path: Path, value: torch.Tensor) -> Tensor:
    save_file({"x": value}, path)
    return read_safetensors(path).tensors["x"]


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header, true or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (33, 5), (4, 3, 2), (0, 5)])
def test_rows_are_those_that_were_saved(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    tensor = one_tensor(tmp_path / "x.safetensors", value)

    assert (tensor.name, tensor.dtype, tensor.shape) == ("x", dtype, shape)
    assert tensor.nbytes == value.numel() * value.itemsize
    np.testing.assert_array_equal(tensor.read(), value.float().numpy())
    if len(value) > 3:
        np.testing.assert_array_equal(tensor.rows(2, 4), value[2:4].float().numpy())


def test_every_finite_half_is_converted_exactly(tmp_path: Path) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    tensor = one_tensor(tmp_path / "x.safetensors", torch.from_numpy(halves))

    found = tensor.read()

    assert found.tobytes() == halves.astype(np.float32).tobytes()  # the sign of zero included


@pytest.mark.parametrize("max_bytes", [1, 100, 1 << 20])
def test_chunks_cover_every_row_once_and_hash_every_byte(tmp_path: Path, max_bytes: int) -> None:
    value = torch.randn(50, 6).half()
    tensor = one_tensor(tmp_path / "x.safetensors", value)
    sha256 = hashlib.sha256()

    chunks = list(tensor.chunks(hash=sha256, max_bytes=max_bytes))

    assert [start for start, _ in chunks] == list(np.cumsum([0, *(len(rows) for _, rows in chunks[:-1])]))
    assert all(rows.nbytes <= max(max_bytes, 24) for _, rows in chunks)
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in chunks]), value.float().numpy())
    assert sha256.hexdigest() == hashlib.sha256(value.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
def test_changing_a_chunk_does_not_change_the_hash(tmp_path: Path, dtype: str) -> None:
    value = torch.ones(64, 1024).to(DTYPES[dtype])
    tensor = one_tensor(tmp_path / "x.safetensors", value)
    sha256 = hashlib.sha256()

    for _, rows in tensor.chunks(hash=sha256, max_bytes=1 << 16):
        rows[:] = 7

    assert sha256.hexdigest() == hashlib.sha256(value.view(torch.uint8).numpy().tobytes()).hexdigest()


def test_reading_waits_for_a_hash_that_is_slower(tmp_path: Path) -> None:
    tensor = one_tensor(tmp_path / "x.safetensors", torch.ones(20, 256))

    class Slow:
        chunks = 0

        def update(self, data: object) -> None:
            time.sleep(0.005)
            self.chunks += 1

    slow = Slow()
    for i, _ in enumerate(tensor.chunks(hash=slow, max_bytes=1024)):
        assert slow.chunks >= i
    assert slow.chunks == 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_found(tmp_path: Path, dtype: str, bad: float) -> None:
    value = torch.randn(40, 8).to(DTYPES[dtype])
    value[31, 5] = torch.copysign(torch.tensor(bad), torch.tensor(-1.0)) if str(bad).startswith("-") else bad
    tensor = one_tensor(tmp_path / "x.safetensors", value)

    with pytest.raises(CheckpointError, match=r"x\[31, 5\] is NaN or infinite") as caught:
        list(tensor.chunks(max_bytes=320))
    assert caught.value.where == str(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(tensor.rows(0, 31), value[:31].float().numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_not_taken_for_infinite(tmp_path: Path, dtype: str) -> None:
    largest = torch.finfo(DTYPES[dtype]).max
    value = torch.tensor([[largest, -largest] * 50] * 50, dtype=DTYPES[dtype])
    tensor = one_tensor(tmp_path / "x.safetensors", value)
    np.testing.assert_array_equal(tensor.read(), value.float().numpy())


def test_other_dtypes_are_listed_but_not_read(tmp_path: Path) -> None:
    tensor = one_tensor(tmp_path / "x.safetensors", torch.arange(4))
    assert tensor.dtype == "I64"
    with pytest.raises(UnsupportedModel, match="x is stored as I64; F32, F16 and BF16 can be read"):
        tensor.read()


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    tensor = one_tensor(tmp_path / "x.safetensors", torch.ones(100, 4))
    with tensor.file.open("r+b") as f:
        f.truncate(tensor.offset + 1000)
    with pytest.raises(CheckpointError, match="the file ends 600 bytes before the rows of x do"):
        tensor.read()


def test_metadata_and_names(tmp_path: Path) -> None:
    save_file({"b": torch.ones(2), "a": torch.zeros(3)}, tmp_path / "x.safetensors", metadata={"k": "v"})
    file = read_safetensors(tmp_path / "x.safetensors")
    assert (set(file.tensors), file.metadata) == ({"a", "b"}, {"k": "v"})


@pytest.mark.parametrize(
    "header, data, message",
    [
        (b"", b"", "not JSON"),
        (b"[1]", b"", "it holds list, not a JSON object"),
        (b"\xff\xfe", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"x": 1' + b"0" * 5000 + b"}", b"", "not JSON"),
        (b'{"x": {}, "x": {}}', b"", "it names 'x' twice"),
        ({"x": 3}, b"", "header entry of 'x' is malformed"),
        ({"x": {"dtype": "F32", "shape": [1]}}, b"", "header entry of 'x' is malformed"),
        ({"x": entry(0, 4, [1], "F33")}, bytes(4), "unknown dtype 'F33'"),
        ({"x": {**entry(0, 4, [1]), "dtype": ["F32"]}}, bytes(4), "unknown dtype"),
        ({"x": entry(0, 4, [-1])}, bytes(4), r"shape \[-1\]"),
        ({"x": entry(0, 4, [True])}, bytes(4), r"shape \[True\]"),
        ({"x": entry(0, 4, [1.0])}, bytes(4), r"shape \[1.0\]"),  # type: ignore[list-item]
        ({"x": entry(0, 4, [1 << 70])}, bytes(4), "shape"),
        ({"x": entry(0, 8, [3])}, bytes(8), r"x is F32 \[3\], which is 12 bytes, but it has 8"),
        ({"x": entry(0, 8, [4], "F32")}, bytes(8), r"which is 16 bytes, but it has 8"),
        ({"x": entry(8, 0, [2])}, bytes(8), "but it has -8"),
        (
            {"x": entry(0, 8, [2]), "y": entry(4, 12, [2])},
            bytes(12),
            "y starts at byte 4 of the data, not at 8: it overlaps",
        ),
        ({"x": entry(0, 8, [2]), "y": entry(0, 8, [2])}, bytes(8), "overlaps"),
        ({"x": entry(0, 8, [2]), "y": entry(12, 16, [1])}, bytes(16), "leaves a hole before it"),
        ({"x": entry(0, 8, [2])}, bytes(5), "3 bytes are missing at the end"),
        ({"x": entry(0, 8, [2])}, bytes(9), "1 bytes too many at the end"),
        ({"x": entry(0, 1 << 50, [1 << 48])}, bytes(9), "bytes are missing at the end"),
        ({"__metadata__": {"k": 1}}, b"", "__metadata__ is not an object of strings"),
        ({"__metadata__": 1}, b"", "__metadata__ is not an object of strings"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("length", [3, 1 << 20, 200_000_000, (1 << 64) - 1])
def test_an_absurd_header_length(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x.safetensors", b"", length=length)
    with path.open("r+b") as f:
        f.truncate(10 if length < 1 << 21 else 300_000_000)  # sparse
    with pytest.raises(CheckpointError, match=f"its header claims {length} bytes"):
        read_safetensors(path)


@pytest.mark.parametrize("content", [b"", b"12345", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"])
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_safetensors(path)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3, 5), "y": torch.ones(2).half()}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_safetensors(tmp_path / "cut")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read it: No such file"):
        read_safetensors(tmp_path / "x.safetensors")
