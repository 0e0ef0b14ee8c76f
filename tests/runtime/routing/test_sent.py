"""The log of what was sent."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from crayon_runtime.errors import InvalidInput, OutputError
from crayon_runtime.routing import sent as module
from crayon_runtime.routing.sent import NOT_KNOWN, Sent, SentLog, sent_log_path
from tests.support import needs

SERVER = "https://example.org"


@pytest.fixture
def log(tmp_path: Path) -> SentLog:
    return SentLog(sent_log_path(tmp_path / "bundle"))


def send(log: SentLog, query: str, outcome: str = "answered") -> None:
    log.ended(log.sending(SERVER, query, 100), outcome, size=100, seconds=0.25)


def test_it_lies_beside_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sent_log_path("bundle") == sent_log_path("bundle/") == tmp_path / "bundle.sent.jsonl"


def test_what_was_sent_can_be_read(log: SentLog) -> None:
    assert log.read() == []
    assert not log.path.exists()
    send(log, 'é "日"\n')
    send(log, "another", "the server cannot be reached")
    first, second = log.read()
    assert first == Sent(time=first.time, server=SERVER, query='é "日"\n', bytes=100, outcome="answered", seconds=0.25)
    assert (second.query, second.outcome) == ("another", "the server cannot be reached")
    now = datetime.now(UTC)
    assert now - timedelta(minutes=1) < datetime.fromisoformat(first.time) <= datetime.fromisoformat(second.time) <= now


def test_it_is_written_before_anything_is_sent(log: SentLog) -> None:
    log.sending(SERVER, "a query", 100)
    (entry,) = log.read()
    assert (entry.query, entry.bytes, entry.outcome, entry.seconds) == ("a query", 100, NOT_KNOWN, None)


def test_the_bytes_are_in_the_end_those_that_left(log: SentLog) -> None:
    log.ended(log.sending(SERVER, "a query", 100), "the server cannot be reached", size=0, seconds=0.1)
    assert log.read()[0].bytes == 0


def test_queries_at_the_same_time(log: SentLog) -> None:
    a, b = log.sending(SERVER, "a", 1), log.sending(SERVER, "b", 1)
    log.ended(b, "answered", size=1, seconds=1)
    log.ended(a, "cancelled", size=1, seconds=2)
    assert [(entry.query, entry.outcome) for entry in log.read()] == [("a", "cancelled"), ("b", "answered")]


def test_the_file_is_lines_of_json(log: SentLog) -> None:
    send(log, "a query")
    before, after = map(json.loads, log.path.read_text().splitlines())
    assert before.keys() == {"id", "time", "server", "query", "bytes"}
    assert after == {"id": before["id"], "bytes": 100, "outcome": "answered", "seconds": 0.25}


def test_it_is_for_its_owner_alone(log: SentLog) -> None:
    send(log, "a query")
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    log.path.chmod(0o644)
    send(log, "another")
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def test_a_new_file_is_begun(log: SentLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 1000)
    for n in range(50):
        send(log, f"query {n}")
        assert log.path.stat().st_size <= 1000
    assert {path.name for path in log.path.parent.iterdir()} == {"bundle.sent.jsonl", "bundle.sent.jsonl.old"}
    assert stat.S_IMODE(log._older.stat().st_mode) == 0o600
    queries = [entry.query for entry in log.read()]
    assert 4 <= len(queries) < 50
    assert queries == [f"query {n}" for n in range(50 - len(queries), 50)]


def test_an_entry_in_two_files(log: SentLog, monkeypatch: pytest.MonkeyPatch) -> None:
    name = log.sending(SERVER, "a query", 100)
    monkeypatch.setattr(module, "LARGEST", log.path.stat().st_size)
    log.ended(name, "answered", size=100, seconds=1)
    assert log._older.exists()
    assert [(entry.query, entry.outcome) for entry in log.read()] == [("a query", "answered")]


def test_one_query_that_is_larger_than_a_file(log: SentLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 10)
    send(log, "a query")
    assert log.read()[0].outcome == "answered"


@pytest.mark.parametrize(
    "damage",
    [b'{"id":"x","time"', b"nonsense\n", b"\xff\n", b"[" * 9999 + b"\n", b'{"id":"x","query":"q","bytes":1}\n'],
)
def test_what_is_damaged_costs_only_itself(damage: bytes, log: SentLog) -> None:
    send(log, "before")
    with log.path.open("ab") as file:
        file.write(damage)
    send(log, "after")
    assert [entry.query for entry in log.read()] == ["before", "after"]


def write_many(path: Path, number: int) -> None:
    for n in range(50):
        send(SentLog(path), f"{number} {n}")


def test_many_programs_at_once(log: SentLog) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(log.path, n)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    entries = log.read()
    assert sorted(entry.query for entry in entries) == sorted(f"{i} {n}" for i in range(3) for n in range(50))
    assert {entry.outcome for entry in entries} == {"answered"}


def test_many_programs_begin_new_files(log: SentLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 10_000)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(log.path, n)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for path in (log.path, log._older):
        lines = path.read_bytes().splitlines()
        assert all(json.loads(line) for line in lines)
    assert log._older.stat().st_size > 9_000, "no file that was just begun took the place of a full one"


# A log that cannot be written


def test_a_full_disk(tmp_path: Path) -> None:
    with needs.tmpfs(16 * 1024) as disk:
        log = SentLog(disk / "bundle.sent.jsonl")
        names = []
        with pytest.raises(OutputError, match="the disk is full") as raised:
            for _ in range(100):
                names.append(log.sending(SERVER, "x" * 500, 1))
        assert raised.value.do == "free some space; nothing is sent without it"
        assert log.path.read_bytes().endswith(b"}\n"), "no half entry is left"
        assert len(log.read()) == len(names)
        for name in names:
            log.ended(name, "answered", size=1, seconds=1)  # says nothing if there is no room for it
        assert {entry.outcome for entry in log.read()} <= {"answered", NOT_KNOWN}


def test_a_write_that_fails_in_the_middle(log: SentLog, monkeypatch: pytest.MonkeyPatch) -> None:
    send(log, "before")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: write(fd, content[:20]))
    with pytest.raises(OutputError, match="the disk is full"):
        log.sending(SERVER, "a query", 1)
    monkeypatch.undo()
    assert len(log.path.read_bytes().splitlines()) == 2
    send(log, "after")
    assert [entry.query for entry in log.read()] == ["before", "after"]


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    log = SentLog(tmp_path)
    with pytest.raises(OutputError, match="Is a directory"):
        log.sending(SERVER, "a query", 1)
    with pytest.raises(InvalidInput, match="Is a directory"):
        log.read()


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        SentLog(tmp_path / "gone" / "bundle.sent.jsonl").sending(SERVER, "a query", 1)


def test_what_points_elsewhere_is_not_followed(log: SentLog, tmp_path: Path) -> None:
    log.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError):
        log.sending(SERVER, "a query", 1)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_other_reasons_are_told(number: int, log: SentLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(OutputError, match=os.strerror(number)) as raised:
        log.sending(SERVER, "a query", 1)
    assert raised.value.where == str(log.path)


def test_what_is_no_text(log: SentLog) -> None:
    with pytest.raises(InvalidInput, match="no text in Unicode"):
        log.sending(SERVER, "\ud800", 1)
    assert not log.path.exists()
