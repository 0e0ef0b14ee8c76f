"""The same bundle elsewhere: onnxruntime-genai, and the oldest ONNX Runtime that is supported."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from crayon_export.exporter import export
from crayon_runtime import Engine
from crayon_runtime.bundle import Bundle
from tests.export.models import tiny_adapter, tiny_llama, tiny_tokenizer
from tests.support import needs

PROMPT = [1, 17, 300, 45, 201, 9]
NEW_TOKENS = 24
TIE = 0.1
"""A difference of log-probabilities, in nats. These models are random: few tokens are this near to the next."""


@pytest.fixture(
    scope="module",
    params=[{"head_dim": 16}, {"head_dim": 8}, {"family": "mobilellm", "layer_repeats": 2}],
    ids=["head-16", "head-8", "shared-layers"],
)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("model")
    model = tiny_tokenizer(tiny_llama(folder / "model", **request.param))
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    alice = tiny_adapter(model, folder / "alice", target_modules=linears)
    bruno = tiny_adapter(model, folder / "bruno", seed=5, target_modules=["q_proj", "up_proj"], r=3)
    return export(model, folder / "bundle", adapters=[alice, bruno]).bundle


def _here(bundle: Bundle, adapter: str | None) -> list[int]:
    with Engine.load(bundle) as engine:
        engine.set_adapter(adapter)
        return engine.generate(PROMPT, max_new_tokens=NEW_TOKENS).token_ids


@pytest.mark.parametrize("adapter", [None, "alice", "bruno"])
def test_onnxruntime_genai_generates_the_same_tokens(bundle: Bundle, adapter: str | None) -> None:
    og = needs.module("onnxruntime_genai")
    model = og.Model(str(bundle.path))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(PROMPT) + NEW_TOKENS, do_sample=False)
    generator = og.Generator(model, params)
    if adapter is not None:
        adapters = og.Adapters(model)
        adapters.load(str(bundle.adapter(adapter).file("adapter.onnx_adapter")), adapter)
        generator.set_active_adapter(adapters, adapter)
    generator.append_tokens(np.array([PROMPT], np.int32))
    tokens: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))

    assert tokens == _here(bundle, adapter)
    assert len(tokens) > 8
    assert adapter is None or tokens != _here(bundle, None)


_OLDEST = """
import sys
import onnxruntime
from crayon_runtime import Engine
assert onnxruntime.__version__.startswith("1.29."), onnxruntime.__version__
with Engine.load(sys.argv[1]) as engine:
    for adapter in (None, "alice"):
        engine.set_adapter(adapter)
        print(engine.generate([int(x) for x in sys.argv[3].split()], max_new_tokens=int(sys.argv[2])).token_ids)
"""


def test_the_oldest_supported_onnxruntime_generates_the_same_tokens(bundle: Bundle) -> None:
    path = os.pathsep.join([str(needs.ort_oldest()), *filter(None, sys.path)])
    command = [sys.executable, "-c", _OLDEST, str(bundle.path), str(NEW_TOKENS), " ".join(map(str, PROMPT))]
    out = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, capture_output=True, text=True)
    answers = {
        adapter: json.loads(line) for adapter, line in zip((None, "alice"), out.stdout.splitlines(), strict=True)
    }

    assert answers[None] != answers["alice"]
    with Engine.load(bundle) as engine:
        for adapter, tokens in answers.items():
            engine.set_adapter(adapter)
            assert len(tokens) > 8
            for i, token in enumerate(tokens):
                here = engine.generate(PROMPT + tokens[:i], max_new_tokens=1, top_log_probabilities=2)
                # Activations are rounded to int8, not alike in two versions: where two tokens are a tie, it may be the other.
                ((best, most), other) = here.top_log_probabilities[0]
                assert token == best or (token == other[0] and most - other[1] < TIE), (adapter, i)
