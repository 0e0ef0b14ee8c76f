"""A phone that is reached by adb: Android's own adbd, alone in a network namespace, with a /data and an /sdcard of its own."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from crayon_runtime.profile.jobs import Job
from crayon_runtime.profile.target import Asked
from tests.support import needs


class Phone:
    """An adbd, and an adb server that knows no other one. The namespace ends with `stop`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._adbd = needs.adbd()
        self._name = f"crayon-{os.getpid()}"
        self._process: subprocess.Popen[bytes] | None = None
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        own_server(folder, monkeypatch)
        network = os.getpid() % 16384
        here, there = (f"10.213.{network >> 6}.{(network & 63) * 4 + host}" for host in (1, 2))
        self.serial = f"{there}:5555"
        self._storage = _Storage()
        inside = ["ip", "-n", self._name]
        for command in (
            ["ip", "netns", "add", self._name],
            ["ip", "link", "add", f"cr{os.getpid()}", "type", "veth", "peer", "name", "phone", "netns", self._name],
            ["ip", "addr", "add", f"{here}/30", "dev", f"cr{os.getpid()}"],
            ["ip", "link", "set", f"cr{os.getpid()}", "up"],
            [*inside, "addr", "add", f"{there}/30", "dev", "phone"],
            [*inside, "link", "set", "phone", "up"],
        ):
            subprocess.run(command, check=True)

    def properties(self, values: dict[str, object] | None) -> None:
        """What `getprop` says; None: there is no such program."""
        (self.bin / "getprop").unlink(missing_ok=True)
        if values is not None:
            cases = "".join(f"{name}) echo '{value}';;\n" for name, value in values.items())
            (self.bin / "getprop").write_text(f"#!/bin/sh\ncase $1 in\n{cases}esac\n")
            (self.bin / "getprop").chmod(0o755)

    def start(self, *, size: str = "64m") -> None:
        """Turn it on, with a storage of this size."""
        mounted = f"mount -t tmpfs -o size={size} tmpfs /data && mount -t tmpfs -o size=8m tmpfs /sdcard"
        mount = f"{mounted} && mkdir -p /data/local/tmp && exec {self._adbd}"
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", self._name, "sh", "-c", mount],
            env=os.environ | {"PATH": path},
            stderr=subprocess.DEVNULL,
        )
        for _ in range(100):
            subprocess.run(["adb", "connect", self.serial], capture_output=True, check=False)
            if self.shell("echo on") == "on":
                return
            time.sleep(0.1)
        raise AssertionError("adbd does not answer")

    def shell(self, command: str) -> str:
        """What a command says there."""
        adb = ["adb", "-s", self.serial, "shell", command]
        return subprocess.run(adb, capture_output=True, text=True, check=False).stdout.strip()

    def unplug(self) -> None:
        """Turn it off."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            subprocess.run(["adb", "disconnect", self.serial], capture_output=True, check=False)

    def unplug_in(self, seconds: float) -> None:
        threading.Timer(seconds, self.unplug).start()

    def stop(self) -> None:
        self.unplug()
        subprocess.run(["adb", "kill-server"], capture_output=True, check=False)
        for process in subprocess.run(
            ["ip", "netns", "pids", self._name], capture_output=True, text=True, check=False
        ).stdout.split():
            os.kill(int(process), 9)
        subprocess.run(["ip", "netns", "del", self._name], check=True)
        self._storage.close()


class _Storage:
    """/data and /sdcard, as long as any phone of any process needs them: who removes a folder unmounts what others have mounted there."""

    def __init__(self) -> None:
        self._made = (Path(tempfile.gettempdir()) / "crayon-phones").open("a+")
        fcntl.flock(self._made, fcntl.LOCK_SH)
        for folder in (Path("/data"), Path("/sdcard")):
            with suppress(FileExistsError):
                folder.mkdir()
                self._made.write(f"{folder}\n")
        self._made.flush()

    def close(self) -> None:
        with self._made, suppress(BlockingIOError):  # there is another phone, which does it
            fcntl.flock(self._made, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._made.seek(0)
            for folder in self._made.read().split():
                Path(folder).rmdir()
            self._made.truncate(0)


@contextmanager
def connected(folder: Path) -> Iterator[Phone]:
    """A phone that is on, for the tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        phone = Phone(folder, patch)
        phone.start()
        yield phone
        phone.stop()


def asked(bundle: Path, **others: Any) -> Asked:
    return Asked(str(bundle), **{"backend": "auto", "adapter": None} | others)


def job(held: Asked, work: Any, **others: Any) -> Job:
    return Job(**held._asdict(), **{"threads": 1, "cpus": None, "process": 0, "work": work} | others)


def own_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The port of an adb server for this test, which whoever needs it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
    monkeypatch.setenv("ANDROID_USER_HOME", str(folder))
    monkeypatch.setenv("ADB_MDNS", "0")
    monkeypatch.setenv("ADBUTILS_ADB_PATH", shutil.which("adb") or "adb")
    return port


def scripted_server(port: int, devices: str) -> socket.socket:
    """An adb server that knows devices, and can say nothing else of them: adb's protocol in the state that adbd cannot be brought into."""
    server = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                asked = connection.recv(int(connection.recv(4), 16))
                assert asked == b"host:devices"
                connection.sendall(b"OKAY" + f"{len(devices):04x}{devices}".encode())

    threading.Thread(target=serve, daemon=True).start()
    return server
