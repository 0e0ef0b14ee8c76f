"""A blend of a pool's LoRAs as a PEFT directory, for transformers, `crayon adapter` and `crayon export --merge`.

The device's form of the same blend is `crayon_runtime.pool.write_adapter_bundle`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from crayon_runtime.files import atomic_directory
from crayon_runtime.manifest import BASE_FINGERPRINT
from crayon_runtime.pool import peft_config

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from crayon_runtime.pool import Blended, Mode, Pool


def blend(
    pool: Pool,
    alpha: npt.ArrayLike,
    out: Path,
    *,
    mode: Mode | None = None,
    rank: int | None = None,
    replace: bool = False,
) -> Blended:
    """Write the adapter of one alpha; bound to the pool's base by fingerprint.

    Args:
        alpha: float [N].
        mode: "separate", "concat" or "svd"; None: that which the pool was trained with.
        rank: of "svd".

    Raises:
        InvalidInput: alpha, mode or rank cannot be used.
        OutputError: `out` exists and is not to be replaced, or cannot be written.
    """
    import numpy as np
    from safetensors.numpy import save_file

    blended = pool.blend(alpha, mode, rank)
    tensors, ranks = {}, {}
    with atomic_directory(out, replace=replace) as folder:
        for module, (a, b) in blended.tensors.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a)
            tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b)
            ranks[module] = len(a)
        smaller = {module: rank for module, rank in ranks.items() if rank != blended.rank}
        config = peft_config(blended.rank, blended.scale, pool.manifest.targets) | {
            "rank_pattern": smaller,
            "alpha_pattern": {module: blended.scale * rank for module, rank in smaller.items()},
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = folder / "adapter_model.safetensors"
        save_file(tensors, weights, metadata={BASE_FINGERPRINT: pool.manifest.base_fingerprint})
        weights.chmod(0o644)  # safetensors writes it for its owner alone
    return blended


def size(adapter: Path) -> int:
    """Bytes of a PEFT directory's tensors."""
    return (adapter / "adapter_model.safetensors").stat().st_size
