"""The phone-assistant benchmark: what a user says to a phone -> an API call in that user's own convention.

    Draws ──> world.utter ──> Request ──> conventions.write ──> Example ──> User ──> Benchmark
              (what is said)              (how it is written)

Everything is generated, deterministic by seed and the same on every version of Python. `benchmark()` is frozen: tests hold the
SHA-256 of each split. Choose settings on `validation` users only, and report `test` users once.
"""

from crayon_server.data.phone_assistant.conventions import CONVENTIONS, Call, Convention, Piece, read, write
from crayon_server.data.phone_assistant.grammar import grammar
from crayon_server.data.phone_assistant.scoring import Score, score, useful
from crayon_server.data.phone_assistant.users import (
    SEPARATOR,
    Benchmark,
    Example,
    User,
    benchmark,
    digest,
    more_examples,
    stream,
    write_jsonl,
)
from crayon_server.data.phone_assistant.world import DOMAINS, SERVER_ONLY

__all__ = [
    "CONVENTIONS",
    "DOMAINS",
    "SEPARATOR",
    "SERVER_ONLY",
    "Benchmark",
    "Call",
    "Convention",
    "Example",
    "Piece",
    "Score",
    "User",
    "benchmark",
    "digest",
    "grammar",
    "more_examples",
    "read",
    "score",
    "stream",
    "useful",
    "write",
    "write_jsonl",
]
