"""Damaged files: with flipped bits and cut off, for a bounded time, under AddressSanitizer.

Nothing of them may end a process. What is promised beyond that differs. A file that was cut off is always refused. Packed weights
are checked before they are used, and made again. Data are numbers: wrong ones give wrong answers, and only a hash tells. A program
is code: ExecuTorch checks the form of its tables, not what they say, and running a flipped one can end the process all the same. So
everything up to loading a method is tried here, and who runs programs compares their hashes first, as `crayon_runtime` does.

CRAYON_FUZZ_SECONDS: how long for each kind of file (5).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native import official
from tests.native.official import Program
from tests.support import needs

needs.native()

SECONDS = float(os.environ.get("CRAYON_FUZZ_SECONDS", "5"))

FUZZ = """
import random, sys, time, traceback
from pathlib import Path
import crayon_native as native

kind, folder, seconds, start, pte, *ptds = sys.argv[1:]
source, target = Path({"program": pte, "data": ptds[0]}[kind]).read_bytes(), Path(folder, "damaged")

def answer(program, data):
    with native.Program(program, data) as p:
        cache = p.new_cache()
        cache.use(p, "forward")
        return cache.step([1, 2, 3], 0).logits.copy()

def look(program):
    with native.Program(program, ptds) as p:
        for name in p.methods:
            try:
                p.constant(name)
            except native.NativeError:
                pass
        p.new_cache()
    return None

end, seed = time.monotonic() + float(seconds), int(start)
while time.monotonic() < end:
    rng, damaged = random.Random(seed), bytearray(source)
    cut = seed % 3 == 0
    if cut:
        del damaged[rng.randrange(len(damaged)):]
    else:
        # Tables are at the front of a program, at both ends of data.
        head, tail = min(len(damaged), 40000), min(len(damaged), 2000)
        for _ in range(rng.randrange(1, 9)):
            at = rng.choice([rng.randrange(len(damaged)), rng.randrange(head), rng.randrange(-tail, 0)])
            damaged[at] ^= 1 << rng.randrange(8)
    target.unlink(missing_ok=True)
    target.write_bytes(damaged)
    print(seed, end=" ", flush=True)
    try:
        match kind:
            case "program":
                got = look(target)
            case "data":
                got = answer(pte, [target, *ptds[1:]])
        if cut:
            sys.exit("a file that was cut off")
        print("ran", flush=True)
    except native.NativeError as e:
        print(e.status.name, flush=True)
    seed += 1
"""


def sanitizer() -> dict[str, str]:
    """The environment of a process that can load the library with AddressSanitizer."""
    library = needs.sanitized_library()
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {
        "CRAYON_NATIVE_LIBRARY": str(library),
        "LD_PRELOAD": " ".join(runtimes),
        # Python does not free everything, nor do frames that a failed check of ExecuTorch's is thrown through.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["program", "data"])
def test_damaged_files_end_no_process(tmp_path: Path, kind: str) -> None:
    """A child that dies says at which seed; the next goes on behind it, so that one run reports every one."""
    environment = os.environ | sanitizer()
    program: Program = official.exported().adapter
    seed, left, deaths, tried = 1, SECONDS, [], 0
    while left > 0 and len(deaths) < 5:
        run = subprocess.run(
            [sys.executable, "-c", FUZZ, kind, tmp_path, str(left), str(seed), program.path, *program.data],
            env=environment,
            capture_output=True,
            text=True,
            timeout=10 * SECONDS + 300,
        )
        lines = run.stdout.splitlines()
        tried += len(lines)
        if run.returncode == 0:
            break
        deaths.append((lines[-1:], run.returncode, run.stderr[-2000:]))
        seed = int(lines[-1].split()[0]) + 1 if lines else seed + 1
        left -= SECONDS / 5
    assert not deaths, deaths
    assert tried > 5
