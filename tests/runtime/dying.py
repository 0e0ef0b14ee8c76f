"""A device that fails at every single file operation of a customization, one after the other; a program, for tests.

python -m tests.runtime.dying kill|full [without-exchange] FOLDER SOURCE

FOLDER/customized is customized with other settings in child processes. The first one fails at its first file operation, the next one at
its second, until one does not fail any more. `kill` is kill -9; `full` is a disk without room. After each, what is there must be the old
or the new customization, whole. SOURCE is the folder of a pool, or the address of a service that signs nothing.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crayon_runtime import files
from crayon_runtime.bundle import Bundle
from crayon_runtime.customize import ADAPTER, customize, kept_examples, read_state
from crayon_runtime.customized import example_states
from crayon_runtime.errors import OutputError
from crayon_runtime.examples import Example
from crayon_runtime.pool import Pool
from crayon_runtime.remote import PoolClient
from tests.runtime import tiny
from tests.runtime.bundles import contents

EXAMPLES = [Example("the alarm", " a b"), Example("the", " the")]
STATUS = {"did not fail": 0, "broke": 1, "did without": 2, "said that the disk is full": 3}
OLD, NEW = {"digits": 1}, {"digits": 3}

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.utime", "os.truncate", "shutil.rmtree"}
_MAKES = {"os.mkdir", "os.rename"}
_WRITES = os.O_WRONLY | os.O_RDWR


def run(folder: Path, source: str, settings: dict[str, Any]) -> bool:
    def script(tokens: list[int], adapter: str | None) -> Any:
        import numpy as np

        return np.full(tiny.VOCAB_SIZE, 0.0, np.float32) if adapter is None else LIKELY

    with tiny.engine(script, bundle=Bundle.open(folder / "model"), tap_size=8) as engine:
        if not source.startswith("http"):
            return customize(engine, EXAMPLES, Pool.open(source), folder=folder / "customized", **settings).installed
        with PoolClient(source, trusted=None, cache=folder / "customized.cache") as client:
            return customize(engine, EXAMPLES, client, folder=folder / "customized", **settings).installed


def fail_at(number: int, act: Callable[[str], object], everything: bool) -> None:
    """From now on, act at the file operation of this number, and before and after the exchange of two paths."""
    count = itertools.count(1)

    def step(what: str) -> None:
        if next(count) == number:
            act(what)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            step(f"open {arguments[0]}")
        elif event in (_CHANGES if everything else _MAKES):
            step(f"{event} {arguments[:2]}")

    fsync, exchange = os.fsync, files._exchange

    def stepping_fsync(fd: int) -> None:
        step("before fsync")
        fsync(fd)

    def stepping_exchange(a: Path, b: Path) -> bool:
        step("before the exchange")
        done = exchange(a, b)
        if everything:
            step("after the exchange")
        return done

    os.fsync, files._exchange = stepping_fsync, stepping_exchange
    sys.addaudithook(audit)


def child(folder: Path, source: str, number: int, kind: str) -> int:
    """Its exit status: a negative signal, or one of `STATUS`."""
    failed = False

    def die(_: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def refuse(_: str) -> None:
        nonlocal failed
        failed = True
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = STATUS["broke"]
    try:
        fail_at(number, die if kind == "kill" else refuse, everything=kind == "kill")
        if run(folder, source, NEW):
            status = STATUS["did without" if failed else "did not fail"]
    except OutputError as e:
        status = STATUS["said that the disk is full" if e.what == "the disk is full" else "broke"]
    finally:
        if status == STATUS["broke"]:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)


def whole(folder: Path) -> dict[str, bytes]:
    Bundle.open(folder / ADAPTER, verify=True)
    read_state(folder)
    kept_examples(folder)
    assert example_states(folder) is not None
    return contents(folder)


def main(kind: str, folder: Path, source: str, *, exchange: bool) -> None:
    if not exchange:
        files._exchange = lambda a, b: False
    target = folder / "customized"
    assert run(folder, source, NEW)
    new = whole(target)
    assert run(folder, source, OLD)
    old = whole(target)
    assert new != old
    shutil.copytree(target, folder / "kept")
    outcomes = {"old": 0, "new": 0}
    for number in itertools.count(1):
        shutil.rmtree(folder / "customized.cache", ignore_errors=True)
        status = child(folder, source, number, kind)
        expected = (
            {-signal.SIGKILL} if kind == "kill" else {STATUS["did without"], STATUS["said that the disk is full"]}
        )
        assert status in {STATUS["did not fail"], *expected}, f"operation {number}: exit status {status}"
        files.recover(target)
        found = whole(target)
        assert found in (old, new), f"operation {number}: {sorted(found)}"
        outcomes["old" if found == old else "new"] += 1
        leftovers = [p.name for p in folder.iterdir() if p.name.startswith(".")]
        assert len(leftovers) <= (kind == "kill"), f"operation {number}: {leftovers}"
        if found == new:
            shutil.rmtree(target)
            shutil.copytree(folder / "kept", target)
        if status == STATUS["did not fail"]:
            break
    assert found == new
    assert not [p for p in folder.rglob(".*") if p.name != ".installed.json"]
    print(f"{number - 1} operations; {outcomes['old']} times the old one, {outcomes['new']} times the new one")


if __name__ == "__main__":
    import numpy as np

    LIKELY = np.zeros(tiny.VOCAB_SIZE, np.float32)
    for example in EXAMPLES:
        LIKELY[tiny.TOKENIZER.encode(example.completion)] = 1.0
    kind, *options, place, source = sys.argv[1:]
    main(kind, Path(place), source, exchange="without-exchange" not in options)
