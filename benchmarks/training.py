"""Training that is killed and goes on, against training that is not; and what a step of MobileLLM-125M takes here: some minutes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.table import Row
from crayon_server.data.phone_assistant import benchmark
from crayon_server.models import load_nano

STEPS, KILLED_AFTER = 60, (13, 37)
"""The first kill is between two checkpoints, as is the second."""


def run(work: Path) -> Iterator[Row]:
    for name in ("resumed", "resumed.work"):
        shutil.rmtree(work / name, ignore_errors=True)  # of an earlier benchmark
    texts = work / "training-texts.txt"
    texts.write_text("\n\n".join(e.text for user in benchmark().train for e in user.examples))
    options = ["--context-length", "64", "--batch-size", "8", "--steps", str(STEPS), "--checkpoint-every", "5"]
    command = _command("nano", texts, *options, "--held-out", "0.02", "--validate-every", "20")
    subprocess.run([*command, "--out", str(work / "uninterrupted"), "--force"], check=True, stdout=subprocess.DEVNULL)
    for steps in KILLED_AFTER:
        _kill_after(steps, [*command, "--out", str(work / "resumed"), "--work", str(work / "resumed.work")])
    subprocess.run(
        [*command, "--out", str(work / "resumed"), "--work", str(work / "resumed.work")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    whole, resumed = (_losses(work / name) for name in ("uninterrupted", "resumed"))
    same = (work / "uninterrupted/model.safetensors").read_bytes() == (work / "resumed/model.safetensors").read_bytes()
    yield Row(
        f"training killed (SIGKILL) after steps {' and '.join(map(str, KILLED_AFTER))} of {STEPS}, against uninterrupted",
        "identical losses",
        f"{sum(a == b for a, b in zip(whole, resumed, strict=True))} of {len(whole)} losses identical, "
        f"weights {'identical' if same else 'different'}",
        whole == resumed and same,
    )
    large = ["--tokenizer", str(load_nano()), "--context-length", "128", "--batch-size", "4", "--steps", "4"]
    out = work / "trained-125m"
    done = subprocess.run(
        [*_command("mobilellm-125m", texts, *large, "--held-out", "0"), "--out", str(out), "--force", "--json"],
        check=True,
        stdout=subprocess.PIPE,
    )
    said, details = json.loads(done.stdout), json.loads((out / "training.json").read_text())
    yield Row(
        f"a step of mobilellm-125m, vocabulary of nano ({details['parameters'] / 1e6:.1f} M), 4 x 128 tokens, one thread",
        "",
        f"{said['tokens_per_second']:.0f} tokens/s, MFU {said['mfu']:.0%} of the {details['peak_flops'] / 1e9:.0f} "
        "GFLOP/s of a matrix product",
    )


def _command(start: str, texts: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "crayon_runtime", "model", "train", start, "--data", str(texts), "--threads", "1"]
    return [*command, *options]


def _kill_after(steps: int, command: list[str]) -> None:
    """Start a training, and kill it when its log has so many steps."""
    work = Path(command[-1])
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not any(log.read_bytes().count(b"\n") >= steps for log in work.glob("training-*/loss.jsonl")):
        if process.poll() is not None:
            raise RuntimeError(f"the training ended before step {steps}")
        time.sleep(0.01)
    process.kill()
    process.wait()


def _losses(model: Path) -> list[tuple[float, float | None]]:
    """Of each step: on its batch, and on held-out texts where they were taken."""
    lines = [json.loads(line) for line in (model / "loss.jsonl").read_text().splitlines()]
    return [(line["loss"], line.get("validation_loss")) for line in lines]
