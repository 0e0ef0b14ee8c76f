"""Every form of a model for ExecuTorch: our runner, ExecuTorch's own runtime, its TextLLMRunner and the golden cases agree."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from crayon_export.architecture import linears
from crayon_export.exporter import export
from crayon_export.tensorfile import read_safetensors
from crayon_runtime import golden
from crayon_runtime.affine import Affine
from crayon_runtime.bundle import Bundle
from crayon_server.models import load_nano
from tests import programs
from tests.export.models import tiny_adapter, tiny_llama
from tests.native import official
from tests.support import needs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MOBILE_125M = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
    "vocab_size": 32000, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
}  # fmt: skip


# Two blocks, each computed twice.
MOBILE_LS = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 640, "layer_repeats": 2,
    "tie_word_embeddings": True,
}  # fmt: skip


def _mobile(folder: Path, **config: Any) -> Path:
    """Random weights, and another model's tokenizer with words for all that is left of the vocabulary."""
    model = tiny_llama(folder, family="mobilellm", **config)
    tensors = load_file(model / "model.safetensors")
    # TextLLMRunner cannot report half a character, so tokens of single bytes are not likely.
    tensors["model.embed_tokens.weight"][3 : 3 + 256] *= 0.1
    # What layers add to their input, as GPT-2 scales it: without, so deep a random model makes noise of what rounding changes.
    for name, values in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            values *= (2 * config["num_hidden_layers"]) ** -0.5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    shutil.copy(load_nano() / "tokenizer_config.json", model)
    tokenizer = json.loads((load_nano() / "tokenizer.json").read_bytes())
    words = tokenizer["model"]["vocab"]
    words |= {f"~{i}": i for i in range(len(words), config["vocab_size"])}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


MODELS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "nano": (lambda _: load_nano(), {}),
    "stories260K": (lambda _: needs.reference_model(), {}),
    "mobilellm-125m": (lambda folder: _mobile(folder, **MOBILE_125M), {}),
    "mobilellm-ls": (lambda folder: _mobile(folder, **MOBILE_LS), {"context_length": 256}),
    "mobilellm-ls-int8": (lambda folder: _mobile(folder, **MOBILE_LS), {"context_length": 256, "quantize": "int8"}),
}
"""How each is had, and how it is exported. The templates of nano and of MobileLLM-125M come with the package."""


class Forms(NamedTuple):
    switchable: Bundle
    merged: Bundle
    single: Bundle

    def program(self, name: str) -> tuple[official.Program, str]:
        """The files of a form, and the method that computes it."""
        base, merged, single = (bundle.path for bundle in self)
        alice = base / "adapters/alice"
        return {
            "base": (official.Program(base / "model.pte", (base / "model.ptd",)), "forward_tap"),
            "adapter": (
                official.Program(alice / "adapter.pte", (base / "model.ptd", alice / "adapter.ptd")),
                "lora_forward_tap",
            ),
            "merged": (official.Program(merged / "model.pte", (merged / "model.ptd",)), "forward_tap"),
            "single": (official.Program(single / "model.pte", ()), "forward_tap"),
        }[name]


@pytest.fixture(scope="module", params=MODELS)
def forms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    needs.native()
    needs.module("executorch")
    folder, (model_of, own) = tmp_path_factory.mktemp(request.param), MODELS[request.param]
    model = model_of(folder / "model")
    adapter = tiny_adapter(model, folder / "alice", r=8, gain=0.2, target_modules="all-linear")
    options: dict[str, Any] = {"backend": "executorch", "adapters": [adapter], **own}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "XDG_CACHE_HOME", str(programs.cache_home())
        )  # a template that is made for this stays out of the user's cache
        return Forms(
            export(model, folder / "switchable", slot_rank=16, **options).bundle,
            export(model, folder / "merged", merge=True, **options).bundle,
            export(model, folder / "single", merge=True, single_file=True, **options).bundle,
        )


def test_golden_cases(forms: Forms) -> None:
    for bundle in forms:
        results = golden.replay(bundle, backend="executorch")
        assert {r.adapter for r in results} == ({None, "alice"} if bundle is forms.switchable else {None})
        assert all(r.passed for r in results), [r for r in results if not r.passed]


@pytest.mark.parametrize("form", ["base", "adapter", "merged", "single"])
def test_our_runner_computes_what_the_official_runtime_does(forms: Forms, form: str) -> None:
    """As far as a different order of sums, of which some come out at another int8 code, lets it."""
    native = needs.native()
    program, method = forms.program(form)
    known = official.answer(program, method)
    # Random weights pass on more of what rounding changes, and many of their tokens are nearly as likely as the best.
    random = forms.switchable.path.parent.name.startswith("mobilellm")
    bound = 0.04 if random else 0.02
    opened = native.Program(*program)
    cache = opened.new_cache()
    cache.use(opened, method)
    fed, position, same = list(official.PROMPT), 0, 0
    for i, token in enumerate(known.tokens):
        logits, _, tap_last = cache.step(fed, position)
        spread = known.logits[i].std()
        assert np.sqrt(np.mean((logits - known.logits[i]) ** 2)) < bound * spread
        assert np.sqrt(np.mean((tap_last - known.tap_last[i]) ** 2)) < bound * np.sqrt(np.mean(known.tap_last[i] ** 2))
        same += int(logits.argmax()) == token
        position += len(fed)
        fed = [token]
    assert same >= len(known.tokens) - (3 if random else 1)


def test_forms_hold_the_same_numbers(forms: Forms) -> None:
    """What is merged is the same in one file and in two, and not what the base computes."""
    found = {}
    for form in ("base", "adapter", "merged", "single"):
        program, method = forms.program(form)
        found[form] = official.answer(program, method).logits[0]
    np.testing.assert_array_equal(found["merged"], found["single"])
    spread = found["base"].std()
    assert np.abs(found["base"] - found["adapter"]).max() > 0.3 * spread
    # Weights are rounded after an adapter was merged, and before one is attached: the same but for that.
    assert np.corrcoef(found["merged"], found["adapter"])[0, 1] > np.corrcoef(found["base"], found["adapter"])[0, 1]


@pytest.mark.parametrize("forms", ["mobilellm-ls", "mobilellm-ls-int8"], indirect=True)
def test_a_block_that_is_computed_twice_is_stored_once(forms: Forms) -> None:
    bundle = forms.switchable
    four_bits = bundle.model.quantization.weights == "int4"
    assert bundle.model.architecture.passes == 4
    weights = read_safetensors(bundle.path.parent / "model/model.safetensors").tensors
    data = bundle.read("model.ptd")
    for linear in linears(bundle.model.architecture):
        codes, _ = (Affine(4, 32) if four_bits else Affine(8, 0)).quantize(weights[f"{linear.module}.weight"].read())
        unsigned = (codes + 8).astype(np.uint8)
        packed = (unsigned[:, 1::2] << 4 | unsigned[:, ::2] if four_bits else codes).tobytes()
        assert data.count(packed) == 1
        assert data.count(hashlib.sha256(packed).hexdigest().encode()) == 1


@pytest.mark.parametrize("form", ["switchable", "merged", "single"])
def test_textllmrunner(forms: Forms, form: str) -> None:
    """In a process of its own: it registers operators that cannot be unloaded."""
    script = Path(__file__).with_name("official_runtimes.py")
    bundle: Bundle = getattr(forms, form)
    done = subprocess.run([sys.executable, script, bundle.path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    runner, runtime = said["runner"].strip(), said["runtime"].strip()
    assert runner
    assert runtime.startswith(runner)
    assert runner == runtime or runner.endswith("</s>"), "it ends with the answer, where the other goes on"
    assert said["largest_difference"] == 0
