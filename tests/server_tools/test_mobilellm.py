"""MobileLLM's classes. Judges: plain LlamaForCausalLM, recomputation without a cache, and a few lines of torch for the released cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from crayon_runtime.errors import CheckpointError, InvalidInput, UnsupportedModel
from crayon_server import models
from crayon_server.cli import model as cli_model
from tests.support import needs

torch = needs.module("torch")
transformers = needs.module("transformers")

from crayon_server.models import mobilellm  # noqa: E402 - it needs torch
from crayon_server.models.mobilellm import MobileLLMConfig, MobileLLMForCausalLM  # noqa: E402

SIZES = {"125m": 124.64, "350m": 345.36, "600m": 603.19, "1b": 1005.5, "1.5b": 1511.2}
RELEASED = {
    "architectures": ["MobileLLMForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
        "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_sharing": False,
    "max_position_embeddings": 2048,
    "model_type": "mobilellm",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "share_embedding": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": 97,
}
"""The fields of facebook/MobileLLM-125M's config.json, of a smaller model."""


def small(**changes: Any) -> MobileLLMConfig:
    shape = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.3,
    }  # fmt: skip
    return MobileLLMConfig(**shape | changes)


def model_of(configuration: MobileLLMConfig, seed: int = 0) -> MobileLLMForCausalLM:
    torch.manual_seed(seed)
    return MobileLLMForCausalLM(configuration).eval()


def some_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def step_by_step(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of all positions: the prompt in one go, then one token after the other with a cache."""
    with torch.no_grad():
        out = model(ids[:, :prompt], use_cache=True)
        pieces = [out.logits]
        for i in range(prompt, ids.shape[1]):
            pieces.append(model(ids[:, i : i + 1], past_key_values=out.past_key_values).logits)
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("family", ["mobilellm", "mobilellm-ls"])
@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(family: str, size: str) -> None:
    configuration = models.config(f"{family}-{size}")
    with torch.device("meta"):
        model = MobileLLMForCausalLM(configuration)
    assert model.num_parameters() / 1e6 == pytest.approx(SIZES[size], rel=1e-4)
    assert (configuration.head_dim, configuration.vocab_size, configuration.rms_norm_eps) == (64, 32000, 1e-5)
    assert configuration.rope_parameters == {"rope_theta": 1e4, "rope_type": "default"}
    assert configuration.layer_repeats == (2 if family == "mobilellm-ls" else 1)
    assert configuration.tie_word_embeddings


def test_any_vocabulary() -> None:
    assert models.config("mobilellm-125m", vocab_size=640).vocab_size == 640
    with pytest.raises(InvalidInput, match="a vocabulary of 2 tokens"):
        models.config("mobilellm-125m", vocab_size=2)
    with pytest.raises(InvalidInput, match="no architecture 'mobilellm-7b'"):
        models.config("mobilellm-7b")


@pytest.mark.parametrize("size", SIZES)
def test_without_repeats_it_is_a_llama(size: str) -> None:
    """At a quarter of the heads and two layers of each shape, and at 125M at all of them."""
    configuration = models.config(f"mobilellm-{size}", vocab_size=500)
    if size != "125m":
        groups = configuration.num_attention_heads // configuration.num_key_value_heads
        configuration = MobileLLMConfig(
            vocab_size=500, num_hidden_layers=2, head_dim=64, num_attention_heads=groups, num_key_value_heads=1,
            hidden_size=64 * groups, intermediate_size=configuration.intermediate_size // 4, initializer_range=0.1,
        )  # fmt: skip
    model = model_of(configuration)
    judge = transformers.LlamaForCausalLM(transformers.LlamaConfig(**configuration.to_llama())).eval()
    judge.load_state_dict(model.state_dict())
    ids = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(2))
    assert (logits(model, ids) - logits(judge, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeats_are_those_of_a_deeper_llama_with_the_same_weights(repeats: int) -> None:
    model = model_of(small(layer_repeats=repeats))
    deep = small(num_hidden_layers=3 * repeats).to_llama()
    judge = transformers.LlamaForCausalLM(transformers.LlamaConfig(**deep)).eval()
    weights = dict(model.state_dict())
    for name, weight in model.state_dict().items():
        if name.startswith("model.layers."):
            block, rest = name.removeprefix("model.layers.").split(".", 1)
            weights |= {f"model.layers.{int(block) * repeats + i}.{rest}": weight for i in range(repeats)}
    judge.load_state_dict(weights)
    ids = some_ids(2, 20)
    assert (logits(model, ids) - logits(judge, ids)).abs().max() <= 1e-4  # of logits up to 8
    with torch.no_grad():
        hidden = [m(ids, output_hidden_states=True).hidden_states for m in (model, judge)]
    assert len(hidden[0]) == 4
    for mine, theirs in zip(hidden[0], hidden[1][::repeats], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_a_cache_changes_nothing(repeats: int) -> None:
    model = model_of(small(layer_repeats=repeats))
    ids = some_ids(2, 14)
    torch.testing.assert_close(step_by_step(model, ids, 6), logits(model, ids, use_cache=False), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert [layer.get_seq_length() for layer in cache.layers] == [14] * (3 * repeats)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_a_cache_and_without(cache: str) -> None:
    model = model_of(small(layer_repeats=2, pad_token_id=0))
    ids = some_ids(2, 9)
    ids[0, :3] = 0  # padding
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **options)
    assert (model.generate(ids, cache_implementation=cache, disable_compile=True, **options) == expected).all()


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = model_of(small(layer_repeats=2)).train()
    ids = some_ids(2, 12)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.activation_checkpointing_enable()
    for expected, got in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_folder_holds_each_block_once(tmp_path: Path) -> None:
    model = model_of(small(layer_repeats=2))
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model.safetensors")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small().to_llama()))
    assert stored.keys() == llama.state_dict().keys() - {"lm_head.weight"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is MobileLLMForCausalLM
    assert loaded.config.layer_repeats == 2
    ids = some_ids(1, 10)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    with torch.no_grad():
        bare = transformers.AutoModel.from_pretrained(tmp_path).eval()(ids).last_hidden_state
        assert torch.equal(bare @ model.lm_head.weight.T, logits(model, ids))


@pytest.mark.parametrize("repeats", [2, 3])
@pytest.mark.parametrize("prompt", [1, 7])
def test_the_released_cache(repeats: int, prompt: int) -> None:
    """One slot for all passes of a block, and torch's causal mask, which is aligned to the first keys in it."""
    # Passes over keys that are not theirs amplify rounding, differently on each kind of CPU, and so much less in float64.
    model = model_of(small(layer_repeats=repeats, kv_sharing="released")).double()
    ids = some_ids(1, 12)
    got = step_by_step(model, ids, prompt)
    torch.testing.assert_close(got, _released(model, ids, prompt), atol=1e-4, rtol=1e-4)
    assert (got - logits(model, ids, use_cache=False)).abs().max() > 0.1
    with torch.no_grad():
        generated = model.generate(ids[:, :prompt], max_new_tokens=5, do_sample=False, eos_token_id=None)
    best = _released(model, generated[:, :-1], prompt)[0, prompt - 1 :].argmax(-1)
    assert generated[0, prompt:].tolist() == best.tolist()


def _released(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits [1, T, vocabulary] as the released code computes them."""
    c, state = model.config, model.state_dict()
    slots: list[list[torch.Tensor]] = [[] for _ in range(2 * c.num_hidden_layers)]  # keys, values of each block
    pieces = [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]
    return torch.cat([_released_step(c, state, ids[0, start:end], start, slots) for start, end in pieces])[None]


def _released_step(c: Any, state: Any, ids: torch.Tensor, start: int, slots: list[list[torch.Tensor]]) -> torch.Tensor:
    nn = torch.nn.functional

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).rsqrt() * state[f"{name}.weight"]

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [heads, T, size]
        frequencies = 1e4 ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        angles = torch.arange(start, start + len(ids))[:, None] * frequencies
        first, second = x.chunk(2, -1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )

    x = state["model.embed_tokens.weight"][ids]
    for block in range(c.num_hidden_layers):
        name = f"model.layers.{block}"
        for _ in range(c.layer_repeats):
            h = norm(x, f"{name}.input_layernorm")
            q, k, v = (
                nn.linear(h, state[f"{name}.self_attn.{p}_proj.weight"]).unflatten(1, (-1, c.head_dim)).transpose(0, 1)
                for p in "qkv"
            )
            slots[2 * block].append(rotate(k))
            slots[2 * block + 1].append(v)
            groups = c.num_attention_heads // c.num_key_value_heads
            keys, values = (torch.cat(slots[2 * block + i], 1).repeat_interleave(groups, 0) for i in range(2))
            attended = nn.scaled_dot_product_attention(rotate(q), keys, values, is_causal=len(ids) > 1)
            x = x + nn.linear(attended.transpose(0, 1).flatten(1), state[f"{name}.self_attn.o_proj.weight"])
            h = norm(x, f"{name}.post_attention_layernorm")
            gate, up = (nn.linear(h, state[f"{name}.mlp.{p}_proj.weight"]) for p in ("gate", "up"))
            x = x + nn.linear(nn.silu(gate) * up, state[f"{name}.mlp.down_proj.weight"])
    return norm(x, "model.norm") @ state["model.embed_tokens.weight"].T


@pytest.mark.parametrize("case", ["padding", "pieces", "eager"])
def test_what_the_released_cache_cannot_do_is_refused(case: str) -> None:
    model = model_of(small(layer_repeats=2, kv_sharing="released"))
    ids, mask = some_ids(1, 8), torch.ones(1, 8, dtype=torch.long)
    past = None
    if case == "padding":
        mask[0, :2] = 0
    elif case == "eager":
        model.set_attn_implementation("eager")
    else:
        with torch.no_grad():
            past = model(ids, use_cache=True).past_key_values
        mask = None
    with pytest.raises(InvalidInput, match="neither padding"):
        model(ids, attention_mask=mask, past_key_values=past, use_cache=True)


@pytest.mark.parametrize(
    "changes, tied, repeats",
    [
        ({}, True, 1),
        ({"layer_sharing": True}, True, 2),
        ({"share_embedding": False}, False, 1),
        ({"share_embedding": False, "tie_word_embeddings": True}, True, 1),
    ],
)
def test_a_released_checkpoint(changes: dict[str, Any], tied: bool, repeats: int, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tmp_path / "released"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(RELEASED | changes))
    (source / "tokenizer.model").write_bytes(b"sentencepiece")
    judge = model_of(small(layer_repeats=repeats, tie_word_embeddings=tied))
    weights = {name: weight.half() for name, weight in judge.state_dict().items()}
    judge.load_state_dict(weights)
    if tied:
        del weights["lm_head.weight"]  # the released code has no output layer then
    save_file(weights, source / "model.safetensors", {"format": "pt"})

    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    assert (loaded.config.tie_word_embeddings, loaded.config.layer_repeats) == (tied, repeats)
    ids = some_ids(2, 11)
    assert torch.equal(logits(loaded, ids), logits(judge, ids))

    mobilellm.convert(source, tmp_path / "ours", "mobilellm")
    mobilellm.convert(tmp_path / "ours", tmp_path / "again", "released")
    written = json.loads((tmp_path / "again/config.json").read_text())
    expected = RELEASED | changes | {"tie_word_embeddings": False, "share_embedding": tied}
    ignored = {"torch_dtype", "transformers_version"}
    assert {k: written[k] for k in expected.keys() - ignored} == {k: v for k, v in expected.items() if k not in ignored}
    assert not {"layer_repeats", "kv_sharing", "rope_parameters"} & written.keys()
    assert (tmp_path / "again/tokenizer.model").read_bytes() == b"sentencepiece"
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "again/model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in weights)

    if repeats > 1:
        with pytest.raises(UnsupportedModel, match="LLaMA computes each block once, this model 2 times"):
            mobilellm.convert(source, tmp_path / "llama", "llama")
        return
    done = CliRunner().invoke(
        cli_model.model, ["convert", str(source), "--to", "llama", "--out", str(tmp_path / "llama")]
    )
    assert done.output.strip() == str(tmp_path / "llama")
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32).eval()
    assert type(llama) is transformers.LlamaForCausalLM
    assert (logits(llama, ids) - logits(judge, ids)).abs().max() <= 1e-5


def test_a_pool_embeds_with_the_tap_of_shared_layers() -> None:
    """The states that hooks catch are those that transformers returns."""
    from crayon_server.pool import indicators

    model = model_of(small(layer_repeats=2))
    ids = some_ids(1, 9)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states
    for layer in range(4):
        with torch.no_grad(), indicators._tapped(model, layer) as states:
            model(input_ids=ids, use_cache=False)
        assert len(states) == 1
        assert torch.equal(states[0], expected[layer])


def test_every_loader_knows_the_model_type(tmp_path: Path) -> None:
    """In a process that has not imported the classes."""
    from crayon_server.models import tokenizer

    model_of(small(layer_repeats=2, vocab_size=tokenizer.VOCAB_SIZE)).save_pretrained(tmp_path)
    tokenizer.write(tokenizer.learn(), tmp_path)
    code = (
        "import sys; from pathlib import Path; from crayon_server.evaluate.float_model import FloatModel;"
        "print(type(FloatModel(Path(sys.argv[1])).model).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "MobileLLMForCausalLM"


def test_layouts_that_cannot_be_written(tmp_path: Path) -> None:
    model_of(small(layer_repeats=3)).save_pretrained(tmp_path / "m")
    with pytest.raises(UnsupportedModel, match="once or twice, not 3 times"):
        mobilellm.convert(tmp_path / "m", tmp_path / "out", "released")
    with pytest.raises(InvalidInput, match="no layout 'gguf'"):
        mobilellm.convert(tmp_path / "m", tmp_path / "out", "gguf")
    with pytest.raises(CheckpointError, match="there is no config.json"):
        mobilellm.convert(tmp_path / "absent", tmp_path / "out", "llama")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match="model.layers.3"):
        mobilellm.convert(tmp_path / "m", tmp_path / "out", "mobilellm")
    (tmp_path / "m/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        mobilellm.convert(tmp_path / "m", tmp_path / "out", "mobilellm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"layer_repeats": 0}, {"kv_sharing": "wrong"}, {"layer_repeats": 1.5}])
def test_a_configuration_that_makes_no_sense(change: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=next(iter(change))):
        small(**change)


def test_create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the shape of a smaller model in the place of 125M's."""
    monkeypatch.setitem(models._MOBILELLM, "125m", models._Shape(2, 64, 4, 2, 96, 16))

    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(cli_model.model, ["create", *(str(argument) for argument in arguments)])

    result = invoke("mobilellm-ls-125m", "--out", tmp_path / "bare")
    assert result.exit_code == 0, result.output
    assert "it has no tokenizer" in result.stderr
    files = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == files
    config = json.loads((tmp_path / "bare/config.json").read_text())
    assert (config["model_type"], config["layer_repeats"], config["vocab_size"]) == ("mobilellm", 2, 32000)

    result = invoke("mobilellm-125m", "--out", tmp_path / "m", "--tokenizer", models.load_nano())
    assert result.exit_code == 0, result.output
    assert (tmp_path / "m/tokenizer.json").exists()
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [0, 1, 2]
    assert config["vocab_size"] == 640

    for arguments, message in [
        (("--tokenizer", models.load_nano(), "--vocab-size", 100), "vocabulary ends at 99"),
        (("--tokenizer", tmp_path), "neither tokenizer.json nor tokenizer.model"),
        (("--pretrained",), "no weights of mobilellm-125m are shipped"),
    ]:
        error = invoke("mobilellm-125m", "--out", tmp_path / "x", *arguments).exception
        assert isinstance(error, (InvalidInput, CheckpointError))
        assert message in str(error)
    for arguments, message in [
        (("--pretrained", "--tokenizer", models.load_nano()), "a tokenizer of their own"),
        (("--vocab-size", 700), "the vocabulary of nano is its tokenizer's"),
    ]:
        assert message in str(invoke("nano", "--out", tmp_path / "x", *arguments).exception)
    assert not (tmp_path / "x").exists()
    assert (
        invoke("nano", "--out", tmp_path / "n", "--tokenizer", models.load_nano(), "--vocab-size", 700).exit_code == 0
    )
    error = CliRunner().invoke(cli_model.model, ["train", "mobilellm-125m", "--out", str(tmp_path / "x")]).exception
    assert "no embedded model" in str(error)
