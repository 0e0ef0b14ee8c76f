"""Operations of a training step. Judge: torch's own counter, over a real forward and backward pass."""

from __future__ import annotations

import pytest

from tests.support import needs

torch = needs.module("torch")
needs.module("transformers")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402 - it needs torch

from crayon_server.models.mobilellm import MobileLLMConfig, MobileLLMForCausalLM  # noqa: E402
from crayon_server.throughput import flops_per_token, measured_peak  # noqa: E402


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_that_torch_counts(repeats: int, tied: bool) -> None:
    configuration = MobileLLMConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=32,
        num_key_value_heads=2, layer_repeats=repeats, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    model = MobileLLMForCausalLM(configuration)
    ids = torch.randint(0, 97, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    rotary = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    attention = 12 * 3 * repeats * 4 * 32 * 16 * 32  # of all tokens, as PaLM counts it; it is bmm
    angles = counter.get_total_flops() - 32 * flops_per_token(configuration, 16)
    assert 0 <= angles < 0.001 * counter.get_total_flops()  # the rotary embedding's angles
    assert rotary - attention == angles


def test_a_peak_is_more_than_a_product_in_numpy_s_loop_and_less_than_any_machine_has() -> None:
    assert 1e8 < measured_peak(torch.device("cpu"), torch.float32) < 1e16
