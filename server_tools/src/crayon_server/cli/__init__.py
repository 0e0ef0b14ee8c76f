"""The server's verbs, a module each; what they share is here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger


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
