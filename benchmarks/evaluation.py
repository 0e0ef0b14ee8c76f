"""lm-evaluation-harness over a bundle: agreement with its `hf` model, and what sharing the beginnings of texts saves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bundles import tokenizer
from benchmarks.parity import STORIES
from benchmarks.table import Row
from crayon_export import export
from crayon_server.data.phone_assistant import benchmark
from crayon_server.models import create, load_nano

QUESTIONS, CHOICES, SHOWN = 24, 4, 3
"""Asked of a user each, and examples before each: prompts of about 90 tokens, choices of about 15."""


def run(work: Path) -> Iterator[Row]:
    yield from _agreement(work, "nano", load_nano())
    yield from _agreement(work, "stories260K", STORIES)
    yield from _times(work)


def _agreement(work: Path, name: str, folder: Path) -> Iterator[Row]:
    from lm_eval.models.huggingface import HFLM

    from crayon_server.evaluate.harness.model import CrayonLM

    bundle = export(folder, work / f"evaluation-{name}.bundle", quantize="none", replace=True).bundle.path
    ours = CrayonLM(bundle)
    own_tokenizer = folder if (folder / "tokenizer.json").exists() else bundle
    theirs = HFLM(
        pretrained=str(folder),
        tokenizer=str(own_tokenizer),
        device="cpu",
        dtype="float32",
        max_length=ours.max_length,
        batch_size=CHOICES,
    )
    asked = _requests("loglikelihood", [choice for question in _questions() for choice in question])
    found, wanted = (np.array(lm.loglikelihood(asked, disable_tqdm=True)) for lm in (ours, theirs))
    difference, same = float(np.abs(found - wanted)[:, 0].max()), bool((found[:, 1] == wanted[:, 1]).all())
    yield Row(
        f"log-likelihoods of {len(asked)} choices against lm-evaluation-harness's hf, float32, {name}",
        "<= 1e-3 nats, same greedy",
        f"{difference:.1e}, {'same' if same else 'other'} greedy",
        difference <= 1e-3 and same,
    )
    texts = _requests("loglikelihood_rolling", [("".join(prompt for (prompt, _), *_ in _questions()),)])
    (found,), (wanted,) = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in (ours, theirs))
    relative = abs(found - wanted) / abs(wanted)
    yield Row(f"... of a text longer than the context, {name}", "<= 1e-5 relative", f"{relative:.1e}", relative <= 1e-5)
    prompts = [(prompt, {"until": ["\n"], "max_gen_toks": 64}) for (prompt, _), *_ in _questions()]
    answers = [lm.generate_until(_requests("generate_until", prompts), disable_tqdm=True) for lm in (ours, theirs)]
    others = sum(a != b for a, b in zip(*answers, strict=True))
    yield Row(f"... greedy answers that differ, of {len(prompts)}, {name}", "0", str(others), others == 0)
    ours.close()


def _times(work: Path) -> Iterator[Row]:
    from crayon_server.evaluate.harness.model import CrayonLM

    model = work / "evaluation-mobilellm-125m"
    if not model.exists():
        create("mobilellm-125m", model, vocab_size=32000)
    bundle = work / "evaluation-125m.bundle"
    if not bundle.exists():
        export(model, bundle, backend=("onnx", "executorch"), tokenizer=tokenizer())
    asked = _requests("loglikelihood", [choice for question in _questions() for choice in question])
    for backend in ("onnx", "executorch"):
        seconds, computed = {}, {}
        for reuse in (True, False):
            lm = CrayonLM(bundle, backend=backend, reuse=reuse)
            lm.loglikelihood(asked[:1])  # what is packed the first time
            before, start = lm.scorer.computed, time.perf_counter()
            lm.loglikelihood(asked)
            seconds[reuse] = (time.perf_counter() - start) / QUESTIONS
            computed[reuse] = (lm.scorer.computed - before) / QUESTIONS
            lm.close()
        yield Row(
            f"a question of {CHOICES} choices after {SHOWN} examples, MobileLLM-125M shapes, int4, {backend}: "
            "beginnings shared / each text alone",
            "",
            f"{seconds[True]:.2f} s, {computed[True]:.0f} tokens / {seconds[False]:.2f} s, {computed[False]:.0f} tokens: "
            f"{seconds[False] / seconds[True]:.1f}x",
        )


def _questions() -> Iterator[list[tuple[str, str]]]:
    """Prompt and completion for each choice: the call that is meant, and calls of the same user's other queries."""
    for user in benchmark().test[:QUESTIONS]:
        shown = "".join(f"{example.text}\n" for example in user.examples[:SHOWN])
        yield [(shown + user.queries[0].prompt, query.completion) for query in user.queries[:CHOICES]]


def _requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]
