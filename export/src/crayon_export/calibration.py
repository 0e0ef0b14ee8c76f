"""The calibration texts of GPTQ: read, and carried through the layers as one backend holds them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from crayon_export.architecture import linears
from crayon_export.gptq import Factor, compensate, factor, hessian
from crayon_export.reference import last_norm, passes
from crayon_export.report import TensorReport
from crayon_export.rounding import Form
from crayon_runtime.errors import InvalidInput
from crayon_runtime.manifest import Architecture
from crayon_runtime.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

DEFAULT_TOKENS = 8192

LEAST_TOKENS = 512
"""Our choice: fewer say little about the inputs of any layer."""

_SEQUENCE = 512
"""Tokens of a text that attend to one another, at most: the memory of attention is its square."""

_LONGEST_TOKEN = 16
"""Characters of a token, on the average of any text."""

_FORM = 'write one {"text": …} on each line, or {"prompt": …, "completion": …}'
GIVE = "give a file of texts as the model will meet them, with --calibration"


@dataclass(frozen=True)
class Calibration:
    """Texts that say what goes into the layers."""

    texts: Sequence[str]
    tokens: int
    """How many are used, the first ones."""
    file: Path

    @classmethod
    def read(cls, file: Path, tokens: int = DEFAULT_TOKENS) -> Calibration:
        """The texts of a file: where its name ends in .jsonl of lines with a "text", or a "prompt" and "completion"; otherwise one text.

        Raises:
            InvalidInput: it cannot be read, is not UTF-8, is empty, or a line has no text; or so few tokens are of no use.
        """
        if tokens < LEAST_TOKENS:
            raise InvalidInput(f"{tokens} calibration tokens are too few", do=f"use {LEAST_TOKENS} or more")
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except OSError as e:
            raise InvalidInput(
                f"the calibration texts cannot be read: {e.strerror or e}", where=file, do="check the path"
            ) from None
        except UnicodeDecodeError as e:
            raise InvalidInput(
                f"not UTF-8 at byte {e.start}", where=file, do="convert the file to UTF-8 first"
            ) from None
        texts = [text]
        if file.suffix == ".jsonl":
            texts = [_text(line, f"{file}:{n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not any(text.strip() for text in texts):
            raise InvalidInput("it holds no text", where=file, do=GIVE)
        return cls(texts, tokens, file)

    def sequences(self, tokenizer: Tokenizer, context_length: int) -> list[Ids]:
        """Their tokens, int64 [at most 512] each; a longer text is cut.

        Raises:
            InvalidInput: there are fewer than `LEAST_TOKENS`.
        """
        taken: list[Ids] = []
        length = min(_SEQUENCE, context_length)
        left = self.tokens
        for text in self.texts:
            ids = np.array(tokenizer.encode(text[: _LONGEST_TOKEN * left])[:left], np.int64)
            taken += [ids[i : i + length] for i in range(0, len(ids), length)]
            left -= len(ids)
            if left <= 0:
                break
        if self.tokens - left < LEAST_TOKENS:
            raise InvalidInput(
                f"the calibration texts have {self.tokens - left} tokens; GPTQ needs {LEAST_TOKENS}, and better {DEFAULT_TOKENS}",
                where=self.file,
                do=GIVE,
            )
        return taken


class _Line(msgspec.Struct):
    text: str = ""
    prompt: str = ""
    completion: str = ""


def _text(line: str, where: str) -> str:
    try:
        found = msgspec.json.decode(line, type=_Line)
    except (ValueError, RecursionError) as e:
        raise InvalidInput(str(e), where=where, do=_FORM) from None
    text = found.text or found.prompt + found.completion
    if not text.strip():
        raise InvalidInput("it has no text", where=where, do=_FORM)
    return text


class CalibrationStream:
    """The texts on their way through the layers as one storage holds them: `rounding.Rounding` of the layer that they come to, by GPTQ.

    Args:
        vector: as in `reference.Weights`.
        texts: tokens, int64 [T_i] each.
        x: their embeddings, float32 [T, hidden].
    """

    def __init__(self, a: Architecture, vector: Callable[[str], Floats], texts: Sequence[Ids], x: Floats) -> None:
        self._a, self._vector, self._texts, self._x = a, vector, texts, x[None]
        self._sizes = {x.module: x.out_features for x in linears(a)}
        self._factor: tuple[Floats, Factor] | None = None
        self._later: dict[str, tuple[Floats, float]] = {}
        self._steps = self._through()
        self._arrive(next(self._steps))

    def __call__(self, form: Form, rows: Floats) -> tuple[Floats, Floats | None]:
        if self._factor is None or self._factor[0] is not self._inputs:  # layers with the same inputs share it
            self._factor = None  # its memory, before that of the next
            h = hessian(self._inputs[0])
            if self._module in self._later:
                h += self._later[self._module][0]
            self._factor = self._inputs, factor(h)
        compensated = compensate(form, rows, self._factor[1])
        self._error += compensated.output_error
        return compensated.targets, compensated.scales

    def rehearse(self, layer: int, weights: Mapping[str, Floats]) -> None:
        """Find the inputs of a block's later passes, which count as those of the first: before it, with its float weights by module."""
        self._later.clear()
        run, first = passes(self._a, self._vector, layer, self._x, self._texts), set[str]()
        try:
            module, inputs = next(run)
            while True:
                y = inputs @ weights[module].T
                if module in first:
                    h, squares = self._later.get(module, (np.float32(0), 0.0))
                    self._later[module] = h + hessian(inputs[0]), squares + float(np.vdot(y, y))
                first.add(module)
                module, inputs = run.send(y)
        except StopIteration:
            pass

    def multiply(self, rows: Floats) -> None:
        """Compute with the next rows of the layer, float32 [n, in], as they are stored."""
        y = self._inputs[0] @ rows.T
        self._squares += float(np.vdot(y, y))
        if self._outputs.size:
            self._outputs[0, :, self._done : self._done + len(rows)] = y
            self._done += len(rows)

    def complete(self, report: TensorReport) -> TensorReport:
        """The report of the layer, with the error of its outputs if it was rounded here."""
        squares = self._squares + self._later.get(self._module, (None, 0.0))[1]
        if not self._error or not squares:
            return report
        return replace(report, output_error=(self._error / squares) ** 0.5)

    def advance(self) -> None:
        """Go on to the next linear layer, with the outputs of this one; after the head there is none."""
        if self._outputs.size:
            self._arrive(self._steps.send(self._outputs))

    def _through(self) -> Generator[tuple[str, Floats], Floats, None]:
        for layer in range(self._a.layers):
            self._x = yield from passes(self._a, self._vector, layer, self._x, self._texts)
        yield "lm_head", last_norm(self._a, self._vector, self._x)

    def _arrive(self, step: tuple[str, Floats]) -> None:
        self._module, self._inputs = step
        self._outputs = np.empty((1, self._inputs.shape[1], self._sizes.get(self._module, 0)), np.float32)
        self._done = 0
        self._error = self._squares = 0.0
