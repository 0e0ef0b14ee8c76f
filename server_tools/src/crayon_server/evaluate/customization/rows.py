"""The rows of the benchmark: what each trains, and what it answers with."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from crayon_runtime.affinity import Weighting, alpha
from crayon_runtime.errors import InvalidInput
from crayon_runtime.refine import refine
from crayon_server import models, training
from crayon_server.data.phone_assistant import benchmark, more_examples
from crayon_server.data.phone_assistant.users import EXAMPLES
from crayon_server.evaluate.customization.answers import Answers, answer
from crayon_server.evaluate.customization.privacy import privacy
from crayon_server.evaluate.exact_match import MAX_NEW_TOKENS
from crayon_server.evaluate.float_model import FloatModel
from crayon_server.pool import indicators
from crayon_server.pool.build import Located, Settings, locate, part_of, train, training_weights
from crayon_server.pool.joint import JointLoras
from crayon_server.training import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from crayon_server.data.phone_assistant import Example, User
    from crayon_server.evaluate.customization.device import Device
    from crayon_server.evaluate.customization.privacy import Disguised
    from crayon_server.pool.build import Recipe
    from crayon_server.pool.indicators import Embeddings
    from crayon_server.pool.joint import Weights

    Floats = npt.NDArray[np.float32]
    OnRow = Callable[["RowName", Answers], object]

RowName = Literal[
    "base",
    "base_int4",
    "few_shot",
    "single_lora",
    "single_lora_nr",
    "uniform",
    "nearest",
    "crayon",
    "crayon_refined",
    "crayon_int4",
    "crayon_int4_float_alpha",
    "crayon_no_groups",
    "crayon_no_groups_int4",
    "crayon_paper",
    "tuned_on_10",
    "oracle",
]
ORACLE_TEXTS = 256
"""Of each user, none with the answer of one of their queries."""
REFINE_EVALUATIONS = 60
TUNING = training.Options(steps=20, learning_rate=4e-3, warmup=2)
"""Of `tuned_on_10`, every step on all ten; chosen on the validation users."""


class Pool(NamedTuple):
    """LoRAs that were trained together and are attached to the float model, and alpha of each user's examples."""

    located: Located
    loras: JointLoras
    alphas: Floats
    """float32 [users, N]"""


class Agreement(NamedTuple):
    """Cosine similarity of the device's alpha and the float model's: over the users."""

    mean: float
    least: float


class Measured(NamedTuple):
    """Of one seed."""

    rows: dict[RowName, Answers]
    alpha: dict[str, Agreement]
    """Of the pools of `crayon` and `crayon_no_groups`, and of the former with indicators that the quantized base found."""
    privacy: list[Disguised]
    """Of `crayon`."""


class Customization:
    """The benchmark on some users.

    Args:
        users: of `benchmark()`, all with the same number of queries; choose settings on validation users only.
        settings: of every row.
        sources: the training users.
    """

    def __init__(self, users: Sequence[User], settings: Settings, sources: Sequence[User] | None = None) -> None:
        sources = benchmark().train if sources is None else sources
        if not users or not sources:
            raise InvalidInput("there are no users", where="users" if sources else "sources")
        self.users, self.settings = users, settings
        self.model = FloatModel(models.load_nano())
        self.queries = [query for user in users for query in user.queries]
        self.query_texts = self.model.tokenize(self.queries)
        self.sources = [e for user in sources for e in user.examples]
        self.texts = self.model.tokenize(self.sources)
        self.groups = [user.name for user in sources for _ in user.examples]
        layers: int = self.model.model.config.num_hidden_layers
        self._tap_layer = layers if settings.tap_layer is None else settings.tap_layer
        with training.threads(settings.threads):
            self.embeddings = self._embed(self.sources)
            self.examples = [self._embed(user.examples) for user in users]

    def _embed(self, examples: Sequence[Example]) -> Embeddings:
        texts = self.model.tokenize(examples)
        return indicators.embed(self.model.model, texts, self._tap_layer, pad_id=self.model.pad_id)

    def untrained(self, device: Device, on_row: OnRow = lambda *_: None) -> dict[RowName, Answers]:
        """The rows that no seed changes."""
        rows = _Rows(on_row)
        rows["base"] = self._answer()
        with training.threads(self.settings.threads):
            rows["few_shot"] = answer(self.model, self.queries, self.few_shot_texts())
        rows["base_int4"] = device.answer()
        return rows

    def measure(self, device: Device, seed: int, on_row: OnRow = lambda *_: None) -> Measured:
        """Train what each row needs, and answer all queries with it."""
        rows = _Rows(on_row)
        own = dataclasses.replace(self.settings, seed=seed)
        one = dataclasses.replace(own, adapters=1)
        rows["single_lora"] = self._for_everybody(one)
        rows["single_lora_nr"] = self._for_everybody(dataclasses.replace(one, rank=own.rank * own.adapters))
        with self.pool("groups", dataclasses.replace(own, weighting=Weighting("topk", top_k=1))) as pool:
            rows["nearest"] = self._answer(pool.loras, pool.alphas)
        with self.pool("groups", own) as pool:
            rows["uniform"] = self._answer(pool.loras, np.full_like(pool.alphas, 1 / own.adapters))
            rows["crayon"] = self._answer(pool.loras, pool.alphas)
            rows["crayon_refined"] = self._answer(pool.loras, self._refined(pool, seed))
            costs = self._privacy(pool, seed)
            kept = device.write_pool("crayon", pool.located, pool.loras)
            on_device = device.alphas(kept)
            rows["crayon_int4"] = device.answer(kept, on_device)
            rows["crayon_int4_float_alpha"] = device.answer(kept, pool.alphas)
            agreements = {"crayon": agreement(on_device, pool.alphas)}
        with self.pool("residual", own) as pool:
            rows["crayon_no_groups"] = self._answer(pool.loras, pool.alphas)
            kept = device.write_pool("crayon_no_groups", pool.located, pool.loras)
            on_device = device.alphas(kept)
            rows["crayon_no_groups_int4"] = device.answer(kept, on_device)
            agreements["crayon_no_groups"] = agreement(on_device, pool.alphas)
        located = locate(device.embed(self.sources), self.groups, own)
        agreements["quantized_indicators"] = agreement(
            self._alphas(located, [device.embed(user.examples) for user in self.users]),
            self._alphas(located, self.examples),
        )
        with self.pool("paper", own) as pool:
            rows["crayon_paper"] = self._answer(pool.loras, pool.alphas)
        rows["tuned_on_10"] = self._tuned(seed)
        rows["oracle"] = self._oracle(dataclasses.replace(own, adapters=len(self.users)))
        return Measured(dict(rows), agreements, costs)

    def few_shot_texts(self) -> list[Tokens]:
        return few_shot_texts(self.model, self.users)

    def _for_everybody(self, settings: Settings) -> Answers:
        with _trained(self.model, self.texts, _ones, settings) as loras:
            return self._answer(loras, np.ones((len(self.users), 1), np.float32))

    @contextmanager
    def pool(self, recipe: Recipe, settings: Settings) -> Iterator[Pool]:
        settings = dataclasses.replace(settings, recipe=recipe)
        located = locate(self.embeddings, self.groups, settings)
        with _trained(self.model, self.texts, training_weights(located, settings), settings) as loras:
            yield Pool(located, loras, self._alphas(located, self.examples, settings.weighting))

    def _alphas(self, located: Located, examples: Sequence[Embeddings], weighting: Weighting | None = None) -> Floats:
        weighting = weighting or self.settings.weighting
        return np.stack([alpha(located.projection, weighting, e.prompt, part_of(located.recipe, e)) for e in examples])

    def _refined(self, pool: Pool, seed: int) -> Floats:
        """Alpha of each user, searched from the cosine start on their examples."""
        with training.threads(self.settings.threads):
            refined = [
                refine(self._log_loss(user, pool.loras), start, evaluations=REFINE_EVALUATIONS, seed=seed)[0]
                for user, start in zip(self.users, pool.alphas, strict=True)
            ]
        return np.stack(refined)

    def _log_loss(self, user: User, loras: JointLoras) -> Callable[[Floats], float]:
        """Of the user's examples with an alpha: mean over all tokens, as on a device."""
        texts = self.model.tokenize(user.examples)
        tokens = [sum(text.in_completion) for text in texts]

        def log_loss(alpha: Floats) -> float:
            forced = self.model.force(texts, loras, np.tile(alpha, (len(texts), 1)))
            return float(np.average(forced.log_loss, weights=tokens))

        return log_loss

    def _privacy(self, pool: Pool, seed: int) -> list[Disguised]:
        def exact_match(alphas: Floats) -> float:
            forced = self.model.force(self.query_texts, pool.loras, self._of_queries(alphas))
            return float(forced.exact.mean())

        with training.threads(self.settings.threads):
            again = [self._embed(_other_examples(user, seed)) for user in self.users]
            signed = self.settings.weighting.signed
            return list(privacy(pool.alphas, self._alphas(pool.located, again), exact_match, seed=seed, signed=signed))

    def _tuned(self, seed: int) -> Answers:
        """One LoRA per user, as a pool whose weights are 1 for the user's own LoRA and 0 for all others."""
        texts = [text for user in self.users for text in self.model.tokenize(user.examples)]
        own = np.eye(len(self.users), dtype=np.float32)
        of_text = np.repeat(np.arange(len(self.users)), [len(user.examples) for user in self.users])
        settings = self.settings
        loras = JointLoras(self.model.model, len(self.users), settings.rank, scale=settings.scale, seed=seed)
        options = dataclasses.replace(TUNING, seed=seed, threads=settings.threads)
        loras.train(
            texts, lambda batch, _: own[of_text[batch]], options, batch_size=len(texts), pad_id=self.model.pad_id
        )
        answers = self._answer(loras, own)
        loras.remove()
        return answers

    def _oracle(self, settings: Settings) -> Answers:
        """As `tuned_on_10`, on many more texts of each user."""
        texts = self.model.tokenize(
            [e for user in self.users for e in more_examples(user, ORACLE_TEXTS, settings.seed)]
        )
        own = np.eye(len(self.users), dtype=np.float32)
        with _trained(self.model, texts, lambda batch, _: own[np.array(batch) // ORACLE_TEXTS], settings) as loras:
            return self._answer(loras, own)

    def _answer(self, loras: JointLoras | None = None, alphas: Floats | None = None) -> Answers:
        """Answer all queries, each with the weights of its user, float32 [users, N]."""
        with training.threads(self.settings.threads):
            of_queries = None if alphas is None else self._of_queries(alphas)
            return answer(self.model, self.queries, self.query_texts, loras, of_queries)

    def _of_queries(self, alphas: Floats) -> Floats:
        return alphas.repeat([len(user.queries) for user in self.users], axis=0)


class _Rows(dict["RowName", Answers]):
    """Tells of every row when it is there."""

    def __init__(self, on_row: OnRow) -> None:
        self._on_row = on_row

    def __setitem__(self, name: RowName, answers: Answers) -> None:
        super().__setitem__(name, answers)
        self._on_row(name, answers)


@contextmanager
def _trained(model: FloatModel, texts: Sequence[Tokens], weights: Weights, settings: Settings) -> Iterator[JointLoras]:
    loras, _ = train(model.model, texts, weights, settings, pad_id=model.pad_id)
    try:
        yield loras
    finally:
        loras.remove()


def few_shot_texts(model: FloatModel, users: Sequence[User]) -> list[Tokens]:
    """The queries of all users after their user's examples, one exchange after the other, as in a conversation.

    The first examples are left out where the context would not hold all, the query and an answer.
    """
    texts = []
    for user in users:
        examples = model.tokenize(user.examples)
        for query in model.tokenize(user.queries):
            room = models.CONTEXT_LENGTH - MAX_NEW_TOKENS - query.in_completion.index(True)
            shown = examples
            while sum(len(text.ids) for text in shown) > room:
                shown = shown[1:]
            given = [i for text in shown for i in text.ids]
            texts.append(Tokens([*given, *query.ids], [*(False for _ in given), *query.in_completion]))
    return texts


def agreement(device: Floats, server: Floats) -> Agreement:
    """Of the alphas of each user, float32 [users, N] each."""
    lengths = np.linalg.norm(device, axis=1) * np.linalg.norm(server, axis=1)
    cosines = (device * server).sum(1) / lengths
    return Agreement(float(cosines.mean()), float(cosines.min()))


def _other_examples(user: User, seed: int) -> list[Example]:
    """As many as the user has, none with the answer of one of those."""
    known = {e.completion for e in user.examples}
    others = [e for e in more_examples(user, 10 * EXAMPLES, seed) if e.completion not in known]
    return others[:EXAMPLES]


def _ones(batch: list[int], _: np.random.Generator) -> Floats:
    return np.ones((len(batch), 1), np.float32)
