"""What an export did to the model: the written report."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from crayon_runtime.cli.common import size_text


@dataclass(frozen=True, slots=True)
class TensorReport:
    """How one tensor is stored, and what that cost."""

    backend: str
    name: str
    stored_as: str
    """"int4", "int8", "fp16" or "fp32"."""
    group_size: int
    relative_error: float
    """||W - W'|| / ||W||, Frobenius."""
    largest_error: float
    bytes: int
    output_error: float | None = None
    """||X (W - W')^T|| / ||X W'^T||, Frobenius, X the layer's inputs on the calibration texts; None: it was rounded without them."""


@dataclass(frozen=True, slots=True)
class CaseReport:
    """The exported weights against the float model, on one golden case."""

    name: str
    adapter: str | None
    steps: int
    mean_kl: float
    """KL(float || exported) in nats, mean over the steps."""
    largest_logit_difference: float
    same_best_token: int
    """At how many of the steps the most likely token is the same."""


@dataclass(frozen=True, slots=True)
class Report:
    model: str
    base_fingerprint: str
    quantization: str
    group_size: int
    rounding: str
    tensors: list[TensorReport]
    cases: list[CaseReport]
    bundle_bytes: int
    peak_rss_bytes: int
    seconds: float

    @property
    def mean_kl(self) -> float:
        """KL(float || exported) in nats, mean over all recorded steps."""
        steps = sum(c.steps for c in self.cases)
        return sum(c.mean_kl * c.steps for c in self.cases) / steps if steps else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean_kl": self.mean_kl}

    def to_json(self) -> bytes:
        return json.dumps(self.to_dict(), indent=1).encode() + b"\n"

    def to_text(self) -> str:
        """The report on one screen: errors by kind of layer, and by golden case."""
        lines = [
            f"{self.model}: {_quantized(self)}, {size_text(self.bundle_bytes)}; "
            f"{self.seconds:.1f} s, peak memory {size_text(self.peak_rss_bytes)}",
            "",
            f"{'layers':<28}{'stored':>10}{'size':>12}{'rel. error':>12}{'largest':>10}",
        ]
        kinds: dict[tuple[str, str, str], list[TensorReport]] = defaultdict(list)
        for t in sorted(self.tensors, key=lambda t: t.backend != self.tensors[0].backend):
            kinds[t.backend, t.name.split(".")[-2], t.stored_as].append(t)
        several = len({t.backend for t in self.tensors}) > 1
        backend = None
        for (held_by, kind, stored_as), group in kinds.items():
            if several and held_by != backend:
                backend = held_by
                lines.append(f"for {backend}")
            mean = sum(t.relative_error for t in group) / len(group)
            label = f"{kind} x {len(group)}" if len(group) > 1 else kind
            lines.append(
                f"{label:<28}{stored_as:>10}{size_text(sum(t.bytes for t in group)):>12}"
                f"{mean:>12.4f}{max(t.largest_error for t in group):>10.3g}"
            )
        if self.cases:
            lines += ["", f"{'golden case':<28}{'KL to float':>12}{'logit diff':>12}{'same best':>12}"]
            for c in self.cases:
                lines.append(
                    f"{c.name:<28}{c.mean_kl:>12.2e}{c.largest_logit_difference:>12.3g}"
                    f"{f'{c.same_best_token}/{c.steps}':>12}"
                )
        return "\n".join(lines)


def _quantized(report: Report) -> str:
    if report.quantization == "none":
        return "float32"
    groups = f"in groups of {report.group_size}" if report.group_size else "by row"
    rounded = "" if report.rounding == "nearest" else f" by {report.rounding.upper()}"
    return f"{report.quantization} {groups}{rounded}"
