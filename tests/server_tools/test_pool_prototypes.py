"""Prototypes of a pool: what the server LLM is asked, what is kept of it, and how it is embedded. Judge of that: a device's own answer."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from crayon_runtime.engine import Engine
from crayon_runtime.errors import AdapterError, InvalidInput, OutputError, ServerError
from crayon_runtime.pool import Embedding, Pool
from crayon_server import models, training
from crayon_server.cli import pool as cli_pool
from crayon_server.data import phone_assistant as pa
from crayon_server.pool import prototypes as library
from crayon_server.pool.data import Pair
from crayon_server.pool.imported import Source, add_lora
from crayon_server.pool.prototypes import BundleEmbedder, Input, ModelEmbedder, Said
from tests.runtime import pools
from tests.server_tools.upstreams import ServerLLM, completion, replies
from tests.support import needs

torch = needs.module("torch")
transformers = needs.module("transformers")
export = needs.module("crayon_export").export
PeftAdapter = needs.module("crayon_export.lora").PeftAdapter

NANO = models.load_nano()
BASE = training.base_fingerprint(NANO)
TEXTS = [e for user in pa.benchmark().train[:6] for e in user.examples[:4]]
TYPICAL = [{"cluster": i // 8, "prompt": e.prompt, "completion": e.completion} for i, e in enumerate(TEXTS)]


def write(out: Path, **changes) -> Pool:
    """A pool of nano, whose LoRAs are random, with eight typical texts of each of three clusters."""
    defaults = {"typical": TYPICAL, "embedding": Embedding(4, "answer", True), "located": pools.projection(3, 96)}
    return pools.write(out, base=BASE, serial=100, **defaults | changes)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return write(tmp_path / "pool")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """In float32."""
    return export(NANO, tmp_path_factory.mktemp("bundles") / "nano", quantize="none").bundle.path


@pytest.fixture(scope="module")
def engine(bundle):
    with Engine.load(bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def embedders(engine, tmp_path_factory) -> SimpleNamespace:
    pool = write(tmp_path_factory.mktemp("pools") / "pool")
    return SimpleNamespace(model=ModelEmbedder(NANO, pool), bundle=BundleEmbedder(engine))


class Scripted:
    """A server LLM that says the prompt backwards, or fails."""

    def __init__(self, fails: str = "") -> None:
        self.asked: list[str] = []
        self.fails = fails
        self._lock = threading.Lock()

    def complete(self, prompt: str, max_tokens: int) -> str:
        with self._lock:
            self.asked.append(prompt)
        if prompt == self.fails:
            raise ServerError("the server LLM is gone")
        return prompt[::-1][:max_tokens]


# What is asked


def test_the_most_typical_inputs_of_each_cluster(tmp_path) -> None:
    repeated = [{"cluster": 0, "prompt": f"{name}\n", "completion": c} for name in "aab" for c in "xy"]
    pool = write(tmp_path / "pool", typical=[*repeated, {"cluster": 2, "prompt": "a", "completion": "z"}])
    expected = [Input(0, "a\n", "x"), Input(0, "b\n", "x"), Input(2, "a", "z")]
    assert library.typical_inputs(pool) == expected
    assert library.typical_inputs(pool, 1) == [expected[0], expected[2]]


def test_a_pool_without_typical_texts(tmp_path) -> None:
    with pytest.raises(InvalidInput, match="no typical texts"):
        library.typical_inputs(write(tmp_path / "pool", typical=[]))


@pytest.mark.parametrize("part, residual", [("answer", True), ("answer", False), ("all", False), ("prompt", False)])
def test_other_texts_belong_to_the_nearest_cluster(tmp_path, embedders, part, residual) -> None:
    located = pools.projection(3, 96, residual=residual)
    pool = write(tmp_path / "pool", located=located, embedding=Embedding(4, part, residual))
    texts = [Pair(e.prompt, e.completion) for e in TEXTS]
    long = Pair("how do i get there\n" * 200, "by bike")
    found = library.inputs_of(pool, [long, *texts], embedders.bundle)
    states = {p: embedders.bundle.embed(texts, p, lambda _: None) for p in ("prompt", part)}
    cosines = np.stack([located.cosines(q) for q in located.query(states["prompt"], states[part])])
    assert {(i.cluster, i.prompt) for i in found} == {
        (int(row.argmax()), text.prompt) for row, text in zip(cosines, texts, strict=True)
    }
    assert [i.cluster for i in found] == sorted(i.cluster for i in found)
    for cluster in {i.cluster for i in found}:
        of = {text.prompt: max(row) for row, text in zip(cosines, texts, strict=True)}
        own = [of[i.prompt] for i in found if i.cluster == cluster]
        assert own == sorted(own, reverse=True)
    assert len(library.inputs_of(pool, texts, embedders.bundle, 2)) <= 6
    with pytest.raises(InvalidInput, match="room for none of the texts"):
        library.inputs_of(pool, [long], embedders.bundle)


# What is said


def test_each_prompt_is_sent_alone_and_as_devices_send_it() -> None:
    server, prompts = Scripted(), [" how are you\n", "b", "what\nthen "]
    said = dict(library.ask(server, prompts, max_tokens=5, concurrency=2))
    assert sorted(server.asked) == ["b", "how are you", "what\nthen"]
    assert said == {" how are you\n": "uoy e", "b": "b", "what\nthen ": "neht\n"}


def test_what_was_said_before_a_failure_is_not_lost(tmp_path) -> None:
    inputs = [Input(0, text, "") for text in "abcdefgh"]
    server, kept = Scripted(fails="e"), Said(tmp_path / "said.jsonl", "m", 8)
    with pytest.raises(ServerError, match="is gone"):
        library.collect(inputs, kept, lambda prompts: library.ask(server, prompts, max_tokens=8, concurrency=1))
    assert set(kept.read()) >= set("abcd")
    again = Scripted()
    counts: list[int] = []
    found = library.collect(
        inputs, kept, lambda prompts: library.ask(again, prompts, max_tokens=8, concurrency=3), counts.append
    )
    assert found == {text: text for text in "abcdefgh"}
    assert not set(again.asked) & set("abcd")
    assert sum(counts) == 8
    assert library.collect(inputs, kept, lambda _: pytest.fail("asked again")) == found


def test_what_is_kept_is_of_one_model_and_limit_and_survives_a_kill(tmp_path) -> None:
    path = tmp_path / "said.jsonl"
    said = Said(path, "m", 8)
    assert said.read() == {}
    said.add("half seven \u2028?", "日本\n\x00")
    Said(path, "other", 8).add("a", "other's")
    Said(path, "m", 9).add("a", "longer")
    whole = path.read_bytes()
    said.add("b", "c")
    path.write_bytes(path.read_bytes()[:-9])
    assert said.read() == {"half seven \u2028?": "日本\n\x00"}
    said.add("d", "e")
    assert said.read() == {"half seven \u2028?": "日本\n\x00", "d": "e"}
    path.write_bytes(whole + b'\xff\xfe\n[]\n{"model": 3}\n' + b"[" * 100_000)
    assert said.read() == {"half seven \u2028?": "日本\n\x00"}
    with pytest.raises(OutputError, match="cannot be kept"):
        Said(tmp_path, "m", 8).add("a", "b")


def test_a_local_model_answers_as_it_does_alone(engine) -> None:
    prompts = [e.prompt for e in TEXTS[:20]]
    said = dict(library.ask_model(NANO, prompts, max_tokens=24))
    assert said == {prompt: engine.generate(prompt, max_new_tokens=24).text for prompt in prompts}


def test_a_local_model_without_a_chat_template_continues_the_text(tmp_path, engine) -> None:
    for path in NANO.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    prompts = ["set an alarm for half past seven\n", "set an alarm for half past seven", "how do i get there\n" * 200]
    said = dict(library.ask_model(tmp_path, prompts, max_tokens=16))
    assert said.pop(prompts[2]) == "", "its context has no room for it"
    assert said == {prompt: engine.generate(prompt, max_new_tokens=16).text for prompt in prompts[:2]}
    assert said[prompts[0]] != said[prompts[1]]


def test_no_model(tmp_path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InvalidInput, match="this is no model"):
            list(library.ask_model(place, ["a"], max_tokens=4))


# How it is embedded


def test_a_model_and_a_bundle_embed_alike(embedders) -> None:
    texts = [Pair(e.prompt, e.completion) for e in TEXTS]
    for part in ("prompt", "answer", "all"):
        counts: list[int] = []
        of_model = embedders.model.embed(texts, part, counts.append)
        assert sum(counts) == len(texts)
        np.testing.assert_allclose(of_model, embedders.bundle.embed(texts, part, lambda _: None), atol=5e-4)


@pytest.mark.parametrize("name", ["model", "bundle"])
def test_what_there_is_no_room_for(embedders, name) -> None:
    texts = [Pair("a\n", "b"), Pair("a\n" * 600, "b"), Pair("a\n", "b " * 600), Pair("c\n", "d")]
    assert getattr(embedders, name).fitting(texts) == [0, 3]


def test_a_prototype_is_what_a_device_would_make_of_it(pool, engine, embedders, tmp_path) -> None:
    """If the server LLM says what the un-customized base says itself, its prototype is the tap of that answer."""
    inputs = library.typical_inputs(pool)
    answers = {text.prompt: engine.generate(text.prompt, max_new_tokens=48) for text in inputs}
    outputs = {prompt: f"  {answer.text}\n" for prompt, answer in answers.items()}
    made = library.add_prototypes(
        pool, inputs, outputs, embedders.bundle, tmp_path / "new", model="itself", choices={"per_cluster": 8}
    )
    found = made.pool.prototypes
    assert found is not None
    ended = [n for n, text in enumerate(inputs) if answers[text.prompt].finish_reason == "stop"]
    assert len(ended) > 10
    for n in ended:
        np.testing.assert_allclose(found.states[n], answers[inputs[n].prompt].answer_tap, atol=4e-3)  # float16
    np.testing.assert_allclose(found.mean, found.states.astype(np.float32).mean(0), atol=1e-3)
    assert made.prototypes == np.bincount([text.cluster for text in inputs]).tolist()


def test_outputs_begin_as_answers_do(pool, embedders, tmp_path) -> None:
    """White space that the data has before an answer is put there, and a server LLM's own is not kept."""
    embedded: list[str] = []

    class Watching:
        fitting = embedders.bundle.fitting

        def embed(self, texts, part, on_texts):
            embedded.extend(text.completion for text in texts)
            return embedders.bundle.embed(texts, part, on_texts)

    inputs = [Input(0, "a", " \nx"), Input(1, "b", "x")]
    outputs = {"a": "\tthe answer ", "b": "\tthe answer "}
    library.add_prototypes(pool, inputs, outputs, Watching(), tmp_path / "new", model="m", choices={})
    assert embedded == [" \nthe answer", "the answer"]


# The pool


def add(pool: Pool, embedder, out: Path, outputs=None, **options):
    inputs = library.typical_inputs(pool)
    said = {text.prompt: f"the answer to {text.prompt}" for text in inputs} | (outputs or {})
    return library.add_prototypes(pool, inputs, said, embedder, out, **{"model": "m", "choices": {}} | options)


def test_everything_else_stays_as_it_is(pool, embedders, tmp_path) -> None:
    made = add(pool, embedders.model, tmp_path / "new", choices={"per_cluster": 32})
    new = Pool.open(tmp_path / "new", verify=True)
    assert made.pool.manifest == new.manifest
    before = {file.path: file.sha256 for file in pool.manifest.files}
    after = {file.path: file.sha256 for file in new.manifest.files}
    assert set(after) - set(before) == {"prototypes.safetensors", "prototypes.jsonl"}
    assert before.items() <= after.items()
    assert new.manifest.version != pool.manifest.version
    assert new.manifest.serial > pool.manifest.serial
    assert new.manifest.settings == pool.manifest.settings | {
        "prototypes": {"per_cluster": 32, "empty": 0, "too_long": 0}
    }
    lines = [json.loads(line) for line in (new.path / "prototypes.jsonl").read_text().splitlines()]
    inputs = library.typical_inputs(pool)
    assert lines == [{"cluster": i.cluster, "prompt": i.prompt, "output": f"the answer to {i.prompt}"} for i in inputs]
    assert new.prototypes is not None
    np.testing.assert_array_equal(new.prototypes.clusters, [line["cluster"] for line in lines])
    with pytest.raises(OutputError, match="exists"):
        add(pool, embedders.model, tmp_path / "new")


def test_prototypes_are_replaced_by_others(pool, embedders) -> None:
    first = add(pool, embedders.model, pool.path, replace=True, model="first").pool
    second = add(
        first, embedders.model, pool.path, {first.typical()[0]["prompt"]: "no"}, replace=True, model="n" * 300
    ).pool
    assert second.manifest.prototypes.model == "n" * 200
    assert second.manifest.serial > first.manifest.serial > 100
    assert [file.path for file in first.manifest.files] == [file.path for file in second.manifest.files]
    assert second.manifest.version != first.manifest.version
    np.testing.assert_array_equal(second.prototypes.states[1], first.prototypes.states[1])
    assert (second.prototypes.states[0] != first.prototypes.states[0]).any()


def test_outputs_that_are_left_out(pool, embedders, tmp_path) -> None:
    inputs = library.typical_inputs(pool)
    whole = [text.prompt for text in inputs if text.cluster == 1]
    outputs = dict.fromkeys(whole[:-1], " \n") | {whole[-1]: "a long answer " * 400}
    others = {text.prompt for text in inputs if text.cluster != 1}
    outputs = {prompt: text for prompt, text in outputs.items() if prompt not in others}
    made = add(pool, embedders.model, tmp_path / "new", outputs)
    assert made.empty == len(outputs) - 1
    assert made.too_long == 1
    assert made.pool.manifest.prototypes.count == len(inputs) - len(outputs) == sum(made.prototypes)
    with pytest.raises(InvalidInput, match=f"of {len(inputs)} outputs of the server LLM {len(inputs)} are empty"):
        add(pool, embedders.model, tmp_path / "no", {text.prompt: "" for text in inputs})
    assert not (tmp_path / "no").exists()


def test_the_model_of_another_pool(tmp_path) -> None:
    other = pools.write(tmp_path / "other")
    with pytest.raises(AdapterError, match=r"pool 'random' is for another base \(bbbbbbbbbbbb…"):
        ModelEmbedder(NANO, other)


def test_the_bundle_of_another_pool(tmp_path, bundle) -> None:
    with pytest.raises(AdapterError, match="of another base"):
        library.open_engine(bundle, pools.write(tmp_path / "other"), 1)
    with pytest.raises(AdapterError, match="tap is layer 4, not 2"):
        library.open_engine(bundle, write(tmp_path / "tap", embedding=Embedding(2, "answer", True)), 1)


def test_a_lora_more_leaves_prototypes_as_they_are(embedders, tmp_path) -> None:
    """A pool that grows keeps those of the other clusters."""
    extra = pa.benchmark().train[20].examples[:8]
    training.train_lora(NANO, extra, tmp_path / "lora", rank=2, steps=1, threads=1)
    lora = PeftAdapter.open(tmp_path / "lora")
    shapes = {module: (lora.a(module).shape[1], lora.b(module).shape[0]) for module in lora.tensors}
    old = add(write(tmp_path / "old", adapters=pools.loras(shapes=shapes)), embedders.model, tmp_path / "pool").pool
    grown = add_lora(old, NANO, Source(tmp_path / "lora", extra), tmp_path / "grown", threads=1)
    assert grown.manifest.adapters == 4
    assert grown.manifest.prototypes == old.manifest.prototypes
    for name in ("prototypes.safetensors", "prototypes.jsonl"):
        assert (grown.path / name).read_bytes() == (old.path / name).read_bytes()
    np.testing.assert_array_equal(
        grown.prototypes.picked([0.2, 0.0, 0.0, 0.8], 3).states, old.prototypes.picked([1.0, 0.0, 0.0], 3).states
    )


# The command


def invoke(*arguments: object, catch: bool = False):
    return CliRunner(catch_exceptions=catch).invoke(cli_pool.pool, ["prototypes", *map(str, arguments)])


def answering(to) -> None:
    """In capital letters."""
    asked = json.loads(to.service.asked[-1].body)
    replies(completion(asked["messages"][-1]["content"].upper()))(to)


def test_the_command_with_an_endpoint(pool, tmp_path) -> None:
    (tmp_path / "key").write_text("sk-short\n")
    with ServerLLM() as server:
        server.always = answering
        options = ("--upstream", server.url, "--upstream-key-file", tmp_path / "key", "--model", NANO)
        # The fourth is refused; asked again, the command goes on.
        server.faults = [answering, answering, answering, replies({"error": {"message": "no"}}, 400)]
        stopped = invoke(pool.path, *options, "--concurrency", 1, "--threads", 1, catch=True)
        assert isinstance(stopped.exception, ServerError)
        assert Pool.open(pool.path).prototypes is None
        kept = len(Said(tmp_path / "pool.prototypes.jsonl", "large", 256).read())
        assert kept in (3, 4), "one more may have been on its way"
        before = len(server.asked)
        done = invoke(pool.path, *options, "--concurrency", 1, "--threads", 1, "--json")
    inputs = library.typical_inputs(pool)
    prompts = {text.prompt for text in inputs}
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    new = Pool.open(pool.path, verify=True)
    assert result == {
        "pool": str(pool.path),
        "version": new.manifest.version,
        "serial": new.manifest.serial,
        "model": "large",
        "count": len(inputs),
        "of_clusters": np.bincount([text.cluster for text in inputs]).tolist(),
        "empty": 0,
        "too_long": 0,
    }
    assert before + len(prompts) - kept == len(server.asked)
    body = server.bodies[0]
    assert body["messages"] == [{"role": "user", "content": inputs[0].prompt.strip()}]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("large", 256, 0.0)
    assert server.asked[0].headers["authorization"] == "Bearer sk-short"
    first = json.loads((pool.path / "prototypes.jsonl").read_text().splitlines()[0])
    assert first["output"] == first["prompt"].strip().upper()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "pool"], "nothing is left"


def test_the_command_with_a_local_model(pool, bundle, tmp_path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": e.prompt, "completion": e.completion}) + "\n" for e in TEXTS[:6]))
    options = ("--upstream", NANO, "--embed-with", bundle, "--data", data, "--max-new-tokens", 8, "--threads", 1)
    done = invoke(pool.path, *options, "--out", tmp_path / "new")
    assert done.exit_code == 0, done.output
    assert f"prototypes, outputs of {NANO.name}" in done.stdout
    new = Pool.open(tmp_path / "new", verify=True)
    assert new.manifest.prototypes.count == len({e.prompt for e in TEXTS[:6]})
    assert new.manifest.settings["prototypes"]["embedded_with"] == "the bundle"
    assert new.manifest.settings["prototypes"]["inputs"] == "other texts"
    assert Pool.open(pool.path).prototypes is None
    assert isinstance(invoke(pool.path, *options, "--out", tmp_path / "new", catch=True).exception, OutputError)


def test_the_command_with_a_bundle(pool, bundle, engine, tmp_path) -> None:
    options = ("--upstream", bundle, "--model", NANO, "--max-new-tokens", 40, "--per-cluster", 2, "--threads", 1)
    done = invoke(pool.path, *options)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (pool.path / "prototypes.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    for line in lines:
        assert line["output"] == engine.generate(line["prompt"], max_new_tokens=40).text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--upstream", NANO), "either --model or --embed-with"),
        (("--upstream", NANO, "--model", NANO, "--embed-with", NANO), "either --model or --embed-with"),
        (("--upstream", NANO, "--model", NANO, "--upstream-model", "m"), "are for a URL"),
    ],
)
def test_options_that_do_not_go_together(pool, arguments, message) -> None:
    done = invoke(pool.path, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_an_address_that_cannot_be_used(pool) -> None:
    done = invoke(pool.path, "--upstream", "http://192.0.2.1:8000", "--model", NANO, catch=True)
    assert isinstance(done.exception, InvalidInput)
    assert "everybody on the way" in str(done.exception)
