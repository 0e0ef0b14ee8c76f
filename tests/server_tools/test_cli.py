"""`crayon model …`: options arrive, errors are those of the tree, and importing the verbs costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from crayon_runtime.errors import InvalidInput
from crayon_server.cli import model as cli_model
from crayon_server.models import load_nano


def invoke(*arguments: object):
    return CliRunner().invoke(cli_model.model, [str(argument) for argument in arguments])


def test_create_writes_the_shipped_nano(tmp_path) -> None:
    result = invoke("create", "nano", "--out", tmp_path / "m", "--pretrained")
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(tmp_path / "m")
    assert (tmp_path / "m/model.safetensors").read_bytes() == (load_nano() / "model.safetensors").read_bytes()


def test_create_replaces_only_when_asked(tmp_path) -> None:
    for force, code in (([], 0), ([], 1), (["--force"], 0)):
        assert invoke("create", "nano", "--out", tmp_path / "m", "--pretrained", *force).exit_code == code


def test_train(tmp_path) -> None:
    result = invoke("train", "nano", "--out", tmp_path / "m", "--steps", 2, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["steps"] == 2
    assert 6 < printed["loss"] < 7
    assert (tmp_path / "m/model.safetensors").exists()


def test_unknown_architecture(tmp_path) -> None:
    result = invoke("create", "pico", "--out", tmp_path / "m")
    assert isinstance(result.exception, InvalidInput)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("train", "nano"), ("train", "nano", "--out", "m", "--steps", "0")])
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_importing_the_verbs_is_light() -> None:
    code = "import sys, crayon_server.cli.model, crayon_server.demo.story; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
