"""A real trained LLaMA through everything: sentencepiece, head size 8, a width of 172, and two LoRAs for two kinds of text.

stories260K writes small children's stories. One adapter learns commands, the other sums; the table of log-losses on three kinds of
text by three models must be smallest where text and model belong together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crayon_export.exporter import export
from crayon_runtime import Engine, backends, golden
from crayon_runtime.bundle import Bundle
from crayon_runtime.golden import log_softmax
from crayon_server.data.phone_assistant import benchmark
from tests.support import needs

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STORIES = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "Tom and his mom went to the zoo. Tom saw a big lion and he was very happy.",
    "One day, a small bird found a red ball. The bird wanted to share it with her friends.",
)
DIGITS = "zero one two three four five six seven eight nine".split()


def _commands() -> list[str]:
    return [e.prompt + e.completion for user in benchmark().validation[:4] for e in user.examples]


def _sums() -> list[str]:
    return [
        f"{a} plus {b} is {n // 10}{n % 10}."
        for i, a in enumerate(DIGITS)
        for j, b in enumerate(DIGITS)
        if (n := i + j) >= 0
    ]


def _split(texts: list[str]) -> tuple[list[str], list[str]]:
    """To train on, and to judge by."""
    return [t for i, t in enumerate(texts) if i % 4], texts[::4][:12]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """float32 and int4, each with both adapters inside."""
    folder, model = tmp_path_factory.mktemp("stories"), needs.reference_model()
    plain = export(model, folder / "plain", quantize="none").bundle
    with Engine.load(plain) as engine:
        encode = engine.tokenizer.encode
    kinds = {"commands": _commands(), "sums": _sums()}
    adapters = [_train(model, [encode(t) for t in _split(texts)[0]], folder / name) for name, texts in kinds.items()]
    return {q: export(model, folder / q, quantize=q, adapters=adapters).bundle for q in ("none", "int4")}


def _train(model: Path, texts: list[list[int]], out: Path) -> Path:
    torch = needs.module("torch")
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LINEARS)
    tuned: Any = get_peft_model(LlamaForCausalLM.from_pretrained(model), lora)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    rng = np.random.default_rng(0)
    for _ in range(40):
        batch = [texts[i] for i in rng.integers(0, len(texts), 16)]
        width = max(map(len, batch))
        ids = torch.tensor([t + [0] * (width - len(t)) for t in batch])
        labels = torch.tensor([t + [-100] * (width - len(t)) for t in batch])
        loss = tuned(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tuned.save_pretrained(out)
    return out


def _log_loss(bundle: Bundle, adapter: str | None, texts: list[str]) -> float:
    """Nats per token, token by token through the backend."""
    with Engine.load(bundle) as engine:
        sequences = [engine.tokenizer.encode(t) for t in texts]
    backend = backends.load(bundle)
    attached = backend.read_adapter(bundle.adapter(adapter)) if adapter else None
    losses = []
    for ids in sequences:
        cache = backend.new_cache(attached)
        step = cache.prefill(np.array(ids[:1]))
        for token in ids[1:]:
            losses.append(-log_softmax(step.logits)[token])
            step = cache.decode(token)
        cache.close()
    return float(np.mean(losses))


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_each_adapter_is_best_on_its_own_kind_of_text(bundles: dict[str, Bundle], quantize: str) -> None:
    texts = {None: list(STORIES), "commands": _split(_commands())[1], "sums": _split(_sums())[1]}
    table = {
        (model, kind): _log_loss(bundles[quantize], model, sample) for model in texts for kind, sample in texts.items()
    }
    for kind in texts:
        best = min(texts, key=lambda model: table[model, kind])
        assert best == kind, table
    # Not by a hair: the adapters learned something.
    assert table["commands", "commands"] < table[None, "commands"] - 1
    assert table["sums", "sums"] < table[None, "sums"] - 1
    # And what the base knew is still there when no adapter is attached: it is a good storyteller.
    assert table[None, None] < 2.5


@pytest.mark.slow
def test_golden_cases_of_base_and_adapters(bundles: dict[str, Bundle]) -> None:
    for bundle in bundles.values():
        results = golden.replay(bundle)
        assert {r.adapter for r in results} == {None, "commands", "sums"}
        assert [r for r in results if not r.passed] == []


@pytest.mark.slow
def test_it_tells_a_story(bundles: dict[str, Bundle]) -> None:
    """Float32 and transformers agree on a whole greedy text, with sentencepiece as the judge of its tokens."""
    torch = needs.module("torch")
    sentencepiece = needs.module("sentencepiece")
    from transformers import LlamaForCausalLM

    model = needs.reference_model()
    judge = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    prompt = "Once upon a time"
    ids = [1, *judge.encode(prompt)]
    reference = LlamaForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        expected = reference.generate(torch.tensor([ids]), max_new_tokens=120, do_sample=False)[0, len(ids) :].tolist()
    with Engine.load(bundles["none"]) as engine:
        answer = engine.generate(prompt, max_new_tokens=120)
    assert answer.token_ids == expected
    assert answer.text == judge.decode(ids[1:] + expected).removeprefix(prompt)
    assert "there was a little girl" in answer.text
