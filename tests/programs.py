"""The bundles with programs of ExecuTorch that the tests share: its exporter takes minutes of CPU, so each is made once.

CRAYON_TEST_PROGRAMS names a folder to keep them in between runs. Where it names none, conftest.py makes one for the session, which the
processes of one share, with the templates in tests/data/templates. What has no template there is made: `python -m tests.programs templates`
makes those that are there again, and a kept folder has further ones in cache/crayon/templates.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from crayon_runtime.bundle import Bundle
from crayon_runtime.manifest import LINEARS
from tests.export.models import tiny_adapter, tiny_llama, tiny_tokenizer
from tests.support import ROOT, needs

TEMPLATES = ROOT / "tests/data/templates"

CONTEXT, INT8_CONTEXT = 4096, 256
GROUP_SIZE = 64
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 40}
ADAPTERS = ("alice", "bruno")
SLOT_RANK = 8
"""The largest rank of these adapters, and so that of the slots."""


class Made(NamedTuple):
    model: Path
    adapters: list[Path]
    bundle: Bundle
    report: dict[str, Any]
    stderr: str
    """What the exporter said there; it ran without a terminal."""


def tiny_model(folder: Path, *, seed: int = 0, context: int = CONTEXT) -> Path:
    """A LLaMA of two layers with a tokenizer. Of its widths 64, 80 and 160 no group divides the second, and 32 the third."""
    shape = {"intermediate_size": 160, "max_position_embeddings": context, **HEADS}
    model = tiny_tokenizer(tiny_llama(folder, seed=seed, **shape))
    _answer_in_words(model)
    return model


def tiny_adapters(model: Path, folder: Path) -> list[Path]:
    """Two adapters of it, in peft's format: every layer, and two ranks, in the first."""
    everywhere = {"target_modules": list(LINEARS), "rank_pattern": {"q_proj": 8}}
    return [
        tiny_adapter(model, folder / name, seed=i, **kind)
        for i, (name, kind) in enumerate(zip(ADAPTERS, (everywhere, {"gain": 1.0}), strict=True))
    ]


def whole_adapter(model: Path, folder: Path) -> Path:
    """An adapter of it that fills all of the slots."""
    kind = {"target_modules": list(LINEARS), "r": SLOT_RANK}
    return tiny_adapter(model, folder / "carla", seed=7, **kind)


def exported() -> Bundle:
    """That model as a bundle for ONNX Runtime and ExecuTorch, with its adapters inside. To be changed in copies only."""
    needs.native()
    return made().bundle


@cache
def made() -> Made:
    """The same, with what it was made from and what the exporter said. It ran in a process that is gone with torch's memory."""
    folder = _made("both")
    said = json.loads((folder / "said.json").read_bytes())
    adapters = [folder / name for name in ADAPTERS]
    return Made(folder / "model", adapters, Bundle.open(folder / "bundle"), said["report"], said["stderr"])


@cache
def exported_int8() -> Bundle:
    """The model as a bundle for ExecuTorch alone, with an int8 KV cache of fewer positions."""
    needs.native()
    return Bundle.open(_made("int8") / "bundle")


@cache
def exported_officially() -> Bundle:
    """The model of `made`, with alice and `whole_adapter`, as ExecuTorch's own exporter makes it of the weights."""
    return Bundle.open(_made("official") / "bundle")


@cache
def exported_as_a_single_file() -> Bundle:
    """The model of `made` with alice merged, in one program for ExecuTorch."""
    return Bundle.open(_made("single") / "bundle")


@cache
def exported_officially_as_a_single_file() -> Bundle:
    """The same, as ExecuTorch's own exporter makes it of the weights."""
    return Bundle.open(_made("official-single") / "bundle")


def cache_home() -> Path:
    """The XDG_CACHE_HOME with the templates of these bundles."""
    return _kept() / "cache"


def _kept() -> Path:
    return Path(os.environ["CRAYON_TEST_PROGRAMS"])


def _made(kind: str) -> Path:
    needs.module("executorch")
    folder = _kept() / kind
    with (_kept() / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "said.json").is_file():
            environment = {**os.environ, "XDG_CACHE_HOME": str(cache_home())}
            subprocess.run([sys.executable, "-m", "tests.programs", str(folder)], check=True, cwd=ROOT, env=environment)
    return folder


def _answer_in_words(model: Path) -> None:
    """Zero the rows of the head for single bytes: TextLLMRunner cannot report half a character. Quantization meets rows of zeros, too."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][: 3 + 256] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def _export(folder: Path) -> None:
    model = tiny_model(folder / "model")
    command = [sys.executable, "-m", "crayon_runtime", "export", str(model), "--out", str(folder / "bundle"), "--json"]
    command += ["--backend", "executorch", "--group-size", str(GROUP_SIZE)]
    if folder.name == "int8":
        command += ["--context-length", str(INT8_CONTEXT), "--kv-dtype", "int8"]
    else:
        alice, bruno = tiny_adapters(model, folder)
        options, adapters = {
            "both": (["--backend", "onnx"], [alice, bruno]),
            "single": (["--single-file", "--merge"], [alice]),
            "official": (["--official"], [alice, whole_adapter(model, folder)]),
            "official-single": (["--official", "--single-file", "--merge"], [alice]),
        }[folder.name]
        command += ["--context-length", str(CONTEXT), *options]
        for adapter in adapters:
            command += ["--adapter", str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    said = {"report": json.loads(done.stdout)["report"], "stderr": done.stderr}
    (folder / "said.json").write_text(json.dumps(said))


def _make_templates() -> None:
    """Those that are there, be they of another version of ExecuTorch, which `read_template` refuses."""
    from crayon_export.executorch.making import make_in_process
    from crayon_export.executorch.template import EXECUTORCH, SUFFIX, TemplateSpec

    for path in sorted(TEMPLATES.glob(f"*{SUFFIX}")):
        with zipfile.ZipFile(path) as archive:
            index = json.loads(archive.read("index.json"))
        spec = msgspec.convert(index["spec"] | {"executorch": EXECUTORCH}, TemplateSpec)
        made = TEMPLATES / f"{spec.key}{SUFFIX}"
        make_in_process(spec, made)
        if made != path:
            path.unlink()


if __name__ == "__main__":
    _make_templates() if sys.argv[1:] == ["templates"] else _export(Path(sys.argv[1]))
