"""Judge: torch itself."""

from __future__ import annotations

import builtins
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crayon_export.torchfile import read_torch
from crayon_runtime.errors import CheckpointError, MissingExtra, UnsupportedModel


def test_tensors_are_those_that_were_saved(tmp_path: Path) -> None:
    a, big = torch.randn(33, 7), torch.randn(20, 10)
    state = {
        "f32": a,
        "f16": a.half(),
        "bf16": a.bfloat16(),
        "same": a,
        "view": big[3:15],
        "parameter": torch.nn.Parameter(a * 2),
        "integers": torch.arange(3),
    }
    torch.save(state, tmp_path / "x.bin")

    found = read_torch(tmp_path / "x.bin")

    assert {n: t.dtype for n, t in found.items() if n in ("f32", "f16", "bf16", "integers")} == {
        "f32": "F32",
        "f16": "F16",
        "bf16": "BF16",
        "integers": "int64",
    }
    for name in state.keys() - {"integers"}:
        np.testing.assert_array_equal(found[name].read(), state[name].detach().float().numpy())
    np.testing.assert_array_equal(found["f16"].rows(30, 32), a[30:32].half().float().numpy())


class _Code:
    """What runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_a_pickle_that_is_not_weights_only_is_not_run(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2), "y": _Code(f"touch {tmp_path}/ran")}, tmp_path / "x.bin")

    with pytest.raises(CheckpointError, match=r"its pickle holds more than weights: .*posix.system") as caught:
        read_torch(tmp_path / "x.bin")

    assert "weights_only" not in str(caught.value)  # torch's advice to switch the protection off
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "state, message",
    [
        ([torch.ones(2)], "it holds list, not a state dict"),
        ({"x": 3}, "x is a int, not a tensor"),
        ({"model": {"x": torch.ones(2)}}, "model is a dict, not a tensor"),
        ({"x": torch.ones(2, 3).t()}, r"x is not contiguous: its strides are \(1, 3\)"),
    ],
)
def test_a_state_dict_that_cannot_be_read(tmp_path: Path, state: Any, message: str) -> None:
    torch.save(state, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=message):
        read_torch(tmp_path / "x.bin")


def test_the_format_before_torch_1_6(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedModel, match=r"format from before 1\.6"):
        read_torch(tmp_path / "x.bin")


def test_damaged_files(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(200)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for content in (b"", b"PK\x03\x04", whole[:500], whole[:-30], b"\0" * 100, whole.replace(b"data.pkl", b"data.pkq")):
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(CheckpointError):
            read_torch(tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="cannot read it: No such file"):
        read_torch(tmp_path / "absent.bin")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(200)}, tmp_path / "x.bin")
    with (
        zipfile.ZipFile(tmp_path / "x.bin") as source,
        zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="compressed archive"):
        read_torch(tmp_path / "y.bin")


def test_without_torch_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "x.bin")
    original = builtins.__import__

    def without_torch(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(MissingExtra, match=r"x\.bin needs the 'pth' extra"):
        read_torch(tmp_path / "x.bin")


def test_a_torch_that_does_not_tell_where_tensors_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "x.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: {"x": torch.ones(2)})
    with pytest.raises(CheckpointError, match=f"torch {torch.__version__.partition('+')[0]}.* does not tell where"):
        read_torch(tmp_path / "x.bin")
