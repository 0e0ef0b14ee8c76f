"""Calibrating one customized model: it answers queries, and its policies are fitted to what became of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from crayon_runtime.customized import ADAPTER
from crayon_runtime.errors import InvalidInput
from crayon_runtime.routing.calibration import Calibration, adapter_sha256, fit, without_labels
from crayon_runtime.routing.policies import EARLY
from crayon_runtime.routing.router import read_reference
from crayon_runtime.routing.signals import signals

if TYPE_CHECKING:
    from crayon_runtime.engine import Engine

Row = dict[str, float]


class Query(Struct, frozen=True):
    """A line of data: what is asked, and how to tell whether the answer is right."""

    prompt: str
    """For the model as it is, as the prompts of examples are."""
    completion: str | None = None
    """The right answer."""
    correct: bool | None = None
    """Whether the device's answer is right, where somebody has judged it; it counts more than a completion."""
    server_correct: bool | None = None
    """Whether the server's answer is right; where nobody knows, it counts as right."""


def read_queries(path: Path) -> list[Query]:
    """Read a jsonl file of queries; other fields are ignored, and so are empty lines.

    Raises:
        InvalidInput: the file cannot be read, is not UTF-8 or holds no queries; or a line is no query, or has other labels than the first.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise InvalidInput(f"the data cannot be read: {e.strerror or e}", where=path, do="check the path") from None
    except UnicodeDecodeError as e:
        raise InvalidInput(f"not UTF-8 at byte {e.start}", where=path, do="convert the file to UTF-8 first") from None
    queries: list[Query] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            query = msgspec.json.decode(line, type=Query)
        except (ValueError, RecursionError) as e:
            raise InvalidInput(str(e), where=f"{path}:{number}", do=_FORM) from None
        if not query.prompt.strip():
            raise InvalidInput("its prompt is empty", where=f"{path}:{number}", do="complete it, or leave it out")
        if queries and _labels(query) != _labels(queries[0]):
            raise InvalidInput(
                "it has other labels than the first line", where=f"{path}:{number}", do="label all lines alike, or none"
            )
        queries.append(query)
    if not queries:
        raise InvalidInput("there are no queries", where=path, do=_FORM)
    return queries


_FORM = 'write one {"prompt": …} on each line, with the right "completion", or whether the answer is "correct", where that is known'


def _labels(query: Query) -> tuple[bool, bool]:
    """What is known of an answer: of the device's, and of the server's."""
    return (query.correct is not None or query.completion is not None, query.server_correct is not None)


def calibrate(
    engine: Engine,
    queries: Sequence[Query],
    folder: Path,
    *,
    budget: float | None = None,
    target_accuracy: float | None = None,
    max_new_tokens: int = 256,
    on_query: Callable[[int], object] = lambda _: None,
) -> Calibration:
    """Answer queries with the customized model, greedily, and fit its policies; `Calibration.write` keeps them.

    Args:
        engine: its present adapter is replaced by the customized one.
        folder: where that is kept.
        budget, target_accuracy: see `fit`; a target needs labels.
        on_query: called with 1 after each.

    Raises:
        InvalidInput: the model is not customized, a query cannot be answered, or what is asked for cannot be reached.
    """
    known, server_known = _labels(queries[0]) if queries else (False, False)
    if target_accuracy is not None and not known:
        raise InvalidInput(
            "without labels nobody knows the accuracy", where="target accuracy", do="label the data, or give a budget"
        )
    if not (folder / ADAPTER).is_dir():
        raise InvalidInput("the model is not customized", where=folder, do="run `crayon customize` first")
    engine.set_adapter(folder / ADAPTER)
    adapter = engine.present_adapter
    reference, _ = read_reference(engine.bundle_of(adapter) if adapter else None, folder, engine.backend.tap_size)
    rows: list[Row] = []
    early: list[Row] = []
    correct: list[bool] = []
    for number, query in enumerate(queries, 1):
        try:
            stream = engine.stream(query.prompt, max_new_tokens=max_new_tokens)
        except InvalidInput as e:
            raise type(e)(e.what, where=f"query {number}", do=e.do) from None
        beginning: Row | None = None
        for _ in stream:
            if stream.so_far.generated_tokens == EARLY:
                beginning = signals(stream.so_far, reference, reference.names)
        rows.append(signals(stream.generation, reference, reference.names))
        early.append(rows[-1] if beginning is None else beginning)
        correct.append(_right(query, stream.generation.text))
        on_query(1)
    if known:
        server = [bool(query.server_correct) for query in queries] if server_known else None
        fitted = fit(rows, correct, budget=budget, target_accuracy=target_accuracy, server_correct=server, early=early)
    elif budget is None:
        raise InvalidInput("either a budget or a target accuracy is wanted", where="budget")
    else:
        fitted = without_labels(rows, budget=budget, early=early)
    return Calibration(
        adapter=adapter_sha256(folder / ADAPTER),
        budget=budget,
        target_accuracy=target_accuracy,
        labelled=known,
        n=len(rows),
        policies=fitted.policies,
        curve=fitted.curve,
    )


def _right(query: Query, text: str) -> bool:
    if query.correct is not None:
        return query.correct
    return query.completion is not None and text.strip() == query.completion.strip()
