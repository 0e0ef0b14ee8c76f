"""How a training went, step by step: as JSON lines that survive its process, and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from crayon_server import svg

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of the log.

    Attributes:
        step: from 1.
        loss: of its batch, in nats per weighted token.
        learning_rate, tokens, seconds: of the step; None where they are not logged.
        validation_loss: after the step, where it was computed.
    """

    step: int
    loss: float
    learning_rate: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    validation_loss: float | None = None


def encode(steps: Sequence[Step]) -> bytes:
    """As JSON lines."""
    return b"".join(msgspec.json.encode(step) + b"\n" for step in steps)


class Log:
    """The steps of a run, in a file that is written as they come.

    What an earlier process of the same run wrote stays; a last line that it did not finish is dropped.

    Args:
        path: None: only in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.steps: list[Step] = []
        self._path = path
        if path is not None and path.exists():
            decoder = msgspec.json.Decoder(Step)
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    step = decoder.decode(line)
                except msgspec.DecodeError:
                    break
                if not line.endswith(b"\n") or step.step != len(self.steps) + 1:
                    break
                self.steps.append(step)
            path.write_bytes(encode(self.steps))

    def has(self, step: int, loss: float) -> bool:
        """Whether this step is there, with this loss; if it is there with another, it and what followed it are dropped."""
        if step <= len(self.steps) and self.steps[step - 1].loss == loss:
            return True
        if step <= len(self.steps):
            del self.steps[step - 1 :]
            if self._path is not None:
                self._path.write_bytes(encode(self.steps))
        return False

    def add(self, step: Step) -> None:
        self.steps.append(step)
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(encode([step]))


def plot(losses: Sequence[float], what: str, validation: Mapping[int, float] | None = None) -> bytes:
    """SVG; the same for the same losses.

    Args:
        what: the losses are, for the axis.
        validation: step -> loss on held-out texts.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=what)
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.75", linewidth=1, label="of each batch")
    window = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    axes.plot(steps[window - 1 :], smooth, label=f"mean of {window}")
    if validation:
        axes.plot(list(validation), list(validation.values()), marker=".", label="on held-out texts")
    axes.set_ylim(bottom=0)
    axes.legend()
    return svg.render(figure)
