"""The forward pass of a LLaMA-style decoder in numpy, one weight at a time.

It is the reference that golden cases are recorded from. Weights come through a `Weights` object, which may stream them from disk
and do something with each on the way: the exporter quantizes and writes every matrix at the moment the reference multiplies by
it, so a model of any size needs one pass and the memory of one chunk.

Several *streams* go through the model at once, as the leading axis of every activation: the float weights and the quantized
ones, each without and with every adapter. All sequences go through together too, one after the other along the token axis.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from crayon_export.architecture import rotary_tables
from crayon_runtime.manifest import Architecture

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Weights(Protocol):
    """Where the forward pass gets its weights. Called in the order of computation, for a block that is repeated in each pass."""

    def embed(self, ids: Ids) -> Floats:
        """The embeddings float32 [streams, T, hidden] of int64 [T] tokens."""

    def vector(self, name: str) -> Floats:
        """A norm's weight, float32 [hidden]."""

    def linear(self, module: str, x: Floats) -> Floats:
        """A linear layer applied to float32 [streams, T, in], adapters included: float32 [streams, T, out]."""


@dataclass(frozen=True, slots=True)
class Outputs:
    logits: Floats
    """float32 [streams, positions, vocabulary]"""
    tapped: Floats
    """float32 [streams, T, hidden]"""


def forward(
    a: Architecture,
    weights: Weights,
    sequences: Sequence[Ids],
    *,
    positions: npt.NDArray[np.int64],
    tap_layer: int,
) -> Outputs:
    """Run the model.

    Args:
        sequences: token ids, int64 [T_i] each; they do not see one another.
        positions: indices into the concatenated sequences, int64 [P]: where logits are wanted.
        tap_layer: index into transformers' `hidden_states`, which counts blocks, not their passes.
    """
    x = weights.embed(np.concatenate(sequences))
    run = steps(a, weights.vector, x, sequences, positions=positions, tap_layer=tap_layer)
    try:
        module, inputs = next(run)
        while True:
            module, inputs = run.send(weights.linear(module, inputs))
    except StopIteration as done:
        outputs: Outputs = done.value
        return outputs


def steps(
    a: Architecture,
    vector: Callable[[str], Floats],
    x: Floats,
    sequences: Sequence[Ids],
    *,
    positions: npt.NDArray[np.int64],
    tap_layer: int,
) -> Generator[tuple[str, Floats], Floats, Outputs]:
    """The same, for a caller who computes the linear layers: yields each with its input, and is sent its output.

    Args:
        vector: as in `Weights`.
        x: the embeddings, float32 [streams, T, hidden].
    """
    tapped = x
    for layer in range(a.layers):
        x = yield from passes(a, vector, layer, x, sequences)
        if layer < tap_layer:
            tapped = x
    x = last_norm(a, vector, x)
    logits = yield "lm_head", x[:, positions]
    return Outputs(logits, tapped=x if tap_layer == a.layers else tapped)


def passes(
    a: Architecture, vector: Callable[[str], Floats], layer: int, x: Floats, sequences: Sequence[Ids]
) -> Generator[tuple[str, Floats], Floats, Floats]:
    """One block, as often as it is computed, in the manner of `steps`: from hidden states float32 [streams, T, hidden] to the next."""
    ends = np.cumsum([len(s) for s in sequences])
    spans = [slice(int(end) - len(s), int(end)) for s, end in zip(sequences, ends, strict=True)]
    tables = rotary_tables(a, max(len(s) for s in sequences))
    for _ in range(a.layer_repeats):
        x = yield from _block(a, vector, f"model.layers.{layer}", x, spans, tables)
    return x


def last_norm(a: Architecture, vector: Callable[[str], Floats], x: Floats) -> Floats:
    """What the head is given, float32 [streams, T, hidden]."""
    return _rms_norm(x, vector("model.norm.weight"), a.norm_eps)


def _block(
    a: Architecture,
    vector: Callable[[str], Floats],
    name: str,
    x: Floats,
    spans: Sequence[slice],
    tables: tuple[Floats, Floats],
) -> Generator[tuple[str, Floats], Floats, Floats]:
    h = _rms_norm(x, vector(f"{name}.input_layernorm.weight"), a.norm_eps)
    q = yield f"{name}.self_attn.q_proj", h
    k = yield f"{name}.self_attn.k_proj", h
    v = yield f"{name}.self_attn.v_proj", h
    attended = np.concatenate([_attention(a, q[:, s], k[:, s], v[:, s], tables) for s in spans], axis=1)
    del h, q, k, v
    x = x + (yield f"{name}.self_attn.o_proj", attended)
    del attended
    h = _rms_norm(x, vector(f"{name}.post_attention_layernorm.weight"), a.norm_eps)
    gate = yield f"{name}.mlp.gate_proj", h
    up = yield f"{name}.mlp.up_proj", h
    del h
    for s in spans:  # in pieces, as is attention: no third array of this size
        gate[:, s] = _silu(gate[:, s]) * up[:, s]
    del up
    return x + (yield f"{name}.mlp.down_proj", gate)


def _rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    mean_square = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    return np.asarray(x / np.sqrt(mean_square + np.float32(eps)) * weight)


def _silu(x: Floats) -> Floats:
    # Written through tanh: exp(-x) overflows for large negative x.
    return np.asarray(x * (np.float32(0.5) * np.tanh(x * np.float32(0.5)) + np.float32(0.5)))


def _attention(a: Architecture, q: Floats, k: Floats, v: Floats, tables: tuple[Floats, Floats]) -> Floats:
    """Causal grouped-query attention of one sequence: q [streams, T, heads * size], k and v [streams, T, kv_heads * size]."""
    streams, length, _ = q.shape
    queries = _rotate(_heads(q, a.heads), tables).reshape(streams, a.kv_heads, -1, length, a.head_size)
    keys = _rotate(_heads(k, a.kv_heads), tables)[:, :, None]
    values = _heads(v, a.kv_heads)[:, :, None]
    scores = queries @ keys.swapaxes(-1, -2) * np.float32(a.head_size**-0.5)
    scores += np.triu(np.full((length, length), -np.inf, np.float32), 1)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = scores / scores.sum(axis=-1, keepdims=True) @ values
    out = np.asarray(out, np.float32)
    return out.reshape(streams, a.heads, length, a.head_size).swapaxes(1, 2).reshape(streams, length, -1)


def _heads(x: Floats, heads: int) -> Floats:
    """[streams, T, heads * size] -> [streams, heads, T, size]"""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _rotate(x: Floats, tables: tuple[Floats, Floats]) -> Floats:
    """Rotary embedding of [streams, heads, T, size]: the first half of each head is rotated against the second."""
    cos, sin = (t[: x.shape[2]] for t in tables)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
