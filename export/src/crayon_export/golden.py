"""Golden cases: which texts are recorded, at which steps, and what of the reference's outputs is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import json as msgspec_json
from safetensors.numpy import save

from crayon_export.reference import Outputs
from crayon_export.report import CaseReport
from crayon_runtime.errors import InvalidInput
from crayon_runtime.golden import Case, Golden, Tolerance, kl_divergence
from crayon_runtime.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

TEXTS = (
    ("Once upon a time there was", " a little dog who lived in a house."),
    ("The capital of France is", " Paris, and the capital of Norway is Oslo."),
    ("set an alarm for half past seven", " tomorrow morning, please"),
    ("naïve café — 東京 🙂", " ½ ≠ 0.5\n"),
)
"""Prompts with continuations: prose, facts, a command, and what a byte-fallback tokenizer has no words for."""

_STEPS = (
    4  # recorded a case: enough to see a drift of the KV cache, few enough to keep a 32,000-token vocabulary at 2 MB
)


def tolerance(backend: str, *, quantize: str, kv_dtype: str) -> Tolerance:
    """How far a backend may be from the reference; see `crayon_runtime.golden` for the units.

    Measured on x86-64 (Intel and AMD) with stories260K, nano and random models: up to 0.06 and 0.025 where kernels quantize the
    activations to int8 (int4 and int8 weights, either backend), 0.17 with a LoRA that was trained hard on the smallest of them; 0.018
    and 0.0074 with an int8 cache under float32 weights, 0.003 and 0.001 with a float16 cache, 5e-6 in float32. Other weights are off by
    more than 1.
    """
    if quantize != "none":
        return Tolerance(backend, "any", 0.3, 0.15)
    return Tolerance(backend, "any", *_FLOAT_TOLERANCES[kv_dtype])


_FLOAT_TOLERANCES = {"fp32": (1e-4, 1e-4), "fp16": (1e-2, 4e-3), "int8": (0.1, 0.05)}


@dataclass(frozen=True, slots=True)
class Recording:
    """Token sequences to record, and where."""

    texts: list[str]
    sequences: list[Ids]
    prompt_lengths: list[int]
    steps: list[list[int]]
    """Positions in each sequence."""

    @classmethod
    def plan(cls, tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], context_length: int) -> Recording:
        """Tokenize the texts; those longer than the context are cut.

        Raises:
            InvalidInput: a text has no tokens.
        """
        recording = cls([], [], [], [])
        for prompt, continuation in texts:
            text = prompt + continuation
            ids = tokenizer.encode(text)
            if not ids:
                raise InvalidInput("a golden text has no tokens", where=repr(text))
            cut = ids[:context_length]
            length = min(len(tokenizer.encode(prompt)), max(len(cut) - 1, 1))
            answer = np.arange(length, len(cut))
            spread = sorted({round(x) for x in np.linspace(0, len(answer) - 1, _STEPS - 1)}) if len(answer) else []
            recording.texts.append(text if len(cut) == len(ids) else "")
            recording.sequences.append(np.array(cut, np.int64))
            recording.prompt_lengths.append(length)
            recording.steps.append([length - 1, *(int(answer[i]) for i in spread)])
        return recording

    @property
    def positions(self) -> Ids:
        """The steps as indices into the concatenated sequences, int64 [P]."""
        starts = np.cumsum([0, *(len(s) for s in self.sequences[:-1])])
        return np.concatenate([np.array(s) + start for s, start in zip(self.steps, starts, strict=True)]).astype(
            np.int64
        )

    def results(
        self,
        outputs: Outputs,
        adapters: Sequence[str | None],
        floats: slice,
        written: slice,
        *,
        backend: str | None = None,
        suffix: str = "",
    ) -> Recorded:
        """The cases, and the comparison with the float model.

        Args:
            adapters: the name of the adapter of each variant; None: the base.
            floats: the streams of `outputs` that used float weights, one for each adapter.
            written: those that used the weights as written; the same streams where nothing was quantized.
            backend: the only one that holds the weights so; None: all do.
            suffix: of the names of the cases.
        """
        cases: list[Case] = []
        arrays: dict[str, Floats] = {}
        reports: list[CaseReport] = []
        token, step = 0, 0
        for i, sequence in enumerate(self.sequences):
            tokens, steps = slice(token, token + len(sequence)), slice(step, step + len(self.steps[i]))
            token, step = tokens.stop, steps.stop
            for variant, adapter in enumerate(adapters):
                name = (f"{i + 1}" if adapter is None else f"{i + 1}-{adapter}") + suffix
                exact = outputs.logits[floats][variant, steps]
                logits = outputs.logits[written][variant, steps]
                tapped = outputs.tapped[written][variant, tokens]
                length = self.prompt_lengths[i]
                answer = tapped[length:].mean(axis=0) if length < len(tapped) else np.zeros(tapped.shape[1], np.float32)
                arrays[f"{name}.logits"] = np.ascontiguousarray(logits)
                arrays[f"{name}.taps"] = np.stack([tapped[:length].mean(axis=0), answer])
                kl = kl_divergence(exact, logits)
                cases.append(
                    Case(
                        name=name,
                        adapter=adapter,
                        text=self.texts[i] or None,
                        ids=sequence.tolist(),
                        prompt_length=length,
                        steps=self.steps[i],
                        kl_to_float=[round(float(x), 9) for x in kl],
                        backend=backend,
                    )
                )
                reports.append(
                    CaseReport(
                        name,
                        adapter,
                        len(kl),
                        float(kl.mean()),
                        float(np.abs(exact - logits).max()),
                        int((exact.argmax(axis=1) == logits.argmax(axis=1)).sum()),
                    )
                )
        return Recorded(cases, arrays, reports)


class Recorded(NamedTuple):
    """Golden cases, with their arrays."""

    cases: list[Case]
    arrays: dict[str, Floats]
    reports: list[CaseReport]


def golden_files(recorded: Sequence[Recorded], tolerances: list[Tolerance]) -> tuple[bytes, bytes]:
    """golden.json and golden.safetensors.

    Args:
        tolerances: one for each backend that the bundle serves.
    """
    golden = Golden([case for r in recorded for case in r.cases], tolerances)
    document = msgspec_json.format(msgspec_json.encode(golden), indent=1)
    return document + b"\n", save({name: array for r in recorded for name, array in r.arrays.items()})
