"""A board that is reached by ssh: a real sshd on a port of its own, whose board is this machine with other folders and another Python."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import needs

PYTHON = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
"""Without the packages of the environment that the tests run in."""

_SERVER = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PrintMotd no
ForceCommand {folder}/shell
"""

_CLIENT = """\
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile none
"""


class Board:
    """What is in `folder`: sshd's log and keys, and of the board its cache, its folder for temporary files and its programs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._sshd = needs.sshd()
        self.folder, self.cache, self.tmp, self.bin = folder, folder / "cache", folder / "board-tmp", folder / "bin"
        for new in (folder, self.cache, self.tmp, self.bin, folder / "client"):
            new.mkdir()
        self.python(f'exec {PYTHON} "$@"')
        for key in ("key", "host_key"):
            new_key(folder / key)
        (folder / "client" / "config").write_text(_CLIENT.format(folder=folder))
        _program(folder / "client" / "ssh", f'exec {shutil.which("ssh")} -F {folder}/client/config "$@"')
        monkeypatch.setenv("PATH", str(folder / "client"), prepend=os.pathsep)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"{getpass.getuser()}@127.0.0.1"

    def python(self, script: str | None) -> None:
        """What `python3` is on the board; None: there is none."""
        (self.bin / "python3").unlink(missing_ok=True)
        if script is not None:
            _program(self.bin / "python3", script)

    def start(self, **environment: object) -> None:
        """Begin anew, on another port."""
        self.stop()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        there = {"XDG_CACHE_HOME": self.cache, "TMPDIR": self.tmp, "PATH": f"{self.bin}:/usr/bin:/bin"} | environment
        settings = " ".join(f"{name}={value}" for name, value in there.items())
        # After the start-up files of this user's shell, which may change PATH.
        _program(self.folder / "shell", f'export {settings}; exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"')
        config = self.folder / "sshd_config"
        config.write_text(_SERVER.format(port=self.port, folder=self.folder))
        self.trust(self.folder / "host_key.pub")
        self._process = subprocess.Popen([self._sshd, "-D", "-f", config, "-E", self.folder / "sshd.log"])
        for _ in range(200):
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError((self.folder / "sshd.log").read_text())

    def trust(self, *keys: Path) -> None:
        """The only host keys that the client knows."""
        known = "".join(f"[127.0.0.1]:{self.port} {key.read_text()}" for key in keys)
        (self.folder / "known_hosts").write_text(known)

    def sessions(self) -> list[int]:
        """The processes of sshd that serve a connection."""
        assert self._process is not None
        listed = subprocess.run(
            ["pgrep", "--parent", str(self._process.pid)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in listed.stdout.split()]

    def cut(self) -> None:
        """End all connections, as a board that loses its power."""
        for pid in self.sessions():
            os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def new_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
