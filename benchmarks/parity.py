"""The exported model against transformers and peft, in float32 and quantized."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bundles import tokenizer
from benchmarks.checkpoints import random_adapter
from benchmarks.table import Row
from crayon_export import export
from crayon_export.architecture import read
from crayon_runtime import backends
from crayon_runtime.bundle import Bundle
from crayon_runtime.golden import kl_divergence
from crayon_runtime.golden import read as read_golden
from crayon_server.models import load_nano

STORIES = Path(__file__).parent.parent / "tests/data/stories260K"


def run(work: Path) -> Iterator[Row]:
    models = {"stories260K": STORIES, "nano": load_nano(), "2 random layers of 7B widths": wide_model(work)}
    for name, folder in models.items():
        difference, same = against_transformers(folder, work / f"{name}-fp32.bundle")
        yield Row(
            f"logits with fp32 weights against transformers eager, {name}",
            "<= 1e-4, same argmax",
            f"{difference:.1e}, {'same' if same else 'another'} argmax",
            difference <= 1e-4 and same,
        )
    for name in ("stories260K", "nano"):
        yield from _merged(work, name, models[name])


def against_transformers(folder: Path, out: Path) -> tuple[float, bool]:
    """Export in float32; the largest difference of a logit on the golden steps, and whether all best tokens are the same."""
    bundle = export(folder, out, quantize="none", tokenizer=_tokenizer(folder), replace=True).bundle
    cases = _cases(bundle)
    pairs = list(zip(_logits(bundle, cases), _transformers(folder, cases), strict=True))
    difference = max(float(np.abs(got - expected).max()) for got, expected in pairs)
    return difference, all(bool((got.argmax(1) == expected.argmax(1)).all()) for got, expected in pairs)


def _merged(work: Path, name: str, folder: Path) -> Iterator[Row]:
    """An adapter merged into the weights, and the same one attached."""
    architecture = read(json.loads((folder / "config.json").read_text()))
    adapter = random_adapter(work / f"{name}-adapter", architecture, 8)
    for quantize in ("none", "int4"):
        options: dict[str, Any] = {"quantize": quantize, "adapters": [adapter], "replace": True}
        attached = export(folder, work / f"{name}-{quantize}-attached.bundle", **options).bundle
        merged = export(folder, work / f"{name}-{quantize}-merged.bundle", merge=True, **options).bundle
        cases = _cases(attached)
        a = np.concatenate(_logits(attached, cases, adapter=adapter.name))
        m = np.concatenate(_logits(merged, cases))
        difference, kl = float(np.abs(a - m).max()), float(kl_divergence(a, m).mean())
        if quantize == "none":
            yield Row(
                f"merged against switchable adapter, fp32, {name}", "<= 1e-4", f"{difference:.1e}", difference <= 1e-4
            )
        else:
            yield Row(f"merged against switchable adapter, int4, {name}", "", f"KL {kl:.2e} nats")


def _cases(bundle: Bundle) -> list[Any]:
    return [case for case in read_golden(bundle)[0].cases if case.adapter is None]


def _logits(bundle: Bundle, cases: list[Any], *, adapter: str | None = None) -> list[np.ndarray]:
    """At each golden step, from the device's side: a prefill, then token by token."""
    backend = backends.load(bundle)
    attached = backend.read_adapter(bundle.adapter(adapter)) if adapter else None
    outputs = []
    for case in cases:
        cache = backend.new_cache(attached)
        rows = [cache.prefill(np.array(case.ids[: case.prompt_length])).logits.copy()]
        rows += [
            step.logits.copy()
            for position in range(case.prompt_length, len(case.ids))
            if (step := cache.decode(case.ids[position])) and position in case.steps
        ]
        outputs.append(np.stack(rows))
    return outputs


def _transformers(folder: Path, cases: list[Any]) -> list[np.ndarray]:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return [model(torch.tensor(c.ids)[None]).logits[0, c.steps].numpy() for c in cases]


def wide_model(work: Path) -> Path:
    """Two layers of LLaMA-7B's widths with dense random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = work / "wide"
    if not path.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, vocab_size=32000
            )
        ).save_pretrained(path)
    return path


def _tokenizer(folder: Path) -> Path | None:
    return None if (folder / "tokenizer.json").exists() or (folder / "tokenizer.model").exists() else tokenizer()
