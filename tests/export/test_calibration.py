"""Judges: transformers for what goes into a layer, and the definition of GPTQ, which `test_gptq` holds to Optimal Brain Quantization."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crayon_export import architecture, lora
from crayon_export.calibration import LEAST_TOKENS, Calibration
from crayon_export.checkpoint import Checkpoint, Fingerprint
from crayon_export.executorch.storage import ProgramStorage, Stored, worth
from crayon_export.gptq import compensate, factor, hessian
from crayon_export.onnx.storage import OnnxStorage
from crayon_export.onnx.tensors import ExternalData
from crayon_export.quantize import Blockwise, Quantized
from crayon_export.reference import forward
from crayon_export.report import TensorReport
from crayon_export.streaming import WrittenWeights
from crayon_export.tokenizer import convert
from crayon_runtime.affine import Affine
from crayon_runtime.errors import InvalidInput
from crayon_runtime.tokenizer import Tokenizer
from tests.export.models import tiny_adapter, tiny_llama, tiny_tokenizer
from tests.support import needs

BLOCKWISE = Blockwise(4, 32)
AFFINE = Affine(4, 32)
TEXTS = [np.random.default_rng(i).integers(3, 320, n) for i, n in enumerate((200, 1, 300, 99))]


class Written:
    """A model as both backends hold it."""

    def __init__(self, folder: Path, scratch: Path, merged: Path | None = None) -> None:
        checkpoint = Checkpoint.open(folder)
        self.architecture = architecture.read(checkpoint.config)
        data = io.BytesIO()
        external = ExternalData(data, "data")
        with ThreadPoolExecutor(1) as pool:
            tied = self.architecture.tied_embeddings
            embedding = "int8" if tied else "fp16"
            onnx = OnnxStorage(external, blockwise=BLOCKWISE, embedding=embedding, tied=tied, pool=pool)
            program = ProgramStorage(scratch, weights=AFFINE, tied=tied, pool=pool)
            weights = WrittenWeights(
                checkpoint,
                self.architecture,
                Fingerprint(),
                [onnx, program],
                adapters=[],
                merged=lora.PeftAdapter.open(merged) if merged else None,
                calibration=TEXTS,
                on_bytes=lambda _: None,
            )
            ids = np.arange(3, 20)
            forward(self.architecture, weights, [ids], positions=np.arange(17), tap_layer=0)
        self.reports: list[TensorReport] = weights.reports
        self.program: dict[str, Stored] = program.tensors
        places = {t.name: {e.key: e.value for e in t.external_data} for t in external.initializers}
        self._arrays = {
            t.name: np.frombuffer(
                data.getvalue(),
                {1: np.float32, 2: np.uint8, 10: np.float16}[t.data_type],
                int(np.prod(t.dims)),
                int(places[t.name]["offset"]),
            ).reshape(t.dims)
            for t in external.initializers
        }

    def onnx(self, name: str, width: int) -> np.ndarray:
        """What the graph computes with."""
        if name in self._arrays:
            return self._arrays[name].astype(np.float32)
        form = BLOCKWISE.shared(width) if "embed" in name else BLOCKWISE
        assert form
        return form.dequantize(Quantized(self._arrays[f"{name}_codes"], self._arrays[f"{name}_scales"]), width)

    def error(self, backend: str, name: str) -> float | None:
        return next(r.output_error for r in self.reports if (r.backend, r.name) == (backend, name))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileLLM-LS: each of its two blocks is computed twice."""
    return tiny_llama(tmp_path_factory.mktemp("shared") / "tiny", family="mobilellm", layer_repeats=2)


def _inputs(folder: Path, weights: Any, module: str) -> list[np.ndarray]:
    """What transformers gives a layer in each of its passes, float32 [T, in], where `weights` are put in the place of its own.

    Args:
        weights: from a tensor's name and its own value, to the value; None keeps it.
    """
    torch = needs.module("torch")
    from transformers import AutoModelForCausalLM

    judge = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    seen: list[list[np.ndarray]] = []
    with torch.no_grad():
        for name, value in judge.named_parameters():
            if value.ndim == 2 and (new := weights(name, value.numpy())) is not None:
                value.copy_(torch.from_numpy(np.array(new)))
        judge.get_submodule(module).register_forward_pre_hook(lambda _, x: seen[-1].append(x[0][0].numpy()))
        for ids in TEXTS:
            seen.append([])
            judge(torch.from_numpy(ids)[None])
    return [np.concatenate(one) for one in zip(*seen, strict=True)]


def _same(found: np.ndarray, expected: np.ndarray) -> float:
    """The share of rows that are the same; where rounding goes the other way, all that follow in a row compensate another error."""
    return float((np.abs(found - expected) <= 1e-5).all(axis=1).mean())


MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head")


def test_each_layer_is_quantized_for_what_the_quantized_layers_before_it_give(model: Path, tmp_path: Path) -> None:
    written = Written(model, tmp_path)
    source = Checkpoint.open(model)
    for module in MODULES:
        own = np.concatenate([rows for _, rows in source.stream(f"{module}.weight")])
        width = own.shape[1]

        inputs = _inputs(model, lambda name, value: written.onnx(name, value.shape[1]), module)[0]
        found = compensate(BLOCKWISE, own, factor(hessian(inputs)))
        expected = BLOCKWISE.dequantize(BLOCKWISE.quantize(found.targets, found.scales), width)
        stored = written.onnx(f"{module}.weight", width)
        assert _same(stored, expected) >= 0.9, module
        error = np.linalg.norm(inputs @ (own - stored).T) / np.linalg.norm(inputs @ stored.T)
        assert written.error("onnx", f"{module}.weight") == pytest.approx(error, rel=1e-2)

        inputs = _inputs(model, lambda name, _: worth(written.program[name]), module)[0]
        found = compensate(AFFINE, own, factor(hessian(inputs)))
        expected = AFFINE.dequantize(*AFFINE.quantize(found.targets, found.scales))
        assert _same(worth(written.program[f"{module}.weight"]), expected) >= 0.9, module


def test_a_merged_adapter_is_in_the_weights_before_their_errors_are_made_good(model: Path, tmp_path: Path) -> None:
    needs.module("peft")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = tiny_adapter(model, tmp_path / "alice", target_modules=["up_proj", "q_proj"])
    written = Written(model, tmp_path, merged=adapter)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).merge_and_unload()
    module = "model.layers.1.mlp.up_proj"
    own = merged.get_submodule(module).weight.detach().numpy()
    inputs = _inputs(model, lambda name, value: written.onnx(name, value.shape[1]), module)[0]
    found = compensate(BLOCKWISE, own, factor(hessian(inputs)))
    expected = BLOCKWISE.dequantize(BLOCKWISE.quantize(found.targets, found.scales), own.shape[1])
    assert _same(written.onnx(f"{module}.weight", own.shape[1]), expected) >= 0.9


def test_all_passes_of_a_repeated_block_count(shared: Path, tmp_path: Path) -> None:
    """The first with what comes to it, the later ones with what they would get from the block's float weights."""
    written = Written(shared, tmp_path)
    module = "model.layers.1.mlp.down_proj"

    def but_layer_1(name: str, value: np.ndarray) -> np.ndarray | None:
        return None if ".1." in name else written.onnx(name, value.shape[1])

    first = _inputs(shared, lambda name, value: written.onnx(name, value.shape[1]), module)[0]
    later = _inputs(shared, but_layer_1, module)[1]
    own = np.concatenate([rows for _, rows in Checkpoint.open(shared).stream(f"{module}.weight")])
    stored = written.onnx(f"{module}.weight", own.shape[1])
    for inputs, same in ((np.concatenate([first, later]), True), (first, False)):
        found = compensate(BLOCKWISE, own, factor(hessian(inputs)))
        expected = BLOCKWISE.dequantize(BLOCKWISE.quantize(found.targets, found.scales), own.shape[1])
        assert (_same(stored, expected) >= 0.9) == same


def test_a_head_that_shares_the_rows_of_the_embedding_keeps_them(shared: Path, tmp_path: Path) -> None:
    written = Written(shared, tmp_path)
    assert written.architecture.tied_embeddings
    head, embedding = (written.program[f"{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
    np.testing.assert_array_equal(head.values, embedding.values)
    assert written.error("executorch", "lm_head.weight") is None
    assert written.error("onnx", "lm_head.weight") is None
    assert written.error("onnx", "model.layers.0.mlp.up_proj.weight") is not None


# Texts


def _tokenizer(folder: Path) -> Tokenizer:
    info = convert(tiny_tokenizer(folder / "source"), folder, model_vocab_size=320)
    return Tokenizer(info, folder / info.file)


def test_a_text_is_cut_and_ends_with_the_tokens_that_were_asked_for(tmp_path: Path) -> None:
    text = "Once upon a time there was a robot. " * 300
    file = tmp_path / "texts.txt"
    file.write_text(text)
    tokenizer = _tokenizer(tmp_path)
    found = Calibration.read(file, 1200).sequences(tokenizer, 256)
    assert [len(ids) for ids in found] == [256] * 4 + [176]
    assert np.concatenate(found).tolist() == tokenizer.encode(text)[:1200]


def test_lines_are_texts_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    lines = ['{"text": "Set an alarm.", "id": 1}', "", '{"prompt": "buy ", "completion": "milk"}']
    file.write_text("\n".join(lines * 200))
    tokenizer = _tokenizer(tmp_path)
    found = Calibration.read(file).sequences(tokenizer, 256)
    assert len(found) == 400
    assert [ids.tolist() for ids in found[:2]] == [tokenizer.encode("Set an alarm."), tokenizer.encode("buy milk")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n ", "holds no text"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "yes"}\n{"text": ', "truncated"),
        ("a.jsonl", b'{"text": 7}', "Expected `str`"),
        ("a.jsonl", b'{"words": "yes"}', "it has no text"),
        ("missing.txt", None, "cannot be read: No such file"),
    ],
)
def test_files_that_are_no_texts_are_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidInput, match=message) as error:
        Calibration.read(file)
    assert name in str(error.value)
    assert error.value.do


def test_too_few_tokens_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("Once upon a time.")
    with pytest.raises(InvalidInput, match=f"tokens; GPTQ needs {LEAST_TOKENS}"):
        Calibration.read(file).sequences(_tokenizer(tmp_path), 256)
    with pytest.raises(InvalidInput, match="100 calibration tokens are too few"):
        Calibration.read(file, 100)
