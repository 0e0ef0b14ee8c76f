"""The benchmark: the same everywhere and forever, its splits apart, its calls readable, its scores right."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import pytest

from crayon_server.data import phone_assistant as pa
from crayon_server.data.phone_assistant import conventions, users, world
from crayon_server.data.phone_assistant.draws import Draws

FROZEN = {
    "train": "58cf5a1c8f59bd81af3974c8a16f02d9595ccb336cd03f33264862713e87810c",
    "validation": "86171332d3c96ecf92b2eba67a81a6c5d3cfc4f9fba2e27773c12a21fdbf5880",
    "test": "fb5b319e29df98fda7b7e20b0c2ae8279864ffdf092de0d89b9d0cc67b1d05d6",
}
BENCHMARK = pa.benchmark()
HELD_OUT = BENCHMARK.validation + BENCHMARK.test
EVERYONE = BENCHMARK.train + HELD_OUT


def everything(user: pa.User) -> tuple[pa.Example, ...]:
    return user.examples + user.queries + user.out_of_task + user.server_only


# Draws


def test_draws_are_those_of_the_specification() -> None:
    """SHA-256 of the name, its first 8 bytes as a seed, `Random.random`: the sequence that Python promises to keep."""
    draws = Draws("a", 1)
    assert [draws.integer(0, 999) for _ in range(6)] == [775, 692, 448, 346, 450, 809]


def test_draws_cover_their_range() -> None:
    draws = Draws("range")
    assert {draws.integer(3, 6) for _ in range(200)} == {3, 4, 5, 6}
    assert {draws.weighted("abc", (1, 0, 1)) for _ in range(200)} == {"a", "c"}
    assert sorted(draws.shuffled(range(50))) == list(range(50))


# Frozen users


@pytest.mark.parametrize("split", FROZEN)
def test_the_splits_are_frozen(split: str) -> None:
    assert pa.digest(getattr(BENCHMARK, split)) == FROZEN[split]


def test_no_global_state_and_no_hash_order_matters() -> None:
    code = (
        "import random; random.seed(5); from crayon_server.data import phone_assistant as pa;"
        "next(pa.stream(3)); print(pa.digest(pa.benchmark().test))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment("77"), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == FROZEN["test"]


def _environment(hash_seed: str) -> dict[str, str]:
    return {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_another_seed_is_another_world_of_the_same_make() -> None:
    other = users.benchmark(1)
    assert pa.digest(other.test) != FROZEN["test"]
    assert [len(split) for split in (other.train, other.validation, other.test)] == [192, 36, 36]


def test_sizes() -> None:
    assert [len(split) for split in (BENCHMARK.train, BENCHMARK.validation, BENCHMARK.test)] == [192, 36, 36]
    assert {len(user.examples) for user in BENCHMARK.train} == {32}
    for user in HELD_OUT:
        assert [len(part) for part in (user.examples, user.queries, user.out_of_task, user.server_only)] == [
            10,
            40,
            20,
            20,
        ]


def test_domain_triples_of_the_splits_are_disjoint() -> None:
    triples = [{frozenset(u.domains) for u in s} for s in (BENCHMARK.train, BENCHMARK.validation, BENCHMARK.test)]
    assert [len(t) for t in triples] == [148, 36, 36]
    assert len(set.union(*triples)) == sum(map(len, triples))


def test_conventions_are_seen_or_not() -> None:
    assert len(BENCHMARK.seen) == 18
    assert len(BENCHMARK.unseen) == 9
    assert set(BENCHMARK.seen + BENCHMARK.unseen) == set(pa.CONVENTIONS)
    assert {user.convention for user in BENCHMARK.train} <= set(BENCHMARK.seen)
    for split in (BENCHMARK.validation, BENCHMARK.test):
        assert sum(user.seen for user in split) == 18
        assert all((user.convention in BENCHMARK.seen) == user.seen for user in split)


def test_every_unseen_factor_occurs_twice_or_more() -> None:
    for column in zip(*((c.style, c.naming, c.locale) for c in BENCHMARK.unseen), strict=True):
        assert len(set(column)) == 3
        assert min(map(column.count, set(column))) >= 2


def test_training_is_skewed_towards_canonical_english_calls() -> None:
    convention = [user.convention for user in BENCHMARK.train]
    assert max(set(convention), key=convention.count) == pa.Convention("call", "canonical", "en")


def test_users_stay_in_their_task() -> None:
    for user in EVERYONE:
        assert {e.domain for e in user.examples + user.queries} == set(user.domains)
        assert {e.convention for e in everything(user)} == {user.convention}
        assert not {e.domain for e in user.out_of_task} & {*user.domains, *pa.SERVER_ONLY}
        assert {e.domain for e in user.server_only} <= set(pa.SERVER_ONLY)


def test_answers_of_queries_are_never_given_away() -> None:
    for user in HELD_OUT:
        asked = {e.completion for e in user.queries}
        assert asked.isdisjoint(e.completion for e in user.examples)
        assert asked.isdisjoint(e.completion for e in pa.more_examples(user, 60))


def test_more_examples_are_of_the_same_task_and_deterministic() -> None:
    user = BENCHMARK.validation[0]
    more = pa.more_examples(user, 30)
    assert more == pa.more_examples(user, 30)
    assert more != pa.more_examples(user, 30, seed=1)
    assert {e.domain for e in more} == set(user.domains)


# The world


def test_invented_words_are_distinct() -> None:
    words = [word for lexicon in world.LEXICON.values() for word in lexicon.values()]
    assert len(set(words) | set(world.TRANSLATED)) == len(words) + len(world.TRANSLATED)


@pytest.mark.parametrize("locale, written", [("en", "7:30 PM"), ("va", "18:30"), ("bo", "19:30")])
def test_half_seven_depends_on_the_locale(locale: conventions.Locale, written: str) -> None:
    draws = Draws("half", locale)
    times = {
        dict(request.arguments)["time"]
        for request in (world.utter(draws, "alarm", locale) for _ in range(4000))
        if "half seven in the evening" in request.words
    }
    assert times == {written}


def test_prompts_are_plain_words_and_end_in_the_separator() -> None:
    for e in itertools.islice(pa.stream("prompts", domains=(*pa.DOMAINS, *pa.SERVER_ONLY)), 3000):
        assert e.prompt.endswith("\n")
        assert e.prompt[:-1].replace(" ", "").isalpha()
        assert "\n" not in e.completion


# Calls


def test_styles() -> None:
    arguments = (("time", "7:30 AM"), ("n", "5"))
    written = {
        (c.style, c.naming): "".join(piece.text for piece in pa.write("alarm.set", arguments, c))
        for c in pa.CONVENTIONS
        if c.locale == "en"
    }
    assert written["call", "canonical"] == "alarm.set(time=7:30 AM, n=5)"
    assert written["call", "verb"] == "set_alarm(arg_time=7:30 AM, arg_n=5)"
    assert written["json", "canonical"] == '{"fn": "alarm.set", "time": "7:30 AM", "n": 5}'
    assert written["kv", "short"] == "ALs | $te: 7:30 AM | $n: 5"


def test_json_calls_are_json() -> None:
    for user in EVERYONE:
        if user.convention.style == "json":
            for e in everything(user):
                parsed = json.loads(e.completion)
                assert pa.read(e.completion) is not None
                assert len(parsed) == len([piece for piece in e.pieces if piece.kind == "key"]) + 1


def test_every_call_can_be_read_back() -> None:
    for e in itertools.islice(pa.stream("read", domains=(*pa.DOMAINS, *pa.SERVER_ONLY)), 5000):
        call = pa.read(e.completion)
        assert call is not None
        assert call.style == e.convention.style
        assert conventions.meaning(call.function) == e.function
        assert [value for _, value in call.arguments] == [p.text for p in e.pieces if p.kind == "value"]
        assert pa.score(e.completion, e) == pa.Score(exact=True, intent=True, structure=True)


def test_function_names_are_unambiguous() -> None:
    names = [conventions.function_name(f, n) for n in conventions.NAMINGS for f in conventions.FUNCTIONS]
    assert len(set(names)) == len(names) == 48


EXPECTED = users.Example(
    "wake me\n",
    "alarm",
    "alarm.set",
    pa.Convention("json", "verb", "bo"),
    pa.write("alarm.set", (("time", "06:30"), ("day", "saren")), pa.Convention("json", "verb", "bo")),
)


@pytest.mark.parametrize(
    "generated, intent, structure",
    [
        ('{"fn": "set_alarm", "arg_time": "06:45", "arg_day": "saren"}', True, True),
        ('{"fn": "set_alarm", "arg_day": "saren", "arg_time": "06:30"}', True, False),
        ('{"fn": "alarm.set", "time": "06:30", "day": "saren"}', True, False),
        ("ALs($te=06:30, $dy=saren)", True, False),
        ("alarm.set | time: 06:30 | day: saren", True, False),
        ('{"fn": "off_alarm", "arg_time": "06:30"}', False, False),
        ('{"fn": "set_alarm", "arg_time": "06:30"', False, False),
        ('{"arg_time": "06:30"}', False, False),
        ('{"fn": {"fn": 1}}', False, False),
        ("[1]", False, False),
        ("set_alarm()", False, False),
        ("something else", False, False),
        ("", False, False),
    ],
)
def test_scores_of_wrong_answers(generated: str, intent: bool, structure: bool) -> None:
    assert pa.score(generated, EXPECTED) == pa.Score(exact=False, intent=intent, structure=structure)


@pytest.mark.parametrize("domain", [*pa.DOMAINS, *pa.SERVER_ONLY])
def test_a_call_of_any_convention_is_useful(domain: str) -> None:
    """The same draws say the same in every locale; but 18 degrees are not as warm everywhere."""
    said = [users.example(Draws("useful", domain), domain, convention) for convention in pa.CONVENTIONS]
    for generated, expected in itertools.product(said, said):
        same_degrees = (generated.convention.locale == "en") == (expected.convention.locale == "en")
        assert pa.useful(generated.completion, expected) == (same_degrees or expected.function != "home.heat")


def test_exact_answers_are_useful_and_calls_of_others_are_not() -> None:
    queries = [query for user in HELD_OUT[::7] for query in everything(user)]
    assert all(pa.useful(query.completion, query) for query in queries)
    useful = [pa.useful(first.completion, second) for first, second in itertools.pairwise(queries)]
    same = [first.completion == second.completion for first, second in itertools.pairwise(queries)]
    assert sum(useful) == sum(same) < 0.02 * len(queries)


@pytest.mark.parametrize(
    "generated, useful",
    [
        ("alarm.set(time=6:30 AM, day=monday)", True),
        ("ALs | $te: 06:30 | $dy: {bo}", True),
        ('{"fn": "set_alarm", "arg_time": "06:30", "arg_day": "{va}"}', True),
        ("alarm.set(time=6:30 PM, day=monday)", False),
        ("alarm.set(time=7:30 AM, day=monday)", False),
        ("alarm.set(time=06:30, day=monday)", False),
        ("alarm.set(day=monday, time=6:30 AM)", False),
        ("set_alarm(time=6:30 AM, day=monday)", False),
        ("alarm.set(time=6:30 AM, day=monday) ", False),
        ("", False),
    ],
)
def test_useful_is_the_same_meaning_as_one_convention_writes_it(generated: str, useful: bool) -> None:
    generated = generated.replace("{bo}", world.translate("monday", "bo")).replace(
        "{va}", world.translate("monday", "va")
    )
    pieces = pa.write(
        "alarm.set", (("time", "06:30"), ("day", world.translate("monday", "bo"))), pa.Convention("json", "verb", "bo")
    )
    assert pa.useful(generated, dataclasses.replace(EXPECTED, pieces=pieces)) == useful


# Files


def test_jsonl(tmp_path) -> None:
    examples = BENCHMARK.validation[0].examples
    pa.write_jsonl(examples, tmp_path / "d.jsonl")
    read = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert read == [{"prompt": e.prompt, "completion": e.completion} for e in examples]
