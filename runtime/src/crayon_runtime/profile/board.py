"""What a board runs while it is profiled over ssh: its text is sent there, so it needs nothing but Python's standard library.

Asked by lines of JSON on stdin, it holds the board's lock, keeps files by their hashes, makes a temporary folder of them, and runs the
measuring program in it. When its stdin ends, or nothing comes from there any more, it ends the program and removes the folder.

Its answers begin with `OWN`, the lines of the measuring program with `PROGRAMS`. Whatever else comes out was said by a login shell.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

OWN, PROGRAMS = b"\x02", b"\x03"
SILENCE = 60.0
"""Seconds without a sign of life after which nobody is taken to be there."""

LOCK = "crayon-profile.lock"
SITE = "site"
_CHUNK = 1 << 20


class Gone(Exception):
    """Nobody asks any more."""


class Refused(Exception):
    """What was asked for cannot be done: the fields of a `Failure`."""

    def __init__(self, what: str, where: object, do: str, error: str = "DeviceError") -> None:
        super().__init__({"type": "failure", "error": error, "what": what, "where": str(where), "do": do})


class Asker:
    """Who is at the other end."""

    def __init__(self, fd: int, silence: float) -> None:
        self._fd = fd
        self._silence = silence
        self._buffer = b""

    def line(self) -> bytes:
        while b"\n" not in self._buffer:
            self._buffer += self._more()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def content(self, size: int) -> Iterator[bytes]:
        while size:
            self._buffer = self._buffer or self._more()
            chunk, self._buffer = self._buffer[:size], self._buffer[size:]
            size -= len(chunk)
            yield chunk

    def _more(self) -> bytes:
        ready, _, _ = select.select([self._fd], [], [], self._silence)
        more = os.read(self._fd, _CHUNK) if ready else b""
        if not more:
            raise Gone
        return more


class Board:
    """What is done here. `cache` outlives this process, and has the files of former profiles by their hashes; `folder` does not."""

    def __init__(self, asker: Asker, lock: int, cache: Path) -> None:
        self._asker = asker
        self._lock = lock
        self._process: subprocess.Popen[bytes] | None = None
        self._cache = cache
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob("run-*"):  # by one whose end was as sudden as that of its power
            shutil.rmtree(left, ignore_errors=True)
        self._folder = Path(tempfile.mkdtemp(prefix="run-", dir=cache))

    def serve(self) -> NoReturn:
        """Do what is asked, until nobody asks."""
        try:
            while True:
                line = self._asker.line()
                if line:  # an empty one is a sign of life
                    asked = json.loads(line)
                    getattr(self, "ask_" + asked.pop("ask"))(**asked)
        finally:
            self.ask_stop()
            shutil.rmtree(self._folder, ignore_errors=True)

    def ask_have(self, files: dict[str, int], unpacked: int) -> None:
        """Say which files are missing. There is room for them, and for so many bytes that they are unpacked to."""
        missing = [sha256 for sha256 in files if not self._has(sha256)]
        needed = sum(in_blocks(files[sha256]) for sha256 in missing) + unpacked
        if shutil.disk_usage(self._cache).free < needed:
            for old in self._cache.iterdir():
                if old.is_file() and old.name not in files:
                    old.unlink()
            free = shutil.disk_usage(self._cache).free
            if free < needed:
                raise _no_space(self._cache, f": {needed / 1e6:.1f} MB are needed, and {free / 1e6:.1f} MB free")
        answer({"missing": missing, "folder": str(self._folder)})

    def ask_put(self, sha256: str, size: int) -> None:
        """Take a file, which follows."""
        digest, incoming = hashlib.sha256(), self._folder / "incoming"
        with incoming.open("wb") as file:
            for chunk in self._asker.content(size):
                digest.update(chunk)
                file.write(chunk)
        answer({"sha256": digest.hexdigest()})
        if digest.hexdigest() == sha256:
            incoming.replace(self._cache / sha256)

    def ask_install(self, wheels: list[str], files: list[tuple[str, str]]) -> None:
        """Unpack wheels, and give files their names."""
        site = self._folder / SITE
        for sha256 in wheels:
            with zipfile.ZipFile(self._cache / sha256) as wheel:
                wheel.extractall(site)
        for scheme in site.glob("*.data/*lib"):  # purelib and platlib are at the root of an installation
            shutil.copytree(scheme, site, dirs_exist_ok=True)
        (self._folder / "tmp").mkdir()
        for path, sha256 in files:
            target = self._folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self._cache / sha256, target)
            except OSError:  # a file system without links
                shutil.copyfile(self._cache / sha256, target)
        answer({})

    def ask_run(self, module: str, job: dict[str, Any], environment: dict[str, str]) -> None:
        """Run the measuring program; what it says is handed on as it comes."""
        here = {"PYTHONPATH": str(self._folder / SITE), "PYTHONNOUSERSITE": "1"}
        here |= dict.fromkeys(("TMPDIR", "XDG_CACHE_HOME"), str(self._folder / "tmp"))
        said = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115, a thread closes it
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=os.environ | here | environment,
            start_new_session=True,
            pass_fds=[self._lock],  # nobody else measures as long as it lives
        )
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it died at once, which is said below
            process.stdin.write(json.dumps(job).encode())
            process.stdin.close()

        def hand_on() -> None:
            assert process.stdout is not None
            with suppress(OSError), said:
                for line in process.stdout:
                    _write(PROGRAMS + line.rstrip(b"\n"))
                code = process.wait()
                said.seek(0)
                answer({"ended": code, "said": said.read()[-2000:].decode(errors="replace").strip()})

        threading.Thread(target=hand_on, daemon=True).start()

    def ask_stop(self) -> None:
        """End the measuring program."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _has(self, sha256: str) -> bool:
        path = self._cache / sha256
        if not path.is_file():
            return False
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                return True
        path.unlink()
        return False


def in_blocks(size: int) -> int:
    """What a file of so many bytes takes on a disk."""
    return -(-size // 4096) * 4096


def answer(value: dict[str, Any]) -> None:
    _write(OWN + json.dumps(value).encode())


def facts() -> dict[str, Any]:
    """What decides which wheels fit."""
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        libc = ""
    version = sys.version_info
    return {
        "python": [version.major, version.minor],
        "version": sys.version.split()[0],
        "abi": f"cp{version.major}{version.minor}{sys.abiflags}",
        "platform": sysconfig.get_platform(),
        "bits": 64 if sys.maxsize > 1 << 32 else 32,
        "libc": libc,
    }


def hold_lock(folder: Path) -> int:
    """The lock that local profiles hold too."""
    path = folder / LOCK
    # Not created where it exists: a system may refuse that for a file of another user in a folder of all.
    held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | (0 if path.exists() else os.O_CREAT), 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        what = "another profile is being made on this device, and the two would measure each other"
        raise Refused(what, path, "wait until it has ended, or end it", "BackendError") from None
    return held


def _write(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _no_space(where: object, detail: str = "") -> Refused:
    return Refused(
        f"there is no space left on the device{detail}", where, "free some there, or set XDG_CACHE_HOME there"
    )


def _exit(*_: object) -> NoReturn:
    raise Gone


def main() -> int:
    """0 when nobody asked any more, 1 when something that was asked for cannot be done, which is said."""
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _exit)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crayon" / "profile"
    try:
        lock = hold_lock(Path(tempfile.gettempdir()))
        board = Board(Asker(0, float(sys.argv[1]) if len(sys.argv) > 1 else SILENCE), lock, cache)
        answer(facts())
        board.serve()
    except (Gone, BrokenPipeError):
        return 0
    except Refused as e:
        answer(e.args[0])
    except OSError as e:
        where = e.filename or cache
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        refused = (
            _no_space(where) if full else Refused(f"the board refuses: {e.strerror or e}", where, "look at it there")
        )
        answer(refused.args[0])
    return 1


if __name__ == "__main__":
    sys.exit(main())
