"""Judge: what each file is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from crayon_export import jsonfile
from crayon_runtime.errors import CheckpointError


def test_an_object(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": [1, {"b": null}]}')
    assert jsonfile.read(tmp_path / "x.json") == {"a": [1, {"b": None}]}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not JSON: Expecting value"),
        (b'{"a": 1', "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": 1' + b"0" * 10_000 + b"}", "not JSON"),
        (b"3", "it holds int, not a JSON object"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "it names 'b' twice"),
    ],
)
def test_what_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        jsonfile.read(tmp_path / "x.json")
    assert caught.value.where == str(tmp_path / "x.json")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no x\.json") as caught:
        jsonfile.read(tmp_path / "x.json")
    assert caught.value.where == str(tmp_path)


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read it: Is a directory"):
        jsonfile.read(tmp_path)
