"""A float model in transformers that answers many texts at once, each with its own blend of a pool's LoRAs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crayon_server import models, training

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from crayon_server.pool.joint import JointLoras
    from crayon_server.training import Text, Tokens

    Floats = npt.NDArray[np.float32]
    Indices = npt.NDArray[np.int64]

BATCH_TOKENS = 8192
"""Of a batch, padding included."""


class Forced(NamedTuple):
    """Teacher forcing of n texts: their completions, every token given all before it.

    Attributes:
        exact: bool [n], whether every token is the likeliest: then, and only then, greedy generation gives the completion.
        log_loss: float32 [n], mean over the completion's tokens, in nats.
    """

    exact: npt.NDArray[np.bool_]
    log_loss: Floats


class FloatModel:
    """A Hugging Face folder in float32, on the GPU where there is one.

    Attributes:
        model, tokenizer: of transformers.
        pad_id: see `training.pad_id`.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import PreTrainedModel, PreTrainedTokenizerBase

        self.tokenizer: PreTrainedTokenizerBase = models.load_tokenizer(folder)
        self.model: PreTrainedModel = models.load(folder, torch.float32).to(training.accelerator().device)
        self.pad_id = training.pad_id(self.tokenizer)

    def tokenize(self, texts: Sequence[Text]) -> list[Tokens]:
        return [training.tokenize(self.tokenizer, text) for text in texts]

    def force(self, texts: Sequence[Tokens], loras: JointLoras | None = None, alphas: Floats | None = None) -> Forced:
        """Score the completions that are there.

        Args:
            loras: attached to this model.
            alphas: float32 [n, N], of each text; None: the base.
        """
        import torch

        exact, log_loss = np.empty(len(texts), np.bool_), np.empty(len(texts), np.float32)
        for rows in _batches([len(text.ids) for text in texts]):
            batch = training.collate([texts[i] for i in rows], self.pad_id, 0.0)
            weights, targets = batch.weights[:, 1:], batch.ids[:, 1:]
            with torch.inference_mode(), blending(loras, alphas, rows):
                logits = (
                    self.model(input_ids=batch.ids.to(self.model.device), use_cache=False).logits[:, :-1].float().cpu()
                )
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            log_loss[rows] = ((losses * weights).sum(1) / weights.sum(1)).numpy()
            exact[rows] = ((logits.argmax(-1) == targets) | (weights == 0)).all(1).numpy()
        return Forced(exact, log_loss)

    def generate(
        self,
        texts: Sequence[Tokens],
        max_new_tokens: int,
        loras: JointLoras | None = None,
        alphas: Floats | None = None,
    ) -> list[str]:
        """Answer the prompts greedily, without end-of-sequence token. Arguments as those of `force`."""
        import torch

        prompts = [text.ids[: text.in_completion.index(True)] for text in texts]
        answers = [""] * len(texts)
        for rows in _batches([len(prompt) + max_new_tokens for prompt in prompts]):
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([[self.pad_id] * (longest - len(prompts[i])) + prompts[i] for i in rows])
            mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
            with torch.inference_mode(), blending(loras, alphas, rows):
                generated = self.model.generate(
                    input_ids=ids.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                )
            for i, row in zip(rows, generated[:, longest:], strict=True):
                answers[i] = self.tokenizer.decode(row, skip_special_tokens=True)
        return answers


@contextmanager
def blending(loras: JointLoras | None, alphas: Floats | None, rows: Indices) -> Iterator[None]:
    """The model answers a batch with the alphas of these rows."""
    import torch

    if loras is None or alphas is None:
        yield
        return
    device = next(loras.model.parameters()).device
    loras.alpha = torch.from_numpy(alphas[rows]).to(device)
    try:
        yield
    finally:
        loras.alpha = None


def _batches(lengths: Sequence[int]) -> Iterator[Indices]:
    """Indices of texts of about the same length, in batches of at most `BATCH_TOKENS`, one text at least."""
    batch: list[int] = []
    for i in np.argsort(lengths, kind="stable").tolist():
        if batch and lengths[i] * (len(batch) + 1) > BATCH_TOKENS:
            yield np.array(batch)
            batch = []
        batch.append(i)
    if batch:
        yield np.array(batch)
