"""Both backends side by side: what their processes measured, and how far what they say is the same."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from crayon_runtime.backends.executorch import native
from crayon_runtime.bundle import Bundle
from crayon_runtime.errors import BackendError, MissingExtra
from crayon_runtime.golden import kl_divergence
from crayon_server.demo import backends
from crayon_server.demo.backends import DECODE, PREFILL, REPETITIONS, Job, Measured
from crayon_server.demo.processes import running
from crayon_server.demo.report import Agreement, BackendFacts, Comparison
from crayon_server.evaluate.exact_match import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROCESSES = 3
"""That measure each backend; the first of them also looks at what it says."""
TITLES = {"onnx": "ONNX Runtime", "executorch": "ExecuTorch"}


def missing() -> str | None:
    """What a comparison needs and this machine lacks, in a line; None: nothing."""
    from crayon_export.executorch.programs import check_installed

    try:
        check_installed()
        native()
    except (BackendError, MissingExtra) as e:
        return f"{e.what}; to have it: {e.do}"
    return None


def compare(
    bundles: Mapping[str, Path], texts: list[tuple[str, str]], *, threads: int | None, folder: Path
) -> Comparison:
    """Measure both backends, several processes of each in turns: what else the machine does meets both.

    Args:
        bundles: one model, by backend.
        texts: prompts, and what else may continue them.
        folder: for what is needed meanwhile.

    Raises:
        BackendError: a process failed.
    """
    measured: dict[str, list[Measured]] = {name: [] for name in bundles}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        logits = {name: Path(scratch, f"{name}.npy") for name in bundles}
        for turn, (name, bundle) in itertools.product(range(PROCESSES), bundles.items()):
            job = Job(str(bundle), name, threads, [] if turn else texts, MAX_NEW_TOKENS, str(logits[name]))
            with running(backends.__name__, job, XDG_CACHE_HOME=scratch) as process:
                said = process.communicate()[0]
            measured[name].append(msgspec.json.decode(said, type=Measured))
        facts = [_facts(name, bundles[name], own) for name, own in measured.items()]
        agreed = _agreement([own[0] for own in measured.values()], list(logits.values()))
    return Comparison(facts, agreed, PREFILL, DECODE, PROCESSES, REPETITIONS)


def _facts(name: str, folder: Path, measured: Sequence[Measured]) -> BackendFacts:
    """One backend.

    Args:
        folder: of its bundle.
        measured: of its processes, the first of which replayed the golden cases too.
    """
    first = measured[0]
    bundle = Bundle.open(folder)
    worst = max(first.golden, key=lambda case: case.error)
    return BackendFacts(
        name=name,
        title=TITLES[name],
        bundle_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        weights_bytes=sum(bundle.file(path).stat().st_size for path in getattr(bundle.model.variants, name).data),
        load_seconds=median(m.load_seconds for m in measured),
        peak_rss_bytes=round(median(m.peak_rss_bytes for m in measured[1:])),
        prefill_tokens_per_second=PREFILL / median(s for m in measured for s in m.prefill_seconds),
        decode_tokens_per_second=DECODE / median(s for m in measured for s in m.decode_seconds),
        mean_kl=json.loads((folder / "report.json").read_bytes())["mean_kl"],
        golden_cases=len(first.golden),
        golden_passed=sum(case.passed for case in first.golden),
        golden_error=worst.error,
        golden_tolerance=worst.tolerance,
        torch_loaded=any(m.torch_loaded for m in measured),
    )


def _agreement(measured: list[Measured], logits: list[Path]) -> Agreement:
    """How far two backends say the same.

    Args:
        logits: the files of their scores of the same tokens.
    """
    one, other = measured
    of_one, of_other = (np.load(path) for path in logits)
    return Agreement(
        answers=len(one.answers),
        same_answers=sum(a == b for a, b in zip(one.answers, other.answers, strict=True)),
        tokens=len(of_one),
        same_best_token=float(np.mean(of_one.argmax(1) == of_other.argmax(1))),
        mean_kl=float(kl_divergence(of_one, of_other).mean()),
    )
