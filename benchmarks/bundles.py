"""Bundles that several benchmarks use, and what a token costs in them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.checkpoints import sparse_checkpoint
from crayon_export import export
from crayon_export.quantize import Blockwise
from crayon_runtime.bundle import Bundle
from crayon_server.models import load_nano


def tokenizer() -> Path:
    """Sparse checkpoints have no text to tell; any tokenizer that fits their vocabulary does."""
    return load_nano()


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
    """Bytes of weights that decoding one token reads: all linear layers and the head; of the embedding, one row."""
    from crayon_export.architecture import linears

    model = Bundle.open(bundle).model
    a, q = model.architecture, model.quantization
    shapes = [(x.out_features, x.in_features) for x in linears(a)] + [(a.vocab_size, a.hidden_size)]
    if q.weights == "none":
        return sum(4 * rows * width for rows, width in shapes)
    blockwise = Blockwise({"int4": 4, "int8": 8}[q.weights], q.group_size)
    return sum(blockwise.nbytes(rows, width) for rows, width in shapes)
