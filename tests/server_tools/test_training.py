"""The training loop: it learns, repeats itself, weighs tokens as asked, and its LoRAs are PEFT's."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest

from crayon_runtime.errors import InvalidInput, OutputError
from crayon_server import models, training
from crayon_server.data import phone_assistant as pa
from crayon_server.data.phone_assistant.draws import Draws
from crayon_server.models.pretrain import pretrain, requests
from tests.support import needs

torch = needs.module("torch")
transformers = needs.module("transformers")
peft = needs.module("peft")
np = needs.module("numpy")

NANO = models.load_nano()
USER = pa.benchmark().validation[35]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(NANO)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "alice"
    losses = training.train_lora(NANO, pa.more_examples(USER, 64), out, rank=4, steps=12, batch_size=16, threads=1)
    return SimpleNamespace(path=out, losses=losses)


def tiny() -> object:
    torch.manual_seed(0)
    configuration = models.config("nano")
    configuration.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16})
    return transformers.LlamaForCausalLM(configuration)


# Tokens and batches


def test_a_text_is_bos_prompt_completion_eos(tokenizer) -> None:
    ids, in_completion = training.tokenize(
        tokenizer, SimpleNamespace(prompt="buy six eggs\n", completion="shop.add(qty=6)")
    )
    assert (ids[0], ids[-1]) == (1, 2)
    assert (
        tokenizer.decode([i for i, inside in zip(ids, in_completion, strict=True) if inside]) == "shop.add(qty=6)</s>"
    )
    assert ids == [*tokenizer("buy six eggs\nshop.add(qty=6)")["input_ids"], 2]


def test_weights_of_a_batch() -> None:
    a = training.Tokens([1, 5, 6, 2], [False, False, True, True])
    b = training.join([training.Tokens([1, 7], [False, True])] * 3)
    batch = training.collate([a, b], 0, prompt_weight=0.25)
    assert batch.ids.tolist() == [[1, 5, 6, 2, 0, 0], [1, 7, 1, 7, 1, 7]]
    assert batch.weights.tolist() == [[0, 0.25, 1, 1, 0, 0], [0, 1, 0.25, 1, 0.25, 1]]


def test_padding_changes_no_loss(tokenizer) -> None:
    model = models.load(NANO, torch.float32)
    texts = [training.tokenize(tokenizer, e) for e in USER.examples]
    with torch.inference_mode():
        together = training.token_losses(model, training.collate(texts, 0, 0.0))
        for i, text in enumerate(texts):
            alone = training.token_losses(model, training.collate([text], 0, 0.0))[0]
            torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_epochs_show_every_text_before_any_again() -> None:
    texts = [training.Tokens([i], [True]) for i in range(10)]
    batches = list(itertools.islice(training.epochs(texts, 4, seed=3), 5))
    seen = [text.ids[0] for batch in batches for text in batch]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert list(itertools.islice(training.epochs(texts, 4, seed=3), 5)) == batches


def test_the_rate_warms_up_and_decays() -> None:
    options = training.Options(steps=100, learning_rate=1.0, warmup=10)
    rates = [training.rate(step, options) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(training.FINAL_RATE, abs=1e-3)


# Training


def run(steps: int) -> tuple[list[float], dict[str, object]]:
    model, batches = tiny(), requests(Draws("test"), pa.DOMAINS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(NANO)
    tokens = ([training.tokenize(tokenizer, e) for exchanges in batch[:8] for e in exchanges] for batch in batches)
    options = training.Options(steps, 1e-2, warmup=5, prompt_weight=0.2, threads=1)
    told: list[int] = []
    losses = training.train(model, tokens, options, pad_id=0, on_step=lambda step, loss: told.append(step))
    assert told == list(range(1, steps + 1))
    return losses, model.state_dict()


def test_training_learns_and_repeats_itself() -> None:
    losses, weights = run(30)
    assert losses[0] == pytest.approx(np.log(640), abs=0.5)
    assert losses[-1] < losses[0] - 1
    again, weights_again = run(30)
    assert losses == again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_pretraining_writes_a_model_folder(tmp_path) -> None:
    losses = pretrain("nano", tmp_path / "m", steps=2, threads=1)
    assert len(losses) == 2
    models.load(tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted(path.name for path in NANO.iterdir())
    with pytest.raises(OutputError):
        pretrain("nano", tmp_path / "m", steps=2)


def test_conversations_are_of_one_user() -> None:
    batches = list(itertools.islice(requests(Draws("conversations"), pa.DOMAINS), 8))
    assert [max(map(len, batch)) for batch in batches[:7]] == [1] * 7
    for conversation in batches[7]:
        assert 2 <= len(conversation) <= 10
        assert len({e.convention for e in conversation}) == 1
        assert len({e.domain for e in conversation}) <= 3


# LoRA


def test_a_lora_learns(lora) -> None:
    assert np.mean(lora.losses[-3:]) < 0.7 * lora.losses[0]


def test_peft_loads_what_was_written(lora, tokenizer) -> None:
    """Logits through PEFT are those of W + (alpha / r) B A, from the tensors in the file."""
    batch = training.collate([training.tokenize(tokenizer, e) for e in USER.queries[:8]], 0, 0.0)
    base = models.load(NANO, torch.float32)
    tensors = needs.module("safetensors.torch").load_file(lora.path / "adapter_model.safetensors")
    merged = models.load(NANO, torch.float32)
    state = merged.state_dict()
    for name, a in tensors.items():
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            state[module] += 8 / 4 * tensors[name.replace("lora_A", "lora_B")] @ a
    adapted = peft.PeftModel.from_pretrained(base, lora.path).eval()
    with torch.inference_mode():
        through_peft = adapted(input_ids=batch.ids).logits
        torch.testing.assert_close(through_peft, merged(input_ids=batch.ids).logits, atol=1e-4, rtol=1e-4)
    assert len(tensors) == 2 * 7 * 4


def test_a_lora_is_bound_to_its_base_and_names_no_path(lora) -> None:
    with needs.module("safetensors").safe_open(lora.path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base_fingerprint"] == training.base_fingerprint(NANO)
    configuration = json.loads((lora.path / "adapter_config.json").read_text())
    assert configuration["base_model_name_or_path"] == "nano"
    assert sorted(path.name for path in lora.path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_exporter_reads_it(lora) -> None:
    adapter = needs.module("crayon_export.lora").PeftAdapter.open(lora.path)
    assert len(adapter.targets) == 7 * 4
    assert {(target.rank, target.scale) for target in adapter.targets.values()} == {(4, 2.0)}
    assert adapter.base_fingerprint == training.base_fingerprint(NANO)


def test_a_lora_is_the_same_again(lora, tmp_path) -> None:
    training.train_lora(
        NANO, pa.more_examples(USER, 64), tmp_path / "alice", rank=4, steps=12, batch_size=16, threads=1
    )
    file = "adapter_model.safetensors"
    assert (tmp_path / "alice" / file).read_bytes() == (lora.path / file).read_bytes()


def test_bad_requests_leave_nothing(lora, tmp_path) -> None:
    with pytest.raises(InvalidInput, match="no texts"):
        training.train_lora(NANO, [], tmp_path / "x", steps=1)
    with pytest.raises(OutputError):
        training.train_lora(NANO, USER.examples, lora.path, steps=1)
    assert list(tmp_path.iterdir()) == []
