"""The log of a training: what is there after a kill, and what is dropped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crayon_server.losses import Log, Step, encode, plot

STEPS = [Step(1, 3.5, 1e-3, 10, 0.1), Step(2, 2.5, 2e-3, 10, 0.1, validation_loss=2.25), Step(3, 2.0)]


def test_what_was_logged_is_there_again(tmp_path: Path) -> None:
    log = Log(tmp_path / "l")
    for step in STEPS:
        assert not log.has(step.step, step.loss)
        log.add(step)
    assert [json.loads(line)["loss"] for line in (tmp_path / "l").read_text().splitlines()] == [3.5, 2.5, 2.0]
    again = Log(tmp_path / "l")
    assert again.steps == STEPS
    assert again.has(2, 2.5)
    assert (tmp_path / "l").read_bytes() == encode(STEPS)


@pytest.mark.parametrize(
    "damage", [b'{"step":4,"loss":1.', b'{"step":4,"loss":1.5}', b'{"step":9,"loss":1.5}\n', b"\xff\n"]
)
def test_what_is_not_whole_is_dropped(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "l").write_bytes(encode(STEPS) + damage)
    log = Log(tmp_path / "l")
    assert log.steps == STEPS
    log.add(Step(4, 1.0))
    assert (tmp_path / "l").read_bytes() == encode([*STEPS, Step(4, 1.0)])


def test_a_step_with_another_loss_drops_what_followed(tmp_path: Path) -> None:
    (tmp_path / "l").write_bytes(encode(STEPS))
    log = Log(tmp_path / "l")
    assert log.has(1, 3.5)
    assert not log.has(2, 2.6)
    assert Log(tmp_path / "l").steps == log.steps == STEPS[:1]


def test_without_a_file_it_is_in_memory() -> None:
    log = Log(None)
    log.add(STEPS[0])
    assert log.has(1, 3.5)
    assert not log.has(1, 3.0)
    assert log.steps == []


def test_the_picture_is_the_same_again_and_shows_validation() -> None:
    losses = [3.0, 2.5, 2.0]
    first, again, more = plot(losses, "loss"), plot(losses, "loss"), plot(losses, "loss", {2: 2.4, 3: 2.2})
    assert first == again != more
    assert b"on held-out texts" in more
    assert b"on held-out texts" not in first
