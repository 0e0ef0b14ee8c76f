"""Embedding many texts: in all processes, in pieces of `PIECE` texts, which are kept on disk, so that what was killed goes on from there.

    FOLDER/prompt.npy, answer.npy, everything.npy    float32 [n, d], the fields of `indicators.Embeddings`
    FOLDER/progress.json                             how many texts are done, and d

The files only grow; what one of them has beyond the progress was not finished, and is written again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from crayon_runtime.errors import AdapterError, IntegrityError, InvalidInput, OutputError
from crayon_runtime.files import atomic_file
from crayon_server.pool import indicators
from crayon_server.pool.indicators import Embeddings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import torch
    from accelerate import Accelerator

    from crayon_runtime.engine import Engine
    from crayon_server.pool.data import Corpus
    from crayon_server.training import Text

    Floats = npt.NDArray[np.float32]
    Embedder = Callable[[list[int], Accelerator], Floats]
    """Indices of texts -> their embeddings, float32 [n, 3, d]. All processes call it together."""

PIECE = 2048
HEADER = 128
"""Bytes before the numbers of an .npy file."""


class _Progress(msgspec.Struct):
    done: int
    size: int


def with_model(model: torch.nn.Module, corpus: Corpus, tap_layer: int, *, pad_id: int) -> Embedder:
    """Embed with a base that has no adapter."""

    def embed(texts: list[int], place: Accelerator) -> Floats:
        batches = list(indicators.batches([corpus[i] for i in texts]))
        means = [indicators.embed_batch(model, batch, tap_layer, pad_id=pad_id) for batch in batches]
        for _ in range(_most(len(batches), place) - len(batches)):  # a sharded base needs all processes for each pass
            indicators.embed_batch(model, batches[0], tap_layer, pad_id=pad_id)
        return np.concatenate(means)

    return embed


def with_engine(engine: Engine, corpus: Corpus, texts: Sequence[Text]) -> Embedder:
    """Embed with an exported bundle: what a device will see."""

    def embed(indices: list[int], _: Accelerator) -> Floats:
        pairs = [(texts[i].prompt, texts[i].completion) for i in indices]
        prompt, answer = (engine.embed(pairs, part=part, base=True) for part in ("prompt", "answer"))
        lengths = np.array([corpus.lengths(i) for i in indices], np.float32)[:, :, None]
        everything = (prompt * lengths[:, 0] + answer * lengths[:, 1]) / lengths.sum(1)
        stacked: Floats = np.stack([prompt, answer, everything], axis=1)
        return stacked

    return embed


def open_engine(bundle: Path, base_fingerprint: str, tap_layer: int | None, threads: int | None) -> Engine:
    """The engine of an exported bundle, whose tap will be the pool's.

    Raises:
        AdapterError: the bundle is of another base, or has another tap than `tap_layer` (None: any).
        BundleError, BackendError: it cannot be used.
    """
    from crayon_runtime.engine import Engine

    engine = Engine.load(bundle, threads=threads)
    assert engine.bundle is not None
    model = engine.bundle.model
    if model.base_fingerprint != base_fingerprint:
        raise AdapterError(
            f"the bundle is of another base ({model.base_fingerprint[:12]}…; the model is {base_fingerprint[:12]}…)",
            where=bundle,
            do="export the model that the pool is built for",
        )
    if tap_layer not in (None, model.tap.layer):
        raise AdapterError(
            f"the bundle's tap is layer {model.tap.layer}, not {tap_layer}",
            where=bundle,
            do=f"export the model with its tap at layer {tap_layer}",
        )
    return engine


def embed(
    embedder: Embedder,
    corpus: Corpus,
    place: Accelerator,
    *,
    folder: Path | None = None,
    on_texts: Callable[[int], None] | None = None,
) -> Embeddings:
    """Embed all texts.

    Args:
        folder: of these texts, this base and this tap alone, seen by all processes; None: in memory.
        on_texts: called with the number of texts done since the last call.

    Returns:
        In every process the same; files that are mapped into memory where there is a folder.

    Raises:
        InvalidInput: a completion has no tokens, or a state is not finite.
        IntegrityError: the folder is damaged.
        OutputError: it cannot be written.
    """
    indicators.check_completions(corpus)
    done = 0 if folder is None else _done(folder, len(corpus))
    place.wait_for_everyone()  # before one of them writes
    pieces = []
    if on_texts and done:
        on_texts(done)
    for start in range(done, len(corpus), PIECE):
        rows = range(start, min(start + PIECE, len(corpus)))
        means = _piece(embedder, corpus, rows, place)
        if not np.isfinite(means).all():
            raise InvalidInput("an embedding is not finite", where=f"texts {rows.start} to {rows.stop - 1}")
        if folder is None:
            pieces.append(means)
        elif place.is_main_process:
            _write(folder, means, start, len(corpus))
        if on_texts:
            on_texts(len(rows))
    if folder is None:
        return Embeddings(*np.moveaxis(np.concatenate(pieces), 1, 0))
    place.wait_for_everyone()
    return Embeddings(*(np.load(_file(folder, part), mmap_mode="r", allow_pickle=False) for part in Embeddings._fields))


def _piece(embedder: Embedder, corpus: Corpus, rows: range, place: Accelerator) -> Floats:
    """float32 [n, 3, d], in the order of the texts; each process embeds a share of them, texts of like length together."""
    import torch

    order = sorted(rows, key=lambda i: sum(corpus.lengths(i)))
    share = order[place.process_index :: place.num_processes]
    means = embedder(share or order[:1], place)[: len(share)]
    if place.num_processes > 1:
        most = -(-len(order) // place.num_processes)
        padded = np.zeros((most, *means.shape[1:]), np.float32)
        padded[: len(means)] = means
        gathered = place.gather(torch.from_numpy(padded).to(place.device)).cpu().numpy()
        means = gathered.reshape(place.num_processes, most, *means.shape[1:]).swapaxes(0, 1)
        means = means.reshape(-1, *means.shape[2:])[: len(order)]
    in_order = np.empty_like(means)
    in_order[np.array(order) - rows.start] = means
    return in_order


def _most(count: int, place: Accelerator) -> int:
    import torch

    if place.num_processes == 1:
        return count
    return int(place.gather(torch.tensor([count], device=place.device)).max())


# On disk


def _file(folder: Path, part: str) -> Path:
    return folder / f"{part}.npy"


def _done(folder: Path, count: int) -> int:
    path = folder / "progress.json"
    if not path.exists():
        return 0
    try:
        progress = msgspec.json.decode(path.read_bytes(), type=_Progress)
        sizes = {_file(folder, part).stat().st_size for part in Embeddings._fields}
    except (OSError, msgspec.DecodeError) as e:
        raise IntegrityError(f"the embeddings cannot be read: {e}", where=folder, do="remove this folder") from None
    if not 0 <= progress.done <= count or min(sizes) < HEADER + 4 * progress.size * progress.done:
        raise IntegrityError("the embeddings are not what their progress says", where=folder, do="remove this folder")
    return progress.done


def _write(folder: Path, means: Floats, start: int, count: int) -> None:
    """Not through a mapping: that kills the process where the disk is full."""
    size = means.shape[2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for n, part in enumerate(Embeddings._fields):
            with _file(folder, part).open("r+b" if start else "wb") as file:
                if not start:
                    file.write(_header(count, size))
                file.seek(HEADER + 4 * size * start)
                file.truncate()
                file.write(np.ascontiguousarray(means[:, n]).data)
                file.flush()
                os.fsync(file.fileno())
    except OSError as e:
        raise OutputError(f"the embeddings cannot be written: {e.strerror}", where=folder, do="free some space") from e
    with atomic_file(folder / "progress.json") as progress:
        progress.write(msgspec.json.encode(_Progress(start + len(means), size)))


def _header(count: int, size: int) -> bytes:
    description = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({count}, {size}), }}"
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + description.ljust(HEADER - 11).encode() + b"\n"
