"""A server LLM that is a script, and a folder as `crayon customize` leaves it: for everything that routes and computes nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crayon_runtime.bundle import Bundle
from crayon_runtime.customized import ADAPTER, STATES
from crayon_runtime.examples import ExampleStates
from crayon_runtime.pool import write_adapter_bundle
from crayon_runtime.prototypes import Prototypes
from tests.runtime import bundles, pools

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass
class Scripted:
    """Says the same to everybody; an exception among its pieces is raised there."""

    said: Sequence[str | Exception] = ("from ", "the server")
    url: str = "https://server.example"
    asked: list[str] = field(default_factory=list)
    limits: list[int | None] = field(default_factory=list)
    closed: int = 0

    def request(self, query: str, *, max_tokens: int | None = None) -> bytes:
        return query.encode()

    def ask(self, query: str, *, max_tokens: int | None = None, cancel: threading.Event | None = None) -> Scripting:
        self.asked.append(query)
        self.limits.append(max_tokens)
        return Scripting(self, query, cancel)


class Scripting(Iterator[str]):
    def __init__(self, server: Scripted, query: str, cancel: threading.Event | None) -> None:
        self.finish_reason: str | None = None
        self.sent_bytes = len(query.encode())
        self.tokens = 0
        self._server, self._cancel = server, cancel
        self._left = list(server.said)

    def __next__(self) -> str:
        if self._cancel is not None and self._cancel.is_set():
            self.finish_reason = "cancelled"
            raise StopIteration
        if not self._left:
            self.finish_reason = "length"
            raise StopIteration
        piece = self._left.pop(0)
        if isinstance(piece, Exception):
            raise piece
        self.tokens += 1
        return piece

    def close(self) -> None:
        self._server.closed += 1


def random(*shape: int, seed: int = 0, offset: float = 0.7) -> Floats:
    """Not around 0, as hidden states are not."""
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) + offset).astype(np.float32)


def prototypes(count: int, size: int) -> Prototypes:
    return Prototypes(random(count, size), random(size, seed=1), "server")


def examples(count: int, size: int) -> ExampleStates:
    log_probability = -np.abs(random(count, seed=4, offset=0))
    return ExampleStates(random(count, size, seed=2), random(count, size, seed=3), log_probability)


def adapter(
    out: Path, *, size: int, prototypes: Prototypes | None = None, name: str = "customized", seed: int = 0
) -> Bundle:
    """An adapter bundle with prototypes, which only the fake backend runs."""
    pool = pools.write(out.with_name(f"{out.name}-{seed}.pool"), located=pools.projection(3, size), replace=True)
    alpha = np.random.default_rng(seed).dirichlet([1, 1, 1]).astype(np.float32)
    return write_adapter_bundle(
        pool.blend(alpha),
        out,
        name=name,
        base_fingerprint=bundles.BASE,
        pool=pool.manifest.origin,
        prototypes=prototypes,
        replace=True,
    )


def customized(folder: Path, *, size: int, count: int = 10, with_prototypes: bool = True, seed: int = 0) -> Path:
    """What `crayon customize` leaves of a model, as far as routing reads it; the path of its adapter."""
    folder.mkdir(exist_ok=True)
    adapter(folder / ADAPTER, size=size, prototypes=prototypes(9, size) if with_prototypes else None, seed=seed)
    (folder / STATES).write_bytes(examples(count, size).to_bytes())
    return folder / ADAPTER
