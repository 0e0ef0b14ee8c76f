"""What is asked, and what is recorded of the answers to it: on the device, and by the server LLM."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crayon_runtime.customize import alpha_of
from crayon_runtime.examples import score
from crayon_runtime.prototypes import read_prototypes
from crayon_runtime.routing.calibration import uncalibrated
from crayon_runtime.routing.signals import SIGNALS, Reference, signals
from crayon_server.data.phone_assistant import useful
from crayon_server.evaluate.exact_match import MAX_NEW_TOKENS
from crayon_server.pool.prototypes import BundleEmbedder, add_prototypes, typical_inputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from crayon_runtime import Engine
    from crayon_runtime.pool import Pool
    from crayon_runtime.routing.policies import Policy
    from crayon_server.data.phone_assistant import Example, User
    from crayon_server.evaluate.customization import Device
    from crayon_server.evaluate.float_model import FloatModel
    from crayon_server.training import Text, Tokens

    Floats = npt.NDArray[np.float64]
    Bools = npt.NDArray[np.bool_]

PARTS = {"in_task": 20, "other_domain": 10, "server_only": 10}
"""How many queries each user has of what the device is customized for, of other domains that it knows, and of domains that only the
server knows: as in the trial that these signals come from."""

AFTER = (2, 3, 4, 6, 8, 12)
"""Tokens after which an early policy may decide."""


def asking(user: User) -> User:
    """The user with the queries of all parts, in the order of `PARTS`."""
    in_task, other, server_only = PARTS.values()
    return dataclasses.replace(
        user, queries=user.queries[:in_task] + user.out_of_task[:other] + user.server_only[:server_only]
    )


class Judged(NamedTuple):
    """Of n answers.

    Attributes:
        exact: bool [n], the call in the user's convention.
        useful: bool [n], the right call in any convention.
    """

    exact: Bools
    useful: Bools


class Recorded(NamedTuple):
    """What a device said to n queries, and what could be known of it.

    Attributes:
        judged: the answers.
        tokens: int64 [n], that were decoded.
        signals: float64 [n, `SIGNALS`], of the whole answer.
        early: the same after so many tokens of `AFTER`, or at the end of a shorter answer.
        uncalibrated: of each query, what its user's device has for a policy right after it was customized.
    """

    judged: Judged
    tokens: npt.NDArray[np.int64]
    signals: Floats
    early: dict[int, Floats]
    uncalibrated: list[Policy]


def judge(answers: Sequence[str], queries: Sequence[Example]) -> Judged:
    exact = np.array([answer == query.completion for answer, query in zip(answers, queries, strict=True)])
    return Judged(exact, np.array([useful(answer, query) for answer, query in zip(answers, queries, strict=True)]))


def said_by(model: FloatModel, examples: Sequence[Text], texts: Sequence[Tokens]) -> list[str]:
    """What a float model answers greedily to examples, tokenized as `texts`; what is exactly right is not generated to know it."""
    exact, _ = model.force(texts)
    wrong: list[int] = np.flatnonzero(~exact).tolist()
    answers = [example.completion for example in examples]
    for i, answer in zip(wrong, model.generate([texts[i] for i in wrong], MAX_NEW_TOKENS), strict=True):
        answers[i] = answer
    return answers


def with_prototypes(device: Device, pool: Pool, server: FloatModel) -> Pool:
    """The pool, with what the server says to its typical inputs, embedded by the device's base."""
    inputs = typical_inputs(pool)
    answers = said_by(server, inputs, server.tokenize(inputs))
    outputs = {text.prompt: answer for text, answer in zip(inputs, answers, strict=True)}
    embedder = BundleEmbedder(device.engine)
    return add_prototypes(
        pool, inputs, outputs, embedder, pool.path, model="nano-server", choices={}, replace=True
    ).pool


def record(device: Device, pool: Pool) -> Recorded:
    """Customize the device for one user after the other, and ask all their queries."""
    texts, tokens, policies = [], [], []
    whole: list[list[float]] = []
    early: dict[int, list[list[float]]] = {after: [] for after in AFTER}
    engine = device.engine
    for user in device.users:
        pairs = [(e.prompt, e.completion) for e in user.examples]
        bundle = device.blended(pool, alpha_of(engine, pairs, pool.manifest, pool.projection))
        adapter = engine.read_adapter(bundle)
        engine.set_adapter(adapter)
        own = score(engine, pairs, adapter).states
        reference = Reference.of(read_prototypes(bundle, engine.backend.tap_size), own, pool.projection)
        policy = next(policy for policy in uncalibrated(reference, own) if policy.name == "calibrated")
        for query in user.queries:
            text, count, at_end, so_far = _answer(engine, query.prompt, reference)
            texts.append(text)
            tokens.append(count)
            policies.append(policy)
            whole.append(at_end)
            for after, row in so_far.items():
                early[after].append(row)
    queries = [query for user in device.users for query in user.queries]
    return Recorded(
        judge(texts, queries),
        np.array(tokens),
        np.array(whole),
        {after: np.array(rows) for after, rows in early.items()},
        policies,
    )


def _answer(engine: Engine, prompt: str, reference: Reference) -> tuple[str, int, list[float], dict[int, list[float]]]:
    """The text, its tokens, and the signals at its end and after each of `AFTER`."""
    so_far = {}
    with engine.stream(prompt, max_new_tokens=MAX_NEW_TOKENS) as stream:
        for count, _ in enumerate(stream, 1):
            if count in AFTER:
                so_far[count] = _row(signals(stream.so_far, reference, SIGNALS))
    generation = stream.generation
    at_end = _row(signals(generation, reference, SIGNALS))
    return generation.text, generation.generated_tokens, at_end, {k: so_far.get(k, at_end) for k in AFTER}


def _row(computed: dict[str, float]) -> list[float]:
    return [computed[name] for name in SIGNALS]
