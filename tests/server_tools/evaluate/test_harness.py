"""A bundle in lm-evaluation-harness gives the numbers of the harness's own `hf` model, and what requests share is computed once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from crayon_export import export
from crayon_runtime import Engine
from crayon_runtime.backends.fake import FakeBackend
from crayon_runtime.backends.onnx import OnnxBackend
from crayon_runtime.bundle import Bundle
from crayon_runtime.errors import AdapterError, BackendError, ContextOverflow, InvalidInput
from crayon_server.evaluate.harness.model import CrayonLM
from crayon_server.evaluate.harness.rows import RowsBackend, rows
from crayon_server.evaluate.harness.scoring import Scorer, Text
from crayon_server.models import load_nano
from tests.export.models import tiny_llama, tiny_tokenizer
from tests.programs import exported, tiny_adapters, tiny_model
from tests.support import needs

TALE = "Once upon a time, there was a little girl named Lily. She loved to play outside. " * 40
CONTEXT = 512


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


@pytest.fixture(scope="module", params=["nano", "stories260K"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[CrayonLM, HFLM]:
    """A bundle in float32, and the harness's own model over what it was exported from."""
    folder = load_nano() if request.param == "nano" else needs.reference_model()
    bundle = export(folder, tmp_path_factory.mktemp("float") / "bundle", quantize="none").bundle
    # transformers does not read that sentencepiece file as sentencepiece does; tests of the exporter hold the bundle's tokenizer to it.
    tokenizer = None if request.param == "nano" else str(bundle.path)
    theirs = HFLM(
        pretrained=str(folder), tokenizer=tokenizer, device="cpu", dtype="float32", max_length=CONTEXT, batch_size=1
    )
    ours = CrayonLM(bundle.path, threads=1)
    assert ours.max_length == CONTEXT
    return ours, theirs


def test_log_likelihoods(models: tuple[CrayonLM, HFLM]) -> None:
    ours, theirs = models
    asked = [
        ("Once upon a time", " there was a little dog"),
        ("Once upon a time", " there"),
        ("Once upon a time", " there was a cat"),
        ("Once upon a time ", "there was"),  # the space moves
        ("", "Lily went to the park."),
        ("", "a"),
        (TALE, " She saw a cat."),  # cut on the left
        (TALE + "And then", " the dog ran"),
        ("set an alarm for half past seven\n", "alarm.set(time=7:30 AM)"),
        ("naïve café — 東京 🙂", " ½ ≠ 0.5\n"),
        ("<s>Hello", " there"),  # has its bos token already
        ("Hello</s>", " there"),  # a control token in the middle
    ]
    found = ours.loglikelihood(requests("loglikelihood", asked))
    wanted = theirs.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    np.testing.assert_allclose([f[0] for f in found], [w[0] for w in wanted], atol=1e-3)
    assert [f[1] for f in found] == [w[1] for w in wanted]


def test_what_is_greedy(models: tuple[CrayonLM, HFLM]) -> None:
    ours, theirs = models
    (answer,) = theirs.generate_until(requests("generate_until", [(TALE, {"max_gen_toks": 6})]), disable_tqdm=True)
    asked = [("", answer), (TALE.rstrip(), f" {answer}"), (TALE.rstrip(), " zebra")]
    found = ours.loglikelihood(requests("loglikelihood", asked))
    wanted = theirs.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    assert [f[1] for f in found] == [w[1] for w in wanted]


def test_rolling_log_likelihoods(models: tuple[CrayonLM, HFLM]) -> None:
    ours, theirs = models
    asked = [(TALE,), ("Hi",), ("",), (TALE[:700],), ("naïve café",)]
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", asked))
    wanted = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", asked), disable_tqdm=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-3)


def test_greedy_answers(models: tuple[CrayonLM, HFLM]) -> None:
    ours, theirs = models
    asked = [
        ("Once upon a time", {"until": ["\n"], "max_gen_toks": 40}),
        ("Once upon a time", {"until": [" little", "zebra"], "max_gen_toks": 40}),
        ("Lily", {"until": [". She", "dog.", "bread to"], "max_gen_toks": 60}),  # stop strings of several tokens
        ("Once upon a time there", {"until": "was", "max_gen_toks": 40}),
        (TALE, {"until": ["."], "max_gen_toks": 50}),  # cut on the left
        ("set an alarm for half past seven\n", {"until": [], "max_gen_toks": 60}),  # up to the eos token
        ("what's the weather on monday\n", {"max_gen_toks": 60}),
    ]
    found = ours.generate_until(requests("generate_until", asked))
    assert found == theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert any(found)


def test_the_chat_template(tmp_path: Path) -> None:
    ours = CrayonLM(export(load_nano(), tmp_path / "bundle").bundle.path, threads=1)
    theirs = HFLM(pretrained=str(load_nano()), device="cpu")
    chat = [
        {"role": "user", "content": "set an alarm"},
        {"role": "assistant", "content": "alarm.set()"},
        {"role": "user", "content": "what is the time"},
    ]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert ours.tok_encode(ours.apply_chat_template(chat)) == theirs.tok_encode(theirs.apply_chat_template(chat))
    assert ours.apply_chat_template(chat[:2], add_generation_prompt=False) == theirs.apply_chat_template(
        chat[:2], add_generation_prompt=False
    )
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.chat_template(False) is None


def test_the_harness_finds_it_by_name(tmp_path: Path) -> None:
    bundle = export(load_nano(), tmp_path / "bundle").bundle.path
    lm = lm_eval.api.registry.get_model("crayon").create_from_arg_string(f"bundle={bundle},threads=1,backend=onnx")
    assert isinstance(lm, CrayonLM)
    lm.close()


# Sharing


def brute_force(engine: Engine, text: Text) -> tuple[float, bool]:
    """One text in a cache of its own, token by token."""
    cache = engine.backend.new_cache(engine.present_adapter)
    total, greedy = 0.0, True
    for position, token in enumerate(text.ids[:-1]):
        logits = cache.decode(int(token)).logits.astype(np.float64)
        if position + 1 >= text.start:
            following = int(text.ids[position + 1])
            total += logits[following] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            greedy &= int(logits.argmax()) == following
    cache.close()
    return total, greedy


def related(seed: int, vocab_size: int, *, most: int = 12, count: int = 40) -> list[Text]:
    """Texts that begin alike, are beginnings of each other, and are equal."""
    draw = random.Random(seed)
    texts: list[Text] = []
    for _ in range(count):
        common = draw.choice(texts).ids.tolist() if texts and draw.random() < 0.8 else []
        ids = common[: draw.randint(0, len(common))] + [draw.randrange(vocab_size) for _ in range(draw.randint(0, 4))]
        ids = (ids if len(ids) >= 2 else [*ids, 1, 2])[:most]
        texts.append(Text(np.array(ids), draw.randint(1, len(ids) - 1)))
    return texts


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("reuse", [True, False])
def test_scores_are_those_of_each_text_alone_and_every_beginning_is_computed_once(seed: int, reuse: bool) -> None:
    engine = Engine(FakeBackend(vocab_size=3, context_length=16), None)  # type: ignore[arg-type]
    texts = related(seed, 3)
    scorer, done = Scorer(engine, reuse=reuse), []
    for _ in range(2):  # a scorer can be asked again
        found = scorer.score(texts, done.append)
    expected = [brute_force(engine, text) for text in texts]
    np.testing.assert_allclose([f.log_likelihood for f in found], [e[0] for e in expected], atol=1e-5)
    assert [f.is_greedy for f in found] == [e[1] for e in expected]
    fed = [text.ids[:-1].tolist() for text in texts]
    assert done == [1] * 2 * len(texts)
    assert scorer.asked == 2 * sum(map(len, fed))
    beginnings = {tuple(ids[:n]) for ids in fed for n in range(1, len(ids) + 1)}
    assert scorer.computed == (2 * len(beginnings) if reuse else scorer.asked)


def test_nothing_to_score() -> None:
    engine = Engine(FakeBackend(), None)  # type: ignore[arg-type]
    assert Scorer(engine).score([]) == []


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("adapters")
    model = tiny_model(folder / "model", context=1024)
    return export(model, folder / "bundle", adapters=tiny_adapters(model, folder), quantize="none").bundle


@pytest.mark.parametrize("name", [None, "alice", "bruno"])
def test_rows_are_the_logits_of_each_step(with_adapters: Bundle, name: str | None) -> None:
    ids = np.random.default_rng(0).integers(3, 320, 40)
    stepwise, whole = OnnxBackend.load(with_adapters, threads=1), RowsBackend.load(with_adapters, threads=1)
    one, other = (b.new_cache(b.read_adapter(with_adapters.adapter(name)) if name else None) for b in (stepwise, whole))
    expected = rows(one, ids, 0)
    np.testing.assert_allclose(rows(other, ids[:30], 7), expected[7:30], atol=1e-4)
    np.testing.assert_allclose(rows(other, ids[30:], 0), expected[30:], atol=1e-4)
    other.rewind(10)
    np.testing.assert_allclose(other.prefill(ids[10:20]).logits, expected[19], atol=1e-4)
    np.testing.assert_allclose(other.decode(int(ids[20])).logits, expected[20], atol=1e-4)
    other.reset(None)  # the slots of an adapter are bound again
    np.testing.assert_allclose(rows(other, ids[:5], 4)[0], stepwise.new_cache().prefill(ids[:5]).logits, atol=1e-4)


@pytest.mark.parametrize("adapter", [None, "bruno"])
def test_texts_longer_than_a_chunk(with_adapters: Bundle, adapter: str | None) -> None:
    lm = CrayonLM(with_adapters.path, adapter=adapter, threads=1)
    ids = np.random.default_rng(1).integers(3, 320, 700)
    texts = [Text(ids, 300), Text(ids[:600], 590), Text(np.append(ids[:550], 5), 550), Text(ids, 699)]
    found = lm.scorer.score(texts)
    expected = [brute_force(lm.engine, text) for text in texts]
    np.testing.assert_allclose([f.log_likelihood for f in found], [e[0] for e in expected], rtol=1e-5)
    assert lm.scorer.computed == 699  # three of them are its beginning


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, "alice"])
def test_executorch(adapter: str | None) -> None:
    lm = CrayonLM(exported().path, backend="executorch", adapter=adapter)
    assert lm.engine.backend.name == "executorch"
    texts = related(3, 320, most=20, count=12)
    expected = [brute_force(lm.engine, text) for text in texts]
    np.testing.assert_allclose([f.log_likelihood for f in lm.scorer.score(texts)], [e[0] for e in expected], rtol=1e-3)


# Bad input


def test_no_such_backend_or_adapter(with_adapters: Bundle) -> None:
    with pytest.raises(BackendError, match="has no ExecuTorch variant"):
        CrayonLM(with_adapters.path, backend="executorch")
    with pytest.raises(AdapterError, match="there is no adapter 'nobody'"):
        CrayonLM(with_adapters.path, adapter="nobody")


def test_more_than_the_context_holds(tmp_path: Path) -> None:
    model = tiny_tokenizer(tiny_llama(tmp_path / "model"))
    lm = CrayonLM(export(model, tmp_path / "bundle", context_length=32).bundle.path, threads=1)
    with pytest.raises(ContextOverflow, match=r"a continuation of \d+ tokens cannot be scored; .* holds 32"):
        lm.loglikelihood(requests("loglikelihood", [("a", "b" * 400)]))
    with pytest.raises(ContextOverflow, match="answers of 32 tokens leave no room for a prompt"):
        lm.generate_until(requests("generate_until", [("a", {"max_gen_toks": 32})]))
    with pytest.raises(InvalidInput, match="not known here: num_beams"):
        lm.generate_until(requests("generate_until", [("a", {"max_gen_toks": 8, "num_beams": 4})]))
    with pytest.raises(InvalidInput, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "Hello"}])
