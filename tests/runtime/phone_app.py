"""What Android's `am`, `pm` and `pidof` do with the app on a phone, in which Python's measuring program takes the app's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from crayon_runtime.profile.app import PACKAGE, RESULTS
from crayon_runtime.profile.target import MODULE
from tests.support import ROOT

_PID = Path("/data/app.pid")


def install(programs: Path) -> None:
    """Put the app on a phone, with the folder of its programs."""
    for name, script in (
        ("pm", f"echo package:/data/app/{PACKAGE}/base.apk"),
        ("pidof", f"[ -e {_PID} ] && [ -e /proc/$(cat {_PID})/cwd ]"),
        ("am", f'cd {ROOT} && exec {sys.executable} -m tests.runtime.phone_app "$@"'),
    ):
        program = programs / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)


def remove(programs: Path) -> None:
    for name in ("am", "pm", "pidof"):
        (programs / name).unlink()


def main(arguments: list[str]) -> int:
    """`am`."""
    if arguments == ["force-stop", PACKAGE]:
        _stop()
        return 0
    assert arguments[:4] == ["start", "-S", "-n", f"{PACKAGE}/.benchmark.HeadlessBenchmarkActivity"]
    _stop()
    extras = [arguments[i : i + 3] for i in range(5, len(arguments), 3)]
    assert all(extra[0] == "--es" for extra in extras)
    values = {key: value for _, key, value in extras}
    job = json.loads(values["job"])
    assert job["bundle"] == values["bundle"]
    if os.fork():
        return 0
    os.setsid()
    for descriptor in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    _PID.write_text(str(os.getpid()))
    out = Path(RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", MODULE], input=values["job"].encode(), stdout=subprocess.PIPE, check=False
    )
    partial = out / f"{values['name']}.new"  # as AtomicFile does
    partial.write_bytes(done.stdout)
    partial.rename(out / values["name"])
    return 0


def _stop() -> None:
    if _PID.exists():
        with suppress(ProcessLookupError):
            os.killpg(int(_PID.read_text()), signal.SIGKILL)
        _PID.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
