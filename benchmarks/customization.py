"""Customization on the frozen test users, three seeds, and on the device in int4: about half an hour on two quiet cores."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.table import Row
from crayon_server.cli import quiet
from crayon_server.evaluate.customization import run as run_benchmark
from crayon_server.pool.build import Settings

SEEDS = (0, 1, 2)


def run(work: Path) -> Iterator[Row]:
    with quiet():
        result = run_benchmark(
            "test",
            SEEDS,
            Settings(threads=1),  # more get in each other's way at this size
            say=lambda line: print(f"  {line}", file=sys.stderr, flush=True),
            jobs=min(len(SEEDS), os.cpu_count() or 1),
        )
    (work / "customization.json").write_text(json.dumps(result, indent=1))
    rows, alpha = result["rows"], result["alpha"]
    em = {name: row["em"] for name, row in rows.items()}
    gain = em["crayon"] - em["single_lora"]
    yield Row(
        "exact match of test users: crayon over one LoRA",
        ">= +.45",
        f"{gain:+.3f} ({em['single_lora']:.3f} to {em['crayon']:.3f}; seeds {_seeds(rows['crayon']['em_seeds'])})",
        gain >= 0.45,
    )
    for name, reach in (("crayon", 0.80), ("crayon_no_groups", 0.65)):
        yield Row(f"exact match of test users: {name}", f">= {reach:.2f}", f"{em[name]:.3f}", em[name] >= reach)
    yield Row(
        "alpha, int4 device against float: cosine, mean over users and seeds (least)",
        ">= 0.99",
        ", ".join(f"{name} {cosine['mean']:.4f} ({cosine['min']:.4f})" for name, cosine in alpha.items()),
        alpha["crayon"]["mean"] >= 0.99,
    )
    difference = em["crayon_int4"] - em["crayon_int4_float_alpha"]
    yield Row(
        "exact match in int4 with its own alpha, less that with the float model's",
        "within .01",
        f"{difference:+.4f} ({em['crayon_int4']:.3f}; float {em['crayon']:.3f})",
        abs(difference) <= 0.01,
    )
    others = [name for name in em if name not in ("single_lora", "crayon", "crayon_no_groups", "crayon_int4")]
    tokens = result["prompt_tokens"]
    yield Row("exact match of test users: other rows", "", ", ".join(f"{name} {em[name]:.3f}" for name in others))
    yield Row("prompt tokens: plain, few_shot", "", f"{tokens['plain']:.0f}, {tokens['few_shot']:.0f}")
    exact, *disguised = result["privacy"]
    yield Row(
        "noise on alpha or its rounding: exact match, and users that are recognized by alpha",
        "",
        f"as it is {exact['em']:.3f}, {exact['recognized']:.0%}; "
        + "; ".join(
            f"{'noise ' + format(d['noise'], 'g') if d['noise'] else str(d['digits']) + ' digits'} "
            f"{d['em']:.3f}, {d['recognized']:.0%}"
            for d in disguised
        ),
    )


def _seeds(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
