"""Judges: transformers for logits and hidden states, peft for adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from crayon_export import adapters as adapter_export
from crayon_export.checkpoint import Checkpoint, fingerprint
from crayon_export.exporter import export
from crayon_export.quantize import Blockwise
from crayon_runtime import backends, golden
from crayon_runtime.bundle import Bundle
from crayon_runtime.errors import AdapterError, CheckpointError, InvalidInput, OutputError, UnsupportedModel
from tests.export.models import tiny_adapter, tiny_llama, tiny_tokenizer
from tests.support import needs

IDS = np.array([1, 17, 300, 45, 45, 201, 9, 260, 33, 110], np.int64)
PROMPT = 6
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return tiny_tokenizer(tiny_llama(folder))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileLLM-LS: each of its two blocks is computed twice."""
    folder = tmp_path_factory.mktemp("shared") / "tiny-ls"
    return tiny_tokenizer(tiny_llama(folder, family="mobilellm", layer_repeats=2))


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(model, tmp_path_factory.mktemp("adapters") / "alice", target_modules=EVERY_LINEAR)


def _run(bundle: Bundle, adapter: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits after the prompt and after each further token, and the taps of all tokens summed."""
    backend = backends.load(bundle)
    cache = backend.new_cache(backend.read_adapter(bundle.adapter(adapter)) if adapter else None)
    step = cache.prefill(IDS[:PROMPT])
    logits, taps = [step.logits.copy()], step.tap_sum.copy()
    for token in IDS[PROMPT:]:
        step = cache.decode(int(token))
        logits.append(step.logits.copy())
        taps += step.tap_sum
    cache.close()
    backend.close()
    return np.stack(logits), taps


def _judge(model: Any, tap_layer: int = -1) -> tuple[np.ndarray, np.ndarray]:
    torch = needs.module("torch")
    with torch.no_grad():
        out = model(torch.from_numpy(IDS)[None], output_hidden_states=True)
    return out.logits[0, PROMPT - 1 :].float().numpy(), out.hidden_states[tap_layer][0].float().sum(0).numpy()


def _transformers(folder: Path) -> Any:
    torch = needs.module("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    assert np.abs(got - expected).max() <= tolerance
    assert (got.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
        {"head_dim": 24, "num_key_value_heads": 1},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"intermediate_size": 172, "hidden_size": 72, "head_dim": 32},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"family": "mistral", "sliding_window": None},
        {"num_hidden_layers": 3, "shard_size": "60KB"},
        {"family": "mobilellm"},
        {"family": "mobilellm", "layer_repeats": 2},
        {"family": "mobilellm", "layer_repeats": 3, "head_dim": 8, "tie_word_embeddings": False},
    ],
    ids=[
        "gqa", "head-8", "head-24-mqa", "mha-tied", "odd-widths", "llama3-rope", "linear-rope", "mistral", "shards", "mobilellm", "ls",
        "three-repeats",
    ],
)  # fmt: skip
def test_float32_logits_and_taps_are_those_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_tokenizer(tiny_llama(tmp_path / "model", **config))
    bundle = export(folder, tmp_path / "bundle", quantize="none").bundle
    logits, taps = _run(bundle)
    expected_logits, expected_taps = _judge(_transformers(folder))
    _assert_close(logits, expected_logits)
    np.testing.assert_allclose(taps, expected_taps, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoints(dtype: str, tmp_path: Path) -> None:
    torch = needs.module("torch")
    folder = tiny_tokenizer(tiny_llama(tmp_path / "model", dtype=getattr(torch, dtype)))
    bundle = export(folder, tmp_path / "bundle", quantize="none").bundle
    _assert_close(_run(bundle)[0], _judge(_transformers(folder))[0])


@pytest.mark.parametrize("tap_layer", [0, 1, 2])
def test_the_tap_may_be_any_hidden_state(model: Path, tap_layer: int, tmp_path: Path) -> None:
    bundle = export(model, tmp_path / "bundle", quantize="none", tap_layer=tap_layer).bundle
    assert bundle.model.tap.layer == tap_layer
    np.testing.assert_allclose(_run(bundle)[1], _judge(_transformers(model), tap_layer)[1], atol=1e-4)


@pytest.mark.parametrize("tap_layer", [0, 1, 2])
def test_the_tap_counts_blocks_and_not_their_passes(shared: Path, tap_layer: int, tmp_path: Path) -> None:
    bundle = export(shared, tmp_path / "bundle", quantize="none", tap_layer=tap_layer).bundle
    np.testing.assert_allclose(_run(bundle)[1], _judge(_transformers(shared), tap_layer)[1], atol=1e-4)


def test_the_passes_of_a_block_share_its_adapter(shared: Path, tmp_path: Path) -> None:
    needs.module("peft")
    from peft import PeftModel

    folder = tiny_adapter(shared, tmp_path / "alice", target_modules=EVERY_LINEAR)
    bundle = export(shared, tmp_path / "bundle", quantize="none", adapters=[folder]).bundle
    base = _transformers(shared)
    expected_base = _judge(base)[0]
    expected = _judge(PeftModel.from_pretrained(base, folder).eval())[0]
    assert np.abs(expected - expected_base).max() > 0.1
    _assert_close(_run(bundle, "alice")[0], expected)
    _assert_close(_run(bundle)[0], expected_base)
    merged = export(shared, tmp_path / "merged", quantize="none", adapters=[folder], merge=True).bundle
    _assert_close(_run(merged)[0], expected)


@pytest.mark.parametrize("quantize", ["int4", "int8", "none"])
def test_the_backend_replays_the_golden_cases_of_shared_layers(shared: Path, quantize: str, tmp_path: Path) -> None:
    adapter = tiny_adapter(shared, tmp_path / "alice", target_modules=EVERY_LINEAR)
    bundle = export(shared, tmp_path / "bundle", quantize=quantize, kv_dtype="fp16", adapters=[adapter]).bundle
    assert bundle.model.architecture.layer_repeats == 2
    results = golden.replay(bundle)
    assert all(r.passed for r in results), results
    assert max(r.logit_error for r in results) < results[0].tolerance.logits / 2


def test_the_memory_of_shared_layers_is_that_of_the_blocks_once(shared: Path, tmp_path: Path) -> None:
    plain = tiny_tokenizer(tiny_llama(tmp_path / "plain", family="mobilellm"))
    done = export(shared, tmp_path / "shared.bundle"), export(plain, tmp_path / "plain.bundle")
    with_repeats, without = (x.bundle.file("model.onnx.data").read_bytes() for x in done)
    assert with_repeats == without  # of the same seed
    assert [t.name for t in done[0].report.tensors] == [t.name for t in done[1].report.tensors]
    assert done[0].bundle.model.base_fingerprint != done[1].bundle.model.base_fingerprint
    assert _run(done[0].bundle)[0].argmax(-1).tolist() != _run(done[1].bundle)[0].argmax(-1).tolist()


def test_the_released_fields_mean_the_same(shared: Path, tmp_path: Path) -> None:
    from crayon_server.models.mobilellm import convert

    convert(shared, tmp_path / "released", "released")
    tiny_tokenizer(tmp_path / "released")
    ours, theirs = (
        export(folder, tmp_path / f"{i}.bundle").bundle for i, folder in enumerate((shared, tmp_path / "released"))
    )
    assert ours.model.architecture == theirs.model.architecture
    assert ours.file("model.onnx").read_bytes() == theirs.file("model.onnx").read_bytes()


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": EVERY_LINEAR},
        {"target_modules": ["v_proj"], "r": 2, "lora_alpha": 5},
        {"target_modules": EVERY_LINEAR, "use_rslora": True},
        {
            "target_modules": EVERY_LINEAR,
            "rank_pattern": {"q_proj": 8, "down_proj": 1},
            "alpha_pattern": {"q_proj": 1, "up_proj": 32},
        },
    ],
    ids=["all", "subset", "rslora", "patterns"],
)
@pytest.mark.parametrize("merge", [False, True], ids=["attached", "merged"])
def test_adapters_are_those_of_peft(model: Path, lora: dict[str, Any], merge: bool, tmp_path: Path) -> None:
    needs.module("peft")
    from peft import PeftModel

    folder = tiny_adapter(model, tmp_path / "alice", **lora)
    bundle = export(model, tmp_path / "bundle", quantize="none", adapters=[folder], merge=merge).bundle
    base = _transformers(model)
    expected_base = _judge(base)[0]
    expected, expected_taps = _judge(PeftModel.from_pretrained(base, folder).eval())
    assert np.abs(expected - expected_base).max() > 0.1  # the adapter does something

    logits, taps = _run(bundle, None if merge else "alice")
    _assert_close(logits, expected)
    np.testing.assert_allclose(taps, expected_taps, atol=1e-4)
    if merge:
        assert [m.name for m in bundle.model.merged] == ["alice"]
        assert bundle.model.adapter_slots is None
    else:
        _assert_close(_run(bundle)[0], expected_base)


@pytest.mark.parametrize("quantize", ["int4", "int8"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_golden_logits_are_those_of_transformers_with_the_dequantized_weights(
    model: Path, quantize: str, group_size: int, tmp_path: Path
) -> None:
    torch = needs.module("torch")
    bundle = export(model, tmp_path / "bundle", quantize=quantize, group_size=group_size).bundle
    judge = _transformers(model)
    blockwise = Blockwise({"int4": 4, "int8": 8}[quantize], group_size)
    with torch.no_grad():
        for name, weight in judge.named_parameters():
            if "proj" in name or name == "lm_head.weight":
                w = weight.numpy()
                weight.copy_(torch.from_numpy(blockwise.dequantize(blockwise.quantize(w), w.shape[1])))
            elif "embed" in name:
                weight.copy_(weight.half().float())
        cases, arrays = golden.read(bundle)
        for case in cases.cases:
            out = judge(torch.tensor(case.ids)[None], output_hidden_states=True)
            _assert_close(arrays[f"{case.name}.logits"], out.logits[0, case.steps].numpy())
            hidden = out.hidden_states[-1][0].numpy()
            means = np.stack([hidden[: case.prompt_length].mean(0), hidden[case.prompt_length :].mean(0)])
            np.testing.assert_allclose(arrays[f"{case.name}.taps"], means, atol=1e-4)
            assert max(case.kl_to_float) > 0


@pytest.mark.parametrize(
    "quantize, group_size, form",
    [
        ("int4", 32, Blockwise(8, 32)),
        ("int4", 128, Blockwise(8, 64)),
        ("int8", 64, Blockwise(8, 64)),
        ("none", None, None),
    ],
)
def test_an_embedding_that_is_the_head_is_stored_once(
    quantize: str, group_size: int | None, form: Blockwise | None, tmp_path: Path
) -> None:
    torch = needs.module("torch")
    folder = tiny_tokenizer(tiny_llama(tmp_path / "model", tie_word_embeddings=True))
    done = export(folder, tmp_path / "bundle", quantize=quantize, group_size=group_size)
    judge = _transformers(folder)
    embedding = judge.get_input_embeddings().weight.detach()
    source = embedding.numpy().copy()
    whole = source if form is None else form.quantize(source).codes
    assert done.bundle.read("model.onnx.data").count(whole.tobytes()) == 1
    stored = {t.name: (t.stored_as, t.group_size, t.bytes) for t in done.report.tensors}
    name, size, nbytes = ("int8", form.group_size, form.nbytes(*source.shape)) if form else ("fp32", 0, source.nbytes)
    assert stored["model.embed_tokens.weight"] == (name, size, nbytes)
    assert stored["lm_head.weight"] == (name, size, 0)
    if form is not None:
        assert done.bundle.model.quantization.embedding == "int8"
        blockwise = Blockwise.named(quantize, group_size)
        assert blockwise
        embedding.copy_(torch.from_numpy(form.dequantize(form.quantize(source), source.shape[1])))
        for weight in (w.detach() for n, w in judge.named_parameters() if "proj" in n):
            w = weight.numpy()
            weight.copy_(torch.from_numpy(blockwise.dequantize(blockwise.quantize(w), w.shape[1])))
    cases, arrays = golden.read(done.bundle)
    for case in cases.cases:
        with torch.no_grad():
            out = judge(torch.tensor(case.ids)[None])
        _assert_close(arrays[f"{case.name}.logits"], out.logits[0, case.steps].numpy())
    assert all(r.passed for r in golden.replay(done.bundle))


def test_an_embedding_whose_width_no_group_divides_is_stored_apart_from_the_head(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tiny_llama(tmp_path / "model", hidden_size=72, head_dim=32, tie_word_embeddings=True))
    done = export(folder, tmp_path / "bundle")
    stored = {t.name: t.stored_as for t in done.report.tensors}
    assert (stored["model.embed_tokens.weight"], stored["lm_head.weight"]) == ("fp16", "int4")
    assert done.bundle.model.quantization.embedding == "fp16"
    assert all(r.passed for r in golden.replay(done.bundle))


@pytest.mark.parametrize("quantize", ["int4", "int8", "none"])
@pytest.mark.parametrize("kv_dtype", ["fp32", "fp16"])
def test_the_backend_replays_the_golden_cases(
    model: Path, adapter: Path, quantize: str, kv_dtype: str, tmp_path: Path
) -> None:
    bundle = export(model, tmp_path / "bundle", quantize=quantize, kv_dtype=kv_dtype, adapters=[adapter]).bundle
    results = golden.replay(bundle)
    assert [r.adapter for r in results] == [None, "alice"] * 4
    assert all(r.passed for r in results), results
    # The tolerance is not so wide that it says nothing: half of it would do.
    assert max(r.logit_error for r in results) < results[0].tolerance.logits / 2


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("Once upon a time there was a robot, who set an alarm for 7:30 and bought milk. " * 60)
    return file


@pytest.mark.parametrize("rounding, quantize", [("mse", "int4"), ("mse", "int8"), ("gptq", "int4"), ("gptq", "int8")])
def test_golden_cases_are_those_of_the_codes_however_they_were_found(
    model: Path, adapter: Path, texts: Path, rounding: str, quantize: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"quantize": quantize, "adapters": [adapter]}
    calibration = texts if rounding == "gptq" else None
    done = export(model, tmp_path / "bundle", rounding=rounding, calibration=calibration, **options)
    nearest = export(model, tmp_path / "nearest", **options)
    assert done.bundle.read("model.onnx.data") != nearest.bundle.read("model.onnx.data")
    results = golden.replay(done.bundle)
    assert all(r.passed for r in results), results
    assert max(r.logit_error for r in results) < results[0].tolerance.logits / 2
    assert done.report.rounding == rounding
    assert rounding.upper() in done.report.to_text()
    for tensor in done.report.tensors[1:]:
        assert (tensor.output_error is not None) == (rounding == "gptq"), tensor
        assert tensor.output_error is None or 0 < tensor.output_error < tensor.relative_error, tensor


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rounding": "up"}, "the rounding is 'up'"),
        ({"rounding": "mse", "quantize": "none"}, "--rounding mse with float32 weights"),
        ({"rounding": "gptq", "quantize": "none"}, "--rounding gptq with float32 weights"),
        ({"rounding": "gptq"}, "GPTQ needs texts"),
        ({"calibration": "texts.txt"}, "--rounding nearest uses no calibration texts"),
        ({"rounding": "gptq", "calibration": "no.txt"}, "cannot be read"),
        ({"rounding": "gptq", "calibration": "no.txt", "calibration_tokens": 9}, "9 calibration tokens are too few"),
    ],
)
def test_roundings_that_cannot_be_are_refused(
    model: Path, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=message) as error:
        export(model, tmp_path / "bundle", **options)
    assert error.value.do
    assert not list(tmp_path.iterdir())


def test_golden_cases_notice_other_weights(model: Path, tmp_path: Path) -> None:
    other = tiny_tokenizer(tiny_llama(tmp_path / "other", seed=7))
    right = export(model, tmp_path / "right").bundle
    wrong = export(other, tmp_path / "wrong").bundle
    for name in ("golden.json", "golden.safetensors"):
        (wrong.path / name).write_bytes((right.path / name).read_bytes())
    assert not any(r.passed for r in golden.replay(wrong))


def test_two_exports_are_equal_but_for_the_report(model: Path, adapter: Path, tmp_path: Path) -> None:
    manifests = [export(model, tmp_path / name, adapters=[adapter]).bundle.model for name in ("one", "two")]
    first, second = ({f.path: f.sha256 for f in m.files if f.path != "report.json"} for m in manifests)
    assert first == second


def test_the_fingerprint_is_that_of_a_full_pass(model: Path, tmp_path: Path) -> None:
    bundle = export(model, tmp_path / "bundle").bundle
    checkpoint = Checkpoint.open(model)
    assert bundle.model.base_fingerprint == fingerprint(checkpoint, bundle.model.architecture)


def test_a_later_adapter_fits_the_bundle_and_no_other(model: Path, adapter: Path, tmp_path: Path) -> None:
    bundle = export(model, tmp_path / "bundle", quantize="none").bundle
    shipped = export(model, tmp_path / "shipped", quantize="none", adapters=[adapter]).bundle
    converted = adapter_export.convert_adapter(adapter, bundle, tmp_path / "alice.adapter")
    file = "adapter.onnx_adapter"
    assert converted.file(file).read_bytes() == shipped.adapter("alice").file(file).read_bytes()

    other = export(tiny_tokenizer(tiny_llama(tmp_path / "other", seed=7)), tmp_path / "other.bundle").bundle
    backend = backends.load(other)
    with pytest.raises(AdapterError, match="made for another base"):
        backend.read_adapter(converted)
    merged = export(model, tmp_path / "merged", adapters=[adapter], merge=True).bundle
    with pytest.raises(AdapterError, match="no adapter slots"):
        adapter_export.convert_adapter(adapter, merged, tmp_path / "no")


def test_an_adapter_that_names_its_base_is_held_to_it(model: Path, adapter: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "alice"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"base_fingerprint": "0" * 64})
    for merge in (False, True):
        with pytest.raises(AdapterError, match="trained on another base"):
            export(model, tmp_path / "bundle", adapters=[folder], merge=merge)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alice"]


def test_the_report_says_how_every_tensor_is_stored(model: Path, tmp_path: Path) -> None:
    done = export(model, tmp_path / "bundle", group_size=32)
    by_name = {t.name: t for t in done.report.tensors}
    assert len(by_name) == 2 + 7 * 2  # embedding, head, and seven linears in each of two layers
    up = by_name["model.layers.1.mlp.up_proj.weight"]
    assert (up.stored_as, up.group_size) == ("int4", 32)
    assert 0.01 < up.relative_error < 0.2
    assert up.bytes == 96 * 64 // 2 + 96 * 2 * 4
    assert done.report.mean_kl > 0
    stored = json.loads(done.bundle.file("report.json").read_bytes())
    assert stored["tensors"][1]["name"] == "model.layers.0.self_attn.q_proj.weight"
    assert "down_proj x 2" in done.report.to_text()


def _set_weight(folder: Path, name: str, value: float) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_numbers(value: float, tmp_path: Path) -> None:
    folder = tiny_tokenizer(tiny_llama(tmp_path / "model"))
    _set_weight(folder, "model.layers.1.mlp.up_proj.weight", value)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        export(folder, tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_embedding_beyond_float16(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tiny_llama(tmp_path / "model"))
    _set_weight(folder, "model.embed_tokens.weight", 1e5)
    with pytest.raises(UnsupportedModel, match="beyond float16"):
        export(folder, tmp_path / "bundle")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"group_size": 48}, "group size 48"),
        ({"quantize": "int3"}, "int3"),
        ({"kv_dtype": "int8"}, "int8 KV cache"),
        ({"context_length": 0}, "context length is 0"),
        ({"context_length": 100000}, "more than the 256"),
        ({"tap_layer": 3}, "tap layer 3"),
        ({"backend": "coreml"}, "coreml"),
        ({"merge": True}, "exactly one adapter"),
    ],
)
def test_options_that_cannot_be(model: Path, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((InvalidInput, UnsupportedModel), match=message):
        export(model, tmp_path / "bundle", **options)
    assert not list(tmp_path.iterdir())


def test_an_existing_bundle_is_kept_unless_told_otherwise(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export(model, out)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(OutputError):
        export(model, out, group_size=64)
    assert (out / "manifest.json").read_bytes() == before
    export(model, out, group_size=64, replace=True)
    assert Bundle.open(out).model.quantization.group_size == 64


def test_a_full_disk_leaves_nothing(model: Path) -> None:
    with needs.tmpfs(64 * 1024) as disk:
        with pytest.raises(OutputError, match=r"space|full"):
            export(model, disk / "bundle")
        assert not list(disk.iterdir())


def test_an_interrupted_export_leaves_nothing(model: Path, tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / "bundle", on_bytes=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_no_bundle_and_the_next_one_succeeds(model: Path, tmp_path: Path) -> None:
    killed = _export_in_a_process_that_kills_itself(model, tmp_path / "bundle")
    assert killed == -9
    assert not (tmp_path / "bundle").exists()
    leftovers = list(tmp_path.iterdir())
    assert leftovers  # it was in the middle of something
    for leftover in leftovers:
        assert not (leftover / "manifest.json").exists()
    export(model, tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def _export_in_a_process_that_kills_itself(model: Path, out: Path) -> int:
    import subprocess
    import sys

    code = (
        "import os, signal, sys; from crayon_export.exporter import export; left = [6]\n"
        "def on_bytes(n):\n    left[0] -= 1\n    left[0] or os.kill(os.getpid(), signal.SIGKILL)\n"
        "export(sys.argv[1], sys.argv[2], on_bytes=on_bytes)"
    )
    return subprocess.run([sys.executable, "-c", code, str(model), str(out)], check=False).returncode


def test_progress_adds_up(model: Path, adapter: Path, tmp_path: Path) -> None:
    from crayon_export.plan import plan

    seen: list[int] = []
    tally: Callable[[int], None] = seen.append
    export(model, tmp_path / "bundle", adapters=[adapter], on_bytes=tally)
    assert sum(seen) == plan(model).weight_bytes


def test_the_plan_can_be_printed(model: Path, adapter: Path) -> None:
    from crayon_export.plan import plan

    described = plan(model, adapters=[adapter], merge=True).describe()
    assert described["merged"] == "alice"
    assert described["quantization"] == {"weights": "int4", "group_size": 32, "embedding": "fp16"}
    assert msgspec.json.encode(described)
