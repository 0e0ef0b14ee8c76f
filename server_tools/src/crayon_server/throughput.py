"""What training costs: floating-point operations of a token, and the share of a machine's peak that they use (MFU).

A multiplication and an addition are two operations. A backward pass counts as two forward passes, and activations that are computed again
count as nothing: "PaLM: Scaling Language Modeling with Pathways" (arXiv:2204.02311, appendix B), 6 N + 12 L H Q T for each token.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

SIZE = 1024
"""Of the square matrices that the peak is measured with."""
SECONDS = 0.5


def flops_per_token(config: PretrainedConfig, length: int) -> int:
    """Of a training step, for each token of texts of this length.

    N are the weights that are multiplied with: those of the blocks, as often as they are computed, and of the output layer, but not the
    lookup of the embedding. L H Q is the width of all queries of all layers. Attention counts as if it were not causal, as in PaLM.

    Args:
        config: of a LLaMA-style decoder.
    """
    heads, head_dim = config.num_attention_heads, config.head_dim
    attention = 2 * config.hidden_size * head_dim * (heads + config.num_key_value_heads)
    block = attention + 3 * config.hidden_size * config.intermediate_size
    layers = config.num_hidden_layers * getattr(config, "layer_repeats", 1)
    n = layers * block + config.vocab_size * config.hidden_size
    return int(6 * n + 12 * layers * heads * head_dim * length)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of products of large square matrices here, the best of many: what a step could reach at most."""
    import torch

    a = torch.randn(SIZE, SIZE, device=device).to(dtype)
    best, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * SIZE**3 / best
