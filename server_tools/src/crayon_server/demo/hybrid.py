"""Hybrid inference in the demo: how good the answers of device and server LLM are, and what moving the threshold would have given."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from crayon_server.data.phone_assistant import useful
from crayon_server.demo.report import MEASURES, PARTS, Asked, Curve, Judged
from crayon_server.evaluate.routing import metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crayon_server.data.phone_assistant import Example, User
    from crayon_server.demo.device import Routed
    from crayon_server.demo.report import Measure, QueryPart


def mixed(user: User, counts: Sequence[int]) -> list[tuple[QueryPart, Example]]:
    """What a user asks, as `crayon bench routing` mixes it: the first queries of each part, in the order of `PARTS`.

    Args:
        counts: how many of each.
    """
    of_parts = (user.queries, user.out_of_task, user.server_only)
    return [
        (part, query) for part, queries, count in zip(PARTS, of_parts, counts, strict=True) for query in queries[:count]
    ]


def asked(part: QueryPart, query: Example, routed: Routed, by_server: str) -> Asked:
    """Judge one query.

    Args:
        by_server: what the server LLM says to it, whether or not the device asked for that.
    """
    return Asked(
        part=part,
        prompt=query.prompt.strip(),
        wanted=query.completion,
        route=routed.route,
        reason=routed.reason,
        fallback=routed.fallback,
        score=routed.score,
        threshold=routed.threshold,
        text=routed.text,
        draft=routed.draft,
        by_server=by_server,
        shown_is=_judge(routed.text, query),
        draft_is=_judge(routed.draft, query),
        by_server_is=_judge(by_server, query),
        device_tokens=routed.device_tokens,
        server_tokens=routed.server_tokens,
        sent_bytes=routed.sent_bytes,
        seconds=routed.seconds,
    )


def _judge(answer: str, query: Example) -> Judged:
    return Judged(exact=answer == query.completion, useful=useful(answer, query))


def curves(queries: Sequence[Asked]) -> dict[Measure, Curve]:
    """What moving everybody's threshold by the same amount would have given, under each measure.

    Every user's policy has a scale of its own, so queries are ordered by score - threshold; the policies as they are lie on the curve, but
    for answers that came from the device because the server LLM failed.
    """
    return {measure: _curve(queries, measure) for measure in MEASURES}


def _curve(queries: Sequence[Asked], measure: Measure) -> Curve:
    margins = [-math.inf if query.score is None else query.score - query.threshold for query in queries]
    device = np.array([getattr(query.draft_is, measure) for query in queries])
    server = np.array([getattr(query.by_server_is, measure) for query in queries])
    policy = metrics.curve(margins, device, server)
    oracle = metrics.curve(device.astype(np.float64) - server, device, server)
    return Curve(
        calls=policy.calls.tolist(),
        accuracy=policy.accuracy.tolist(),
        oracle_calls=oracle.calls.tolist(),
        oracle_accuracy=oracle.accuracy.tolist(),
        policy_calls=fmean(query.route == "server" for query in queries),
        policy_accuracy=fmean(getattr(query.shown_is, measure) for query in queries),
        apgr=metrics.apgr(margins, device, server),
    )
