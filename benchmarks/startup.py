"""What a process pays before its first token."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.table import Row
from crayon_export import export
from crayon_server.models import load_nano

_IMPORT = """
import json, sys, time
started = time.perf_counter()
import crayon_runtime
seconds = time.perf_counter() - started
from crayon_runtime.probe import peak_memory
peak = peak_memory()
print(json.dumps({"seconds": seconds, "peak": peak, "torch": "torch" in sys.modules}))
"""


def run(work: Path) -> Iterator[Row]:
    runs = [json.loads(subprocess.check_output([sys.executable, "-c", _IMPORT])) for _ in range(7)]
    seconds, peak = (float(np.median([r[key] for r in runs])) for key in ("seconds", "peak"))
    torch = any(r["torch"] for r in runs)
    yield Row(
        "import crayon_runtime",
        "<= 0.3 s, <= 60 MB, no torch",
        f"{seconds:.2f} s, {peak / 1e6:.0f} MB, {'with' if torch else 'no'} torch",
        seconds <= 0.3 and peak <= 60e6 and not torch,
    )
    bundle = export(load_nano(), work / "startup.bundle", replace=True).bundle.path
    command = [sys.executable, "-m", "crayon_runtime", "run", str(bundle), "set an alarm", "--max-new-tokens", "1"]
    times = []
    for _ in range(7):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    yield Row("crayon run, nano: process start to the end of one token", "", f"{np.median(times):.2f} s")
