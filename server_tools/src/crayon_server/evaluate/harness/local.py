"""Questions with choices in files of one's own, asked as lm-evaluation-harness asks them.

A task is the harness's own definition (its YAML file: prompt, choices, metrics) over rows made from the items of `qa.items`, in the
columns that the definition reads; nothing is fetched. Beside its metrics there is `log_loss`: of the right choice, nats per byte, which
tells models apart that answer no better than chance.

    FOLDER/piqa_dev.jsonl       the questions: TASK_test.jsonl, else _dev, else _val
    FOLDER/piqa_train.jsonl     examples to show before a question, if that is asked for; MMLU's are its _dev
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import AggMetricConfig
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.hellaswag.utils import preprocess

from crayon_runtime.errors import InvalidInput
from crayon_server.evaluate.qa.items import Item, read

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Row = dict[str, Any]

_LETTERS = "ABCDEFGHIJ"


class Definition(NamedTuple):
    """A task of the harness.

    Attributes:
        file: that defines it there, under `lm_eval/tasks`.
        row: the columns that it reads, of an item.
        choices: how many it reads; None: any number.
    """

    file: str
    row: Callable[[Item], Row]
    choices: int | None = None


def _lettered(item: Item, question: str = "question") -> Row:
    letters = [*_LETTERS[: len(item.choices)]]
    return {
        question: item.question,
        "choices": {"text": item.choices, "label": letters},
        "answerKey": letters[item.answer],
    }


def _named(item: Item, *names: str) -> Row:
    return dict(zip(names, item.choices, strict=True))


TASKS = {
    "arc_easy": Definition("arc/arc_easy.yaml", _lettered),
    "arc_challenge": Definition("arc/arc_challenge.yaml", _lettered),
    "boolq": Definition(
        "super_glue/boolq/default.yaml",
        lambda i: {"passage": i.context, "question": i.question, "label": i.answer},
        2,
    ),
    "piqa": Definition(
        "piqa/piqa.yaml", lambda i: {"goal": i.question, "label": i.answer, **_named(i, "sol1", "sol2")}, 2
    ),
    "siqa": Definition(
        "siqa/siqa.yaml",
        lambda i: {
            "context": i.context,
            "question": i.question,
            "label": str(i.answer + 1),
            **_named(i, "answerA", "answerB", "answerC"),
        },
        3,
    ),
    "hellaswag": Definition(
        "hellaswag/hellaswag.yaml",
        lambda i: {
            "query": preprocess(i.question),
            "choices": [preprocess(choice) for choice in i.choices],
            "label": str(i.answer),
        },
    ),
    "openbookqa": Definition("openbookqa/openbookqa.yaml", lambda i: _lettered(i, "question_stem")),
    "winogrande": Definition(
        "winogrande/default.yaml",
        lambda i: {"sentence": i.question, "answer": str(i.answer + 1), **_named(i, "option1", "option2")},
        2,
    ),
    "csqa": Definition("commonsense_qa/default.yaml", _lettered, 5),
    # The harness has no QASC: its questions are asked as those of ARC, which are of the same kind.
    "qasc": Definition("arc/arc_easy.yaml", _lettered),
    "mmlu": Definition(
        "mmlu/default/mmlu_{user}.yaml",
        lambda i: {"question": i.question, "choices": i.choices, "answer": i.answer},
        4,
    ),
    "medmcqa": Definition(
        "medmcqa/medmcqa.yaml",
        lambda i: {"question": i.question, "cop": i.answer, **_named(i, "opa", "opb", "opc", "opd")},
        4,
    ),
}
"""By the name of the files; the first eight are MobileLLM's zero-shot list (arXiv:2402.14905, table 3)."""


class LocalTask(ConfigurableTask):  # type: ignore[misc]
    """A task of the harness, with the log-loss of the right choice as one more metric."""

    def process_results(self, doc: Row, results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        if self.multiple_input:  # the choices are in the context, and one text follows each
            right, text = self.doc_to_text(doc), self.doc_to_target(doc)
        else:
            choices, right = self.doc_to_choice(doc), self.doc_to_target(doc)
            right = choices.index(right) if isinstance(right, str) else right
            text = choices[right]
        return {**super().process_results(doc, results), "log_loss": -results[right][0] / len(text.encode())}

    def aggregation(self) -> dict[str, Any]:
        return {**super().aggregation(), "log_loss": mean}

    def higher_is_better(self) -> dict[str, bool]:
        return {**super().higher_is_better(), "log_loss": False}


def present(folder: Path) -> list[str]:
    """The tasks whose questions are in a folder."""
    return [name for name in TASKS if _questions(folder, name) is not None]


def load(name: str, folder: Path, *, shots: int = 0) -> Any:
    """A task, or the group of MMLU's, to be given to the harness.

    Args:
        name: of `TASKS`.
        shots: how many examples will be shown before each question.

    Raises:
        InvalidInput: a file is missing, or has a line that is no question of that task.
    """
    path = _questions(folder, name)
    if path is None:
        raise InvalidInput(
            f"there are no questions of {name}", where=folder, do=f"put {name}_test.jsonl or {name}_dev.jsonl there"
        )
    items = _read(path, name)
    examples: list[Item] = []
    if shots:
        examples = _read(folder / f"{name}_{'dev' if name == 'mmlu' else 'train'}.jsonl", name)
        asked = {item.key for item in items}
        examples = [item for item in examples if item.key not in asked]
    definition = TASKS[name]
    if name != "mmlu":
        return _task(name, definition, items, examples, shots)
    group = Group("mmlu", aggregate_metric_list=[AggMetricConfig(metric="acc"), AggMetricConfig(metric="log_loss")])
    shown = _by_subject(examples)
    for subject, own in _by_subject(items).items():
        of_subject = definition._replace(file=definition.file.format(user=subject))
        group.add(_task(f"mmlu_{subject}", of_subject, own, shown[subject], shots))
    return group


def _task(name: str, definition: Definition, items: Sequence[Item], examples: Sequence[Item], shots: int) -> LocalTask:
    if len(examples) < shots:
        raise InvalidInput(f"{name} has {len(examples)} examples to show; {shots} are wanted", do="ask for fewer")
    splits = {"test": Dataset.from_list([definition.row(item) for item in items])}
    if examples:
        splits["train"] = Dataset.from_list([definition.row(item) for item in examples])
    path = Path(lm_eval.tasks.__file__).parent / definition.file
    if not path.is_file():
        raise InvalidInput(f"lm-evaluation-harness has no task {name!r}", do='check the "user" of the questions')
    config = load_yaml(path) | {
        "task": name,
        "custom_dataset": lambda **_: splits,
        "dataset_kwargs": None,
        "process_docs": None,  # the rows are as it would leave them
        "test_split": "test",
        "validation_split": None,
        "training_split": "train" if examples else None,
        "fewshot_split": "train" if examples else None,
    }
    config.pop("tag", None)
    return LocalTask(config=config)


def _questions(folder: Path, name: str) -> Path | None:
    paths = (folder / f"{name}_{split}.jsonl" for split in ("test", "dev", "val"))
    return next((path for path in paths if path.is_file()), None)


def _read(path: Path, name: str) -> list[Item]:
    items, choices = read(path), TASKS[name].choices
    if not items:
        raise InvalidInput("there are no questions in the file", where=path, do="put one JSON object on each line")
    for number, item in enumerate(items, 1):
        if len(item.choices) > len(_LETTERS) or (choices and len(item.choices) != choices):
            wanted = choices or f"at most {len(_LETTERS)}"
            raise InvalidInput(
                f"a question of {name} has {wanted} choices, not {len(item.choices)}", where=f"{path}:{number}"
            )
        if name == "winogrande" and "_" not in item.question:
            raise InvalidInput("a sentence of winogrande has a _ in the place of a choice", where=f"{path}:{number}")
    return items


def _by_subject(items: Sequence[Item]) -> defaultdict[str, list[Item]]:
    found: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        found[item.user].append(item)
    return found
