"""The base once more, as a program for ExecuTorch: made from the template that comes with the package, or by its own exporter if there is none.

Runs in a process of its own beside the building of the pool. Reads a `Job` from stdin, as JSON.
"""

from __future__ import annotations

import sys

import msgspec

from crayon_export import export
from crayon_server import training
from crayon_server.models import load_nano


class Job(msgspec.Struct, frozen=True):
    """What to export.

    Attributes:
        golden_texts: prompts and what continues them, for the golden cases.
        out: the folder of the bundle.
    """

    group_size: int
    golden_texts: list[tuple[str, str]]
    threads: int | None
    out: str


def main(job: Job) -> None:
    """Export nano to int4."""
    with training.threads(job.threads):
        export(
            load_nano(),
            job.out,
            backend="executorch",
            quantize="int4",
            group_size=job.group_size,
            golden_texts=job.golden_texts,
        )


if __name__ == "__main__":
    main(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))
