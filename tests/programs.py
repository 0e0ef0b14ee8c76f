"""The bundle for both backends that the runtime's tests share: the official exporter takes a minute and more.

CRAYON_TEST_PROGRAMS names a folder to keep it in between runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from crayon_runtime.bundle import Bundle
from tests.export.models import tiny_adapter, tiny_llama, tiny_tokenizer
from tests.support import ROOT, needs

CONTEXT = 4096
ADAPTERS = ("alice", "bruno")


def tiny_model(folder: Path) -> tuple[Path, list[Path]]:
    """A LLaMA of two layers with a tokenizer, and two adapters of it, in the formats of transformers and peft."""
    model = tiny_tokenizer(tiny_llama(folder / "model", max_position_embeddings=CONTEXT))
    return model, [tiny_adapter(model, folder / name, seed=i, gain=2.0) for i, name in enumerate(ADAPTERS)]


@cache
def exported() -> Bundle:
    """That model as a bundle for ONNX Runtime and ExecuTorch, with its adapters inside. To be changed in copies only.

    It is made by another process, which is gone with torch's memory when the bundle is there.
    """
    needs.native()
    needs.module("executorch")
    folder = Path(os.environ.get("CRAYON_TEST_PROGRAMS") or _temporary().name, "both")
    if not (folder / "bundle/manifest.json").is_file():
        subprocess.run([sys.executable, "-m", "tests.programs", str(folder)], check=True, cwd=ROOT)
    return Bundle.open(folder / "bundle")


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _export(folder: Path) -> None:
    from crayon_export.exporter import export

    model, adapters = tiny_model(folder)
    export(model, folder / "bundle", backend=["onnx", "executorch"], context_length=CONTEXT, adapters=adapters)


if __name__ == "__main__":
    _export(Path(sys.argv[1]))
