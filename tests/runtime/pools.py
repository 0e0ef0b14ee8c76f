"""Random pools: for everything that reads one and trains none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from crayon_runtime.affinity import Projection, Weighting
from crayon_runtime.pool import Embedding, Pool, PoolManifest, write_pool
from crayon_runtime.prototypes import ClusteredPrototypes
from tests.runtime import bundles

SHAPES = {"model.layers.0.self_attn.q_proj": (8, 12), "model.layers.1.mlp.down_proj": (16, 6)}
"""(in, out) of each module that the adapters change."""

Lora = dict[str, tuple[np.ndarray, np.ndarray]]


def loras(
    count: int = 3, rank: int = 2, shapes: dict[str, tuple[int, int]] = SHAPES, *, gain: float = 1.0, seed: int = 0
) -> list[Lora]:
    """Random A [r, in] and B [out, r]: each adapter changes an output by about `gain` of its size."""
    rng = np.random.default_rng(seed)
    return [
        {
            module: (
                (rng.standard_normal((rank, inside)) * inside**-0.5).astype(np.float32),
                (rng.standard_normal((outside, rank)) * gain * rank**-0.5).astype(np.float32),
            )
            for module, (inside, outside) in shapes.items()
        }
        for _ in range(count)
    ]


def projection(count: int = 3, d: int = 8, k: int = 4, *, residual: bool = True, seed: int = 0) -> Projection:
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    indicators = random(count, k)
    indicators /= np.linalg.norm(indicators, axis=1, keepdims=True)
    parts = (random(d), random(d), random(d, d) / d) if residual else (None, None, None)
    return Projection(random(d), random(d, k), indicators, *parts)


def prototypes(clusters: tuple[int, ...] = (0, 0, 0, 1, 1, 2), d: int = 8, *, seed: int = 0) -> ClusteredPrototypes:
    states = np.random.default_rng(seed).standard_normal((len(clusters), d)).astype(np.float16)
    mean = states.mean(0, dtype=np.float32)
    return ClusteredPrototypes(states, np.array(clusters), mean, "a-server-llm")


def write(
    out: Path,
    *,
    adapters: list[Lora] | None = None,
    located: Projection | None = None,
    base: str = bundles.BASE,
    typical: list[dict[str, Any]] | None = None,
    server: ClusteredPrototypes | None = None,
    replace: bool = False,
    **changes: Any,
) -> Pool:
    """A pool; `server` are its prototypes, and `changes` fields of its manifest."""
    adapters = adapters if adapters is not None else loras()
    residual = changes.get("embedding", Embedding(2, "answer", True)).residual
    located = located or projection(len(adapters), residual=residual)
    fields: dict[str, Any] = {
        "schema_version": "1.0",
        "name": "random",
        "base_fingerprint": base,
        "adapters": len(adapters),
        "rank": len(next(iter(adapters[0].values()))[0]),
        "scale": 2.0,
        "targets": list(adapters[0]),
        "embedding": Embedding(2, "answer", True),
        "dimensions": located.indicators.shape[1],
        "weighting": Weighting(),
        "blend": "separate",
        "grouped": False,
        "settings": {"seed": 0},
    }
    manifest = PoolManifest(**fields | changes)
    return write_pool(
        out,
        manifest,
        located,
        [(None, lora) for lora in adapters],
        typical=typical or [],
        prototypes=server,
        replace=replace,
    )
