"""How much ten examples of a user customize the embedded model: a pool against one LoRA, and what lies between.

    base               the model as it is
    single_lora        one LoRA of rank r for everybody, trained on all texts
    single_lora_nr     the same of rank N r: as many parameters as the pool has
    uniform            the pool of `crayon`, all weights 1/N: without the user's examples
    nearest            one LoRA per cluster, each trained on its own cluster; the user gets the nearest
    crayon             joint training, blended by alpha of the user's examples; the data says which texts belong together
    crayon_no_groups   the same where the data does not say it: alpha from the task residual of each text
    crayon_paper       the paper's recipe, as far as it is public: PCA of the mean state over prompt and answer of each text
    oracle             a LoRA of the user's own, trained on further texts of theirs: what no ten examples can reach

A row differs from another only in what its name says: all see as many training texts, in the same number of steps (`oracle`: of the
users themselves). Every user has 10 examples, and queries that no training saw. All rows are the float model.

Exact match is that of greedy generation. An answer is exactly right if and only if every token is the likeliest after those before
it, so right answers are found in one pass over the references; only the wrong ones are then generated, to know their intent.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np

from crayon_runtime.affinity import Weighting, alpha
from crayon_runtime.errors import InvalidInput
from crayon_server import models, training
from crayon_server.data.phone_assistant import benchmark, more_examples, score
from crayon_server.evaluate.exact_match import MAX_NEW_TOKENS
from crayon_server.pool import indicators
from crayon_server.pool.build import Settings, locate, part_of, train, training_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from crayon_server.data.phone_assistant import Example, User
    from crayon_server.pool.build import Recipe
    from crayon_server.pool.indicators import Embeddings
    from crayon_server.pool.joint import JointLoras
    from crayon_server.training import Tokens

    Floats = npt.NDArray[np.float32]

RowName = Literal[
    "base",
    "single_lora",
    "single_lora_nr",
    "uniform",
    "nearest",
    "crayon",
    "crayon_no_groups",
    "crayon_paper",
    "oracle",
]
ORACLE_TEXTS = 256
"""Of each user, none with the answer of one of their queries."""
BATCH = 120


@dataclass(frozen=True)
class Row:
    """Shares of the queries from 0 to 1, and log-loss in nats per answer token; means over seeds.

    Attributes:
        em: exact match. `em_seen` and `em_unseen`: of users whose convention training has or has not; None without such users.
        em_seeds: of each seed.
        em_deviation: between users (population standard deviation of their exact match).
        intent: the right function is called, in whatever convention.
    """

    em: float
    em_seen: float | None
    em_unseen: float | None
    em_seeds: list[float]
    em_deviation: float
    intent: float
    log_loss: float


class Answers(NamedTuple):
    """One row of one seed: for each query whether it was answered exactly, its intent, and its log-loss."""

    exact: npt.NDArray[np.bool_]
    intent: npt.NDArray[np.bool_]
    log_loss: Floats


class Customization:
    """The benchmark on some users.

    Args:
        users: of `benchmark()`, all with the same number of queries; choose settings on validation users only.
        settings: of every row.
        sources: the training users.
    """

    def __init__(self, users: Sequence[User], settings: Settings, sources: Sequence[User] | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        sources = benchmark().train if sources is None else sources
        if not users or not sources:
            raise InvalidInput("there are no users", where="users" if sources else "sources")
        model_dir = models.load_nano()
        self.settings, self.users = settings, users
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_dir)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self.pad_id = training.pad_id(self.tokenizer)
        self.queries = [query for user in users for query in user.queries]
        self.owner = np.repeat(np.arange(len(users)), [len(user.queries) for user in users])
        layers: int = self.model.config.num_hidden_layers
        self._tap_layer = layers if settings.tap_layer is None else settings.tap_layer
        self.texts = self._tokenize([e for user in sources for e in user.examples])
        self.groups = [user.name for user in sources for _ in user.examples]
        with training.threads(settings.threads):
            self.embeddings = self._embed(self.texts)
            self.examples = [self._embed(self._tokenize(user.examples)) for user in users]

    def _tokenize(self, examples: Sequence[Example]) -> list[Tokens]:
        return [training.tokenize(self.tokenizer, example) for example in examples]

    def _embed(self, texts: Sequence[Tokens]) -> Embeddings:
        return indicators.embed(self.model, texts, self._tap_layer, pad_id=self.pad_id)

    def rows(self, seed: int) -> Iterator[tuple[RowName, Answers]]:
        """Train what each row needs, and answer all queries with it."""
        own = dataclasses.replace(self.settings, seed=seed)
        one = dataclasses.replace(own, adapters=1)
        yield "base", self._answer(None, None)
        yield "single_lora", self._for_everybody(one)
        yield "single_lora_nr", self._for_everybody(dataclasses.replace(one, rank=own.rank * own.adapters))
        loras, alphas = self._pool("groups", own)
        yield "uniform", self._answer(loras, np.full_like(alphas, 1 / own.adapters))
        crayon = self._answer(loras, alphas)
        loras.remove()
        yield "nearest", self._pool_answers("groups", dataclasses.replace(own, weighting=Weighting("topk", top_k=1)))
        yield "crayon", crayon
        yield "crayon_no_groups", self._pool_answers("residual", own)
        yield "crayon_paper", self._pool_answers("paper", own)
        yield "oracle", self._oracle(dataclasses.replace(own, adapters=len(self.users)))

    def _for_everybody(self, settings: Settings) -> Answers:
        loras, _ = train(self.model, self.texts, _ones, settings, pad_id=self.pad_id)
        answers = self._answer(loras, np.ones((len(self.users), 1), np.float32))
        loras.remove()
        return answers

    def _pool(self, recipe: Recipe, settings: Settings) -> tuple[JointLoras, Floats]:
        """A pool, still attached to the model, and alpha of each user's examples, float32 [users, N]."""
        settings = dataclasses.replace(settings, recipe=recipe)
        located = locate(self.embeddings, self.groups, settings)
        weights = training_weights(located, settings)
        loras, _ = train(self.model, self.texts, weights, settings, pad_id=self.pad_id)
        alphas = [alpha(located.projection, settings.weighting, e.prompt, part_of(recipe, e)) for e in self.examples]
        return loras, np.stack(alphas)

    def _pool_answers(self, recipe: Recipe, settings: Settings) -> Answers:
        loras, alphas = self._pool(recipe, settings)
        answers = self._answer(loras, alphas)
        loras.remove()
        return answers

    def _oracle(self, settings: Settings) -> Answers:
        """One LoRA per user: a pool whose weights are 1 for the user's own LoRA and 0 for all others."""
        texts = self._tokenize([e for user in self.users for e in more_examples(user, ORACLE_TEXTS, settings.seed)])
        own = np.eye(len(self.users), dtype=np.float32)
        loras, _ = train(
            self.model, texts, lambda batch, _: own[np.array(batch) // ORACLE_TEXTS], settings, pad_id=self.pad_id
        )
        answers = self._answer(loras, own)
        loras.remove()
        return answers

    def _answer(self, loras: JointLoras | None, alphas: Floats | None) -> Answers:
        """Answer all queries, each with the weights of its user, float32 [users, N]."""
        parts = []
        with training.threads(self.settings.threads):
            for start in range(0, len(self.queries), BATCH):
                owner = self.owner[start : start + BATCH]
                of_batch = None if alphas is None else alphas[owner]
                parts.append(self._answer_batch(self.queries[start : start + BATCH], loras, of_batch))
        return Answers(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _answer_batch(self, queries: Sequence[Example], loras: JointLoras | None, alphas: Floats | None) -> Answers:
        import torch

        batch = training.collate(self._tokenize(queries), self.pad_id, 0.0)
        weights, targets = batch.weights[:, 1:], batch.ids[:, 1:]
        with torch.inference_mode(), _answering(loras, alphas):
            logits = self.model(input_ids=batch.ids, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            log_loss = ((losses * weights).sum(1) / weights.sum(1)).numpy()
            exact = ((logits.argmax(-1) == targets) | (weights == 0)).all(1).numpy()
        wrong: list[int] = np.flatnonzero(~exact).tolist()
        intent = exact.copy()
        if wrong:
            with torch.inference_mode(), _answering(loras, None if alphas is None else alphas[wrong]):
                generated = self._generate([queries[i].prompt for i in wrong])
            intent[wrong] = [score(text, queries[i]).intent for i, text in zip(wrong, generated, strict=True)]
        return Answers(exact, intent, log_loss)

    def _generate(self, prompts: list[str]) -> list[str]:
        batch = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        ids = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        completions = ids[:, batch["input_ids"].shape[1] :]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in completions]

    def summary(self, seeds: Sequence[Answers]) -> Row:
        """A row from its answers with each seed."""
        exact = np.stack([answers.exact for answers in seeds]).astype(np.float64)
        of_users = np.stack([exact[:, self.owner == i].mean(1) for i in range(len(self.users))], axis=1)
        seen = np.array([user.seen for user in self.users])
        return Row(
            em=float(exact.mean()),
            em_seen=float(of_users[:, seen].mean()) if seen.any() else None,
            em_unseen=float(of_users[:, ~seen].mean()) if not seen.all() else None,
            em_seeds=exact.mean(1).tolist(),
            em_deviation=fmean(pstdev(users) for users in of_users.tolist()),
            intent=fmean(float(answers.intent.mean()) for answers in seeds),
            log_loss=fmean(float(answers.log_loss.mean()) for answers in seeds),
        )


def _ones(batch: list[int], _: np.random.Generator) -> Floats:
    return np.ones((len(batch), 1), np.float32)


@contextmanager
def _answering(loras: JointLoras | None, alphas: Floats | None) -> Iterator[None]:
    """The model answers with these weights, float32 [B, N]."""
    import torch

    if loras is None or alphas is None:
        yield
        return
    loras.alpha = torch.from_numpy(alphas)
    try:
        yield
    finally:
        loras.alpha = None


def run(
    users: Literal["validation", "test"],
    seeds: Sequence[int],
    settings: Settings | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """All rows, as one JSON object: {"rows": {name: `Row`}, "seeds": …, "users": …, "settings": …}.

    Args:
        users: choose settings on validation users only.
        seeds: of the training; the users and their texts are always those of the frozen benchmark.
        say: told every result when it is there.

    Raises:
        InvalidInput: there are no seeds, or one comes twice.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise InvalidInput("seeds must be different integers, at least one", where="seeds")
    bench = Customization(getattr(benchmark(), users), settings or Settings())
    answers: dict[RowName, list[Answers]] = {}
    for seed in seeds:
        for name, result in bench.rows(seed):
            answers.setdefault(name, []).append(result)
            if say:
                say(f"seed {seed}  {name}: exact match {result.exact.mean():.3f}")
    return {
        "rows": {name: asdict(bench.summary(of_seeds)) for name, of_seeds in answers.items()},
        "seeds": list(seeds),
        "users": users,
        "settings": msgspec.to_builtins(bench.settings),
    }
