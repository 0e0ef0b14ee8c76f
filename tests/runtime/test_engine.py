"""The engine over the fake backend, whose logits depend on every token before and on the adapter: any mix-up shows in the answer."""

from __future__ import annotations

import gc
import os
import random
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crayon_runtime import backends
from crayon_runtime.backends.fake import FakeAdapter, FakeBackend
from crayon_runtime.bundle import Bundle
from crayon_runtime.engine import Engine
from crayon_runtime.errors import (
    AdapterError,
    BackendError,
    BundleError,
    ContextOverflow,
    EngineClosed,
    InvalidInput,
    ManifestError,
)  # fmt: skip
from crayon_runtime.generation import Generation
from crayon_runtime.request import slide
from tests.runtime import bundles, tiny
from tests.runtime.tiny import BOS, EOS, TOKENIZER, VOCAB_SIZE, byte_ids, engine, fake

ALICE, BOB = FakeAdapter("alice"), FakeAdapter("bob")
PROMPT = [BOS, *byte_ids("an alarm")]


def alone(prompt: list[int], n: int, adapter: FakeAdapter | None = None) -> list[int]:
    """The greedy answer of a fresh cache, every token computed from the very beginning."""
    backend, answer = FakeBackend(vocab_size=VOCAB_SIZE, context_length=4096), []
    while len(answer) < n and EOS not in answer:
        cache = backend.new_cache(adapter)
        answer.append(int(cache.prefill(np.array(prompt + answer)).logits.argmax()))
    return answer


def tap(ids: list[int], start: int, stop: int, adapter: FakeAdapter | None = None) -> np.ndarray:
    """The mean hidden state of the tokens from `start` to `stop`, computed from the very beginning."""
    hidden = FakeBackend(context_length=4096).hidden(ids, adapter and adapter.name)
    return hidden[start:stop].mean(0, dtype=np.float64).astype(np.float32)


def check_taps(prompt: list[int], generation: Generation, adapter: FakeAdapter | None = None) -> None:
    fed = prompt + generation.token_ids[:-1]
    assert generation.prompt_tap is not None
    assert np.array_equal(generation.prompt_tap, tap(fed, 0, len(prompt), adapter))
    if len(generation.token_ids) > 1:
        assert generation.answer_tap is not None
        assert np.array_equal(generation.answer_tap, tap(fed, len(prompt), len(fed), adapter))
    else:
        assert generation.answer_tap is None


# one answer


def test_an_answer() -> None:
    with engine([*byte_ids("ok 😀"), EOS]) as e:
        g = e.generate("the alarm", max_new_tokens=50)
    assert g.text == "ok 😀"
    assert g.token_ids == [*byte_ids("ok 😀"), EOS]
    assert g.finish_reason == "stop"
    assert g.stop is None
    assert g.prompt_tokens == len(TOKENIZER.encode("the alarm"))
    assert g.generated_tokens == len(g.token_ids) == len(g.log_probabilities) == 8
    assert 0 < g.prompt_seconds <= g.first_token_seconds
    assert g.decode_seconds > 0
    assert g.prompt_tokens_per_second > 0
    assert g.decode_tokens_per_second > 0
    assert fake(e).closed


def test_one_backend_call_a_token() -> None:
    e = engine()
    g = e.generate(PROMPT, max_new_tokens=20)
    assert g.token_ids == alone(PROMPT, 20)
    assert fake(e).prefilled == [len(PROMPT)]
    assert fake(e).calls["decode"] == g.generated_tokens - 1
    check_taps(PROMPT, g)


def test_a_stream_is_the_answer_in_pieces() -> None:
    script = [*byte_ids("日本"), *byte_ids(" é"), EOS]
    e = engine(script)
    stream = e.stream("the alarm", max_new_tokens=50)
    with pytest.raises(InvalidInput, match="has not ended"):
        _ = stream.generation
    assert sum(fake(e).calls.values()) == 0, "nothing is computed before the first piece is asked for"
    pieces = list(stream)
    assert [piece.token_id for piece in pieces] == script == stream.generation.token_ids
    assert [piece.text for piece in pieces] == ["", "", "日", "", "", "本", " ", "", "é", ""]
    assert "".join(piece.text for piece in pieces) == stream.generation.text == TOKENIZER.decode(script)


def test_a_cut_character_ends_as_a_replacement() -> None:
    e = engine(byte_ids("a😀"))
    pieces = [piece.text for piece in e.stream("the", max_new_tokens=3)]
    assert pieces == ["a", "", "\ufffd"]


def test_max_new_tokens_ends_it_by_length() -> None:
    g = engine(byte_ids("abcdef")).generate("the", max_new_tokens=3)
    assert (g.text, g.finish_reason) == ("abc", "length")


def test_eos_at_the_last_token_is_a_stop() -> None:
    g = engine([*byte_ids("ab"), EOS]).generate("the", max_new_tokens=3)
    assert (g.text, g.finish_reason, g.generated_tokens) == ("ab", "stop", 3)


def test_an_answer_of_eos_alone() -> None:
    g = engine([EOS]).generate("the")
    assert (g.text, g.token_ids, g.finish_reason, g.answer_tap) == ("", [EOS], "stop", None)


def test_any_of_several_eos_tokens_ends_it() -> None:
    e = Engine(FakeBackend([*byte_ids("ab"), 99], vocab_size=VOCAB_SIZE), tiny.tokenizer(eos=[EOS, 99]))
    assert e.generate("the").text == "ab"


@pytest.mark.parametrize(
    "answer, stop, text, found",
    [
        ("one\n\ntwo", ["\n\n"], "one", "\n\n"),
        ("one STOP two", "STOP", "one ", "STOP"),
        ("one STO two", ["STOP"], "one STO two", None),
        ("ends with STO", ["STOP"], "ends with STO", None),
        ("日本語", ["本"], "日", "本"),
        ("abc", ["zzz", "bc", "c"], "a", "bc"),
    ],
)
def test_stop_strings(answer: str, stop: Any, text: str, found: str | None) -> None:
    stream = engine([*byte_ids(answer), EOS]).stream("the", stop=stop)
    pieces = [piece.text for piece in stream]
    g = stream.generation
    assert "".join(pieces) == g.text == text
    assert (g.stop, g.finish_reason) == (found, "stop")
    if found:
        assert len(g.token_ids) == len((text + found).encode())


def test_a_stop_string_inside_one_token() -> None:
    word = TOKENIZER._library.token_to_id("▁the")
    g = engine([*byte_ids("x"), word, EOS]).generate("a", stop=[" th"])
    assert (g.text, g.stop) == ("x", " th")


def test_log_probabilities() -> None:
    logits = np.log(np.arange(1, VOCAB_SIZE + 1, dtype=np.float32))
    g = engine(lambda ids, adapter: logits).generate("the", max_new_tokens=3, temperature=0.5, top_k=2, seed=1)
    weights = np.arange(1, VOCAB_SIZE + 1)
    assert g.log_probabilities == pytest.approx(
        [float(np.log(weights[t] / weights.sum())) for t in g.token_ids], abs=1e-4
    )


def test_seeds() -> None:
    e = engine()
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 3.0}
    answers = [e.generate(PROMPT, **options, seed=seed).token_ids for seed in (1, 1, 2, None, None)]
    assert answers[0] == answers[1]
    assert len({tuple(answer) for answer in answers}) == 4
    assert engine().generate(PROMPT, **options, seed=1).token_ids == answers[0]


def test_the_repetition_penalty_knows_the_prompt() -> None:
    logits = np.zeros(VOCAB_SIZE, np.float32)
    logits[[50, 60, 70]] = [3, 2.9, 2.8]
    g = engine(lambda ids, adapter: logits).generate([50, 51], repetition_penalty=2.0, max_new_tokens=3)
    assert g.token_ids == [60, 70, 50]


# prompts and options that cannot be served


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ("a\ud800", "not valid Unicode"),
        ([1, VOCAB_SIZE], f"token 1 is {VOCAB_SIZE}"),
        ([-1], "token 0 is -1"),
        ([2**70], "token 0 is 1180591620717411303424"),
        ([1, True], "token 1 is True"),
        ([1.0], "token 0 is 1.0"),
        (["a"], "token 0 is 'a'"),
        ([None], "token 0 is None"),
        (np.array([[1, 2]]), "token 0 is"),
        (np.array([1.5]), "token 0 is"),
        (b"abc", "not bytes"),
        (None, "not NoneType"),
        (7, "not int"),
        ({"role": "user"}, "not dict"),
    ],
)
def test_prompts_that_cannot_be_served(prompt: Any, message: str) -> None:
    e = engine()
    with pytest.raises(InvalidInput) as error:
        e.generate(prompt)
    assert message in str(error.value)
    assert not fake(e).calls


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -5}, "max_new_tokens is -5"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"stop": [""]}, "a stop string must"),
        ({"stop": ""}, "a stop string must"),
        ({"stop": [3]}, "a stop string must"),
        ({"overflow": "wrap"}, "overflow is 'wrap'"),
        ({"keep": -1}, "keep is -1"),
        ({"keep": 1023}, "keep is 1023"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 2}, "top_p is 2"),
    ],
)
def test_options_that_cannot_be_served(options: dict[str, Any], message: str) -> None:
    e = engine()
    with pytest.raises(InvalidInput, match=message):
        e.stream("the", **options)
    assert not fake(e).calls


def test_an_unknown_option_is_a_mistake_in_the_program() -> None:
    with pytest.raises(TypeError, match="temprature"):
        engine().generate("the", temprature=1.0)  # type: ignore[call-arg]


def test_ids_may_be_a_numpy_array() -> None:
    assert engine().generate(np.array(PROMPT), max_new_tokens=5).token_ids == alone(PROMPT, 5)  # type: ignore[arg-type]


def test_control_tokens_in_the_prompt_are_text_unless_asked_for() -> None:
    e = engine([EOS])
    plain = e.generate("a</s>").prompt_tokens
    parsed = e.generate("a</s>", parse_special=True).prompt_tokens
    assert parsed < plain


# the context


def test_the_context_is_the_limit() -> None:
    e = engine(byte_ids("x"), context_length=16)
    assert e.generate([9] * 15, max_new_tokens=9).finish_reason == "length"
    g = e.generate([9] * 10, max_new_tokens=100)
    assert (g.generated_tokens, g.finish_reason) == (6, "length")
    for n in (16, 17, 40):
        with pytest.raises(ContextOverflow, match=f"the prompt has {n} tokens; the context holds 16"):
            e.generate([9] * n)


def slid(prompt: list[int], n: int, keep: int, context: int) -> list[int]:
    """The answer under the sliding policy, each token from a fresh cache."""
    backend, answer = FakeBackend(vocab_size=VOCAB_SIZE, context_length=context), []
    held = slide(np.array(prompt), keep, context - 1).tolist()
    while len(answer) < n:
        token = int(backend.new_cache().prefill(np.array(held)).logits.argmax())
        answer.append(token)
        held = [*held, token] if len(held) < context else slide(np.array([*held, token]), keep, context - 1).tolist()
    return answer


@pytest.mark.parametrize("keep", [0, 1, 5, 14])
@pytest.mark.parametrize("length", [3, 15, 16, 40])
def test_sliding(keep: int, length: int) -> None:
    prompt = [1 + i % 200 for i in range(length)]
    tokenizer = tiny.tokenizer(eos=[VOCAB_SIZE + 1])
    e = Engine(FakeBackend(vocab_size=VOCAB_SIZE, context_length=16), tokenizer)
    g = e.generate(prompt, max_new_tokens=50, overflow="slide", keep=keep)
    assert g.token_ids == slid(prompt, 50, keep, 16)
    assert g.finish_reason == "length"


def test_sliding_forgets_the_older_half_and_keeps_bos() -> None:
    assert slide(np.arange(10), 1, 9).tolist() == [0, 6, 7, 8, 9]
    assert slide(np.arange(10), 0, 9).tolist() == [5, 6, 7, 8, 9]
    assert slide(np.arange(10), 2, 10).tolist() == [*range(10)]
    e = engine(context_length=16)
    session = e.session()
    e.generate([BOS] + [9] * 14, max_new_tokens=4, overflow="slide", session=session)
    assert session.tokens[0] == BOS


def test_taps_survive_sliding() -> None:
    prompt = [BOS, *byte_ids("abcdefghij")]
    e = Engine(FakeBackend(vocab_size=VOCAB_SIZE, context_length=16), tiny.tokenizer(eos=[VOCAB_SIZE + 1]))
    g = e.generate(prompt, max_new_tokens=12, overflow="slide")
    backend, held, rows = FakeBackend(vocab_size=VOCAB_SIZE), prompt, []
    assert g.prompt_tap is not None
    assert np.array_equal(g.prompt_tap, tap(prompt, 0, len(prompt)))
    for token in g.token_ids[:-1]:
        held = [*held, token] if len(held) < 16 else slide(np.array([*held, token]), 1, 15).tolist()
        rows.append(backend.hidden(held)[-1])
    assert g.answer_tap is not None
    assert np.array_equal(g.answer_tap, np.mean(rows, axis=0, dtype=np.float64).astype(np.float32))


# what is kept between answers


def test_a_continued_prompt_is_not_computed_again() -> None:
    e = engine()
    first = e.generate(PROMPT, max_new_tokens=10)
    longer = PROMPT + first.token_ids[:-1] + byte_ids("and more")
    second = e.generate(longer, max_new_tokens=10)
    assert second.token_ids == alone(longer, 10)
    assert second.reused_tokens == len(longer) - len("and more")
    assert fake(e).prefilled == [len(PROMPT), len("and more")]
    assert fake(e).open_caches == 1
    check_taps(longer, second)


def test_answers_and_taps_are_exact_after_any_history() -> None:
    rng = random.Random(0)
    e = engine(context_length=2048)
    session = e.session()
    reused = 0
    for turn in range(60):
        adapter = rng.choice([None, None, None, ALICE])
        e.set_adapter(adapter)
        prompt = [rng.randrange(3, 6) for _ in range(rng.choice([1, 2, 5, 300]))]
        if turn and rng.random() < 0.7:
            prompt = session.tokens[: rng.randrange(1, 700)] + prompt
        g = e.generate(prompt, max_new_tokens=rng.randrange(1, 12), session=rng.choice([session, None]))
        assert g.token_ids == alone(prompt, g.generated_tokens, adapter)
        check_taps(prompt, g, adapter)
        reused += g.reused_tokens > 0
    assert reused > 10


def test_a_session_is_nobody_elses() -> None:
    e = engine()
    with e.session() as session:
        e.generate(PROMPT, max_new_tokens=3, session=session)
        e.generate([BOS, 9, 9], max_new_tokens=3)
        g = e.generate(PROMPT + byte_ids("x"), max_new_tokens=3, session=session)
        assert g.reused_tokens == len(PROMPT)
        assert fake(e).open_caches == 2
    assert fake(e).open_caches == 1
    with pytest.raises(EngineClosed):
        e.generate(PROMPT, session=session)


def test_a_session_runs_one_answer_at_a_time_and_in_its_own_engine() -> None:
    e = engine()
    session = e.session()
    running = e.stream(PROMPT, session=session)
    next(running)
    with pytest.raises(InvalidInput, match="another answer is running in this session"):
        e.generate(PROMPT, session=session)
    running.close()
    assert e.generate(PROMPT, session=session, max_new_tokens=2).generated_tokens == 2
    with pytest.raises(InvalidInput, match="another engine's"):
        engine().generate(PROMPT, session=session)


# cancelling, closing, failing


def test_cancelling_while_the_prompt_is_fed() -> None:
    cancel = threading.Event()

    def script(ids: list[int], adapter: str | None) -> int:
        cancel.set()
        return 9

    e = engine(script)
    g = e.generate([9] * 600, cancel=cancel)
    assert (g.finish_reason, g.text, g.token_ids, g.prompt_tap) == ("cancelled", "", [], None)
    assert fake(e).prefilled == [256]
    cancel.clear()
    again = e.generate([9] * 600, max_new_tokens=1, cancel=threading.Event())
    assert again.reused_tokens == 256
    check_taps([9] * 600, again)


def test_cancelling_while_it_answers() -> None:
    cancel = threading.Event()

    def script(ids: list[int], adapter: str | None) -> int:
        if len(ids) == len(PROMPT) + 2:
            cancel.set()
        return byte_ids("x")[0]

    g = engine(script).generate(PROMPT, cancel=cancel)
    assert (g.finish_reason, g.text) == ("cancelled", "xxx")
    check_taps(PROMPT, g)


def test_cancelling_while_it_slides() -> None:
    cancel = threading.Event()
    e = engine(byte_ids("x"), context_length=600)
    answered = 0
    for answered, _ in enumerate(e.stream([9] * 599, cancel=cancel, overflow="slide", max_new_tokens=1000), start=1):
        if answered == 2:  # the next token does not fit
            cancel.set()
    assert answered == 2


def test_a_set_event_cancels_before_anything_is_fed() -> None:
    cancel = threading.Event()
    cancel.set()
    e = engine()
    assert e.generate(PROMPT, cancel=cancel).finish_reason == "cancelled"
    assert not fake(e).prefilled


def test_closing_a_stream_frees_its_session() -> None:
    e = engine(byte_ids("x"))
    stream = e.stream(PROMPT)
    assert next(stream).text == next(stream).text == "x"
    stream.close()
    assert (stream.generation.finish_reason, stream.generation.text) == ("cancelled", "xx")
    check_taps(PROMPT, stream.generation)
    assert list(stream) == []
    assert e.generate(PROMPT + byte_ids("xy"), max_new_tokens=1).reused_tokens == len(PROMPT) + 1
    assert fake(e).open_caches == 1


def test_dropping_a_stream_frees_its_session_at_once() -> None:
    e = engine(byte_ids("x"))
    gc.disable()
    try:
        for _ in e.stream(PROMPT):
            break
        assert e.generate(PROMPT, max_new_tokens=1).text == "x"
        assert fake(e).open_caches == 1
    finally:
        gc.enable()


def test_a_stream_that_never_started_holds_nothing() -> None:
    e = engine()
    stream = e.stream(PROMPT)
    stream.close()
    assert stream.generation.finish_reason == "cancelled"
    assert fake(e).open_caches == 0


@pytest.mark.parametrize("error", [BackendError("out of memory"), KeyboardInterrupt()])
def test_after_a_failure_the_engine_answers_as_before(error: BaseException) -> None:
    failing = [True]

    def script(ids: list[int], adapter: str | None) -> int:
        if len(ids) == len(PROMPT) + 2 and failing:
            failing.clear()
            raise error
        return byte_ids("x")[0]

    e = engine(script)
    session = e.session()
    with pytest.raises(type(error)):
        e.generate(PROMPT, session=session)
    g = e.generate(PROMPT + byte_ids("xxxx"), session=session, max_new_tokens=3)
    assert (g.text, g.reused_tokens) == ("xxx", 0)
    check_taps(PROMPT + byte_ids("xxxx"), g)


def test_a_closed_engine_says_so() -> None:
    e = engine()
    session = e.session()
    e.generate(PROMPT, max_new_tokens=2)
    e.close()
    e.close()
    assert fake(e).calls["close"] == 1
    assert fake(e).open_caches == 0
    for use in (
        lambda: e.generate(PROMPT),
        lambda: e.stream(PROMPT),
        lambda: e.embed(["the"]),
        lambda: e.session(),
        lambda: e.set_adapter(None),
        lambda: e.generate(PROMPT, session=session),
    ):
        with pytest.raises(EngineClosed, match="closed"):
            use()


def test_closing_the_engine_ends_running_streams() -> None:
    e = engine(byte_ids("x"))
    stream, waiting = e.stream(PROMPT), e.stream(PROMPT)
    next(stream)
    e.close()
    for each in (stream, waiting):
        with pytest.raises(EngineClosed):
            next(each)
    assert stream.generation.text == "x"
    assert fake(e).open_caches == 0


def test_closing_the_engine_while_another_thread_streams() -> None:
    e = engine(byte_ids("x"), context_length=100_000)
    started = threading.Event()

    def read() -> None:
        for _ in e.stream(PROMPT, max_new_tokens=99_000):
            started.set()

    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read)
        assert started.wait(10)
        e.close()
        with pytest.raises(EngineClosed):
            reading.result(10)
    assert fake(e).open_caches == 0


# many at once


def test_two_streams_in_one_thread() -> None:
    e = engine()
    prompts = [PROMPT, [BOS, *byte_ids("the other")]]
    streams = [e.stream(prompt, max_new_tokens=15) for prompt in prompts]
    answers: list[list[int]] = [[], []]
    for i in [0, 1, 1, 0, 0, 1, *[0, 1] * 15]:
        answers[i] += [piece.token_id for piece in [next(streams[i], None)] if piece]
    assert answers == [alone(prompt, 15) for prompt in prompts]
    for prompt, stream in zip(prompts, streams, strict=True):
        check_taps(prompt, stream.generation)
    assert fake(e).open_caches == 1, "one idle cache is kept"


def test_many_threads_get_the_answers_they_would_get_alone() -> None:
    e = engine()
    prompts = [[BOS, *byte_ids(f"prompt {i % 12}")] for i in range(96)]
    wanted = {tuple(prompt): alone(prompt, 12) for prompt in prompts}
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda prompt: e.generate(prompt, max_new_tokens=12), prompts))
    for prompt, g in zip(prompts, got, strict=True):
        assert g.token_ids == wanted[tuple(prompt)]
        check_taps(prompt, g)
    assert fake(e).open_caches == 1


def test_adapters_swapped_while_many_threads_answer() -> None:
    e = engine()
    wanted = {adapter: alone(PROMPT, 12, adapter) for adapter in (None, ALICE, BOB)}

    def answer(i: int) -> list[int]:
        e.set_adapter((None, ALICE, BOB)[i % 3])  # another thread may set another one before the next line
        return e.generate(PROMPT, max_new_tokens=12).token_ids

    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(answer, range(90)))
    assert all(answer in wanted.values() for answer in got)
    assert len({tuple(answer) for answer in got}) == 3


def test_a_cancelled_thread_leaves_the_others_alone() -> None:
    e = engine(context_length=4096)
    cancel = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        long = threads.submit(lambda: e.generate([9, 9], max_new_tokens=4000, cancel=cancel, stop="\0\0\0\0\0"))
        short = threads.submit(lambda: e.generate(PROMPT, max_new_tokens=12))
        assert short.result(30).token_ids == alone(PROMPT, 12)
        cancel.set()
        assert long.result(30).finish_reason in ("cancelled", "stop")


# adapters


def test_a_running_answer_keeps_its_adapter() -> None:
    e = engine()
    e.set_adapter(ALICE)
    stream = e.stream(PROMPT, max_new_tokens=12)
    answer = [next(stream).token_id for _ in range(3)]
    not_started = e.stream(PROMPT, max_new_tokens=12)
    e.set_adapter(BOB)
    assert e.adapter == "bob"
    assert e.generate(PROMPT, max_new_tokens=12).token_ids == alone(PROMPT, 12, BOB)
    answer += [piece.token_id for piece in stream]
    assert answer == alone(PROMPT, 12, ALICE)
    assert [piece.token_id for piece in not_started] == alone(PROMPT, 12, ALICE)
    e.set_adapter(None)
    assert e.adapter is None
    assert e.generate(PROMPT, max_new_tokens=12).token_ids == alone(PROMPT, 12)


def test_adapters_by_name_path_and_bundle(tmp_path: Path) -> None:
    model = tiny.bundle(tmp_path)
    e = engine(bundle=model)
    other = Bundle.open(bundles.write_adapter(tmp_path / "other", "carol"))
    for adapter, name in [
        ("alice", "alice"), ("bob", "bob"), (other, "carol"), (other.path, "carol"), (str(other.path), "carol"), (ALICE, "alice"),
    ]:  # fmt: skip
        e.set_adapter(adapter)
        assert e.adapter == name
        assert e.generate(PROMPT, max_new_tokens=5).token_ids == alone(PROMPT, 5, FakeAdapter(name))
    e.set_adapter("alice")
    assert fake(e).calls["read_adapter"] == 3, "each is read once"


def test_an_adapter_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    e = engine()
    e.set_adapter(bundles.write_adapter(tmp_path / "a", "alice"))
    (tmp_path / "a").rename(tmp_path / "old")
    e.set_adapter(bundles.write_adapter(tmp_path / "a", "bob"))
    assert e.adapter == "bob"


def test_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    e = engine(bundle=tiny.bundle(tmp_path))
    e.set_adapter("alice")
    with pytest.raises(AdapterError, match="there is no adapter 'dave'") as error:
        e.set_adapter("dave")
    assert "choose one of alice, bob" in str(error.value)
    with pytest.raises(AdapterError, match="there is no adapter"):
        engine().set_adapter("dave")
    with pytest.raises(ManifestError, match="is a model, not an adapter"):
        e.set_adapter(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError):
        e.set_adapter(tmp_path / "empty")
    assert e.adapter == "alice", "a failure changes nothing"


def test_past_eos_for_measurements() -> None:
    e = engine([*TOKENIZER.encode("a b", add_bos=False), EOS])
    g = e.generate("the alarm", max_new_tokens=9, ignore_eos=True)
    assert (g.generated_tokens, g.finish_reason) == (9, "length")
    assert EOS in g.token_ids[:-1]


# embedding


def test_embeddings_are_means_over_exactly_their_tokens() -> None:
    e = engine(context_length=1500)
    pairs = [
        ("the alarm", " a b"),
        ("the alarm", " the alarm"),
        ("x" * 700, "y" * 300),
        ("the", "é"),
        ("the alarm", " a b"),
    ]
    whole = [(TOKENIZER.encode(p), TOKENIZER.encode(p + a)) for p, a in pairs]
    assert all(both[: len(head)] == head for head, both in whole)
    ids = [(head, both[len(head) :]) for head, both in whole]
    for _ in range(2):  # the second time with what the first left in the cache
        for part in ("all", "prompt", "answer"):
            means = e.embed(pairs, part=part)  # type: ignore[arg-type]
            assert (means.dtype, means.shape) == (np.float32, (5, 4))
            for mean, (head, tail) in zip(means, ids, strict=True):
                start, stop = {"all": (0, None), "prompt": (0, len(head)), "answer": (len(head), None)}[part]
                assert np.array_equal(mean, tap(head + tail, start, stop or len(head + tail)))
    texts = e.embed(["the alarm", "a b"])
    assert np.array_equal(texts, e.embed(["the alarm", "a b"], part="prompt"))
    assert np.array_equal(texts[0], tap(ids[0][0], 0, len(ids[0][0])))
    assert fake(e).open_caches == 1


def test_embeddings_use_the_adapter() -> None:
    e = engine()
    e.set_adapter(ALICE)
    ids = TOKENIZER.encode("the alarm")
    assert np.array_equal(e.embed(["the alarm"])[0], tap(ids, 0, len(ids), ALICE))
    assert np.array_equal(e.embed(["the alarm"], base=True)[0], tap(ids, 0, len(ids)))
    assert e.adapter == ALICE.name


def test_an_adapter_that_is_read_is_not_yet_set(tmp_path: Path) -> None:
    e = engine()
    read = e.read_adapter(Bundle.open(bundles.write_adapter(tmp_path / "a", "alice")))
    assert (read.name, e.adapter) == ("alice", None)
    e.set_adapter(read)
    assert e.adapter == "alice"
    e.close()
    with pytest.raises(EngineClosed):
        e.read_adapter(Bundle.open(tmp_path / "a"))


def test_an_answer_so_far_is_what_a_shorter_one_is() -> None:
    with tiny.engine() as e:
        with e.stream("a b", max_new_tokens=9) as stream:
            for count, _ in enumerate(stream, 1):
                now, shorter = stream.so_far, e.generate("a b", max_new_tokens=count)
                assert (now.token_ids, now.log_probabilities) == (shorter.token_ids, shorter.log_probabilities)
                if count == 1:
                    assert now.answer_tap is None
                else:
                    assert np.array_equal(now.answer_tap, shorter.answer_tap)  # type: ignore[arg-type]
                assert np.array_equal(now.prompt_tap, shorter.prompt_tap)  # type: ignore[arg-type]
        assert stream.so_far is stream.generation


def test_the_bundle_of_an_adapter(tmp_path: Path) -> None:
    with tiny.engine(bundle=tiny.bundle(tmp_path)) as e:
        assert e.present_adapter is None
        e.set_adapter("alice")
        alice, bob = e.present_adapter, e.find_adapter("bob")
        assert alice is not None
        assert bob is not None
        assert [e.bundle_of(a).as_adapter.name for a in (alice, bob)] == ["alice", "bob"]  # type: ignore[union-attr]
        assert e.bundle_of(FakeAdapter("carol")) is None
        bundles.edit_manifest(tmp_path / "model/adapters/bob", lambda document: document.update(name="bert"))
        assert e.bundle_of(bob) is None, "another one is in its place"


def test_the_answer_tap_is_the_embedding_of_the_answer() -> None:
    e = engine([*TOKENIZER.encode("the alarm", add_bos=False), EOS])
    g = e.generate("a b")
    assert g.answer_tap is not None
    assert np.array_equal(g.answer_tap, e.embed([("a b", g.text)], part="answer")[0])


def test_a_token_across_the_boundary_belongs_to_the_answer() -> None:
    e = engine()
    prompt, both = TOKENIZER.encode("a"), TOKENIZER.encode("abc")
    assert both == [*prompt[:-1], both[-1]], "one token, of both"
    assert np.array_equal(e.embed([("a", "bc")], part="answer")[0], tap(both, len(prompt) - 1, len(both)))


@pytest.mark.parametrize(
    "texts, part, error",
    [
        ("the alarm", "all", "a list of texts"),
        (["the", ""], "all", "the prompt is empty"),
        (["the"], "answer", "no answer to embed"),
        ([("the", "")], "answer", "no answer to embed"),
        (["the"], "middle", "part is 'middle'"),
        ([("the", "alarm", "a")], "all", "a text to embed is"),
        ([None], "all", "a text to embed is"),
        ([[1, 2]], "all", "a text to embed is"),
        (["a\udc80"], "all", "not valid Unicode"),
        ([("the", "a\udc80")], "all", "not valid Unicode"),
    ],
)
def test_texts_that_cannot_be_embedded(texts: Any, part: Any, error: str) -> None:
    e = engine()
    with pytest.raises(InvalidInput, match=error):
        e.embed(texts, part=part)
    assert e.embed(["the"]).shape == (1, 4), "the session is free again"


def test_a_text_may_fill_the_context_to_be_embedded_but_not_more() -> None:
    e = engine(context_length=16)
    text = "x" * (16 - len(TOKENIZER.encode("")) - len(TOKENIZER.encode("x", add_bos=False)) + 1)
    assert len(TOKENIZER.encode(text)) == 16
    assert e.embed([text]).shape == (1, 4)
    with pytest.raises(ContextOverflow, match="the text has 17 tokens; the context holds 16") as error:
        e.embed(["the", text + "x"])
    assert "text 1" in str(error.value)


def test_no_texts_give_no_rows() -> None:
    assert engine().embed([]).shape == (0, 4)


# chats


def test_a_chat_is_a_prompt_in_the_template() -> None:
    e = engine(chat_template=tiny.CHATML)
    messages = [{"role": "user", "content": "the alarm"}]
    ids = e.tokenizer.apply_chat_template(messages)
    assert e.chat(messages, max_new_tokens=8).token_ids == e.generate(ids, max_new_tokens=8).token_ids == alone(ids, 8)
    with pytest.raises(InvalidInput, match="no chat template"):
        engine().chat(messages)


def test_a_chat_computes_only_what_is_new() -> None:
    answer = byte_ids("ok")
    e = engine([*answer, EOS], chat_template=tiny.CHATML)
    session = e.session()
    messages = [{"role": "user", "content": "the alarm"}]
    g = e.chat(messages, session=session)
    messages += [{"role": "assistant", "content": g.text}, {"role": "user", "content": "more"}]
    again = e.chat(messages, session=session)
    assert again.reused_tokens >= g.prompt_tokens


# loading


def test_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    def load(bundle: Bundle, name: str, *, threads: int | None, adapter: Bundle | None) -> FakeBackend:
        made.append((bundle.path, name, threads, adapter and adapter.path))
        return FakeBackend([*byte_ids("ok"), EOS], vocab_size=VOCAB_SIZE)

    monkeypatch.setattr(backends, "load", load)
    bundle = tiny.bundle(tmp_path)
    for source in (bundle, bundle.path, os.fspath(bundle.path)):
        with Engine.load(source, threads=2) as e:
            e.set_adapter("bob")
            assert (e.generate("the").text, e.adapter) == ("ok", "bob")
    assert made == [(bundle.path, "auto", 2, None)] * 3
    for adapter in ("bob", tmp_path / "bob", Bundle.open(tmp_path / "bob")):
        with Engine.load(bundle, backend="onnx", adapter=adapter) as e:
            assert e.adapter == "bob"
        assert made[-1] == (
            bundle.path,
            "onnx",
            None,
            bundle.adapter("bob").path if adapter == "bob" else tmp_path / "bob",
        )
    with pytest.raises(AdapterError, match="there is no adapter 'dave'"):
        Engine.load(bundle, adapter="dave")

    with monkeypatch.context() as patch:
        unfit: list[FakeBackend] = []

        def read_adapter(backend: FakeBackend, adapter: Bundle) -> FakeAdapter:
            unfit.append(backend)
            raise AdapterError("it does not fit")

        patch.setattr(FakeBackend, "read_adapter", read_adapter)
        with pytest.raises(AdapterError, match="does not fit"):
            Engine.load(bundle, adapter="bob")
        assert [backend.closed for backend in unfit] == [True]
    with pytest.raises(ManifestError, match="is an adapter, not a model"):
        Engine.load(tmp_path / "alice")
    with pytest.raises(BundleError, match="there is no bundle here"):
        Engine.load(tmp_path / "nothing")
    for threads in (0, -1, 1.5, True):
        with pytest.raises(InvalidInput, match="threads is"):
            Engine.load(bundle, threads=threads)  # type: ignore[arg-type]


# memory


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.1},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 0.8, "top_k": 40, "seed": 1},
        {"temperature": 0.8, "top_p": 0.9, "seed": 1},
        {"temperature": 0.8, "min_p": 0.05, "seed": 1},
        {"stop": ["zzz"]},
    ],
    ids=str,
)
def test_a_token_allocates_nothing_that_grows_with_vocabulary_or_context(options: dict[str, Any]) -> None:
    vocab_size, context = 256 * 1024, 16 * 1024
    e = Engine(FakeBackend(byte_ids("x"), vocab_size=vocab_size, context_length=context), TOKENIZER)
    stream = e.stream([9] * 2000, max_new_tokens=10_000, **options)
    for _ in range(100):
        next(stream)
    peaks = []
    tracemalloc.start()
    try:
        for _ in range(100):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            next(stream)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    assert max(peaks) < min(4 * vocab_size, 8 * context) / 4
    assert sorted(peaks)[50] < 8 * 1024
