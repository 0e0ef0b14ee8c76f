"""Pre-training of the embedded models on the phone-assistant benchmark's world: every domain, every convention, uniformly.

Most texts are lone requests: the model cannot know whose convention is wanted. One batch in eight has conversations of one user,
so that a model also learns to follow a convention that it is shown (few-shot prompts, chat).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

from crayon_runtime.errors import InvalidInput
from crayon_runtime.files import atomic_directory
from crayon_server import models, training
from crayon_server.data.phone_assistant import CONVENTIONS, DOMAINS, SERVER_ONLY
from crayon_server.data.phone_assistant.draws import Draws
from crayon_server.data.phone_assistant.users import SEPARATOR, Example, example

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from crayon_server.data.phone_assistant import Convention
    from crayon_server.training import OnStep

STEPS = 2000
BATCH_SIZE = 64
CONVERSATIONS_EVERY = 8
EXCHANGES = (2, 10)
"""Exchanges of a conversation, the fewest and the most."""
TYPED = 1 / 8


def requests(draws: Draws, domains: Sequence[str]) -> Iterator[list[list[Example]]]:
    """Batches without end of lone requests and, now and then, of conversations: as many exchanges in either."""
    for n in itertools.count(1):
        if n % CONVERSATIONS_EVERY:
            yield [[_typed(draws, draws.choice(domains), draws.choice(CONVENTIONS))] for _ in range(BATCH_SIZE)]
        else:
            yield [_conversation(draws, domains) for _ in range(2 * BATCH_SIZE // sum(EXCHANGES))]


def _conversation(draws: Draws, domains: Sequence[str]) -> list[Example]:
    convention, own = draws.choice(CONVENTIONS), draws.shuffled(domains)[:3]
    return [_typed(draws, draws.choice(own), convention) for _ in range(draws.integer(*EXCHANGES))]


def _typed(draws: Draws, domain: str, convention: Convention) -> Example:
    """A request; one in eight begins with a capital, and one in eight ends with a punctuation mark, as people type them."""
    e = example(draws, domain, convention)
    words = e.prompt.removesuffix(SEPARATOR)
    if draws.chance(TYPED):
        words = words[0].upper() + words[1:]
    if draws.chance(TYPED):
        words += draws.choice(".?!")
    return dataclasses.replace(e, prompt=words + SEPARATOR)


def pretrain(
    name: str,
    out: Path,
    *,
    steps: int = STEPS,
    seed: int = 0,
    threads: int | None = None,
    on_step: OnStep | None = None,
    replace: bool = False,
) -> list[float]:
    """Train an embedded model from nothing, and write its Hugging Face folder.

    `nano` knows the twelve domains of a device; `nano-server` also those that only a server knows.

    Returns:
        The loss of each step.

    Raises:
        InvalidInput: it is no embedded model.
        OutputError: `out` exists and is not to be replaced, or cannot be written.
    """
    from transformers import PreTrainedTokenizerFast

    if name not in models.NANO:
        raise InvalidInput(
            f"{name!r} is no embedded model", do=f"choose one of {', '.join(models.NANO)}, or give texts with --data"
        )
    with atomic_directory(out, replace=replace) as folder:
        model = models.initialize(name, seed)
        models.save(model, folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        domains = (*DOMAINS, *SERVER_ONLY) if name == "nano-server" else DOMAINS
        batches = (
            [training.join(training.tokenize(tokenizer, e) for e in exchanges) for exchanges in batch]
            for batch in requests(Draws("pretrain", name, seed), domains)
        )
        options = training.Options(
            steps, learning_rate=3e-3, warmup=50, prompt_weight=0.2, weight_decay=0.01, seed=seed, threads=threads
        )
        losses = training.train(model, batches, options, pad_id=tokenizer.pad_token_id, on_step=on_step)
        models.save(model, folder)
    return losses
