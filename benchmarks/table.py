"""One row a claim: what was measured, what it should reach, what it was."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    what: str
    reach: str
    measured: str
    met: bool | None = None
    """None: there is nothing to reach, the number is for the reader."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def machine() -> str:
    """This machine, in a line: processor, cores, memory, and the libraries that do the arithmetic."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
        flags = next((line for line in lines if line.startswith("flags")), "")
        cpu += "".join(f", {name}" for name in ("avx512_vnni", "avx_vnni", "amx_int8") if f" {name}" in flags)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB; Python {platform.python_version()}, "
        f"onnxruntime {version('onnxruntime')}, numpy {version('numpy')}"
    )


def render(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    marks = {True: "met", False: "**not met**", None: ""}
    lines = ["| what | reach | measured | |", "|---|---|---|---|"]
    lines += [f"| {r.what} | {r.reach} | {r.measured} | {marks[r.met]} |" for r in rows]
    return "\n".join(lines)
