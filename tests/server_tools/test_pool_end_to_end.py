"""A pool, a blend, and a device that answers with it: merged into the weights, and as an adapter that is switched on, are one model.

Everything is done with the commands that a user has.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner

from crayon_export.cli import adapter as cli_adapter
from crayon_export.cli import export as cli_export
from crayon_runtime import Engine
from crayon_runtime.bundle import Bundle
from crayon_runtime.examples import score
from crayon_runtime.pool import Pool, write_adapter_bundle
from crayon_server import models
from crayon_server.cli import pool as cli_pool
from crayon_server.data import phone_assistant as pa
from tests.support import needs

torch = needs.module("torch")
transformers = needs.module("transformers")
peft = needs.module("peft")

NANO = models.load_nano()
ALPHA = [0.55, 0.3, 0.15]
USER = pa.benchmark().validation[0]
QUERIES = [(query.prompt, query.completion) for query in USER.queries[:12]]
ROUNDING = 2e-3
"""Of float32 logits: products are added in another order, in another library."""


def run(command, *arguments: object) -> str:
    done = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> SimpleNamespace:
    """A pool, the three blends of one alpha, and bundles of the base."""
    folder = tmp_path_factory.mktemp("desk")
    lines = [
        {"prompt": e.prompt, "completion": e.completion, "group": user.name}
        for user in pa.benchmark().train[:6]
        for e in user.examples[:16]
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "alpha.json").write_text(json.dumps(ALPHA))
    size = ("--adapters", 3, "--rank", 2, "--steps", 30, "--learning-rate", 0.02, "--batch-size", 16, "--threads", 1)
    run(cli_pool.pool, "build", "--model", NANO, "--data", folder / "texts.jsonl", "--out", folder / "pool", *size)
    for mode in ("separate", "concat", "svd"):
        run(cli_pool.blend, folder / "pool", "--weights", folder / "alpha.json", "--out", folder / mode, "--mode", mode)
    for quantize in ("none", "int4"):
        run(cli_export, NANO, "--out", folder / quantize, "--quantize", quantize)
    return SimpleNamespace(folder=folder, pool=Pool.open(folder / "pool", verify=True))


class Said(NamedTuple):
    logits: np.ndarray
    """float32 [n, V]: after each prompt."""
    log_loss: float
    """Of the wanted answers, nats per token."""
    answers: list[str]


def ask(bundle: Path, adapter: Bundle | None) -> Said:
    """What a device says."""
    with Engine.load(bundle) as engine:
        read = engine.read_adapter(adapter) if adapter else None
        engine.set_adapter(read)
        scored = score(engine, QUERIES, read)
        answers = [engine.generate(prompt, max_new_tokens=48).text for prompt, _ in QUERIES]
    return Said(scored.first_logits, scored.log_loss, answers)


def merged(desk, mode: str, quantize: str) -> Said:
    """`crayon export --merge`."""
    out = desk.folder / f"merged-{mode}-{quantize}"
    if not out.exists():
        run(cli_export, NANO, "--adapter", desk.folder / mode, "--merge", "--out", out, "--quantize", quantize)
    return ask(out, None)


def inside(desk, mode: str, quantize: str) -> Said:
    """`crayon export --adapter`."""
    out = desk.folder / f"inside-{mode}-{quantize}"
    run(cli_export, NANO, "--adapter", desk.folder / mode, "--out", out, "--quantize", quantize)
    return ask(out, Bundle.open(out).adapter(mode))


def beside(desk, mode: str, quantize: str) -> Said:
    """`crayon adapter convert`."""
    out = desk.folder / f"beside-{mode}-{quantize}"
    run(cli_adapter, "convert", desk.folder / mode, "--bundle", desk.folder / quantize, "--out", out)
    return ask(desk.folder / quantize, Bundle.open(out))


def blended(desk, mode: str, quantize: str) -> Said:
    """As a device blends, or the service does."""
    out, manifest = desk.folder / f"blended-{mode}-{quantize}", desk.pool.manifest
    blend = desk.pool.blend(ALPHA, mode)
    adapter = write_adapter_bundle(
        blend, out, name="alice", base_fingerprint=manifest.base_fingerprint, pool=manifest.origin
    )
    return ask(desk.folder / quantize, adapter)


@pytest.mark.parametrize("switched_on", [inside, beside, blended])
@pytest.mark.parametrize("mode", ["separate", "concat", "svd"])
def test_merged_and_switched_on_are_one_model_in_float(desk, mode: str, switched_on) -> None:
    one, other = merged(desk, mode, "none"), switched_on(desk, mode, "none")
    np.testing.assert_allclose(one.logits, other.logits, atol=ROUNDING, rtol=0)
    assert one.log_loss == pytest.approx(other.log_loss, abs=ROUNDING)
    assert one.answers == other.answers


def test_both_are_what_transformers_and_peft_say(desk) -> None:
    """And not what the base says: an adapter that is dropped on the way would be one model with itself."""
    model = models.load(NANO, torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(NANO)

    def logits(model) -> np.ndarray:
        with torch.inference_mode():
            rows = [model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1] for prompt, _ in QUERIES]
        return torch.stack(rows).numpy()

    base = logits(model)
    reference = logits(peft.PeftModel.from_pretrained(model, desk.folder / "separate").eval())
    said = merged(desk, "separate", "none")
    np.testing.assert_allclose(said.logits, reference, atol=ROUNDING, rtol=0)
    assert np.abs(said.logits - base).max() > 100 * ROUNDING
    assert said.answers != ask(desk.folder / "none", None).answers


def test_modes_differ_where_they_should(desk) -> None:
    """`separate` has cross terms; `concat` is the exact sum; `svd` is `concat` cut to the rank of one LoRA."""
    separate, concat, svd = (blended_logits(desk, mode) for mode in ("separate", "concat", "svd"))
    assert np.abs(separate - concat).max() > 10 * ROUNDING
    assert np.abs(svd - concat).max() > ROUNDING


def blended_logits(desk, mode: str) -> np.ndarray:
    return merged(desk, mode, "none").logits


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL, nats, mean over rows, of distributions that logits [n, V] stand for."""
    p, q = (
        x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True) for x in (p, q)
    )
    return float((np.exp(p) * (p - q)).sum(1).mean())


def test_int4_differs_by_the_rounding_of_its_weights(desk, record_property) -> None:
    """Merging rounds W + s B A, switching on rounds W alone: two roundings of one model, each as far from it as the other."""
    exact = merged(desk, "separate", "none")
    one, other = merged(desk, "separate", "int4"), blended(desk, "separate", "int4")
    measured = {
        "KL of merged from float": divergence(exact.logits, one.logits),
        "KL of switched on from float": divergence(exact.logits, other.logits),
        "KL of one from the other": divergence(one.logits, other.logits),
        "log-loss: float": exact.log_loss,
        "log-loss: merged": one.log_loss,
        "log-loss: switched on": other.log_loss,
        "same answers": float(np.mean([a == b for a, b in zip(one.answers, other.answers, strict=True)])),
    }
    for name, value in measured.items():
        record_property(name, f"{value:.4f}")
    assert all(value < 0.02 for name, value in measured.items() if name.startswith("KL")), measured
    assert abs(one.log_loss - other.log_loss) < 0.1 * exact.log_loss, measured
    assert measured["same answers"] >= 0.5, measured
    print(measured)


def test_a_rounding_of_another_model_is_further_away(desk) -> None:
    """So that the bounds above could be missed: the base, in int4, is none of these roundings."""
    exact = merged(desk, "separate", "none")
    assert divergence(exact.logits, ask(desk.folder / "int4", None).logits) > 0.05
