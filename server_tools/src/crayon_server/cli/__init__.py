"""The server's verbs, a module each; what they share is here."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bars and warnings: they would break into ours."""
    from transformers.utils import logging

    getLogger("torch.utils._pytree").setLevel(ERROR)  # it warns of torchao, where that is installed
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # old names of transformers', which peft and we use as long as there is a version without the new ones
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


@contextmanager
def work_folder(work: Path | None, out: Path, computed: str, *, remove: bool) -> Iterator[Path]:
    """The folder of --work; or one beside the result, which goes when the result is there, or when nothing was computed.

    Args:
        computed: a pattern of the paths in it that are worth keeping.
        remove: whether this process does so.
    """
    folder = work or out.with_name(f"{out.name}.work")
    finished = False
    try:
        yield folder
        finished = True
    finally:
        if work is None and remove and (finished or not any(folder.glob(computed))):
            shutil.rmtree(folder, ignore_errors=True)
