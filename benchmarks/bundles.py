"""Bundles that several benchmarks use, and what a token costs in them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import sparse_checkpoint
from crayon_export import export
from crayon_export.estimate import weight_bytes
from crayon_export.quantize import Blockwise
from crayon_runtime.bundle import Bundle
from crayon_server.models import load_nano


def tokenizer() -> Path:
    """Sparse checkpoints have no text to tell; any tokenizer that fits their vocabulary does."""
    return load_nano()


def exported(model: Path, out: Path, *options: str) -> dict[str, Any]:
    """Run `crayon export` in a process of its own, with any tokenizer where the model has none; returns its report."""
    command = [sys.executable, "-m", "crayon_runtime", "export", str(model), "--out", str(out), "--force", "--json"]
    if not any((model / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        command += ["--tokenizer", str(tokenizer())]
    print(f"  exporting {out.name} …", file=sys.stderr, flush=True)
    done = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE)
    report: dict[str, Any] = json.loads(done.stdout)["report"]
    return report


def tinyllama(work: Path, *, group_size: int = 32, slots: bool = True) -> Path:
    """A bundle at TinyLlama-1.1B's shapes, int4, with an adapter of rank 16 inside where there are slots."""
    out = work / f"tinyllama-int4-g{group_size}{'' if slots else '-no-slots'}.bundle"
    if not out.exists():
        model = sparse_checkpoint(work, "tinyllama-1.1b")
        adapters = [model / "adapter"] if slots else []
        export(
            model, out, group_size=group_size, adapters=adapters, adapter_slots=slots, tokenizer=tokenizer(),
        )  # fmt: skip
    return out


def bytes_per_token(bundle: Path) -> int:
    """Bytes of weights that decoding one token reads: all linear layers, the head and the norms; of the embedding, one row."""
    model = Bundle.open(bundle).model
    blockwise = Blockwise.named(model.quantization.weights, model.quantization.group_size or None)
    return weight_bytes(model.architecture, blockwise)[1]
