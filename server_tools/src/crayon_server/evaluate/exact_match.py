"""Exact match, intent and structure of what is generated: by a bundle on the device's engine, or by a float model in transformers.

Log-loss is the mean over examples of the mean over completion tokens (end of sequence included) of -ln p, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from crayon_runtime.errors import InvalidInput
from crayon_server.data.phone_assistant import score

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from crayon_runtime import Engine
    from crayon_server.data.phone_assistant import Example
    from crayon_server.training import Text

MAX_NEW_TOKENS = 72
"""The longest completion of the benchmark has 50-odd tokens."""


@dataclass(frozen=True)
class Result:
    """Shares of the examples, 0 to 1; log-loss in nats; and what was generated for each example."""

    exact_match: float
    intent: float
    structure: float
    log_loss: float
    answers: tuple[str, ...]


def judge(answers: Sequence[str], examples: Sequence[Example], log_loss: float) -> Result:
    """Score one generated completion (without end-of-sequence token) per example."""
    if not examples:
        raise InvalidInput("there are no examples to judge")
    scores = [score(answer, example) for answer, example in zip(answers, examples, strict=True)]
    return Result(
        exact_match=fmean(s.exact for s in scores),
        intent=fmean(s.intent for s in scores),
        structure=fmean(s.structure for s in scores),
        log_loss=log_loss,
        answers=tuple(answers),
    )


def evaluate(engine: Engine, examples: Sequence[Example]) -> Result:
    """Answer the prompts greedily with the engine and its present adapter, and judge the answers."""
    answers = [engine.generate(e.prompt, max_new_tokens=MAX_NEW_TOKENS).text for e in examples]
    return judge(answers, examples, log_loss(engine, examples))


def log_loss(engine: Engine, texts: Sequence[Text]) -> float:
    """Of the reference completions, with the engine's present adapter; that is one of its bundle's.

    Every completion is fed token by token: this takes as long as answering.
    """
    backend, tokenizer = engine.backend, engine.tokenizer
    adapter = None
    if engine.adapter is not None and engine.bundle is not None:
        adapter = backend.read_adapter(engine.bundle.adapter(engine.adapter))
    cache = backend.new_cache(adapter)
    losses = []
    for text in texts:
        cache.reset(adapter)
        step = cache.prefill(np.array(tokenizer.encode(text.prompt), np.int64))
        tokens = [*tokenizer.encode(text.completion, add_bos=False), tokenizer.info.eos[0]]
        surprises = [_surprise(step.logits, tokens[0])]
        for token, following in pairwise(tokens):
            surprises.append(_surprise(cache.decode(token).logits, following))
        losses.append(fmean(surprises))
    cache.close()
    return fmean(losses)


def _surprise(logits: npt.NDArray[np.float32], token: int) -> float:
    """-ln p(token) in nats."""
    largest = float(logits.max())
    return largest + float(np.log(np.exp(logits - largest).sum())) - float(logits[token])


def evaluate_float(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> Result:
    """The same with a transformers (or PEFT) model, all examples in one batch."""
    return judge(_generate(model, tokenizer, examples), examples, log_loss_float(model, tokenizer, examples))


def log_loss_float(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]
) -> float:
    """Of the reference completions."""
    import torch

    from crayon_server import training

    tokens = [training.tokenize(tokenizer, text) for text in texts]
    batch = training.collate(tokens, training.pad_id(tokenizer), prompt_weight=0.0)
    with torch.inference_mode():
        losses = training.token_losses(model, batch)
    weights = batch.weights[:, 1:]
    return float(((losses * weights).sum(1) / weights.sum(1)).mean())


def _generate(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[str]:
    batch = tokenizer([e.prompt for e in examples], padding=True, padding_side="left", return_tensors="pt")
    ids = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    completions = ids[:, batch["input_ids"].shape[1] :]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in completions]
