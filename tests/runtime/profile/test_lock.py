from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from crayon_runtime.errors import BackendError
from crayon_runtime.profile.board import LOCK
from crayon_runtime.profile.lock import one_at_a_time

_HOLD = """
import sys
from pathlib import Path
from crayon_runtime.profile.lock import one_at_a_time
with one_at_a_time(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_profiles_do_not_run_together_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BackendError, match="another profile is being made") as refused, one_at_a_time(tmp_path):
            pass
        assert refused.value.where == str(tmp_path / LOCK)
        other.kill()
        other.wait()
    with one_at_a_time(tmp_path):
        pass
    with one_at_a_time(tmp_path):
        pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BackendError, match="cannot be opened"), one_at_a_time(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()
