"""A profile: read from its file, asked for its parts, written as JSON lines, CSV and HTML."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from crayon_runtime.errors import InvalidInput
from crayon_runtime.profile.records import (
    Absent,
    Header,
    Line,
    LongRun,
    Operator,
    OperatorKind,
    Sample,
    Test,
    from_jsonl,
    to_jsonl,
)

JSONL, CSV, HTML = "profile.jsonl", "profile.csv", "profile.html"

_COLUMNS = (
    "test", "label", "backends", "adapter", "n_threads", "cpu_mask", "n_prompt", "n_gen", "n_depth", "avg_ns", "stddev_ns",
    "avg_ts", "stddev_ts", "p50_ns", "p90_ns", "p99_ns", "bandwidth_share", "samples",
)  # fmt: skip

Kind = TypeVar("Kind", bound=Line)


@dataclass(frozen=True)
class Profile:
    """All lines of a profile, the header first."""

    lines: list[Line]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile: its folder, or its JSON lines.

        Raises:
            InvalidInput: it cannot be read, or is no profile.
            SchemaTooNew: a newer version wrote it.
        """
        file = Path(path) / JSONL if Path(path).is_dir() else Path(path)
        do = "give the folder or the profile.jsonl that `crayon profile` made"
        try:
            return cls(from_jsonl(file.read_bytes(), str(file)))
        except OSError as e:
            raise InvalidInput(f"the profile cannot be read: {e.strerror}", where=file, do=do) from None
        except (ValueError, RecursionError) as e:  # also msgspec's
            raise InvalidInput(f"this is no profile: {e}", where=file, do=do) from None

    def write(self, folder: Path) -> None:
        """The three files of a profile, into an empty folder."""
        from crayon_runtime.profile.report import html

        (folder / JSONL).write_bytes(to_jsonl(self.lines))
        (folder / CSV).write_text(self.to_csv(), encoding="utf-8")
        (folder / HTML).write_text(html(self), encoding="utf-8")

    def to_csv(self) -> str:
        """One line a test, without its samples."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(_COLUMNS)
        for test in self.tests:
            own = {"label": test.label, "samples": len(test.samples_ns)}
            table.writerow([own[name] if name in own else getattr(test, name) for name in _COLUMNS])
        return text.getvalue()

    @property
    def header(self) -> Header:
        (header,) = self._of(Header)
        return header

    @property
    def tests(self) -> list[Test]:
        return self._of(Test)

    @property
    def samples(self) -> list[Sample]:
        return self._of(Sample)

    @property
    def operators(self) -> list[Operator]:
        return self._of(Operator)

    @property
    def operator_kinds(self) -> list[OperatorKind]:
        return self._of(OperatorKind)

    @property
    def long_run(self) -> LongRun | None:
        return next(iter(self._of(LongRun)), None)

    @property
    def absent(self) -> list[Absent]:
        return self._of(Absent)

    def _of(self, kind: type[Kind]) -> list[Kind]:
        return [line for line in self.lines if isinstance(line, kind)]
