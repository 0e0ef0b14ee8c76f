"""Judge: transformers' eager LLaMA, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crayon_export import architecture
from crayon_export.reference import forward
from tests.support import needs


class _ModelWeights:
    """The weights of a transformers model, one stream."""

    def __init__(self, model: Any) -> None:
        self._state = {k: v.float().numpy() for k, v in model.state_dict().items()}

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self._state["model.embed_tokens.weight"][ids][None]

    def vector(self, name: str) -> np.ndarray:
        return self._state[name]

    def linear(self, module: str, x: np.ndarray) -> np.ndarray:
        return x @ self._state[f"{module}.weight"].T


def _config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    shape = {
        "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
        "intermediate_size": 80, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "initializer_range": 0.3,
    }  # fmt: skip
    if "layer_repeats" in changes:
        from crayon_server.models.mobilellm import MobileLLMConfig

        return MobileLLMConfig(**{"tie_word_embeddings": False, **shape, **changes})
    return LlamaConfig(**{**shape, **changes})


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 6, "head_dim": 8},
        {"tie_word_embeddings": True},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {"layer_repeats": 2},
        {"layer_repeats": 3, "tie_word_embeddings": True},
    ],
    ids=["gqa", "mha", "tied", "llama3-rope", "linear-rope", "repeats", "three-repeats-tied"],
)
@pytest.mark.parametrize("tap_layer", [0, 2, 3])
def test_logits_and_hidden_states_are_those_of_transformers(changes: dict[str, Any], tap_layer: int) -> None:
    torch = needs.module("torch")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(**changes)).eval()
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 97, n) for n in (7, 1, 40)]
    starts = [0, 7, 8]
    positions = np.array([3, 6, 7, 8, 47])

    a = architecture.read(model.config.to_dict())
    got = forward(a, _ModelWeights(model), sequences, positions=positions, tap_layer=tap_layer)

    for ids, start in zip(sequences, starts, strict=True):
        with torch.no_grad():
            expected = model(torch.from_numpy(ids)[None], output_hidden_states=True)
        span = slice(start, start + len(ids))
        hidden = expected.hidden_states[tap_layer][0].numpy()
        _assert_close(got.tapped[0, span], hidden)
        for i, position in enumerate(positions):
            if start <= position < start + len(ids):
                logits = expected.logits[0, position - start].numpy()
                _assert_close(got.logits[0, i], logits)


def test_a_trained_model(reference_model: Path) -> None:
    torch = needs.module("torch")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(reference_model).eval()
    ids = np.random.default_rng(1).integers(3, 512, 60)
    a = architecture.read(model.config.to_dict())
    got = forward(a, _ModelWeights(model), [ids], positions=np.arange(60), tap_layer=a.layers)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    _assert_close(got.logits[0], expected)


def _assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    """Within float32's rounding over a few layers."""
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.fixture
def reference_model() -> Path:
    return needs.reference_model()
