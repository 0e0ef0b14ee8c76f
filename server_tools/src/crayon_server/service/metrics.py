"""What the service counts, for Prometheus: numbers of requests, never of users.

With several workers, each writes its numbers to files in the folder that PROMETHEUS_MULTIPROC_DIR names, and any of them adds up all.
"""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, multiprocess

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_LONG = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0)


class Metrics:
    """The numbers of one application."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "crayon_requests", "Requests, by route and status", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "crayon_request_seconds",
            "From the first byte of a request to the last of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._sent = Counter("crayon_sent_bytes", "Bytes of answers, without headers", registry=self._registry)
        self._hits = Counter("crayon_cache_hits", "Adapters that were there already", registry=self._registry)
        self._blends = Histogram(
            "crayon_blend_seconds",
            "Making an adapter, until it is on the disk",
            buckets=_SECONDS,
            registry=self._registry,
        )

        self._tries = Histogram(
            "crayon_upstream_seconds",
            "Asking the server LLM once, until its first byte or until it failed, by what came of it",
            ["outcome"],
            buckets=_LONG,
            registry=self._registry,
        )

    def answered(self, route: str, status: int, sent: int, seconds: float) -> None:
        """Count an answer.

        Args:
            route: as the application declares it, so that there are few.
        """
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)
        self._sent.inc(sent)

    def hit(self) -> None:
        """Count an adapter that was there already."""
        self._hits.inc()

    def made(self, seconds: float) -> None:
        """Count an adapter that was made."""
        self._blends.observe(seconds)

    def tried(self, outcome: str, seconds: float) -> None:
        """Count that the server LLM was asked once.

        Args:
            outcome: as an `Endpoint` tells it.
        """
        self._tries.labels(outcome).observe(seconds)

    def render(self) -> bytes:
        """Prometheus's text format; of all workers, if there are several."""
        if MULTIPROCESS not in os.environ:
            return generate_latest(self._registry)
        everybody = CollectorRegistry()
        multiprocess.MultiProcessCollector(everybody)  # type: ignore[no-untyped-call]
        return generate_latest(everybody)
