"""Traces of real bundles, and what has to be in them."""

from __future__ import annotations

from pathlib import Path

from crayon_runtime.manifest import LINEARS
from crayon_runtime.profile.jobs import Job, Trace
from crayon_runtime.profile.records import Operator
from crayon_runtime.profile.target import Local, results

TOKENS = 3


def traced(bundle: Path, backend: str) -> list[Operator]:
    work = Trace(depth=4, generate=TOKENS)
    job = Job(bundle=str(bundle), backend=backend, adapter=None, threads=1, cpus=None, process=0, work=work)
    found = list(results(Local(), job))
    assert all(isinstance(operator, Operator) for operator in found)
    return found  # type: ignore[return-value]


def linear_modules(found: list[Operator]) -> set[str]:
    """Of those that are computed as one, each."""
    modules = set()
    for operator in found:
        if operator.kind == "linear" and operator.module is not None:
            first, *more = operator.module.split(",")
            modules |= {first, *(f"{first.rpartition('.')[0]}.{name}" for name in more)}
    return modules


def expected(layers: int) -> set[str]:
    parts = [f"{'self_attn' if name in ('q_proj', 'k_proj', 'v_proj', 'o_proj') else 'mlp'}.{name}" for name in LINEARS]
    return {f"model.layers.{layer}.{part}" for layer in range(layers) for part in parts} | {"lm_head"}
