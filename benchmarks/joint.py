"""A step of joint training against a step of one LoRA with as many parameters, PEFT's, in the same loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import interleaved
from benchmarks.table import Row
from crayon_runtime.manifest import LINEARS
from crayon_server import models, training
from crayon_server.data import phone_assistant
from crayon_server.pool.joint import JointLoras
from crayon_server.training import Tokens

N, RANK = 16, 4
ROUNDS = 9
THREADS = 1


def run(_work: Path) -> Iterator[Row]:
    nano = models.load_nano()
    tokenizer = models.load_tokenizer(nano)
    examples = [e for user in phone_assistant.benchmark().train[:16] for e in user.examples[:4]]
    texts = [training.tokenize(tokenizer, e) for e in examples]
    yield _row("nano, 64 texts", lambda: models.load(nano, torch.float32), texts)
    rng = np.random.default_rng(0)
    long = [Tokens(rng.integers(3, 4000, 64).tolist(), [i >= 32 for i in range(64)]) for _ in range(16)]
    yield _row("LLaMA of 4 x 512, 16 texts of 64 tokens", _random, long)


def _random() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 1376, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=4000))


def _row(name: str, model: Callable[[], Any], texts: list[Tokens]) -> Row:
    options = training.Options(steps=1, learning_rate=1e-3, threads=THREADS)
    base, place = model(), training.accelerator()
    loras = JointLoras(base, N, RANK, scale=2.0, seed=0)
    alphas = np.random.default_rng(0).dirichlet([1] * N, len(texts)).astype(np.float32)
    configuration = peft.LoraConfig(r=N * RANK, lora_alpha=2 * N * RANK, target_modules=list(LINEARS))
    single = peft.get_peft_model(model(), configuration)
    runs: dict[str, Callable[[], Any]] = {
        "joint": lambda: loras.train(
            texts, lambda batch, _: alphas[batch], options, batch_size=len(texts), pad_id=0, place=place
        ),
        "single": lambda: training.train(single, iter([texts]), options, pad_id=0, place=place),
    }
    seconds = interleaved(runs, ROUNDS)
    ratio = float(np.median(np.array(seconds["joint"]) / np.array(seconds["single"])))
    joint, one = (float(np.median(seconds[run])) for run in ("joint", "single"))
    return Row(
        f"joint training step, N = {N}, r = {RANK}, against one LoRA of rank {N * RANK}; {name}",
        "<= 1.0x",
        f"{ratio:.2f}x ({joint * 1e3:.0f} ms against {one * 1e3:.0f} ms)",
        ratio <= 1.0,
    )
