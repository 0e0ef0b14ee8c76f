"""Sampling: judged by transformers' processors and warpers, and by the module's specification, written out again in plain Python."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crayon_runtime import sampling
from crayon_runtime.errors import BackendError, InvalidInput
from crayon_runtime.sampling import Sampler, SamplingOptions, SplitMix64
from tests.support import needs

V = 60
Floats = npt.NDArray[np.float32]


class Dice:
    """A generator that throws what it is told."""

    def __init__(self, u: float = 0.5) -> None:
        self.u = u
        self.thrown = 0

    def uniform(self) -> float:
        self.thrown += 1
        return self.u


def loaded(options: SamplingOptions, vocab_size: int = V) -> tuple[Sampler, Dice]:
    sampler, dice = Sampler(options, vocab_size), Dice()
    sampler._random = dice  # type: ignore[assignment]
    return sampler, dice


def normal(seed: int, size: int = V, scale: float = 3.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


@pytest.mark.parametrize(
    "seed, bits",
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]),
    ],
)  # fmt: skip
def test_the_generator_gives_the_numbers_of_the_specification(seed: int, bits: list[int]) -> None:
    generator = SplitMix64(seed)
    assert [generator.next() for _ in bits] == bits
    for number in bits:
        assert str(number) in str(sampling.__doc__) or f"{number:016X}" in str(sampling.__doc__)


def test_uniform_is_the_upper_53_bits() -> None:
    generator = SplitMix64(0)
    numbers = [generator.uniform() for _ in range(3)]
    assert numbers == [0.8833108082136426, 0.43152799704850997, 0.026433771592597743]
    assert all(str(number) in str(sampling.__doc__) for number in numbers)


OPTIONS = [
    dict(zip(("temperature", "top_k", "top_p", "min_p", "repetition_penalty"), values, strict=True))
    for values in itertools.product(
        [0.7, 1.0, 1.9], [0, 1, 7, 1000], [1.0, 0.9, 0.3], [0.0, 0.05, 0.4], [1.0, 1.3, 0.8]
    )
]


def test_kept_tokens_and_probabilities_are_those_of_transformers() -> None:
    torch, generation = needs.module("torch"), needs.module("transformers.generation.logits_process")
    seen = [3, 3, 17, 40, 41]
    for number, options in enumerate(OPTIONS):
        logits = normal(number)
        steps = [
            generation.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]),
            generation.TemperatureLogitsWarper(options["temperature"]),
            *([generation.TopKLogitsWarper(options["top_k"])] if options["top_k"] else []),
            *([generation.TopPLogitsWarper(options["top_p"])] if options["top_p"] < 1 else []),
            *([generation.MinPLogitsWarper(options["min_p"])] if options["min_p"] else []),
        ]
        scores = torch.from_numpy(logits.copy())[None]
        for step in steps:
            scores = step(torch.tensor([seen]), scores)
        probabilities = torch.softmax(scores.double(), -1)[0].numpy()
        order = sorted(np.flatnonzero(probabilities), key=lambda i: (-probabilities[i], i))

        sampler, dice = loaded(SamplingOptions(**options))
        sampler.observe(np.array(seen))
        below = 0.0
        for token in order:  # each token fills its interval of [0, 1): so the set and the probabilities are right
            for share in (0.001, 0.5, 0.999):
                dice.u = below + share * float(probabilities[token])
                before = sampler._seen.copy()
                assert sampler.sample(logits) == token, options
                sampler._seen[:] = before
            below += float(probabilities[token])
        assert below == pytest.approx(1)


def specified(
    logits: Floats, options: SamplingOptions, seen: set[int], u: float, allowed: Sequence[int] | None = None
) -> int:
    """The module's docstring, step by step."""
    there = list(range(len(logits))) if allowed is None else sorted(allowed)
    z, f32 = [np.float32(x) for x in logits], np.float32
    p, t = f32(options.repetition_penalty), f32(options.temperature)
    if p != 1:
        z = [(x / p if x >= 0 else x * p) if i in seen else x for i, x in enumerate(z)]
    if t == 0:
        return min(there, key=lambda i: (-z[i], i))
    z = [x / t for x in z]
    order = sorted(there, key=lambda i: (-z[i], i))
    if 0 < options.top_k < len(order):
        order = [i for i in order if z[i] >= z[order[options.top_k - 1]]]
    distance = [float(z[order[0]]) - float(z[i]) for i in order]
    c = list(itertools.accumulate(np.exp(-np.array(distance)).tolist()))
    kept = [i for i in range(len(order)) if i == 0 or c[i - 1] < options.top_p * c[-1] or options.top_p == 1]
    if options.min_p > 0:
        kept = [i for i in kept if distance[i] <= -math.log(options.min_p)]
    total = c[kept[-1]]
    return order[next((i for i in kept if c[i] > u * total), next(i for i in kept if c[i] == total))]


@settings(deadline=None, max_examples=300)
@given(
    logits=st.lists(st.sampled_from([-math.inf, -3.5, -1.0, -0.0, 0.0, 0.25, 1.0, 2.0, 2.5]), min_size=2, max_size=20),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 8),
    top_p=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    penalty=st.sampled_from([1.0, 1.5, 0.5]),
    seen=st.sets(st.integers(0, 1)),
    u=st.floats(0, 1, exclude_max=True),
    bound=st.none() | st.sets(st.integers(0, 20)),
)
def test_ties_too_are_as_specified(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seen: set[int], u: float,
    bound: set[int] | None,
) -> None:  # fmt: skip
    array = np.array([1.0, *logits], np.float32)
    options = SamplingOptions(temperature, top_k, top_p, min_p, penalty)
    sampler, dice = loaded(options, len(array))
    sampler.observe(np.array([*seen], np.int64))
    dice.u = u
    if bound is None:
        assert sampler.sample(array) == specified(array, options, seen, u)
    else:
        there = [0, *sorted(i for i in bound if 0 < i < len(array))]
        allowed = np.isin(np.arange(len(array)), there)
        assert sampler.sample(array, allowed) == specified(array, options, seen, u, there)


@pytest.mark.parametrize("top_k", [0, 40])
def test_ties_in_a_large_vocabulary(top_k: int) -> None:
    logits = np.round(normal(5, 3000, scale=0.6))
    options = SamplingOptions(temperature=0.9, top_k=top_k)
    sampler, dice = loaded(options, len(logits))
    for dice.u in np.linspace(0, 0.9999, 12).tolist():
        assert sampler.sample(logits) == specified(logits, options, set(), dice.u)


def test_many_equal_scores() -> None:
    sampler, dice = loaded(SamplingOptions(temperature=1.0), 100_000)
    for u, token in [(0.0, 0), (0.25, 25_000), (0.999995, 99_999)]:
        dice.u = u
        assert sampler.sample(np.zeros(100_000, np.float32)) == token


def test_top_k_keeps_what_equals_the_kth() -> None:
    sampler, dice = loaded(SamplingOptions(temperature=1.0, top_k=2), 5)
    tokens = set()
    for dice.u in np.linspace(0, 0.999, 50):
        tokens.add(sampler.sample(np.array([1, 3, 1, 0, 1], np.float32)))
    assert tokens == {0, 1, 2, 4}


def test_greedy_takes_the_first_of_the_best_and_draws_nothing() -> None:
    sampler, dice = loaded(SamplingOptions(), 4)
    assert sampler.sample(np.array([0, 2, 2, 1], np.float32)) == 1
    assert dice.thrown == 0


def test_one_number_is_drawn_a_token() -> None:
    sampler, dice = loaded(SamplingOptions(temperature=1.0, top_k=5, top_p=0.9, min_p=0.01))
    for seed in range(10):
        sampler.sample(normal(seed))
    assert dice.thrown == 10


def test_greedy_heeds_the_repetition_penalty() -> None:
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0), 3)
    logits = np.array([3.0, 2.0, -1.0], np.float32)
    assert [sampler.sample(logits) for _ in range(4)] == [0, 1, 0, 0]
    assert logits.tolist() == [3.0, 2.0, -1.0]


def test_a_seed_gives_the_same_answer_and_another_seed_another() -> None:
    def answer(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.5, seed=seed), V)
        return [sampler.sample(normal(i)) for i in range(30)]

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)
    assert answer(None) != answer(None)
    assert answer(2**64 - 1) == answer(2**64 - 1)


def test_frequencies() -> None:
    probabilities = np.array([0.5, 0.25, 0.125, 0.125])
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=3), 4)
    logits = np.log(probabilities).astype(np.float32)
    n = 8000
    counts = np.bincount([sampler.sample(logits) for _ in range(n)], minlength=4)
    chi_square = float((((counts - n * probabilities) ** 2) / (n * probabilities)).sum())
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001; the seed is fixed


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}, *OPTIONS[::17]])
def test_a_constraint_is_as_minus_infinity_for_all_other_tokens(options: dict[str, Any]) -> None:
    for seed in range(12):
        logits = normal(seed)
        allowed = np.random.default_rng(seed).random(V) < (0.03, 0.3, 0.9)[seed % 3]
        allowed[seed] = True
        (bound, dice), (masked, same) = loaded(SamplingOptions(**options)), loaded(SamplingOptions(**options))
        for sampler in (bound, masked):
            sampler.observe(np.array([3, 17]))
        for dice.u in (0.0, 0.3, 0.77, 1 - 2.0**-53):
            same.u = dice.u
            token = bound.sample(logits, allowed)
            assert token == masked.sample(np.where(allowed, logits, -np.inf).astype(np.float32))
            assert allowed[token]
            wide = logits.astype(np.float64)
            plain = wide[token] - np.log(np.exp(wide).sum())
            assert bound.log_probability == pytest.approx(plain, abs=1e-5), "of the plain softmax"
        assert dice.thrown == same.thrown
        assert logits.tolist() == normal(seed).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.001, 1.0])
def test_a_constraint_that_leaves_nothing_likely_is_an_error(temperature: float) -> None:
    sampler, _ = loaded(SamplingOptions(temperature=temperature))
    logits = normal(0)
    logits[7] = -np.inf
    for allowed in (np.zeros(V, np.bool_), np.arange(V) == 7):
        with pytest.raises(InvalidInput, match="none of the tokens that the constraint allows"):
            sampler.sample(logits, allowed)
    assert sampler.sample(logits, np.arange(V) == 8) == 8, "the sampler goes on"


@pytest.mark.parametrize("options", [OPTIONS[0], *OPTIONS[100::50], {}])
def test_the_log_probability_is_that_of_the_plain_softmax(options: dict[str, Any]) -> None:
    sampler = Sampler(SamplingOptions(**options, seed=1), V)
    for seed in range(10):
        logits = normal(seed)
        wide = logits.astype(np.float64)
        want = wide - np.log(np.exp(wide - wide.max()).sum()) - wide.max()
        token = sampler.sample(logits)
        assert sampler.log_probability == pytest.approx(want[token], abs=1e-5)


def test_the_likeliest_tokens_are_those_of_the_plain_softmax() -> None:
    sampler = Sampler(SamplingOptions(temperature=2.0, top_k=3, repetition_penalty=1.5, seed=1), V)
    for seed in range(10):
        logits = normal(seed)
        token = sampler.sample(logits)
        everything = sampler.most_likely(logits, 2 * V)
        assert dict(everything)[token] == sampler.log_probability
        assert [i for i, _ in everything] == np.argsort(-logits, kind="stable").tolist()
        assert sum(np.exp(value) for _, value in everything) == pytest.approx(1, abs=1e-5)
        for count in (0, 1, 7):
            assert [*sampler.most_likely(logits, count)] == everything[:count]


def test_of_equally_likely_tokens_the_first_are_told_and_impossible_ones_never() -> None:
    logits = np.full(V, -np.inf, np.float32)
    logits[[3, 8, 11, 12]] = [1.0, 2.0, 1.0, 1.0]
    sampler = Sampler(SamplingOptions(), V)
    sampler.sample(logits)
    assert [token for token, _ in sampler.most_likely(logits, 3)] == [8, 3, 11]
    assert [token for token, _ in sampler.most_likely(logits, 20)] == [8, 3, 11, 12]


@pytest.mark.parametrize("mask", [-np.inf, np.finfo(np.float32).min])
def test_masked_tokens_are_never_chosen(mask: float) -> None:
    logits = np.full(V, mask, np.float32)
    logits[[5, 9]] = [-700.0, -701.0]
    for u in (0.0, 0.5, 0.7312, 1 - 2.0**-53):
        for options in ({"temperature": 1.0}, {"temperature": 0.001}, {"temperature": 2.0, "top_k": 10}):
            sampler, dice = loaded(SamplingOptions(**options, repetition_penalty=1.2))  # type: ignore[arg-type]
            sampler.observe(np.array([0, 5]))
            dice.u = u
            assert sampler.sample(logits) in (5, 9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_the_backends_fault(bad: float) -> None:
    logits = normal(0)
    logits[3] = bad
    for options in (SamplingOptions(), SamplingOptions(temperature=1.0)):
        with pytest.raises(BackendError, match="logits are not usable"):
            Sampler(options, V).sample(logits)
    with pytest.raises(BackendError):
        Sampler(SamplingOptions(), V).sample(np.full(V, -np.inf, np.float32))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.1},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_k": 40},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.8, "min_p": 0.05},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("ties", [False, True])
def test_nothing_that_grows_with_the_vocabulary_is_allocated(options: dict[str, Any], ties: bool) -> None:
    size = 256 * 1024
    logits = np.zeros(size, np.float32) if ties else normal(1, size)
    sampler = Sampler(SamplingOptions(**options, seed=1), size)
    sampler.sample(logits)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        sampler.sample(logits)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 16 * 1024, peak


@pytest.mark.parametrize(
    "name, values",
    [
        ("temperature", [-0.1, math.nan, math.inf, 1e-9, "1", True, None]),
        ("top_k", [-1, 1.0, True, "5", None]),
        ("top_p", [-0.1, 1.1, math.nan, None, "0.9"]),
        ("min_p", [-0.1, 1.1, math.nan, None]),
        ("repetition_penalty", [0, -1.0, math.nan, 1000, None]),
        ("seed", [-1, 2**64, 1.5, True, "7"]),
    ],
)
def test_options_out_of_range_are_named(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidInput, match=f"{name} is .*; it must be "):
            SamplingOptions(**{name: value})


def test_numpy_numbers_are_numbers() -> None:
    options = SamplingOptions(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint64(2**63))  # type: ignore[arg-type]
    assert Sampler(options, V).sample(normal(0)) < V
