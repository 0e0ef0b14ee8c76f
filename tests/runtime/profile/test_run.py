"""A whole profile, over the fake backend in this process; and what is refused."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crayon_runtime.errors import AdapterError, BackendError, ContextOverflow, InvalidInput, OutputError, SchemaTooNew
from crayon_runtime.profile import Profile, profile
from crayon_runtime.profile.jobs import Describe, Job, Measure
from crayon_runtime.profile.records import Core, Header
from crayon_runtime.profile.target import Local
from tests.runtime import tiny
from tests.runtime.profiles import HEADER, InProcess

SMALL: dict[str, Any] = {"prompts": [4], "depths": [0, 8], "generate": 4, "repetitions": 2}


@pytest.fixture(autouse=True)
def own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny.bundle(tmp_path).path


def left(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()} - {"tmp", "model", "alice", "bob"}


def test_a_profile_has_everything_and_is_what_its_file_says(bundle: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    made = profile(bundle, tmp_path / "out", target=InProcess(), long_seconds=0.05, on_step=steps.append, **SMALL)
    assert Profile.read(tmp_path / "out") == made == Profile.read(tmp_path / "out" / "profile.jsonl")
    assert (made.header.backends, made.header.target) == ("fake", "here")
    tests = {(t.test, t.n_prompt, t.n_gen, t.n_depth): t for t in made.tests}
    decode = tests["decode", 0, 4, 8]
    assert decode.label == "tg4 @ d8"
    assert decode.processes == [0, 0, 0, 1, 1, 1]
    assert len(decode.warmup_ns) == 2
    assert decode.samples_ts == pytest.approx([4e9 / ns for ns in decode.samples_ns])
    assert 0 < decode.p50_ns <= decode.p90_ns <= decode.p99_ns  # type: ignore[operator]
    assert decode.bandwidth_share > 0  # type: ignore[operator]
    assert len(tests["load_first", 0, 0, 0].samples_ns) == len(tests["load_warm", 0, 0, 0].samples_ns) == 2
    assert {t.test for t in made.tests} >= {"load_cold", "swap_read", "ttft", "control_read", "prefill", "first_token"}
    assert made.long_run is not None
    assert steps == ["what is measured", "repetition 1 of 2", "repetition 2 of 2", "operators", "the long run, 0.05 s"]
    assert {"operators", "routing overhead"} <= {a.what for a in made.absent}
    assert len(made.absent) == len({a.what for a in made.absent}), "every process says so, the profile once"


def test_the_csv_has_a_row_for_each_test_and_the_page_needs_nothing_else(bundle: Path, tmp_path: Path) -> None:
    made = profile(bundle, tmp_path / "out", target=InProcess(), **SMALL)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/profile.csv").read_text())))
    assert [row["label"] for row in rows] == [test.label for test in made.tests]
    assert [float(row["avg_ns"]) for row in rows] == pytest.approx([test.avg_ns for test in made.tests])
    page = (tmp_path / "out/profile.html").read_text()
    assert page.count("<svg ") >= 4
    for outside in ("src=", "href=", "@import", "url(", "<script"):
        assert outside not in page
    assert all(a.what in page for a in made.absent)


def test_threads_and_kinds_of_cores_take_turns(bundle: Path, tmp_path: Path) -> None:
    class BigLittle(InProcess):
        def run(self, job: Job) -> Iterator[bytes]:
            alone = msgspec.structs.replace(job, cpus=None)  # there may be no such cores here
            for line in super().run(alone):
                record = json.loads(line)
                if record["type"] == "profile":
                    record["cores"] = [msgspec.to_builtins(Core(i, 400 if i < 2 else 1024, None)) for i in range(4)]
                yield json.dumps(record).encode()
            self.jobs[-1] = job

    target = BigLittle()
    made = profile(bundle, tmp_path / "out", target=target, threads=[1, 2], **SMALL)
    measured = [(job.threads, job.cpus) for job in target.jobs if isinstance(job.work, Measure)]
    assert measured == [(1, None), (2, None), (2, [2, 3]), (2, [0, 1])] * 2
    labels = {test.label for test in made.tests if test.test == "decode" and test.n_depth == 0}
    assert labels == {"tg4, 1 threads", "tg4, 2 threads", "tg4, 2 threads, cores 0xc", "tg4, 2 threads, cores 0x3"}
    once = Counter(job.work.more for job in target.jobs if isinstance(job.work, Measure))
    assert once == {True: 2, False: 6}


def test_usual_sizes_beyond_the_context_are_absent(bundle: Path, tmp_path: Path) -> None:
    made = profile(bundle, tmp_path / "out", target=InProcess(), repetitions=1)
    assert made.header.plan is not None
    assert (made.header.plan.prompts, made.header.plan.depths) == ([64], [0])
    assert {"prompt 512", "depth 1024"} <= {a.what for a in made.absent}


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"prompts": [300]}, ContextOverflow, "prompt 300: the context holds 256"),
        ({"depths": [0, 250]}, ContextOverflow, "depth 250 and 32 tokens after it: the context holds 256"),
        ({"prompts": [0]}, InvalidInput, "prompt is 0"),
        ({"depths": [-1]}, InvalidInput, "depth is -1"),
        ({"generate": 1}, InvalidInput, "generate is 1"),
        ({"threads": [0]}, InvalidInput, "threads is 0"),
        ({"threads": []}, InvalidInput, "nothing to measure"),
        ({"repetitions": 0}, InvalidInput, "repetitions is 0"),
        ({"long_seconds": float("nan")}, InvalidInput, "long is nan"),
        ({"long_seconds": -1.0}, InvalidInput, "long is -1"),
        ({"backend": "tpu"}, BackendError, "there is no backend 'tpu'"),
        ({"adapter": "carol"}, AdapterError, "there is no adapter 'carol'"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_leaves_nothing(
    bundle: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        profile(bundle, tmp_path / "out", target=InProcess(), **options)
    assert left(tmp_path) == set()


def test_an_existing_folder_is_refused_before_anything_is_measured(bundle: Path, tmp_path: Path) -> None:
    target = InProcess()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    with pytest.raises(OutputError, match="exists already"):
        profile(bundle, tmp_path / "out", target=target, **SMALL)
    assert target.jobs == []
    assert (tmp_path / "out/mine").read_text() == "kept"
    profile(bundle, tmp_path / "out", target=target, replace=True, **SMALL)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["profile.csv", "profile.html", "profile.jsonl"]


def test_an_interruption_leaves_nothing_half_written(bundle: Path, tmp_path: Path) -> None:
    class Interrupted(InProcess):
        def run(self, job: Job) -> Iterator[bytes]:
            if isinstance(job.work, Describe):
                yield from super().run(job)
            else:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(bundle, tmp_path / "out", target=Interrupted(), **SMALL)
    assert left(tmp_path) == set()


def test_a_target_that_says_nothing(bundle: Path, tmp_path: Path) -> None:
    class Silent(Local):
        def run(self, job: Job) -> Iterator[bytes]:
            yield from ()

    with pytest.raises(BackendError, match="did not say what it has loaded"):
        profile(bundle, tmp_path / "out", target=Silent(), **SMALL)


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "its first line is not that of a profile"),
        (b'{"type": "test"}\n', "its first line is not that of a profile"),
        (b"[1]\n", "its first line is not that of a profile"),
        (b"{broken\n", "this is no profile"),
        (b"\xff\n", "this is no profile"),
        (msgspec.json.encode(HEADER) + b'\n{"type": "test", "test": "decode"}\n', "missing required field"),
        (msgspec.json.encode(HEADER) + b'\n{"type": "surprise"}\n', "surprise"),
    ],
)
def test_a_file_that_is_no_profile(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "profile.jsonl").write_bytes(content)
    with pytest.raises(InvalidInput, match=match):
        Profile.read(tmp_path)
    with pytest.raises(InvalidInput, match="cannot be read"):
        Profile.read(tmp_path / "none")


def test_a_profile_of_a_newer_version(tmp_path: Path) -> None:
    newer: Header = msgspec.structs.replace(HEADER, schema_version="2.0")
    (tmp_path / "profile.jsonl").write_bytes(msgspec.json.encode(newer) + b"\n")
    with pytest.raises(SchemaTooNew):
        Profile.read(tmp_path)
    later = json.dumps(msgspec.to_builtins(HEADER) | {"schema_version": "1.9", "unknown": 1})
    (tmp_path / "profile.jsonl").write_text(later)
    assert Profile.read(tmp_path).header.schema_version == "1.9"
