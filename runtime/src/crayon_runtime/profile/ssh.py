"""Profiling on a board that is reached by ssh: `--target ssh://[user@]host[:port]`.

One connection of the `ssh` binary, so that ~/.ssh/config, agents and known hosts are what they always are. At its other end the board's own
Python runs the text of `board.py`, which takes the runtime and the bundle, runs the measuring program, and cleans up as soon as the
connection ends, whatever ended it.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import msgspec

from crayon_runtime.backends import served
from crayon_runtime.bundle import Bundle
from crayon_runtime.errors import DeviceError, MissingExtra
from crayon_runtime.files import CHUNK
from crayon_runtime.profile import board
from crayon_runtime.profile.jobs import Job
from crayon_runtime.profile.push import Item, adapter_outside, check_sent, check_served, items_of, total
from crayon_runtime.profile.records import Failure
from crayon_runtime.profile.target import MODULE, Asked, OnStep, check_end, environment_of, error_of

OPTIONS = (
    "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3",
    "-o", "ClearAllForwardings=yes",
)  # fmt: skip

OLDEST = (3, 11)
"""The oldest Python that the runtime runs in."""

_TOO_OLD = "crayon needs a newer Python than "
_SIGN_OF_LIFE = board.SILENCE / 4


class Ssh:
    """A board.

    Args:
        address: `[user@]host`, or a name of ~/.ssh/config.
        port: None: what the configuration says.
        wheels: a folder of wheels for the board; None: see `crayon_runtime.profile.wheels`.
    """

    def __init__(self, address: str, port: int | None = None, *, wheels: Path | None = None) -> None:
        self.name = f"ssh://{address}" + (f":{port}" if port is not None else "")
        self._address = address
        self._port = port
        self._wheels = wheels
        self._connection: _Connection | None = None

    @contextmanager
    def hold(self, asked: Asked, on_step: OnStep) -> Iterator[Asked]:
        try:
            from crayon_runtime.profile.wheels import NATIVE, Board, wheelhouse
        except ModuleNotFoundError as e:
            raise MissingExtra("device", "profiling over ssh") from e
        bundle = Bundle.open(asked.bundle)
        check_served(bundle, asked.backend)
        adapter = adapter_outside(bundle, asked.adapter)
        on_step(f"connecting to {self.name}")
        with _Connection(self._command(), self.name, self._address) as connection:
            there = Board.of(connection.facts)
            names = served(bundle) if asked.backend == "auto" else [asked.backend]
            try:
                wheels = wheelhouse(there, native="executorch" in names, folder=self._wheels, on_step=on_step)
            except DeviceError as e:
                if "onnx" not in names or NATIVE not in e.what:
                    raise
                on_step(f"only by onnxruntime: {e.what}")
                wheels = wheelhouse(there, native=False, folder=self._wheels, on_step=on_step)
            install = [Item.of("", wheel) for wheel in wheels]
            place = f"bundle/{bundle.path.name}"
            files = items_of(bundle, place) + (items_of(adapter, "adapter") if adapter else [])
            folder = connection.send(install, files, on_step)
            self._connection = connection
            try:
                yield Asked(
                    bundle=f"{folder}/{place}",
                    backend=asked.backend,
                    adapter=f"{folder}/adapter" if adapter else asked.adapter,
                )
            finally:
                self._connection = None

    def run(self, job: Job) -> Iterator[bytes]:
        assert self._connection is not None, "the board is not held"
        code, said = yield from self._connection.run(job)
        check_end(code, said, job)

    def _command(self) -> list[str]:
        text = base64.b64encode(zlib.compress(Path(board.__file__).read_bytes(), 9)).decode()
        # In double quotes there is nothing that any login shell takes for its own.
        start = (
            f"import sys; sys.version_info < {OLDEST} and sys.exit('{_TOO_OLD}' + sys.version.split()[0]); "
            f"import base64, zlib; exec(zlib.decompress(base64.b64decode('{text}')))"
        )
        port = () if self._port is None else ("-p", str(self._port))
        return ["ssh", *OPTIONS, *port, "--", self._address, f'python3 -c "{start}"']


class _Connection:
    """What `board.py` is asked, and says."""

    def __init__(self, command: Sequence[str], name: str, address: str) -> None:
        self._name = name
        self._address = address
        self._said = tempfile.TemporaryFile()  # noqa: SIM115, it is closed on leaving
        self._sending = threading.Lock()
        self._ending = threading.Event()
        try:
            # In a session of its own: Ctrl-C is for us, and we end it.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, start_new_session=True
            )
        except FileNotFoundError:
            raise DeviceError("there is no `ssh` here", do="install OpenSSH's client") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        try:
            self.facts = self._answer(begun=False)
            threading.Thread(target=self._show_signs_of_life, daemon=True).start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Leave: the board notices, and ends by itself when it has cleaned up."""
        self._ending.set()
        with suppress(OSError):
            self._stdin.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait()
            self._stdout.close()
            self._said.close()

    def send(self, wheels: Sequence[Item], files: Sequence[Item], on_step: OnStep) -> str:
        """Put there what is missing, and install it; the folder that it is in."""
        items = {item.sha256: item for item in (*wheels, *files)}
        unpacked = sum(_unpacked_size(wheel.source) for wheel in wheels)
        on_step("what is on the board already")
        found = self._ask("have", files={sha256: item.size for sha256, item in items.items()}, unpacked=unpacked)
        missing = [items[sha256] for sha256 in found["missing"]]
        if missing:
            on_step(f"sending {len(missing)} of {len(items)} files, {total(missing) / 1e6:.1f} MB")
        for item in missing:
            self._put(item)
        on_step("installing the runtime on the board")
        self._ask(
            "install",
            wheels=[wheel.sha256 for wheel in wheels],
            files=[(item.path, item.sha256) for item in files],
        )
        return str(found["folder"])

    def run(self, job: Job) -> Generator[bytes, None, tuple[int, str]]:
        """Lines of the measuring program; then its exit code, and what it said on stderr."""
        ended = False
        try:
            self._write([_line("run", module=MODULE, job=msgspec.to_builtins(job), environment=environment_of(job))])
            for line in self._lines():
                if not line.startswith(board.PROGRAMS):
                    ended = True
                    answer = self._parsed(line)
                    return answer["ended"], answer["said"]
                yield line[1:]
        finally:
            if not ended and self._process.poll() is None:
                self._write([_line("stop")])
                for line in self._lines():
                    if line.startswith(board.OWN):
                        break
        raise self._lost()

    def _put(self, item: Item) -> None:
        def content() -> Iterator[bytes]:
            yield _line("put", sha256=item.sha256, size=item.size)
            left = item.size
            with item.source.open("rb") as file:
                while left and (chunk := file.read(min(left, CHUNK))):
                    left -= len(chunk)
                    yield chunk
            yield b"\0" * left  # it has become shorter: the hash tells

        self._write(content())
        check_sent(item, self._answer()["sha256"])

    def _ask(self, what: str, **fields: object) -> dict[str, Any]:
        self._write([_line(what, **fields)])
        return self._answer()

    def _answer(self, *, begun: bool = True) -> dict[str, Any]:
        for line in self._lines():
            if line.startswith(board.OWN):
                return self._parsed(line)
        raise self._lost() if begun else self._not_reached()

    def _lines(self) -> Iterator[bytes]:
        for line in self._stdout:
            if line[:1] in (board.OWN, board.PROGRAMS):
                yield line

    def _parsed(self, line: bytes) -> dict[str, Any]:
        """An answer; what the board refuses is an error here."""
        answer: dict[str, Any] = json.loads(line[1:])
        if answer.get("type") == "failure":
            failure = msgspec.convert(answer, Failure)
            raise error_of(msgspec.structs.replace(failure, where=f"{self._name}: {failure.where}"))
        return answer

    def _write(self, parts: Sequence[bytes] | Iterator[bytes]) -> None:
        try:
            with self._sending:
                for part in parts:
                    self._stdin.write(part)
                self._stdin.flush()
        except BrokenPipeError:  # it may have said why
            self._answer()

    def _show_signs_of_life(self) -> None:
        with suppress(OSError, ValueError):
            while not self._ending.wait(_SIGN_OF_LIFE):
                with self._sending:
                    self._stdin.write(b"\n")
                    self._stdin.flush()

    def _end(self) -> tuple[int, str]:
        """The exit code of ssh, and the last that it said."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._said.seek(0)
        return self._process.poll() or 0, self._said.read()[-4000:].decode(errors="replace").strip()

    def _lost(self) -> DeviceError:
        _, said = self._end()
        last = f": {said.splitlines()[-1]}" if said else ""
        return DeviceError(
            f"the connection to the board was lost{last}",
            where=self._name,
            do="look whether it is still on and reachable; nothing of this profile was kept, and files that it has got are not sent again",
        )

    def _not_reached(self) -> DeviceError:
        code, said = self._end()
        last = said.splitlines()[-1] if said else f"ssh ended with code {code}"
        what, do = f"the board cannot be reached: {last}", "check its address, and that sshd runs there"
        if old := re.search(f"{_TOO_OLD}(.+)", said):
            what = f"the board's python3 is {old[1]}, which is too old"
            do = "install Python {}.{} or newer there, as `python3`".format(*OLDEST)
        elif code == 127:
            what, do = (
                f"there is no python3 on the board: {last}",
                "install it there, as with `apt-get install python3`",
            )
        elif "REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
            what = "the board has another host key than before: it was set up anew, or this is another machine"
            do = f"if it is yours, forget the old one with `ssh-keygen -R`, and connect once by hand: ssh {self._address}"
        elif "Host key verification failed" in said:
            what = "the board's host key is not known here"
            do = f"connect once by hand, and compare it: ssh {self._address}"
        elif code == 255 and "Permission denied" in said:
            what = f"the board lets nobody in with the keys of this user: {last}"
            do = f"let `ssh -o BatchMode=yes {self._address} true` work first, as with `ssh-copy-id {self._address}`"
        elif code != 255:
            what, do = f"Python does not start on the board: {last}", "try `python3 --version` there"
        return DeviceError(what, where=self._name, do=do)


def _unpacked_size(wheel: Path) -> int:
    """What its files take on a disk."""
    with zipfile.ZipFile(wheel) as archive:
        return sum(board.in_blocks(info.file_size) for info in archive.infolist())


def _line(ask: str, **fields: object) -> bytes:
    return json.dumps({"ask": ask, **fields}).encode() + b"\n"
