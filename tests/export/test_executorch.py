"""Judges: torchao for the quantized numbers, ExecuTorch's own runtime and its TextLLMRunner for the program, peft through the golden cases."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from crayon_export.adapters import convert_adapter
from crayon_export.architecture import linears
from crayon_export.executorch import programs as official
from crayon_export.executorch.quiet import quiet
from crayon_export.executorch.storage import PER_ROW, linear_form
from crayon_export.exporter import export
from crayon_export.plan import plan
from crayon_export.tensorfile import read_safetensors
from crayon_runtime import golden
from crayon_runtime.affine import Affine, bfloat16
from crayon_runtime.bundle import Bundle, BundleWriter
from crayon_runtime.errors import AdapterError, BackendError, InvalidInput, MissingExtra
from crayon_runtime.manifest import LINEARS, Variants
from tests import programs
from tests.export.models import tiny_adapter, tiny_llama, tiny_tokenizer
from tests.support import needs

LAYERS = 2


@pytest.fixture(name="made")
def _made() -> programs.Made:
    return programs.made()


def test_the_official_exporter_is_not_heard(made: programs.Made) -> None:
    assert made.stderr == ""


def test_the_bundle_serves_both_backends(made: programs.Made) -> None:
    model = made.bundle.model
    assert model.variants.onnx
    assert model.variants.executorch
    assert model.variants.executorch.program == "model.pte"
    assert model.variants.executorch.data == ["model.ptd"]
    assert model.quantization.embedding == "fp16"
    adapter = made.bundle.adapter("alice").as_adapter.variants
    assert adapter.onnx
    assert adapter.executorch
    assert adapter.executorch.dtype == "int8"
    assert not list(made.bundle.path.glob("*.tmp*"))


# The program


def _plans(program: Path) -> dict[str, Any]:
    serialize = needs.module("executorch.exir._serialize._program")
    return {plan.name: plan for plan in serialize.deserialize_pte_binary(program.read_bytes()).program.execution_plan}


def _names(data: Path) -> dict[str, int]:
    """Sizes of what a .ptd holds."""
    serialize = needs.module("executorch.extension.flat_tensor.serialize.serialize")
    cord = needs.module("executorch.exir._serialize._cord").Cord(data.read_bytes())
    payload = serialize.FlatTensorSerializer().deserialize(cord)
    return {name: len(payload.buffers[entry.buffer_index]) for name, entry in payload.named_data.items()}


def test_methods_and_constants(made: programs.Made) -> None:
    plans = _plans(made.bundle.file("model.pte"))
    context = made.bundle.model.context_length
    constants = [plan for name, plan in plans.items() if name.startswith("get_")]
    values = {plan.name: [plan.values[i].val.int_val for i in plan.outputs] for plan in constants}
    assert values == {
        "get_max_seq_len": [min(256, context)],
        "get_max_context_len": [context],
        "get_vocab_size": [320],
        "get_n_layers": [LAYERS],
        "get_tap_size": [64],
        "get_bos_id": [1],
        "get_eos_ids": [2],
    }
    steps = {name for name in plans if "forward" in name}
    assert steps == {"forward", "forward_tap"}
    assert len(plans["forward"].outputs) == 1
    assert len(plans["forward_tap"].outputs) == 3


def test_an_adapter_shares_cache_and_weights_with_its_base(made: programs.Made) -> None:
    base = _plans(made.bundle.file("model.pte"))["forward_tap"]
    folder = made.bundle.path / "adapters/alice"
    plans = _plans(folder / "adapter.pte")
    assert {name for name in plans if "forward" in name} == {
        "forward",
        "forward_tap",
        "lora_forward",
        "lora_forward_tap",
    }
    cache = 2 * LAYERS * 40 * made.bundle.model.context_length * 4
    for name in ("forward", "forward_tap", "lora_forward", "lora_forward_tap"):
        assert plans[name].non_const_buffer_sizes[2] == base.non_const_buffer_sizes[2] == cache
        assert _cache_places(plans[name]) == _cache_places(base)
    own, shared = _names(folder / "adapter.ptd"), _names(made.bundle.file("model.ptd"))
    assert not own.keys() & shared.keys()
    layers = linears(made.bundle.model.architecture)
    codes = sum(programs.SLOT_RANK * (x.in_features + x.out_features) for x in layers)
    scales = 4 * sum(programs.SLOT_RANK + x.out_features for x in layers)
    assert sum(own.values()) == codes + scales
    program = (folder / "adapter.pte").read_bytes()
    assert all(name.encode() in program for name in (*own, *shared))


def _cache_places(plan: Any) -> set[tuple[int, tuple[int, ...]]]:
    """Where the keys and values of a method lie in the memory that outlives a step."""
    tensors = (value.val for value in plan.values)
    planned = (
        t for t in tensors if getattr(t, "allocation_info", None) is not None and t.allocation_info.memory_id == 2
    )
    return {(t.allocation_info.memory_offset_low, tuple(t.sizes)) for t in planned}


def test_weights_are_stored_under_the_names_of_the_official_exporter(made: programs.Made) -> None:
    """XNNPACK finds a weight by the SHA-256 of its packed codes, so this is equality of every byte with our own rule."""
    names = _names(made.bundle.file("model.ptd"))
    tensors = read_safetensors(made.model / "model.safetensors").tensors
    modules = {x.module: x.in_features for x in linears(made.bundle.model.architecture)} | {"lm_head": 64}
    for module, width in modules.items():
        form = linear_form(width, Affine(4, programs.GROUP_SIZE))
        if form is None:
            assert hashlib.sha256(tensors[f"{module}.weight"].read().tobytes()).hexdigest() in names
            continue
        codes, scales = form.quantize(tensors[f"{module}.weight"].read())
        unsigned = (codes + 8).astype(np.uint8)
        packed = unsigned[:, 1::2] << 4 | unsigned[:, ::2]
        assert hashlib.sha256(packed.tobytes()).hexdigest() in names, module
        halves = (bfloat16(scales).view(np.uint32) >> 16).astype(np.uint16)
        assert f"scale_{hashlib.sha256(halves.tobytes()).hexdigest()}" in names, module


# What it computes


def test_golden_cases_of_both_backends(made: programs.Made) -> None:
    needs.native()
    for backend in ("onnx", "executorch"):
        results = golden.replay(made.bundle, backend=backend)
        assert {r.adapter for r in results} == {None, *programs.ADAPTERS}
        assert all(r.name.endswith("@executorch") == (backend == "executorch") for r in results)
        assert all(r.passed for r in results), [r for r in results if not r.passed]
        assert max(r.logit_error for r in results) < 0.1


def test_textllmrunner_and_the_official_runtime_agree(made: programs.Made) -> None:
    """In a process of its own: each of both runtimes registers operators, and neither can be unloaded."""
    needs.module("executorch")
    script = Path(__file__).with_name("official_runtimes.py")
    done = subprocess.run([sys.executable, script, made.bundle.path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["runner"].strip() == said["runtime"].strip()
    assert len(said["runtime"]) > 12
    assert said["largest_difference"] == 0


# The report


def test_the_report_says_how_each_layer_is_stored(made: programs.Made) -> None:
    stored = {
        t["name"].removesuffix(".weight").rpartition(".")[2]: (t["stored_as"], t["group_size"])
        for t in made.report["tensors"]
        if t["backend"] == "executorch"
    }
    assert stored == {
        "embed_tokens": ("int8", 0),
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("int4", 64)),
        "o_proj": ("fp32", 0),
        "down_proj": ("int4", 32),
        "lm_head": ("int4", 64),
    }
    expected = 2 * len(linears(made.bundle.model.architecture)) + 4
    assert len(made.report["tensors"]) == expected
    cases = {c["name"] for c in made.report["cases"]}
    assert {"1", "1-alice", "1@executorch", "1-alice@executorch"} <= cases


@pytest.mark.parametrize(
    "width, group, expected",
    [(128, 128, 128), (576, 128, 64), (960, 128, 64), (96, 128, 32), (256, 32, 32), (172, 32, None)],
)
def test_a_group_divides_the_width_or_the_layer_stays_float(width: int, group: int, expected: int | None) -> None:
    assert linear_form(width, Affine(4, group)) == (Affine(4, expected) if expected else None)
    assert linear_form(width, PER_ROW) == linear_form(width, Affine(4, group), tied_head=True) == PER_ROW
    assert linear_form(width, None) is linear_form(width, None, tied_head=True) is None


# The rule of quantization


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 64), (4, 128), (8, 0)])
def test_codes_and_scales_are_those_of_torchao(bits: int, group: int) -> None:
    torch = needs.module("torch")
    with quiet():
        torchao = needs.module("torchao.quantization")
        granularity = needs.module("torchao.quantization.granularity")
    weights = _awkward((48, 384))
    layer = torch.nn.Linear(384, 48, bias=False)
    layer.weight = torch.nn.Parameter(torch.from_numpy(weights))
    config = torchao.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        weight_granularity=granularity.PerGroup(group) if group else granularity.PerAxis(0),
    )
    torchao.quantize_(model := torch.nn.Sequential(layer), config)
    theirs = model[0].weight

    codes, scales = Affine(bits, group).quantize(weights)

    np.testing.assert_array_equal(codes, theirs.qdata.numpy())
    assert scales.tobytes() == theirs.scale.numpy().tobytes()
    if not group:
        np.testing.assert_array_equal(Affine(bits, group).dequantize(codes, scales), theirs.dequantize().numpy())


def test_scales_of_groups_are_rounded_as_bfloat16() -> None:
    torch = needs.module("torch")
    values = np.abs(_awkward((64, 64))) + np.float32(1e-30)
    np.testing.assert_array_equal(bfloat16(values), torch.from_numpy(values).bfloat16().float().numpy())
    weights = _awkward((4, 64))
    codes, scales = Affine(4, 32).quantize(weights)
    expected = codes.reshape(4, 2, 32) * bfloat16(scales)[..., None]
    np.testing.assert_array_equal(Affine(4, 32).dequantize(codes, scales), expected.reshape(4, 64))


def _awkward(shape: tuple[int, int]) -> np.ndarray:
    """Random rows, one of zeros, one all negative, ties, tiny and large ones."""
    weights = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weights[0] = 0
    weights[1] = -np.abs(weights[1])
    weights[2] = np.arange(shape[1]) % 15 - 7.5
    weights[3] *= 1e-12
    return weights


# An adapter that comes later


@pytest.fixture
def executorch_only(made: programs.Made, tmp_path: Path) -> Bundle:
    """The same bundle without what serves ONNX Runtime."""
    model = made.bundle.model
    with BundleWriter(tmp_path / "only") as writer:
        for file in model.files:
            if "onnx" not in file.path and not file.path.startswith("adapters/"):
                writer.add_file(file.path, made.bundle.file(file.path))
        variants = Variants(executorch=model.variants.executorch)
        writer.finish(msgspec.structs.replace(model, variants=variants, adapters=[]))
    return Bundle.open(tmp_path / "only")


def test_a_converted_adapter_is_the_one_that_an_export_makes(
    made: programs.Made, executorch_only: Bundle, tmp_path: Path
) -> None:
    later = convert_adapter(made.adapters[0], executorch_only, tmp_path / "later")
    assert later.as_adapter.variants.onnx is msgspec.UNSET
    inside = made.bundle.adapter("alice")
    for name in ("adapter.pte", "adapter.ptd"):
        assert later.read(name) == inside.read(name)
    assert later.as_adapter.variants.executorch == inside.as_adapter.variants.executorch


def test_converting_takes_neither_torch_nor_executorch(made: programs.Made, tmp_path: Path) -> None:
    program = """
        import sys
        sys.modules |= dict.fromkeys(("torch", "executorch", "torchao"))  # importing one fails
        from crayon_export.adapters import convert_adapter
        convert_adapter(*sys.argv[1:])
    """
    work = [str(made.adapters[1]), str(made.bundle.path), str(tmp_path / "bruno")]
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), *work], check=True)
    assert Bundle.open(tmp_path / "bruno").read("adapter.ptd") == made.bundle.adapter("bruno").read("adapter.ptd")


def test_an_adapter_of_another_base_is_refused(made: programs.Made, executorch_only: Bundle, tmp_path: Path) -> None:
    shutil.copytree(made.adapters[0], tmp_path / "alice")
    file = tmp_path / "alice/adapter_model.safetensors"
    save_file(load_file(file), file, {"base_fingerprint": "b" * 64})
    with pytest.raises(AdapterError, match="trained on another base"):
        convert_adapter(tmp_path / "alice", executorch_only, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_larger_rank_than_the_slots_is_refused(made: programs.Made, executorch_only: Bundle, tmp_path: Path) -> None:
    large = tiny_adapter(made.model, tmp_path / "large", r=programs.SLOT_RANK + 1)
    with pytest.raises(AdapterError, match="its rank is 9; the program for ExecuTorch has slots of rank 8") as refused:
        convert_adapter(large, executorch_only, tmp_path / "refused")
    assert "--slot-rank 9" in str(refused.value.do)
    assert not (tmp_path / "refused").exists()


# What is refused


@pytest.mark.parametrize(
    "options, says",
    [
        ({"kv_dtype": "fp16"}, "fp16 KV cache"),
        ({"quantize": "int8", "group_size": 32}, "one scale a row"),
        ({"group_size": 16}, "group size 16"),
        ({"group_size": 256}, "group size 256"),
        ({"backend": ["onnx", "executorch"], "kv_dtype": "int8"}, "int8 KV cache"),
        ({"backend": "tflite"}, "'tflite'"),
        ({"backend": []}, "at least one backend"),
        ({"backend": "onnx", "official": True}, "--official"),
        ({"backend": "onnx", "single_file": True}, "--single-file"),
        ({"backend": "onnx", "slot_rank": 4}, "--slot-rank"),
        ({"backend": "onnx", "slot_targets": ["q_proj"]}, "--slot-target"),
        ({"single_file": True, "slot_rank": 4}, "a program that has none"),
        ({"official": True, "slot_targets": ["q_proj"]}, "a program that has none"),
        ({"slot_rank": 0}, "from 1 to 4096"),
        ({"slot_rank": 4097}, "from 1 to 4096"),
        ({"slot_targets": ["lm_head"]}, "no linear layer 'lm_head'"),
    ],
)
def test_what_no_kernel_computes_is_refused_by_name(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    model = tiny_tokenizer(tiny_llama(tmp_path / "model"))
    with pytest.raises(InvalidInput, match=says):
        plan(model, **{"backend": "executorch"} | options)


def test_the_slots_are_for_the_adapters_that_are_given(made: programs.Made) -> None:
    def slots(**options: Any) -> Any:
        return plan(made.model, backend="executorch", **options).describe()["program_slots"]

    assert slots() == {"rank": 16, "targets": sorted(LINEARS)}
    assert slots(adapters=made.adapters) == {"rank": 8, "targets": sorted(LINEARS)}
    assert slots(adapters=made.adapters[1:]) == {"rank": 4, "targets": sorted(LINEARS)}
    some = {"slot_rank": 5, "slot_targets": ["v_proj", "q_proj", "down_proj", "q_proj"]}
    assert slots(adapters=made.adapters[1:], **some) == {"rank": 5, "targets": ["down_proj", "q_proj", "v_proj"]}
    assert slots(merge=True, adapters=made.adapters[:1]) is None
    assert slots(adapter_slots=False) is None
    assert slots(single_file=True) is None
    assert slots(official=True) is None
    with pytest.raises(AdapterError, match="'alice' has rank 8 in .*q_proj; the slots have 7"):
        slots(adapters=made.adapters, slot_rank=7)
    with pytest.raises(AdapterError, match="'alice' changes .*; the slots are in q_proj"):
        slots(adapters=made.adapters[:1], slot_targets=["q_proj"])
    with pytest.raises(InvalidInput, match="takes no adapters"):
        slots(adapters=made.adapters, single_file=True)


def test_the_plan_says_what_the_embedding_becomes(tmp_path: Path) -> None:
    model = tiny_tokenizer(tiny_llama(tmp_path / "model"))
    described = plan(model, backend="executorch", kv_dtype="int8").describe()
    assert described["backends"] == ["executorch"]
    assert described["quantization"] == {"weights": "int4", "group_size": 32, "embedding": "int8"}
    assert plan(model, backend=["executorch", "onnx", "onnx"]).backends == ["onnx", "executorch"]
    by_row = plan(model, backend="executorch", quantize="int8").describe()["quantization"]
    assert by_row == {"weights": "int8", "group_size": 0, "embedding": "int8"}


def test_a_missing_executorch_is_a_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_tokenizer(tiny_llama(tmp_path / "model"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="'pte'"):
        export(model, tmp_path / "bundle", backend="executorch", official=True)
    assert not (tmp_path / "bundle").exists()


def test_a_failure_of_the_official_exporter_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.module("executorch")
    model = tiny_tokenizer(tiny_llama(tmp_path / "model"))

    def fail(*args: object) -> None:
        raise RuntimeError("no such pass")

    monkeypatch.setattr(official, "_make", fail)
    with pytest.raises(BackendError, match="RuntimeError: no such pass"):
        export(model, tmp_path / "bundle", backend="executorch", official=True)
    assert not (tmp_path / "bundle").exists()
    assert list(tmp_path.iterdir()) == [model]


def test_quiet_is_over_when_it_ends(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    handlers = list(logging.root.handlers)
    with quiet():
        print("printed")
        logging.error("logged")
        logging.root.addHandler(logging.StreamHandler())
        warnings.warn("warned", stacklevel=1)
        subprocess.run(["echo", "from a child"], check=True)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert logging.root.handlers == handlers
    print("printed")
    logging.error("logged")
    assert capfd.readouterr().out == "printed\n"
    assert [r.message for r in caplog.records] == ["logged"]
