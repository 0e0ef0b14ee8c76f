"""Building a pool: embed, find the indicators, train all LoRAs together, write the folder that `crayon_runtime.pool` reads.

Three recipes, which differ in what the indicators are made of:

    paper      PCA of each text's mean state over prompt and answer                 the Crayon paper's, as far as it is public
    residual   whitened PCA of each text's task residual                            ours, where nothing is known of the texts
    groups     LDA between groups over task residuals, of means of 10 texts         ours, where the data says what belongs together

With groups, alpha of a training text is that of a sample of its group: what a device will send. Otherwise it is the text's own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np

from crayon_runtime.affinity import Projection, Weighting, weights
from crayon_runtime.errors import InvalidInput, OutputError
from crayon_runtime.manifest import LINEARS, SCHEMA_VERSION
from crayon_runtime.pool import Embedding, PoolManifest, peft_config, write_pool
from crayon_server import training
from crayon_server.pool import indicators
from crayon_server.pool.joint import JointLoras

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt
    import torch

    from crayon_runtime.pool import Pool
    from crayon_server.pool.indicators import Embeddings, Indices
    from crayon_server.pool.joint import Weights
    from crayon_server.training import OnStep, Text, Tokens

    Floats = npt.NDArray[np.float32]

Recipe = Literal["paper", "residual", "groups"]
DIMENSIONS: dict[Recipe, int] = {"paper": 16, "residual": 16, "groups": 8}
"""Of the projection, at most; chosen on the phone-assistant benchmark."""
TEMPERATURE = 0.2
"""Of the softmax over cosines; chosen on the benchmark's validation users."""
SAMPLES_OF_A_GROUP = 8
"""How many samples of each group are clustered."""
TYPICAL_TEXTS = 5
"""Of each cluster, written beside the pool."""


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
    threads: int | None = None


class Pair(NamedTuple):
    """A text to train on."""

    prompt: str
    completion: str


class Located(NamedTuple):
    """Where texts lie among the indicators."""

    recipe: Recipe
    projection: Projection
    queries: Floats
    """float32 [n, d], of the texts that the projection was fitted on."""
    groups: list[Indices] | None
    """Of the texts, where the recipe uses them."""


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
    recipe: Recipe = settings.recipe or ("residual" if groups is None else "groups")
    count = len(embeddings.answer)
    if count < settings.adapters:
        raise InvalidInput(
            f"{count} texts are too few for {settings.adapters} adapters", do=f"use --adapters {count} or fewer"
        )
    members = _members(groups) if recipe == "groups" else None
    indicators.check_different(embeddings.answer)
    parts = None if recipe == "paper" else indicators.fit_residual(embeddings.prompt, embeddings.answer)
    states = part_of(recipe, embeddings)
    queries = states if parts is None else indicators.residual(parts, embeddings.prompt, states)
    dimensions = settings.dimensions or DIMENSIONS[recipe]
    if members is not None:
        axes = indicators.fit_lda(queries, members, dimensions)
        generator = np.random.default_rng(settings.seed)
        points = indicators.samples_of_groups(queries, members, settings.sample, SAMPLES_OF_A_GROUP, generator)
    else:
        axes, points = indicators.fit_pca(queries, dimensions, whiten=recipe == "residual"), queries
    z = ((points - axes.mean) @ axes.projection).astype(np.float32)
    centres, _ = indicators.cluster(z, settings.adapters, settings.seed)
    fitted = parts or (None, None, None)
    return Located(recipe, Projection(axes.mean, axes.projection, centres, *fitted), queries, members)


def _members(groups: Sequence[str] | None) -> list[Indices]:
    if groups is None:
        raise InvalidInput('no text has a "group"', do="name the group of every text, or use --no-groups")
    names = np.array(groups)
    return [np.flatnonzero(names == name) for name in np.unique(names)]


def training_weights(located: Located, settings: Settings) -> Weights:
    """Alpha of the texts of a batch: each its own, or that of a new sample of its group."""
    projection, weighting, queries = located.projection, settings.weighting, located.queries
    if located.groups is None:
        own = np.stack([weights(projection.cosines(query), weighting) for query in queries])
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
) -> tuple[JointLoras, list[float]]:
    """Train the LoRAs of a pool; they stay attached to the model. Returns them and the loss of each step."""
    loras = JointLoras(model, settings.adapters, settings.rank, scale=settings.scale, seed=settings.seed)
    options = training.Options(settings.steps, settings.learning_rate, seed=settings.seed, threads=settings.threads)
    losses = loras.train(texts, alphas, options, batch_size=settings.batch_size, pad_id=pad_id, on_step=on_step)
    return loras, losses


def build(
    model_dir: Path,
    texts: Sequence[Text],
    out: Path,
    *,
    groups: Sequence[str] | None = None,
    settings: Settings | None = None,
    on_step: OnStep | None = None,
    replace: bool = False,
) -> Pool:
    """Build a pool from texts.

    Args:
        model_dir: the base, a Hugging Face folder; it stays as it is.
        out: the new pool; its name is the pool's.
        groups: which texts belong together (of one user, source or task): the group of each text.

    Raises:
        InvalidInput: the texts are too few, all alike, or have no completion.
        OutputError: `out` exists and is not to be replaced, or cannot be written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = settings or Settings()
    if out.exists() and not replace:
        raise OutputError("the target exists", where=out, do="choose another path, or replace it")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    layers = model.config.num_hidden_layers
    tap_layer = layers if settings.tap_layer is None else settings.tap_layer
    if not 0 <= tap_layer <= layers:
        raise InvalidInput(f"tap layer {tap_layer} is not one of 0 to {layers}")
    tokens = [training.tokenize(tokenizer, text) for text in texts]
    pad_id = training.pad_id(tokenizer)
    with training.threads(settings.threads):
        embeddings = indicators.embed(model, tokens, tap_layer, pad_id=pad_id)
    located = locate(embeddings, groups, settings)
    alphas = training_weights(located, settings)
    loras, losses = train(model, tokens, alphas, settings, pad_id=pad_id, on_step=on_step)
    loras.remove()
    chosen = asdict(settings) | {
        "recipe": located.recipe,
        "tap_layer": tap_layer,
        "texts": len(texts),
        "groups": 0 if located.groups is None else len(located.groups),
        "final_loss": float(np.mean(losses[-20:])),
    }
    del chosen["weighting"], chosen["threads"]  # one stands in the manifest; the other changes nothing
    manifest = PoolManifest(
        schema_version=SCHEMA_VERSION,
        name=out.name,
        base_fingerprint=training.base_fingerprint(model_dir),
        adapters=settings.adapters,
        rank=settings.rank,
        scale=settings.scale,
        targets=loras.modules,
        embedding=Embedding(
            tap_layer=tap_layer,
            part="all" if located.recipe == "paper" else "answer",
            residual=located.projection.residual,
        ),
        dimensions=located.projection.projection.shape[1],
        weighting=settings.weighting,
        blend="separate",
        grouped=located.groups is not None,
        settings=chosen,
    )
    config = peft_config(settings.rank, settings.scale, LINEARS, base=model_dir.name)
    adapters = ((config, loras.lora(n)) for n in range(settings.adapters))
    typical = typical_texts(located, texts)
    return write_pool(out, manifest, located.projection, adapters, typical=typical, replace=replace)


def typical_texts(located: Located, texts: Sequence[Text]) -> list[dict[str, Any]]:
    """The texts nearest to each indicator."""
    projection = located.projection
    cosines = np.stack([projection.cosines(query) for query in located.queries])
    return [
        {"cluster": n, "prompt": texts[i].prompt, "completion": texts[i].completion}
        for n in range(cosines.shape[1])
        for i in np.argsort(-cosines[:, n], kind="stable")[:TYPICAL_TEXTS]
    ]


class _Line(msgspec.Struct):
    prompt: str
    completion: str
    group: str | int | None = None


def read_texts(path: Path) -> tuple[list[Pair], list[str] | None]:
    """Texts of JSON lines {"prompt", "completion", "group"?}, and the group of each; None unless every line names one.

    Raises:
        InvalidInput: the file cannot be read, or a line is not such an object.
    """
    try:
        content = path.read_bytes()
    except OSError as e:
        raise InvalidInput(f"the data cannot be read: {e.strerror}", where=path, do="check the path") from None
    decoder = msgspec.json.Decoder(_Line)
    lines = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                lines.append(decoder.decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError) as e:
                raise InvalidInput(f"not a text to train on: {e}", where=f"{path}, line {number}") from None
    if not lines:
        raise InvalidInput("there are no texts", where=path)
    groups = [str(line.group) for line in lines if line.group is not None]
    return [Pair(line.prompt, line.completion) for line in lines], groups if len(groups) == len(lines) else None
