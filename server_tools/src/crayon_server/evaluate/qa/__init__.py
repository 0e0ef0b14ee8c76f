"""How much ten questions with their answers customize any model: SIQA, OpenBookQA, MedMCQA, and MMLU as 57 users.

    base           the model as it is
    single_lora    one LoRA for everybody, trained on all questions
    uniform        the pool of `crayon`, all weights 1/N
    nearest        one LoRA per cluster; the user gets the nearest
    crayon         joint training, blended by alpha of the user's ten; questions of one task and subject belong together

A question is asked as "CONTEXT Question: … Answer:", without its choices; a choice is scored by how likely it is to continue that.
Accuracy is lm-evaluation-harness's `acc_norm`: the choice of the highest log-likelihood per character
(https://github.com/EleutherAI/lm-evaluation-harness). Log-loss is that of the right choice, in nats per token; neither sees the end
of sequence.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import msgspec
import numpy as np

from crayon_runtime.affinity import Weighting, alpha
from crayon_server import training
from crayon_server.evaluate.float_model import FloatModel
from crayon_server.evaluate.qa.intervals import estimate
from crayon_server.evaluate.qa.items import Dealt, deal
from crayon_server.pool import indicators
from crayon_server.pool.build import Settings, locate, train, training_weights
from crayon_server.training import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from crayon_server.pool.data import Pair
    from crayon_server.pool.indicators import Embeddings
    from crayon_server.pool.joint import JointLoras, Weights

    Floats = npt.NDArray[np.float32]

RowName = Literal["base", "single_lora", "uniform", "nearest", "crayon"]
MAX_TOKENS = 512
"""Of a question with its answer; of a longer one the beginning is left out, as lm-evaluation-harness does. Our choice of the number."""

NOTE = "No row's accuracy is better than chance, whose value lies in its confidence interval: only log-loss means anything here."


class Scores(NamedTuple):
    """One row, an element per question.

    Attributes:
        right: bool, the right choice was the likeliest.
        log_loss: float32, of the right choice, nats per token.
    """

    right: npt.NDArray[np.bool_]
    log_loss: Floats


class Qa:
    """The benchmark with one model.

    Args:
        model_dir: a Hugging Face folder.
        dealt: who has, trains on and is asked what.
        settings: of every row.
    """

    def __init__(self, model_dir: Path, dealt: Dealt, settings: Settings) -> None:
        self.settings, self.users = dataclasses.replace(settings, recipe="groups"), dealt.users
        self.model = FloatModel(model_dir)
        config = self.model.model.config
        self._length: int = min(MAX_TOKENS, config.max_position_embeddings)
        self._tap_layer: int = config.num_hidden_layers if settings.tap_layer is None else settings.tap_layer
        self.queries = [item for user in dealt.users for item in user.queries]
        self._asked = [len(user.queries) for user in dealt.users]
        self._choices = [_without_end(text) for item in self.queries for text in self._tokenize(item.pairs)]
        self._texts = self._tokenize([item.right for item in dealt.training])
        self._groups = [item.group for item in dealt.training]
        with training.threads(settings.threads):
            self._embeddings = self._embed(self._texts)
            self._examples = [self._embed(self._tokenize([item.right for item in u.examples])) for u in self.users]

    def rows(self) -> Iterator[tuple[RowName, Scores]]:
        """Train what each row needs, and score all questions with it."""
        settings = self.settings
        yield "base", self._score()
        with self._trained(_ones, dataclasses.replace(settings, adapters=1)) as loras:
            yield "single_lora", self._score(loras, np.ones((len(self.users), 1), np.float32))
        with self._pool(Weighting("topk", top_k=1)) as (loras, alphas):
            yield "nearest", self._score(loras, alphas)
        with self._pool(settings.weighting) as (loras, alphas):
            yield "uniform", self._score(loras, np.full_like(alphas, 1 / settings.adapters))
            yield "crayon", self._score(loras, alphas)

    @contextmanager
    def _pool(self, weighting: Weighting) -> Iterator[tuple[JointLoras, Floats]]:
        """A pool, and alpha of each user's examples, float32 [users, N]."""
        settings = dataclasses.replace(self.settings, weighting=weighting)
        located = locate(self._embeddings, self._groups, settings)
        with self._trained(training_weights(located, settings), settings) as loras:
            alphas = [alpha(located.projection, weighting, e.prompt, e.answer) for e in self._examples]
            yield loras, np.stack(alphas)

    @contextmanager
    def _trained(self, weights: Weights, settings: Settings) -> Iterator[JointLoras]:
        loras, _ = train(self.model.model, self._texts, weights, settings, pad_id=self.model.pad_id)
        try:
            yield loras
        finally:
            loras.remove()

    def _score(self, loras: JointLoras | None = None, alphas: Floats | None = None) -> Scores:
        """Answer all questions, each with the weights of its user, float32 [users, N]."""
        counts = [len(item.choices) for item in self.queries]
        of_choices = None if alphas is None else alphas.repeat(self._asked, axis=0).repeat(counts, axis=0)
        with training.threads(self.settings.threads):
            log_losses = self.model.force(self._choices, loras, of_choices).log_loss
        right, log_loss = [], []
        start = 0
        for item in self.queries:
            losses = log_losses[start : start + len(item.choices)]
            tokens = [sum(text.in_completion) for text in self._choices[start : start + len(item.choices)]]
            per_character = losses * tokens / [len(choice) for choice in item.choices]
            right.append(per_character.argmin() == item.answer)
            log_loss.append(losses[item.answer])
            start += len(item.choices)
        return Scores(np.array(right), np.array(log_loss, np.float32))

    def _embed(self, texts: Sequence[Tokens]) -> Embeddings:
        return indicators.embed(self.model.model, texts, self._tap_layer, pad_id=self.model.pad_id)

    def _tokenize(self, pairs: Sequence[Pair]) -> list[Tokens]:
        return [_shortened(text, self._length) for text in self.model.tokenize(pairs)]


def _shortened(text: Tokens, length: int) -> Tokens:
    """The first token and the last ones, `length` of them."""
    if len(text.ids) <= length:
        return text
    return Tokens([text.ids[0], *text.ids[1 - length :]], [False, *text.in_completion[1 - length :]])


def _without_end(text: Tokens) -> Tokens:
    return Tokens(text.ids[:-1], text.in_completion[:-1])


def _ones(batch: list[int], _: np.random.Generator) -> Floats:
    return np.ones((len(batch), 1), np.float32)


def run(
    model_dir: Path,
    data: Path,
    *,
    limit: int = 500,
    settings: Settings | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """All rows, as one JSON object.

    Args:
        data: a folder with the files of `items.FILES`.
        limit: test questions of each task.
        settings: of every row; its seed also deals the questions.
        say: told every result when it is there.

    Returns:
        "rows": {name: {"accuracy", "log_loss": `Estimate`, the same with "_change": paired differences to the base,
        "tasks": {task: {"accuracy", "log_loss"}}}}; "tasks": {task: {"test", "of", "dropped"}}; "users", "training"; "chance", and
        "note" if no accuracy is better than that; "seed", "settings".

    Raises:
        InvalidInput: the data cannot be used.
    """
    settings = settings or Settings()
    dealt = deal(data, limit=limit, seed=settings.seed)
    qa = Qa(model_dir, dealt, settings)
    scores: dict[RowName, Scores] = {}
    for name, result in qa.rows():
        scores[name] = result
        say(f"{name}: accuracy {result.right.mean():.3f}, log-loss {result.log_loss.mean():.4f}")
    tasks = np.array([item.task for item in qa.queries])
    rows = {name: _row(scores[name], scores["base"], tasks) for name in get_args(RowName)}
    chance = float(np.mean([1 / len(item.choices) for item in qa.queries]))
    return {
        "rows": rows,
        "tasks": {
            task: {"test": int((tasks == task).sum()), "of": of, "dropped": dealt.dropped[task]}
            for task, of in dealt.available.items()
        },
        "users": len(dealt.users),
        "training": len(dealt.training),
        "chance": chance,
        "note": None if any(row["accuracy"]["low"] > chance for row in rows.values()) else NOTE,
        "seed": settings.seed,
        "settings": msgspec.to_builtins(settings),
    }


def _row(scores: Scores, base: Scores, tasks: npt.NDArray[np.str_]) -> dict[str, Any]:
    return {
        "accuracy": estimate(scores.right),
        "log_loss": estimate(scores.log_loss),
        "accuracy_change": estimate(scores.right.astype(np.float64) - base.right),
        "log_loss_change": estimate(scores.log_loss - base.log_loss),
        "tasks": {
            str(task): {"accuracy": estimate(scores.right[own]), "log_loss": estimate(scores.log_loss[own])}
            for task in dict.fromkeys(tasks)
            for own in [tasks == task]
        },
    }
