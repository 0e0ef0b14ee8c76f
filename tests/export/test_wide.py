"""LLaMA-7B's widths, for what only shows there: dense random weights in two layers, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.parity import against_transformers, wide_model
from tests.support import needs


@pytest.mark.slow
def test_two_layers_of_7b_widths(tmp_path: Path) -> None:
    needs.module("torch")
    difference, same_best_token = against_transformers(wide_model(tmp_path), tmp_path / "bundle")
    assert difference <= 1e-4
    assert same_best_token
