"""Zero-shot tasks and API calling with an exported bundle, by lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

    files ──> local.load ──────┐
    calls ──> api_calling.load ├──> the harness ──> CrayonLM ──> Scorer ──> rows ──> backend
    Hub ───> the harness's own ┘                            └──> Engine.generate

Local tasks fetch nothing. Errors of the mean are the harness's standard errors; 95 % of a value lie within 1.96 of them.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from crayon_runtime.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lm_eval.tasks import TaskManager

    from crayon_server.evaluate.harness.model import CrayonLM, Progress


def run(
    bundle: str | Path,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    shots: int = 0,
    backend: str = "auto",
    adapter: str | None = None,
    threads: int | None = None,
    chat: bool = False,
    progress: Progress = lambda *_, **__: nullcontext(lambda _: None),
) -> dict[str, Any]:
    """Run tasks over a bundle.

    Args:
        tasks: names of local tasks, "api_calling", or names of the harness's own tasks, whose data come from the Hub.
        data: a folder with the files of local tasks; or a file of calls for "api_calling", which else is the phone-assistant benchmark.
        limit: questions of each task; None: all.
        shots: examples before each question.
        backend, adapter, threads: as in `model.load`.
        chat: ask in the form of the bundle's chat template.
        progress: as `crayon_runtime.cli.common.progress`.

    Returns:
        "bundle", "backend", "adapter", "limit", "num_fewshot", "chat_template"; "tasks": {name: {"metrics": {name: {"value", "stderr"}},
        "samples"}}, groups of tasks included; "seconds"; "tokens": {"asked", "computed"} of what was scored; "versions".

    Raises:
        InvalidInput: there is no such task, or its data cannot be used; and the errors of `Engine.load`.
    """
    if not tasks:
        raise InvalidInput("no task is named", where="tasks", do="name one or more, such as piqa or api_calling")
    if data is not None and not data.exists():
        raise InvalidInput("there is no data", where=data, do="check --data")
    with _quiet():
        from lm_eval.defaults import DEFAULT_OTHER_SEED
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager

        from crayon_server.evaluate.harness.model import CrayonLM

        lm = CrayonLM(bundle, backend=backend, adapter=adapter, threads=threads, progress=progress)
        try:
            if chat:
                lm.apply_chat_template([{"role": "user", "content": "Hello"}])  # says now if there is none
            loaded = TaskManager(include_defaults=False).load([*_load(tasks, data, shots, lm)])
            for task in loaded["tasks"].values():
                task.set_config("num_fewshot", shots)
                task.set_fewshot_seed(DEFAULT_OTHER_SEED)
            start = perf_counter()
            found = evaluate(lm, loaded, limit=limit, log_samples=False, apply_chat_template=chat)
            seconds = perf_counter() - start
            return {
                "bundle": str(bundle),
                "backend": lm.engine.backend.name,
                "adapter": lm.engine.adapter,
                "limit": limit,
                "num_fewshot": shots,
                "chat_template": chat,
                "tasks": {name: _result(row) for name, row in (found["results"] | found.get("groups", {})).items()},
                "seconds": seconds,
                "tokens": {"asked": lm.scorer.asked, "computed": lm.scorer.computed},
                "versions": {name: version(name) for name in ("crayon-edge", "lm-eval")},
            }
        finally:
            lm.close()


def _load(names: Sequence[str], data: Path | None, shots: int, lm: CrayonLM) -> Iterator[Any]:
    """The tasks themselves."""
    from crayon_server.evaluate.harness import api_calling, local

    folder = data if data is not None and data.is_dir() else None
    here = local.present(folder) if folder else []
    for name in dict.fromkeys(names):
        if name == api_calling.NAME:
            if shots:
                raise InvalidInput("api_calling has no examples to show", do="leave --num-fewshot out")
            yield api_calling.load(data if folder is None else None, lambda text: len(lm.tok_encode(text)))
        elif data and folder is None:
            raise InvalidInput(
                f"the questions of {name} are read from a folder, and this is a file",
                where=data,
                do=f"give the folder with {name}_test.jsonl or {name}_dev.jsonl, or leave --data out",
            )
        elif folder and name in here:
            yield local.load(name, folder, shots=shots)
        elif folder and name in local.TASKS:
            raise InvalidInput(
                f"there are no questions of {name}",
                where=folder,
                do=f"put {name}_test.jsonl or {name}_dev.jsonl there; there are: {', '.join(here) or 'none'}",
            )
        else:
            yield _from_the_hub(name, here)


def _from_the_hub(name: str, here: Sequence[str]) -> Any:
    """One of the harness's own tasks or groups."""
    from crayon_server.evaluate.harness import api_calling, local

    manager = _hub_tasks()
    if name not in manager.all_tasks:
        near = get_close_matches(name, {*local.TASKS, *manager.all_tasks}, 5)
        raise InvalidInput(
            f"there is no task {name!r}" + f"; near: {', '.join(near)}" * bool(near),
            where="tasks",
            do=f"with --data: {', '.join(here or local.TASKS)}; without: {api_calling.NAME}, and those of `lm_eval ls tasks`",
        )
    try:
        loaded = manager.load([name])
    except Exception as e:  # datasets and huggingface_hub raise their own types, and those of their transports
        raise InvalidInput(
            f"the data of {name} cannot be had: {e}",
            where="tasks",
            do="they are on the Hugging Face Hub: connect to the network, or give questions in files of your own with --data",
        ) from e
    return [*loaded["groups"].values(), *loaded["tasks"].values()][0]


@cache
def _hub_tasks() -> TaskManager:
    """Fourteen thousand definitions, which take seconds to find."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _result(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the harness says of one task, of its first filter."""
    values = {key.partition(",")[0]: value for key, value in row.items() if "," in key}
    metrics = {name: value for name, value in values.items() if not name.endswith("_stderr")}
    return {
        "samples": row.get("sample_len"),
        "metrics": {
            name: {"value": float(value), "stderr": _number(values.get(f"{name}_stderr"))}
            for name, value in metrics.items()
        },
    }


def _number(value: object) -> float | None:
    """The harness writes "N/A" where there is none."""
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's own log, and the bar that it draws whatever it is told."""
    from lm_eval.api import task

    logger, bar = logging.getLogger("lm_eval"), task.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    task.tqdm = lambda documents, **_: documents
    try:
        yield
    finally:
        task.tqdm = bar
        logger.setLevel(level)
