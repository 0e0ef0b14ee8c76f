"""Building a pool: embed, find the indicators, train all LoRAs together, write the folder that `crayon_runtime.pool` reads.

Three recipes, which differ in what the indicators are made of:

    paper      PCA of each text's mean state over prompt and answer                 the Crayon paper's, as far as it is public
    residual   whitened PCA of each text's task residual                            ours, where nothing is known of the texts
    groups     LDA between groups over task residuals, of means of 10 texts         ours, where the data says what belongs together

With groups, alpha of a training text is that of a sample of its group: what a device will send. Otherwise it is the text's own.

A build with a work folder goes on where it was killed: each step leaves there what it made, under a name that is a hash of all that it
depends on. Other texts, another base or another setting have another name, and so nothing old is taken for new.
"""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np

from crayon_runtime.affinity import Projection, Weighting, weights
from crayon_runtime.errors import InvalidInput, OutputError
from crayon_runtime.files import atomic_file
from crayon_runtime.manifest import LINEARS, SCHEMA_VERSION
from crayon_runtime.pool import Embedding, Pool, PoolManifest, peft_config, pool_name, write_pool
from crayon_server import models, training
from crayon_server.checkpoints import Checkpoints
from crayon_server.losses import Step, encode, plot
from crayon_server.pool import embeddings as embedding
from crayon_server.pool import indicators
from crayon_server.pool.data import Corpus, Pair, Texts, read_texts
from crayon_server.pool.joint import JointLoras

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt
    import torch
    from accelerate import Accelerator

    from crayon_runtime.pool import TypicalText
    from crayon_server.pool.indicators import Embeddings, Indices, Residual, Rows
    from crayon_server.pool.joint import Weights
    from crayon_server.training import OnStep, Precision, Text, Tokens

    Floats = npt.NDArray[np.float32]

__all__ = ["Pair", "Settings", "build", "locate", "part_of", "read_texts", "train", "training_weights"]

Recipe = Literal["paper", "residual", "groups"]
DIMENSIONS: dict[Recipe, int] = {"paper": 16, "residual": 16, "groups": 8}
"""Of the projection, at most; chosen on the phone-assistant benchmark."""
TEMPERATURE = 0.2
"""Of the softmax over cosines; chosen on the benchmark's validation users."""
SAMPLES_OF_A_GROUP = 8
"""How many samples of each group are clustered."""
TYPICAL_TEXTS = 32
"""Of each cluster, written beside the pool: what prototypes are made of."""
LIBRARIES = ("accelerate", "numpy", "scikit-learn", "torch", "transformers")
"""Whose versions are written down."""


@dataclass(frozen=True)
class Settings:
    """Every choice of a build.

    Attributes:
        adapters, rank, scale: N, r, and what B A is multiplied by (alpha / r in PEFT's terms).
        tap_layer: index into transformers' hidden_states; None: after the last norm.
        recipe: see the module; None: "groups" where there are groups, else "residual".
        dimensions: k of the projection; None: the recipe's.
        weighting: how cosines become alpha, in training and on the device.
        sample: texts whose mean stands for a group.
        steps, batch_size, learning_rate: of the joint training.
        max_tokens: longer texts are left out, and counted; None: the model's context.
        mixed_precision: "bf16" holds the base in bfloat16, and computes in it; the LoRAs stay float32. None: as accelerate is configured.
        gradient_accumulation, gradient_checkpointing: see `training.Options`.
        threads: of torch; None leaves its default.
    """

    adapters: int = 16
    rank: int = 4
    scale: float = 2.0
    tap_layer: int | None = None
    recipe: Recipe | None = None
    dimensions: int | None = None
    weighting: Weighting = dataclasses.field(default_factory=lambda: Weighting(temperature=TEMPERATURE))
    sample: int = 10
    steps: int = 200
    batch_size: int = 64
    learning_rate: float = 8e-3
    seed: int = 0
    max_tokens: int | None = None
    mixed_precision: Precision | None = None
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    threads: int | None = None


class Located(NamedTuple):
    """Where texts lie among the indicators."""

    recipe: Recipe
    projection: Projection
    queries: Rows
    """float32 [n, d], of the texts that the projection was fitted on."""
    groups: list[Indices] | None
    """Of the texts, where the recipe uses them."""

    @property
    def z(self) -> Floats:
        """Of each text, at unit length: float32 [n, k]."""
        axes = self.projection
        blocks = [(block - axes.mean) @ axes.projection for block in indicators.blocks(self.queries)]
        return indicators.normalize(np.concatenate(blocks).astype(np.float32))

    @property
    def sizes(self) -> list[int]:
        """How many texts are nearest to each indicator."""
        nearest = (self.z @ self.projection.indicators.T).argmax(1)
        sizes: list[int] = np.bincount(nearest, minlength=len(self.projection.indicators)).tolist()
        return sizes


def part_of(recipe: Recipe, embeddings: Embeddings) -> Floats:
    """The means that a recipe's queries are made of, beside those of the prompts: float32 [n, d]."""
    return embeddings.everything if recipe == "paper" else embeddings.answer


def locate(embeddings: Embeddings, groups: Sequence[str] | None, settings: Settings) -> Located:
    """Find the indicators.

    Args:
        groups: of each text; None: not known.

    Raises:
        InvalidInput: there are too few different texts for so many adapters, or the recipe needs groups that are not there.
    """
    recipe = _recipe(groups, settings)
    _check_count(len(embeddings.answer), settings)
    members = _members(groups) if recipe == "groups" else None
    indicators.check_different(embeddings.answer)
    if members is None:
        indicators.check_count(part_of(recipe, embeddings), settings.adapters)
    parts = None if recipe == "paper" else indicators.fit_residual(embeddings.prompt, embeddings.answer)
    queries = _queries(recipe, parts, embeddings)
    dimensions = settings.dimensions or DIMENSIONS[recipe]
    if members is not None:
        axes = indicators.fit_lda(queries, members, dimensions)
        generator = np.random.default_rng(settings.seed)
        points = indicators.samples_of_groups(queries, members, settings.sample, SAMPLES_OF_A_GROUP, generator)
        z = ((points - axes.mean) @ axes.projection).astype(np.float32)
    else:
        axes = indicators.fit_pca(queries, dimensions, whiten=recipe == "residual")
        blocks = [(block - axes.mean) @ axes.projection for block in indicators.blocks(queries)]
        z = np.concatenate(blocks).astype(np.float32)
    centres, _ = indicators.cluster(z, settings.adapters, settings.seed)
    fitted = parts or (None, None, None)
    return Located(recipe, Projection(axes.mean, axes.projection, centres, *fitted), queries, members)


def _check_count(texts: int, settings: Settings) -> None:
    if texts < settings.adapters:
        raise InvalidInput(
            f"{texts} texts are too few for {settings.adapters} adapters", do=f"use --adapters {texts} or fewer"
        )


def _recipe(groups: Sequence[str] | None, settings: Settings) -> Recipe:
    return settings.recipe or ("residual" if groups is None else "groups")


def _queries(recipe: Recipe, parts: Residual | None, embeddings: Embeddings) -> Rows:
    """Of each text; computed when asked for where there are too many for memory."""
    states = part_of(recipe, embeddings)
    if parts is None:
        return states
    if indicators.in_blocks(states):
        return indicators.Residuals(parts, embeddings.prompt, states)
    return indicators.residual(parts, embeddings.prompt, states)


def _members(groups: Sequence[str] | None) -> list[Indices]:
    if groups is None:
        raise InvalidInput('no text has a "group"', do="name the group of every text, or use --no-groups")
    members: dict[str, list[int]] = {}
    for i, name in enumerate(groups):
        members.setdefault(name, []).append(i)
    return [np.array(members[name]) for name in sorted(members)]


def training_weights(located: Located, settings: Settings) -> Weights:
    """Alpha of the texts of a batch: each its own, or that of a new sample of its group."""
    projection, weighting, queries = located.projection, settings.weighting, located.queries
    if located.groups is None:
        blocks = indicators.blocks(queries)
        own = np.stack([weights(projection.cosines(query), weighting) for block in blocks for query in block])
        return lambda batch, _: own[batch]
    group_of = {int(i): group for group in located.groups for i in group}

    def of_groups(batch: list[int], generator: np.random.Generator) -> Floats:
        groups = [group_of[i] for i in batch]
        samples = indicators.samples_of_groups(queries, groups, settings.sample, 1, generator)
        return np.stack([weights(projection.cosines(sample), weighting) for sample in samples])

    return of_groups


def train(
    model: torch.nn.Module,
    texts: Sequence[Tokens],
    alphas: Weights,
    settings: Settings,
    *,
    pad_id: int,
    on_step: OnStep | None = None,
    place: Accelerator | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[JointLoras, list[float]]:
    """Train the LoRAs of a pool; they stay attached to the model. Returns them and the loss of each step."""
    loras = JointLoras(model, settings.adapters, settings.rank, scale=settings.scale, seed=settings.seed)
    options = training.Options(
        settings.steps,
        settings.learning_rate,
        seed=settings.seed,
        gradient_accumulation=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        threads=settings.threads,
    )
    losses = loras.train(
        texts,
        alphas,
        options,
        batch_size=settings.batch_size,
        pad_id=pad_id,
        on_step=on_step,
        place=place or training.accelerator(settings.mixed_precision),
        checkpoints=checkpoints,
    )
    return loras, losses


def build(
    model_dir: Path,
    texts: Sequence[Text],
    out: Path,
    *,
    groups: Sequence[str] | None = None,
    settings: Settings | None = None,
    embed_with: Path | None = None,
    work: Path | None = None,
    checkpoint_every: int = 100,
    place: Accelerator | None = None,
    on_texts: Callable[[int], None] | None = None,
    on_step: OnStep | None = None,
    say: Callable[[str], None] | None = None,
    replace: bool = False,
) -> Pool:
    """Build a pool from texts.

    Args:
        model_dir: the base, a Hugging Face folder; it stays as it is.
        out: the new pool; its name is the pool's.
        groups: which texts belong together (of one user, source or task): the group of each text.
        embed_with: a bundle of the base: what is embedded, is embedded with the quantized model that devices have.
        work: a folder for embeddings and checkpoints, from which a build that was killed goes on; None: all is in memory.
        checkpoint_every: steps.
        place: where; None: `training.accelerator`. Several processes need a work folder, which all see.
        on_texts: called with the number of texts embedded since the last call.
        on_step: called after every step.
        say: told what was decided.

    Raises:
        InvalidInput: the texts are too few, all alike, too long, or have no completion; or a setting cannot be used.
        AdapterError: the bundle is of another base, or has another tap.
        OutputError: `out` exists and is not to be replaced, or something cannot be written.
    """
    import torch

    settings, say = settings or Settings(), say or (lambda _: None)
    name = pool_name(out)
    check_out(out, replace=replace)
    place = place or training.accelerator(settings.mixed_precision)
    if place.num_processes > 1 and work is None:
        raise InvalidInput("several processes need a work folder", where="work")
    if settings.batch_size < (parts := place.num_processes * settings.gradient_accumulation):
        raise InvalidInput(f"a batch of {settings.batch_size} texts cannot be split into {parts} parts")
    if _recipe(groups, settings) == "groups":
        _members(groups)
    fingerprint = training.base_fingerprint(model_dir)
    tokenizer = models.load_tokenizer(model_dir)
    dtype = torch.bfloat16 if place.mixed_precision == "bf16" else torch.float32
    model = models.load(model_dir, dtype)
    pad_id, layers = training.pad_id(tokenizer), model.config.num_hidden_layers
    if settings.tap_layer is not None and not 0 <= settings.tap_layer <= layers:
        raise InvalidInput(f"tap layer {settings.tap_layer} is not one of 0 to {layers}")
    with ExitStack() as stack:
        limit = min(model.config.max_position_embeddings, settings.max_tokens or 1 << 31)
        tap_layer = layers if settings.tap_layer is None else settings.tap_layer
        engine = None
        if embed_with is not None:
            engine = embedding.open_engine(embed_with, fingerprint, settings.tap_layer, settings.threads)
            stack.callback(engine.close)
            assert engine.bundle is not None
            tap_layer, limit = engine.bundle.model.tap.layer, min(limit, engine.backend.context_length)
        corpus = Corpus(tokenizer, texts, limit)
        if left_out := len(texts) - len(corpus):
            say(f"{left_out} of {len(texts)} texts are longer than {limit} tokens, and are left out")
            texts, groups = _selected(texts, corpus.kept), groups and _selected(groups, corpus.kept)
        _check_count(len(corpus), settings)
        key = {"base": fingerprint, "tokens": corpus.digest, "tap_layer": tap_layer, "dtype": str(dtype)}
        if engine is not None and engine.bundle is not None:
            files = sorted((file.path, file.sha256) for file in engine.bundle.manifest.files)
            key |= {"bundle": _hash(files)}
            embedder = embedding.with_engine(engine, corpus, texts)
        model = training.put(model, place)
        if engine is None:
            embedder = embedding.with_model(model, corpus, tap_layer, pad_id=pad_id)
        with training.threads(settings.threads):
            folder = work and work / f"embeddings-{_hash(key)}"
            embeddings = embedding.embed(embedder, corpus, place, folder=folder, on_texts=on_texts)
    chosen = msgspec.to_builtins(asdict(settings)) | {"recipe": _recipe(groups, settings), "tap_layer": tap_layer}
    del chosen["threads"]  # changes nothing
    key |= {"groups": _hash(groups), "settings": _hash(chosen)}
    run = work and work / f"training-{_hash(key)}"
    located = _located(embeddings, groups, settings, run, place)
    say(_decided(located, len(corpus)))
    loras, losses = train(
        model,
        corpus,
        training_weights(located, settings),
        settings,
        pad_id=pad_id,
        on_step=on_step,
        place=place,
        checkpoints=None if run is None else Checkpoints(run / "checkpoint", checkpoint_every),
    )
    loras.remove()
    if place.is_main_process:
        origin = {
            "mixed_precision": place.mixed_precision,
            "embedded_with": "the model" if embed_with is None else "the bundle",
            "texts": len(corpus),
            "left_out": left_out,
            "data_sha256": corpus.digest,
            "final_loss": float(np.mean(losses[-20:])),
            "processes": place.num_processes,
        }
        manifest = _manifest(name, fingerprint, loras, located, settings, chosen | origin)
        config = peft_config(settings.rank, settings.scale, LINEARS, base=model_dir.name)
        adapters = ((config, loras.lora(n)) for n in range(settings.adapters))
        typical = typical_texts(located, texts)
        further = {
            "loss.jsonl": encode([Step(i, loss) for i, loss in enumerate(losses, 1)]),
            "loss.svg": plot(losses, "loss, nats per answer token"),
        }
        write_pool(out, manifest, located.projection, adapters, typical=typical, further=further, replace=replace)
    place.wait_for_everyone()
    return Pool.open(out)


def _manifest(
    name: str, fingerprint: str, loras: JointLoras, located: Located, settings: Settings, chosen: dict[str, Any]
) -> PoolManifest:
    """What the pool says of itself.

    Args:
        chosen: every choice, and what became of it.
    """
    del chosen["weighting"]  # has a field of its own
    found = {
        "sizes": located.sizes,
        "groups": 0 if located.groups is None else len(located.groups),
        "pca": _pca(located),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    return PoolManifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        base_fingerprint=fingerprint,
        adapters=settings.adapters,
        rank=settings.rank,
        scale=settings.scale,
        targets=loras.modules,
        embedding=Embedding(
            tap_layer=chosen["tap_layer"],
            part="all" if located.recipe == "paper" else "answer",
            residual=located.projection.residual,
        ),
        dimensions=located.projection.projection.shape[1],
        weighting=settings.weighting,
        blend="separate",
        grouped=located.groups is not None,
        settings=chosen | found,
    )


def check_out(out: Path, *, replace: bool) -> None:
    """Refuse, with OutputError, a target that exists, before anything is computed."""
    if out.exists() and not replace:
        raise OutputError("the target exists", where=out, do="choose another path, or replace it")


def _selected(items: Sequence[Any], kept: Sequence[int]) -> Sequence[Any]:
    return items.select(kept) if isinstance(items, Texts) else [items[i] for i in kept]


def _hash(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()[:16]


def _located(
    embeddings: Embeddings, groups: Sequence[str] | None, settings: Settings, run: Path | None, place: Accelerator
) -> Located:
    """As `locate`; with a folder it is done once, by one process, as sums in another order would be others."""
    from safetensors.numpy import load_file, save

    if run is None:
        return locate(embeddings, groups, settings)
    path = run / "projection.safetensors"
    if place.is_main_process and not path.exists():
        arrays = vars(locate(embeddings, groups, settings).projection)
        with atomic_file(path) as file:
            file.write(save({k: np.ascontiguousarray(v) for k, v in arrays.items() if v is not None}))
    place.wait_for_everyone()
    projection, recipe = Projection(**load_file(path)), _recipe(groups, settings)
    fitted = None
    if projection.prompt_mean is not None and projection.answer_mean is not None and projection.ridge is not None:
        fitted = indicators.Residual(projection.prompt_mean, projection.answer_mean, projection.ridge)
    members = _members(groups) if recipe == "groups" else None
    return Located(recipe, projection, _queries(recipe, fitted, embeddings), members)


def _pca(located: Located) -> str | None:
    if located.recipe == "groups":
        return None
    return "in blocks" if indicators.in_blocks(located.queries) else "exact"


def _decided(located: Located, texts: int) -> str:
    how = {
        "paper": "the paper's, PCA of each text's mean state",
        "residual": "PCA of each text's task residual; nothing is said of which texts belong together",
        "groups": f"LDA between {len(located.groups or [])} groups over task residuals",
    }
    return (
        f"recipe {located.recipe} ({how[located.recipe]}): {texts} texts, {len(located.projection.indicators)} clusters"
    )


def typical_texts(located: Located, texts: Sequence[Text]) -> list[TypicalText]:
    """The texts nearest to each indicator."""
    z = located.z
    cosines = z @ located.projection.indicators.T
    return [
        typical_text(n, texts[i], z[i])
        for n in range(cosines.shape[1])
        for i in np.argsort(-cosines[:, n], kind="stable")[:TYPICAL_TEXTS]
    ]


def typical_text(cluster: int, text: Text, z: Floats) -> TypicalText:
    """A line of typical.jsonl; z float32 [k], of unit length."""
    position = [round(float(x), 4) for x in z]
    return {"cluster": cluster, "prompt": text.prompt, "completion": text.completion, "position": position}
