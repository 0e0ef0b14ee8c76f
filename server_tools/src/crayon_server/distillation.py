"""Knowledge distillation: a student learns from the logits of a teacher, beside the labels.

    loss = (1 - w) CE(student, label) + w T^2 KL(softmax(teacher / T) || softmax(student / T))

T^2 keeps the size of the second term's gradients what it is at T = 1 (Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural
Network", arXiv:1503.02531, section 2). MobileLLM's authors (arXiv:2402.14905) found labels alone to be as good, and faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from crayon_runtime.errors import InvalidInput
from crayon_server import models, training

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from crayon_server.training import Batch


@dataclass(frozen=True)
class Teacher:
    """A frozen model, and how much a student listens to it.

    Attributes:
        weight: w, 0 to 1.
        temperature: T.
    """

    model: torch.nn.Module
    weight: float = 0.5
    temperature: float = 1.0

    def loss(self, student: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Of every token but the first: float32 [B, T - 1], in nats; a `training.LossOf`."""
        import torch

        logits = student(input_ids=batch.ids, use_cache=False).logits[:, :-1]
        with torch.no_grad():
            taught = self.model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
        labels = training.cross_entropy(logits, batch.ids[:, 1:])
        return (1 - self.weight) * labels + self.weight * divergence(logits, taught, self.temperature)


def divergence(logits: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(taught / T) || softmax(logits / T)), of logits [..., V]: float32 [...], in nats."""
    import torch

    student, teacher = (torch.log_softmax(each.float() / temperature, -1) for each in (logits, taught))
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def load_teacher(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    length: int,
    place: Accelerator,
    *,
    weight: float,
    temperature: float,
) -> Teacher:
    """A teacher from a Hugging Face folder, where it runs: in bfloat16 if the student is trained so, sharded if the student is.

    Args:
        tokenizer, vocab_size: the student's.
        length: tokens of the longest text.

    Raises:
        InvalidInput: there is no such model, it knows other tokens, its context is too short, or weight or temperature cannot be used.
    """
    import torch

    if not 0 <= weight <= 1 or not temperature > 0:
        raise InvalidInput(f"weight {weight} is not 0 to 1, or temperature {temperature} not above 0", where="teacher")
    try:
        other = models.load_tokenizer(folder)
        model = models.load(folder, torch.bfloat16 if place.mixed_precision == "bf16" else torch.float32)
    except (OSError, ValueError) as e:
        raise InvalidInput(f"the teacher cannot be loaded: {e}", where=folder, do="give a Hugging Face folder") from e
    _check_vocabulary(folder, tokenizer, vocab_size, other, model.config.vocab_size)
    if model.config.max_position_embeddings < length:
        raise InvalidInput(
            f"the teacher's context of {model.config.max_position_embeddings} tokens is shorter than the texts' {length}",
            where=folder,
            do="train with a shorter --context-length",
        )
    return Teacher(training.put(model, place), weight, temperature)


def _check_vocabulary(
    folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int, other: PreTrainedTokenizerBase, other_size: int
) -> None:
    do = "take a teacher with the student's tokenizer, or give a new student the teacher's with --tokenizer"
    if other_size != vocab_size:
        raise InvalidInput(f"the teacher has {other_size} tokens, the student {vocab_size}", where=folder, do=do)
    ours, theirs = ({i: token for token, i in each.get_vocab().items()} for each in (tokenizer, other))
    for i in sorted({*ours, *theirs}):
        if ours.get(i) != theirs.get(i):
            what = f"token {i} is {theirs.get(i)!r} for the teacher, {ours.get(i)!r} for the student"
            raise InvalidInput(what, where=folder, do=do)
