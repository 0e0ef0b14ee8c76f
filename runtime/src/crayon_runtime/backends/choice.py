"""Which backend answers faster on this device: measured once for a bundle, and remembered.

None is the faster one everywhere: it depends on the processor's instructions, on the shapes of the model, and on what else runs.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from crayon_runtime.errors import BackendError, OutputError
from crayon_runtime.files import atomic_file
from crayon_runtime.probe import cores, free_memory, processor

if TYPE_CHECKING:
    from crayon_runtime.backends.base import Backend, Cache
    from crayon_runtime.bundle import Bundle

PROMPT, ANSWER = 64, 64
"""Tokens of the prompt and of the answer whose time decides."""

_DECODED = 8
"""Tokens that a round decodes."""

_ROUNDS, _ENOUGH = 6, 5.0
"""Rounds at most, and seconds after which no other one begins. The first only warms up, so there are always two."""

_RESIDENT = 3
"""Bytes of memory for each byte of weights: a mapped file, a copy in the order in which a backend computes, and room."""

_DISTRIBUTIONS = ("crayon-edge", "crayon-edge-native", "onnxruntime")
"""What may change the speed of a backend when its version changes."""


def choose(bundle: Bundle, names: Sequence[str], load: Callable[[str], Backend], *, threads: int | None) -> Backend:
    """Load the backend that answers fastest here.

    Args:
        names: those to choose from, at least one; where there are several, one that cannot run the model is left out.
        load: loads one.
        threads: what they are loaded with.

    Raises:
        BackendError: none of them can run the model; it is the error of the first.
    """
    if len(names) == 1:
        return load(names[0])
    place, facts = _place(bundle, threads), {"among": sorted(names), "versions": _versions()}
    name = _recall(place, facts)
    if name is None:
        seconds = _time(bundle, names, load)
        name = min(seconds, key=seconds.__getitem__)
        if len(seconds) == len(names):
            _remember(place, facts, name, seconds)
    return load(name)


def measure(caches: Mapping[str, Cache], vocab_size: int, context_length: int) -> dict[str, float]:
    """Seconds that each takes for `PROMPT` tokens and an answer of `ANSWER`: medians of interleaved rounds.

    Args:
        caches: of one model, by the backend's name.
    """
    prompt = np.arange(min(PROMPT, max(1, context_length // 2)), dtype=np.int64) % vocab_size
    decoded = min(_DECODED, context_length - len(prompt))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in caches}
    start = perf_counter()
    for done in range(_ROUNDS):
        if done > 1 and perf_counter() - start > _ENOUGH:
            break
        for name, cache in caches.items():
            cache.rewind(0)
            began = perf_counter()
            cache.prefill(prompt)
            between = perf_counter()
            for token in range(decoded):
                cache.decode(token % vocab_size)
            times[name].append((between - began, (perf_counter() - between) / max(decoded, 1)))
    medians = {
        name: [statistics.median(part) for part in zip(*rounds[1:], strict=True)] for name, rounds in times.items()
    }
    return {name: prefill + ANSWER * decode for name, (prefill, decode) in medians.items()}


def _time(bundle: Bundle, names: Sequence[str], load: Callable[[str], Backend]) -> dict[str, float]:
    """`measure` of all that load, together if the memory holds them, else one after the other."""
    seconds: dict[str, float] = {}
    failures: list[BackendError] = []
    for group in [names] if _fit(bundle) else [[name] for name in names]:
        with ExitStack() as stack:
            caches: dict[str, Cache] = {}
            for name in group:
                try:
                    backend = load(name)
                    stack.callback(backend.close)
                    caches[name] = backend.new_cache()
                    stack.callback(caches[name].close)
                except BackendError as e:
                    failures.append(e)
            model = bundle.model
            seconds |= measure(caches, model.architecture.vocab_size, model.context_length)
    if not seconds:
        raise failures[0]
    return seconds


def _fit(bundle: Bundle) -> bool:
    """Whether all backends of a bundle are well in memory at the same time."""
    free = free_memory()
    return free is None or bundle.size * _RESIDENT < free


def _place(bundle: Bundle, threads: int | None) -> Path:
    """The file for what was measured of a bundle on this machine with so many threads."""
    from platformdirs import user_cache_path

    document = hashlib.sha256(json.dumps(bundle.document, sort_keys=True).encode()).hexdigest()[:32]
    folder = user_cache_path("crayon", appauthor=False) / "backends"
    return folder / f"{document}-{processor()}-{threads or 'all'}-of-{cores()}.json"


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _recall(place: Path, facts: Mapping[str, object]) -> str | None:
    """What was the fastest under the same circumstances; None: it was not measured."""
    with suppress(OSError, ValueError, RecursionError):
        kept = json.loads(place.read_bytes())
        if isinstance(kept, dict) and all(kept.get(key) == value for key, value in facts.items()):
            name = kept.get("backend")
            return name if name in kept["among"] else None
    return None


def _remember(place: Path, facts: Mapping[str, object], name: str, seconds: dict[str, float]) -> None:
    with suppress(OutputError), atomic_file(place) as file:
        file.write(json.dumps({"backend": name, "seconds": seconds, **facts}, indent=1).encode())
