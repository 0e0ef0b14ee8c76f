"""Questions with choices: read from JSON lines, and dealt out to users, to training and to the test.

    {"id", "task", "question", "choices": [...], "answer": 0-based, "context"?, "user"?}

MMLU is 57 users, one of each subject. SIQA, OpenBookQA and MedMCQA are one user each.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import Struct

from crayon_runtime.errors import InvalidInput
from crayon_server.data.phone_assistant.draws import Draws
from crayon_server.pool.data import Pair

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

TRAINING, TEST = 0, 1
FILES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "siqa": (("siqa_train",), "siqa_dev"),
    "openbookqa": (("openbookqa_train",), "openbookqa_test"),
    "mmlu": (("mmlu_dev", "mmlu_val"), "mmlu_test"),
    "medmcqa": (("medmcqa_dev",), None),
}
"""For training and for the test; None: half of the former. The answers of MedMCQA's own test split are not public."""
EXAMPLES = 10
"""Of a user, from outside the test; no pool sees them."""
GROUP_TEXTS = 256
"""Of a group to train on, at most."""


class Item(Struct, frozen=True):
    """A question. `user`: its subject."""

    id: str
    task: str
    question: str
    choices: list[str]
    answer: int
    context: str = ""
    user: str = ""

    @property
    def group(self) -> str:
        return f"{self.task}/{self.user}" if self.user else self.task

    @property
    def owner(self) -> str:
        """The user who asks it."""
        return self.group if self.task == "mmlu" else self.task

    @property
    def pairs(self) -> list[Pair]:
        """Prompt and completion with each choice."""
        prompt = f"{self.context}\n" * bool(self.context) + f"Question: {self.question}\nAnswer:"
        return [Pair(prompt, f" {choice}") for choice in self.choices]

    @property
    def right(self) -> Pair:
        return self.pairs[self.answer]

    @property
    def key(self) -> str:
        """SHA-256 of context, question and choices, whatever their order, case and spaces: equal for exact duplicates."""
        parts = [_normal(self.context), _normal(self.question), *sorted(map(_normal, self.choices))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class User:
    """Who customizes with `examples`, and is asked `queries`."""

    name: str
    task: str
    examples: tuple[Item, ...]
    queries: tuple[Item, ...]


class Dealt(NamedTuple):
    """What everyone gets. No item is in two places."""

    users: list[User]
    training: list[Item]
    dropped: dict[str, int]
    """By task: items outside the test that stand in it too, and were left out."""
    available: dict[str, int]
    """By task: items of the whole test."""


def deal(folder: Path, *, limit: int, seed: int = 0) -> Dealt:
    """Read all tasks, and deal their items out.

    Args:
        folder: with the files of `FILES`, as NAME.jsonl.
        limit: test items of a task, at most; every user of a task has about as many.
        seed: of all choices.

    Raises:
        InvalidInput: a file cannot be read, a line is not an item, or a user has too few.
    """
    outside: list[Item] = []
    test: dict[str, list[Item]] = {}
    for task, (names, test_name) in FILES.items():
        others = [item for name in names for item in read(folder / f"{name}.jsonl")]
        test[task] = read(folder / f"{test_name}.jsonl") if test_name else [i for i in others if _half(i) == TEST]
        outside += others if test_name else [i for i in others if _half(i) == TRAINING]
    tested = {item.key for items in test.values() for item in items}
    dropped = dict.fromkeys(FILES, 0)
    by_group: dict[str, list[Item]] = defaultdict(list)
    for item in outside:
        if item.key in tested:
            dropped[item.task] += 1
        else:
            by_group[item.group].append(item)
    queries = {task: _spread(task, items, limit, seed) for task, items in test.items()}
    examples, training = _split(by_group, seed)
    users = [
        User(owner, task, tuple(_enough(owner, examples.get(owner, []))), tuple(asked))
        for task, owners in queries.items()
        for owner, asked in owners.items()
    ]
    return Dealt(users, training, dropped, {task: len(items) for task, items in test.items()})


def read(path: Path) -> list[Item]:
    """The items of a file.

    Raises:
        InvalidInput: it cannot be read, or a line is not an item.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise InvalidInput(f"the questions cannot be read: {e.strerror}", where=path, do="check --data") from None
    decoder, items = msgspec.json.Decoder(Item), []
    for number, line in enumerate(lines, 1):
        try:
            item = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise InvalidInput(f"not a question: {e}", where=f"{path}:{number}") from None
        if not 0 <= item.answer < len(item.choices) or not all(map(str.strip, item.choices)):
            raise InvalidInput("it has no such answer, or an empty choice", where=f"{path}:{number}")
        items.append(item)
    return items


def _spread(task: str, items: Iterable[Item], limit: int, seed: int) -> dict[str, list[Item]]:
    """By user: at most `limit` items in all, the users in turn."""
    waiting: dict[str, list[Item]] = defaultdict(list)
    for item in Draws("qa", seed, task, "test").shuffled(list(items)):
        waiting[item.owner].append(item)
    spread: dict[str, list[Item]] = {owner: [] for owner in sorted(waiting)}
    while limit > 0 and any(waiting.values()):
        for owner in [owner for owner in spread if waiting[owner]][:limit]:
            spread[owner].append(waiting[owner].pop())
            limit -= 1
    return {owner: asked for owner, asked in spread.items() if asked}


def _split(by_group: dict[str, list[Item]], seed: int) -> tuple[dict[str, list[Item]], list[Item]]:
    """Examples of each user, drawn from all their groups in turn, and the items that are left to train on."""
    examples: dict[str, list[Item]] = defaultdict(list)
    shuffled = {group: Draws("qa", seed, group).shuffled(by_group[group]) for group in sorted(by_group)}
    wanting = True
    while wanting:
        wanting = False
        for items in shuffled.values():
            if items and len(examples[items[-1].owner]) < EXAMPLES:
                examples[items[-1].owner].append(items.pop())
                wanting = True
    return examples, [item for items in shuffled.values() for item in items[:GROUP_TEXTS]]


def _enough(owner: str, examples: Sequence[Item]) -> Sequence[Item]:
    if len(examples) < EXAMPLES:
        raise InvalidInput(f"{owner} has {len(examples)} items outside the test; {EXAMPLES} are needed", where="data")
    return examples


def _half(item: Item) -> int:
    return hashlib.sha256(item.id.encode()).digest()[0] % 2


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
