"""Models by name: a local folder as it is, anything else from the Hugging Face Hub or what `HF_ENDPOINT` names instead."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from crayon_runtime.errors import CheckpointError, CrayonError, MissingExtra, OutputError

_SMALL = {
    *("config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"),
}
_WEIGHTS = (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin")
"""In the order of preference; repositories often hold the same weights several times."""


def fetch(model: str | Path, *, revision: str | None = None, token: str | None = None, weights: bool = True) -> Path:
    """The folder of a model. From the Hub it is downloaded into the Hub's cache; a download that was cut off is resumed.

    Args:
        model: a folder, or a Hub id as OWNER/NAME.
        revision: a branch, tag or commit, where it comes from the Hub.
        token: for private and gated models; None: what `hf auth login` stored.
        weights: False for the config alone.

    Raises:
        CheckpointError: there is neither such a folder nor such a model, or it cannot be downloaded.
        OutputError: the cache cannot be written.
        MissingExtra: huggingface_hub is not installed.
    """
    folder = Path(model).expanduser()
    if folder.exists():
        return folder
    try:
        from huggingface_hub import HfApi, errors, snapshot_download
    except ModuleNotFoundError:
        raise MissingExtra("export", "downloading from the Hub") from None
    model, endpoint = str(model), os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    download = partial(snapshot_download, model, revision=revision, token=token, endpoint=endpoint)
    try:
        siblings = HfApi(endpoint, token=token).model_info(model, revision=revision).siblings or []
    except errors.HFValidationError:
        raise CheckpointError(
            "there is no such folder", where=model, do="give the folder of a model, or its id on the Hub as OWNER/NAME"
        ) from None
    except Exception as e:  # noqa: BLE001 - the HTTP library, whose errors pass through, differs between versions
        cached = _cached(download, weights)
        if cached is not None:
            return cached
        raise _explain(e, model, revision, endpoint) or CheckpointError(
            f"{model} is no folder, and the Hub cannot be reached",
            where=endpoint,
            do="check the network, or give the folder of a model",
        ) from None
    try:
        names = _choose([file.rfilename for file in siblings]) if weights else ["config.json"]
        return Path(download(allow_patterns=names))
    except Exception as e:  # noqa: BLE001 - as above
        raise _explain(e, model, revision, endpoint) or CheckpointError(
            f"the download of {model} broke off: {e!s:.300}",
            where=endpoint,
            do="run the command again; it goes on from there",
        ) from None


def _cached(download: Callable[..., str], weights: bool) -> Path | None:
    """What an earlier download left, if it is complete."""
    try:
        return Path(download(allow_patterns=["config.json", *["model*.safetensors"] * weights], local_files_only=True))
    except FileNotFoundError:
        return None


def _choose(names: list[str]) -> list[str]:
    """The files of a repository that an export reads."""
    weights = next((found for w in _WEIGHTS if (found := [n for n in names if re.fullmatch(w, n)])), [])
    return [*weights, *(n for n in names if n in _SMALL)]


def _explain(error: Exception, model: str, revision: str | None, endpoint: str) -> CrayonError | None:
    """What the Hub's answer or the local disk's means for the user; None for anything else."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        what, do = (
            f"access to {model} has to be granted first",
            "accept its terms on its page, then give --token or HF_TOKEN",
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = f"there is neither a folder nor a model called {model}, or it is private"
        do = "check the name; for a private model give --token or HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        what, do = f"{model} has no revision {revision}", "give a branch, tag or commit that it has"
    elif isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        what = f"the Hub answered {status} for {model}"
        do = "the token is wrong or expired; give another" if status in (401, 403) else "try again later"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return OutputError(
            f"the Hub's cache cannot be written: {error.strerror}",
            where=error.filename,
            do="set HF_HOME to a folder with room for the model",
        )
    else:
        return None
    return CheckpointError(what, where=endpoint, do=do)
