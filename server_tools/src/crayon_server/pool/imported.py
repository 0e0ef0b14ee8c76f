"""Pools of LoRAs that exist already: made of PEFT folders, or grown by one of them.

A pool holds LoRAs of one rank and one scale. Others are brought to these and still compute what they did: a smaller rank is filled up
with zeros, another alpha / r goes into B, and a module that one LoRA does not adapt has A = B = 0.

The indicator of a LoRA is where the texts that it was trained on lie: their mean, projected to tell the LoRAs' texts apart. All of this is
our choice; the paper trains its own. LoRAs that were trained apart have no cross terms in their training: their products are blended, not
their factors, and cut to the rank of one (`svd`).
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from crayon_runtime.affinity import Projection, Weighting
from crayon_runtime.errors import AdapterError, InvalidInput
from crayon_runtime.manifest import LINEARS, SCHEMA_VERSION
from crayon_runtime.pool import (
    PROJECTION,
    TYPICAL,
    Embedding,
    PoolManifest,
    adapter_folder,
    peft_config,
    pool_name,
    write_pool,
)
from crayon_runtime.prototypes import FILE as PROTOTYPES
from crayon_server import models, training
from crayon_server.pool import indicators
from crayon_server.pool.build import DIMENSIONS, TEMPERATURE, TYPICAL_TEXTS, check_out, part_of, typical_text
from crayon_server.pool.data import Corpus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from crayon_export.lora import PeftAdapter
    from crayon_runtime.manifest import Architecture
    from crayon_runtime.pool import Pool, TypicalText
    from crayon_server.pool.build import Recipe
    from crayon_server.pool.indicators import Embeddings
    from crayon_server.training import Text

    Floats = npt.NDArray[np.float32]
    Matrix = npt.NDArray[Any]

WEIGHTING = Weighting("softmax", TEMPERATURE)
"""As of pools that are built. Validation users of the phone-assistant benchmark, one seed, exact match of 16 LoRAs that were trained apart, of
a cluster each, imported with 40 texts each: the nearest alone .825; two .866; three .877; all .878; all, cut to the rank of one .883."""
SAME_PLACE = 0.999
"""Indicators of a larger cosine than this are one: no alpha tells them apart."""
RIDGE, SHRINKAGE = 1.0, 0.1
"""See `indicators`. A pool is built of thousands of texts, LoRAs come with tens. Of 8 conventions of the phone-assistant benchmark, 10 or
20 texts each, samples of 10 others lie nearest to their own indicator in 94 to 97 %; with the values for many texts, 29 to 79 %."""
AMID = 0.05
"""Means that are less than this fraction of the texts' mean distance away from all others' mean have no direction."""


class Source(NamedTuple):
    """A LoRA, and texts that it was trained on or could have been."""

    adapter: Path
    """A PEFT folder."""
    texts: Sequence[Text]


def import_pool(
    model_dir: Path,
    sources: Sequence[Source],
    out: Path,
    *,
    recipe: Recipe = "residual",
    tap_layer: int | None = None,
    dimensions: int | None = None,
    weighting: Weighting = WEIGHTING,
    threads: int | None = None,
    replace: bool = False,
) -> Pool:
    """Make a pool of LoRAs that were trained elsewhere.

    Args:
        model_dir: their base, a Hugging Face folder.
        sources: two or more; which texts belong together is told by whose they are.
        recipe: how the projection is fitted, see `crayon_server.pool.build`. Indicators are not clustered.
        tap_layer: index into transformers' hidden_states; None: after the last norm.
        dimensions: k of the projection; None: the recipe's.

    Raises:
        AdapterError: a LoRA is of another base, by its fingerprint or by its shapes.
        UnsupportedModel: one is no plain LoRA; what it is instead is named.
        InvalidInput: there are fewer than two LoRAs, two are the same or have texts that cannot be told apart, or one has no texts.
        OutputError: `out` exists and is not to be replaced, or cannot be written.
    """
    check_out(out, replace=replace)
    name = pool_name(out)
    if len(sources) < 2:
        raise InvalidInput(f"a pool cannot be made of {len(sources)} LoRA", do="give two or more, each with its texts")
    if (weighting.top_k or 1) > len(sources):
        raise InvalidInput(f"the {weighting.top_k} nearest of {len(sources)} LoRAs")
    fingerprint, architecture = _base(model_dir)
    loras = [_open(source, fingerprint, architecture) for source in sources]
    _check_distinct(loras)
    given = sum(len(source.texts) for source in sources)
    sources, embedded, layer = _embed(model_dir, sources, tap_layer, threads)
    projection = _locate(embedded, recipe, dimensions or DIMENSIONS[recipe])
    names = [lora.name for lora in loras]
    for n, point in enumerate(projection.indicators):
        _check_place(point, projection.indicators[:n], names[n], names)
    shapes = _shapes(loras, architecture)
    rank = max(module.rank for lora in loras for module in lora.targets.values())
    scales = {module.scale for lora in loras for module in lora.targets.values()} - {0.0}
    scale = scales.pop() if len(scales) == 1 else 1.0
    sizes = [len(source.texts) for source in sources]
    manifest = PoolManifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        base_fingerprint=fingerprint,
        adapters=len(loras),
        rank=rank,
        scale=scale,
        targets=list(shapes),
        embedding=Embedding(tap_layer=layer, part="all" if recipe == "paper" else "answer", residual=recipe != "paper"),
        dimensions=projection.projection.shape[1],
        weighting=weighting,
        blend="svd",
        grouped=True,
        settings={
            "recipe": "imported",
            "projection": recipe,
            "tap_layer": layer,
            "texts": sum(sizes),
            "left_out": given - sum(sizes),
            "sizes": sizes,
            "told_apart": _told_apart(embedded, recipe, dimensions or DIMENSIONS[recipe]),
            "loras": [_provenance(lora) for lora in loras],
        },
    )
    config = peft_config(rank, scale, _names(shapes, architecture), base=model_dir.name)
    adapters = ((config, _fitted(lora, shapes, rank, scale)) for lora in loras)
    states = [part_of(recipe, e) for e in embedded]
    typical = [
        text
        for n, (source, e, state) in enumerate(zip(sources, embedded, states, strict=True))
        for text in _typical(n, source.texts, projection.query(e.prompt, state), projection)
    ]
    return write_pool(out, manifest, projection, adapters, typical=typical, replace=replace)


def add_lora(
    pool: Pool, model_dir: Path, source: Source, out: Path, *, threads: int | None = None, replace: bool = False
) -> Pool:
    """Write a pool with one more LoRA. The projection, the files of the other LoRAs and the prototypes stay as they are, so the new
    one has none; version and serial are new.

    Args:
        pool: opened with verify=True, so that nothing damaged gets a new hash.
        out: may be where the pool is, with `replace`.

    Raises:
        AdapterError: the LoRA, or the model, is of another base than the pool; or the LoRA has a larger rank or other modules.
        UnsupportedModel: it is no plain LoRA.
        InvalidInput: it is in the pool already, has no texts, or they lie where those of another LoRA do.
        OutputError: `out` exists and is not to be replaced, or cannot be written.
    """
    check_out(out, replace=replace)
    old = pool.manifest
    fingerprint, architecture = _base(model_dir)
    if fingerprint != old.base_fingerprint:
        raise AdapterError(
            f"pool {old.name!r} is for another base ({old.base_fingerprint[:12]}…; this one is {fingerprint[:12]}…)",
            where=model_dir,
            do="give the model that the pool was made for",
        )
    lora = _open(source, fingerprint, architecture)
    shapes = {module: (a.shape[1], b.shape[0]) for module, (a, b) in pool.lora(0).items()}
    _check_fits(lora, pool)
    tensors = _fitted(lora, shapes, old.rank, old.scale)
    _check_new(tensors, pool, lora)
    (source,), (embedded,), _ = _embed(model_dir, [source], old.embedding.tap_layer, threads)
    parts = {"answer": embedded.answer, "all": embedded.everything, "prompt": embedded.prompt}
    queries = pool.projection.query(embedded.prompt, parts[old.embedding.part])
    cosines = pool.projection.cosines(queries.mean(0))
    z = (queries.mean(0) - pool.projection.mean) @ pool.projection.projection
    indicator = indicators.normalize(z.astype(np.float32))
    n = old.adapters
    projection = dataclasses.replace(pool.projection, indicators=np.vstack([pool.projection.indicators, indicator]))
    _check_place(indicator, pool.projection.indicators, lora.name, [f"LoRA {i} of the pool" for i in range(n)])
    nearest = {"adapter": int(cosines.argmax()), "cosine": round(float(cosines.max()), 4)}
    added = _provenance(lora) | {"adapter": n, "texts": len(source.texts), "nearest": nearest}
    settings = old.settings | {"added": [*old.settings.get("added", []), added]}
    if "sizes" in settings:
        settings["sizes"] = [*settings["sizes"], len(source.texts)]
    manifest = msgspec.structs.replace(
        old, adapters=n + 1, serial=max(int(time.time()), old.serial + 1), settings=settings
    )
    config = peft_config(old.rank, old.scale, _names(shapes, architecture), base=model_dir.name)
    kept = (pool.path / adapter_folder(i) for i in range(n))
    typical = [*pool.typical(), *_typical(n, source.texts, queries, projection)]
    further = {
        file.path: (pool.path / file.path).read_bytes()
        for file in old.files
        if "/" not in file.path and file.path not in (PROJECTION, PROTOTYPES, TYPICAL)
    }
    return write_pool(
        out,
        manifest,
        projection,
        [*kept, (config, tensors)],
        typical=typical,
        prototypes=pool.prototypes,
        further=further,
        replace=replace,
    )


# Where texts lie


def _embed(
    model_dir: Path, sources: Sequence[Source], tap_layer: int | None, threads: int | None
) -> tuple[list[Source], list[Embeddings], int]:
    """Those texts of each one that the model has room for, their embeddings, and the tap layer."""
    import torch

    tokenizer = models.load_tokenizer(model_dir)
    model = models.load(model_dir, torch.float32)
    layers: int = model.config.num_hidden_layers
    layer = layers if tap_layer is None else tap_layer
    if not 0 <= layer <= layers:
        raise InvalidInput(f"tap layer {layer} is not one of 0 to {layers}")
    kept, embedded = [], []
    with training.threads(threads):
        for adapter, texts in sources:
            try:
                corpus = Corpus(tokenizer, texts, model.config.max_position_embeddings)
                embedded.append(indicators.embed(model, corpus, layer, pad_id=training.pad_id(tokenizer)))
            except InvalidInput as e:
                raise InvalidInput(e.what, where=f"{adapter}: {e.where}" if e.where else adapter, do=e.do) from None
            kept.append(Source(adapter, [texts[i] for i in corpus.kept]))
    return kept, embedded, layer


def _locate(embedded: Sequence[Embeddings], recipe: Recipe, dimensions: int) -> Projection:
    """Indicators are 0 where a LoRA's texts lie in no direction from those of the others."""
    prompts = np.concatenate([e.prompt for e in embedded])
    states = np.concatenate([part_of(recipe, e) for e in embedded])
    members = np.split(np.arange(len(states)), np.cumsum([len(e.answer) for e in embedded])[:-1])
    indicators.check_different(states)
    parts = None if recipe == "paper" else indicators.fit_residual(prompts, states, RIDGE)
    queries = states if parts is None else indicators.residual(parts, prompts, states)
    if recipe == "groups":
        axes = indicators.fit_lda(queries, members, dimensions, SHRINKAGE)
    else:
        axes = indicators.fit_pca(queries, dimensions, whiten=recipe == "residual")
    means: Floats = np.stack([queries[group].mean(0) for group in members])
    # Between the LoRAs, not between the texts: who brings most texts would otherwise lie at the origin, in no direction.
    centre = means.mean(0)
    points: Floats = ((means - centre) @ axes.projection).astype(np.float32)
    spread = np.linalg.norm((queries - centre) @ axes.projection, axis=1).mean()
    points[np.linalg.norm(points, axis=1) < AMID * spread] = 0
    return Projection(centre, axes.projection, indicators.normalize(points), *(parts or (None, None, None)))


def _told_apart(embedded: Sequence[Embeddings], recipe: Recipe, dimensions: int) -> float | None:
    """The share of every other text that lies nearest to its own LoRA's indicator, if all is fitted on the rest; each LoRA counts
    the same. None where a LoRA has only one text.
    """
    if min(len(e.answer) for e in embedded) < 2:
        return None
    fitted, others = ([type(e)(*(part[start::2] for part in e)) for e in embedded] for start in (0, 1))
    projection = _locate(fitted, recipe, dimensions)
    right = []
    for n, e in enumerate(others):
        queries = projection.query(e.prompt, part_of(recipe, e))
        right.append(np.mean([projection.cosines(query).argmax() == n for query in queries]))
    return round(float(np.mean(right)), 4)


def _typical(cluster: int, texts: Sequence[Text], queries: Floats, projection: Projection) -> list[TypicalText]:
    """The texts of a LoRA that are nearest to its indicator."""
    z = indicators.normalize(((queries - projection.mean) @ projection.projection).astype(np.float32))
    cosines = z @ projection.indicators[cluster]
    return [typical_text(cluster, texts[i], z[i]) for i in np.argsort(-cosines, kind="stable")[:TYPICAL_TEXTS].tolist()]


# LoRAs


def _base(model_dir: Path) -> tuple[str, Architecture]:
    from crayon_export import architecture, checkpoint

    opened = checkpoint.Checkpoint.open(model_dir)
    return training.base_fingerprint(model_dir), architecture.read(opened.config, where=model_dir)


def _open(source: Source, fingerprint: str, architecture: Architecture) -> PeftAdapter:
    from crayon_export import lora
    from crayon_export.adapters import check_base

    adapter = lora.PeftAdapter.open(source.adapter)
    lora.check(adapter, architecture)
    check_base(adapter, fingerprint)
    if not source.texts:
        raise InvalidInput("it has no texts", where=source.adapter, do="give some that it was trained on")
    return adapter


def _shapes(loras: Sequence[PeftAdapter], architecture: Architecture) -> dict[str, tuple[int, int]]:
    """(in, out) of every module that any of them adapts, in the model's order."""
    from crayon_export.architecture import linears

    used = {module for lora in loras for module in lora.tensors}
    return {
        linear.module: (linear.in_features, linear.out_features)
        for linear in linears(architecture)
        if linear.module in used
    }


def _names(modules: Mapping[str, object], architecture: Architecture) -> list[str]:
    """`target_modules`: kinds of linears where these mean no others, else every module by its name."""
    kinds = [kind for kind in LINEARS if any(module.endswith(f".{kind}") for module in modules)]
    return kinds if len(modules) == len(kinds) * architecture.layers else list(modules)


def _fitted(lora: PeftAdapter, shapes: Mapping[str, tuple[int, int]], rank: int, scale: float) -> dict[str, Any]:
    """By module A [rank, in] and B [out, rank] such that `scale * B @ A` is what the LoRA adds."""
    pairs = {}
    for module, (inside, outside) in shapes.items():
        a, b = np.zeros((rank, inside), np.float32), np.zeros((outside, rank), np.float32)
        if module in lora.tensors:
            own = lora.targets[module].rank
            a[:own] = lora.a(module)
            with np.errstate(over="ignore"):
                b[:, :own] = lora.b(module) * np.float32(lora.scale(module) / scale)
        if not np.isfinite(b).all():
            raise AdapterError(f"{module} is too large for float32 at scale {scale:g}", where=lora.path)
        pairs[module] = _narrow(a), _narrow(b)
    return pairs


def _narrow(matrix: Floats) -> Matrix:
    """float16 where that is the same: most published LoRAs are."""
    with np.errstate(over="ignore"):
        half = matrix.astype(np.float16)
    return half if np.array_equal(half, matrix) else matrix


def _provenance(lora: PeftAdapter) -> dict[str, Any]:
    return {"name": lora.name, "sha256": lora.sha256, "rank": max(module.rank for module in lora.targets.values())}


# What cannot be


def _check_distinct(loras: Sequence[PeftAdapter]) -> None:
    seen: dict[str, PeftAdapter] = {}
    for lora in loras:
        if first := seen.get(lora.sha256):
            raise InvalidInput(f"it is the same LoRA as {first.path}", where=lora.path, do="give each LoRA once")
        seen[lora.sha256] = lora


def _check_place(point: Floats, others: Floats, name: str, names: Sequence[str]) -> None:
    """Refuse an indicator, [k], that has no direction, or that of one of the others, [n, k]."""
    if not point.any():
        raise InvalidInput(f"the texts of {name} lie amid those of the others", do="give it texts of its own task")
    cosines = others @ point
    if len(others) and cosines.max() > SAME_PLACE:
        raise InvalidInput(
            f"the texts of {name} lie where those of {names[int(cosines.argmax())]} do: no alpha can tell them apart",
            do="give each LoRA texts of its own task; or import all LoRAs into a new pool, whose projection knows all of them",
        )


def _check_fits(lora: PeftAdapter, pool: Pool) -> None:
    rank = max(module.rank for module in lora.targets.values())
    if rank > pool.manifest.rank:
        raise AdapterError(
            f"it has rank {rank}; the pool's LoRAs have {pool.manifest.rank}",
            where=lora.path,
            do="train it at the pool's rank, or import all LoRAs into a new pool",
        )
    if others := sorted(set(lora.tensors) - set(pool.manifest.targets)):
        raise AdapterError(
            f"it adapts {others[0]}, which the pool's LoRAs do not",
            where=lora.path,
            do="train it on the pool's modules, or import all LoRAs into a new pool",
        )
    if pool.manifest.scale == 0:
        raise AdapterError("the pool's LoRAs add nothing: their scale is 0", where=pool.path)


def _check_new(tensors: Mapping[str, tuple[Matrix, Matrix]], pool: Pool, lora: PeftAdapter) -> None:
    for n in range(pool.manifest.adapters):
        there = pool.lora(n)
        if all(np.array_equal(x, y) for module in tensors for x, y in zip(tensors[module], there[module], strict=True)):
            raise InvalidInput(f"it is LoRA {n} of the pool already", where=lora.path)
