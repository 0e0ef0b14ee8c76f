"""API calling as MobileLLM measures it (arXiv:2402.14905, section 3.2.2): is the intent right, is the structure, and how near is the reply?

A completion is a call in its first line, and what is said to the user, if anything, in the others. A call is one that
`phone_assistant.read` reads, as `alarm.set(day=monday)`, or JSON in OpenAI's form, {"name": "set_alarm", "arguments": {"day": "monday"}}.

    exact_match    the call, character for character
    intent         the function
    structure      function and argument names in their order, whatever the values
    rouge1, rougeL F-measures (https://aclanthology.org/W04-1013) of the reply; of the call, where the expected completion has no reply
"""

from __future__ import annotations

import json
from itertools import chain
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from rouge_score.rouge_scorer import RougeScorer

from crayon_runtime.errors import InvalidInput
from crayon_server.data.phone_assistant import Call, benchmark, read
from crayon_server.data.phone_assistant.conventions import meaning
from crayon_server.pool.data import Pair, read_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

NAME = "api_calling"
METRICS = ("exact_match", "intent", "structure", "rouge1", "rougeL")
_ROOM = 16
"""Tokens that an answer may have more than the longest that is expected."""


def load(path: Path | None, count: Callable[[str], int]) -> ConfigurableTask:
    """The task, to be given to the harness.

    Args:
        path: JSON lines {"prompt", "completion"}; None: the queries of the phone-assistant benchmark's test users, of all in turn.
        count: how many tokens a text has.

    Raises:
        InvalidInput: the file cannot be read, or a completion does not begin with a call.
    """
    pairs = _shipped() if path is None else read_texts(path)[0]
    for number, pair in enumerate(pairs, 1):
        if read_call(_split(pair.completion)[0]) is None:
            raise InvalidInput(
                f"the completion of text {number} does not begin with a call: {_split(pair.completion)[0][:80]!r}",
                where=path,
                do='write name(key=value), or {"name": "…", "arguments": {…}}, in its first line',
            )
    rows = {"test": Dataset.from_list([pair._asdict() for pair in pairs])}
    several_lines = any("\n" in pair.completion for pair in pairs)
    return ConfigurableTask(
        config={
            "task": NAME,
            "output_type": "generate_until",
            "custom_dataset": lambda **_: rows,
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{completion}}",
            "target_delimiter": "",
            "generation_kwargs": {
                "until": [] if several_lines else ["\n"],
                "max_gen_toks": max(count(pair.completion) for pair in pairs) + _ROOM,
                "do_sample": False,
            },
            "process_results": lambda doc, results: judge(results[0], doc["completion"]),
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
            "metadata": {"version": 1},
        }
    )


def judge(generated: str, expected: str) -> dict[str, float]:
    """The `METRICS` of one completion, 0 to 1."""
    (call, reply), (expected_call, expected_reply) = _split(generated), _split(expected)
    found, reference = read_call(call), read_call(expected_call)
    compared = (reply, expected_reply) if expected_reply else (call, expected_call)
    rouge = RougeScorer(["rouge1", "rougeL"]).score(compared[1], compared[0])
    return {
        "exact_match": float(call == expected_call),
        "intent": float(None is not _intent(found) == _intent(reference)),
        "structure": float(found is not None and reference is not None and found.skeleton == reference.skeleton),
        **{name: score.fmeasure for name, score in rouge.items()},
    }


def read_call(text: str) -> Call | None:
    """The call that a text is; None if it is none."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return read(text)
    match value:
        case {"name": str(name), "arguments": dict(arguments)}:
            return Call("json", name, tuple((key, json.dumps(argument)) for key, argument in arguments.items()))
    return read(text)


def _intent(call: Call | None) -> str | None:
    """The function, whatever the convention calls it."""
    return None if call is None else meaning(call.function) or call.function


def _split(completion: str) -> tuple[str, str]:
    """Call and reply."""
    call, _, reply = completion.strip().partition("\n")
    return call.strip(), reply.strip()


def _shipped() -> Sequence[Pair]:
    """So that the first of them are of all users."""
    queries = chain.from_iterable(zip(*(user.queries for user in benchmark().test), strict=True))
    return [Pair(query.prompt, query.completion) for query in queries]
