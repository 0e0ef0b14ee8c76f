"""Prototypes for a pool: the server LLM answers inputs that are typical of each cluster, and the un-customized base embeds what it says.

    typical.jsonl ──> prompts ──> server LLM ──> outputs ──> embed ──> POOL/prototypes.safetensors
    or other texts    by cluster                 base model, each output given its prompt

An output is embedded as a device embeds its own answers: the mean tapped state over its tokens. It is written as the answers in the data
are, with the white space that those begin with; that is our choice. What was said is kept in a file until all of it is there, so that
what was stopped goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec
import numpy as np

from crayon_runtime.engine import Engine
from crayon_runtime.errors import AdapterError, InvalidInput, OutputError
from crayon_runtime.pool import OUTPUTS, PROJECTION, adapter_folder, write_pool
from crayon_runtime.prototypes import FILE, ClusteredPrototypes
from crayon_runtime.request import prompt_ids
from crayon_runtime.session import common_prefix
from crayon_server import models, training
from crayon_server.pool import embeddings, indicators
from crayon_server.pool.data import Corpus, Pair

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from crayon_runtime.engine import Part
    from crayon_runtime.pool import Pool
    from crayon_server.training import Text

    Floats = npt.NDArray[np.float32]
    OnTexts = Callable[[int], None]

PER_CLUSTER = 32
"""Prototypes of a cluster: S of 64 has that many of the two that matter most. Our choice."""
BATCH = 16
"""Prompts that a local server LLM answers at once."""
LONGEST_NAME = 200


class Input(NamedTuple):
    """What the server LLM is asked."""

    cluster: int
    prompt: str
    completion: str
    """How it is answered in the data."""


class Server(Protocol):
    """A server LLM that is asked by threads."""

    def complete(self, prompt: str, max_tokens: int) -> str: ...


class Embedder(Protocol):
    """The un-customized base, as a model or as devices have it."""

    def fitting(self, texts: Sequence[Text]) -> list[int]:
        """Those that the base has room for, and whose completion has tokens of its own."""

    def embed(self, texts: Sequence[Text], part: Part, on_texts: OnTexts) -> Floats:
        """Mean tapped states over a part of each text, float32 [n, D]. All of them must fit."""


class Made(NamedTuple):
    """A pool with prototypes."""

    pool: Pool
    prototypes: list[int]
    """How many each cluster has."""
    empty: int
    too_long: int
    """Outputs that were left out."""


# What is asked


def typical_inputs(pool: Pool, per_cluster: int = PER_CLUSTER) -> list[Input]:
    """Inputs of the pool's typical texts, the most typical first, each once in a cluster.

    Raises:
        InvalidInput: the pool has none.
    """
    texts = (Input(text["cluster"], text["prompt"], text["completion"]) for text in pool.typical())
    inputs = _first(texts, per_cluster)
    if not inputs:
        raise InvalidInput("the pool has no typical texts", where=pool.path, do="give texts with --data")
    return inputs


def inputs_of(pool: Pool, texts: Sequence[Text], embedder: Embedder, per_cluster: int = PER_CLUSTER) -> list[Input]:
    """Inputs of other texts: each belongs to the nearest cluster, where those that are nearest come first.

    Raises:
        InvalidInput: the base has room for none of them.
    """
    texts = [texts[i] for i in embedder.fitting(texts)]
    if not texts:
        raise InvalidInput("the base has room for none of the texts", do="give shorter ones")
    prompt, other = (embedder.embed(texts, part, lambda _: None) for part in ("prompt", pool.manifest.embedding.part))
    projection = pool.projection
    z = (projection.query(prompt, other) - projection.mean) @ projection.projection
    cosines = indicators.normalize(z.astype(np.float32)) @ projection.indicators.T
    nearest, order = cosines.argmax(1), np.argsort(-cosines.max(1), kind="stable")
    return _first((Input(int(nearest[i]), texts[i].prompt, texts[i].completion) for i in order), per_cluster)


def _first(inputs: Iterable[Input], per_cluster: int) -> list[Input]:
    """The first of each cluster, sorted by cluster; the same prompt once."""
    kept: dict[int, dict[str, Input]] = {}
    for text in inputs:
        own = kept.setdefault(text.cluster, {})
        if len(own) < per_cluster:
            own.setdefault(text.prompt.strip(), text)
    return [text for cluster in sorted(kept) for text in kept[cluster].values()]


# What is said


def collect(
    inputs: Sequence[Input],
    said: Said,
    answer: Callable[[Sequence[str]], Iterator[tuple[str, str]]],
    on_output: Callable[[int], object] = lambda _: None,
) -> dict[str, str]:
    """The output of each prompt: as it was kept, or asked for and kept now.

    Args:
        answer: prompts -> prompts and outputs, in any order: `ask`, or `ask_model`.
        on_output: called with the number of outputs since the last call.

    Raises:
        OutputError: an output cannot be kept. And whatever `answer` raises; the same call goes on from there.
    """
    outputs = said.read()
    prompts = list(dict.fromkeys(text.prompt for text in inputs))
    missing = [prompt for prompt in prompts if prompt not in outputs]
    on_output(len(prompts) - len(missing))
    for prompt, output in answer(missing) if missing else ():
        said.add(prompt, output)
        outputs[prompt] = output
        on_output(1)
    return outputs


class Said:
    """What a server LLM said so far, in a file of JSON lines; what other models said, or with another limit, stays in it unused.

    Args:
        max_tokens: the most of an output.
    """

    def __init__(self, path: Path, model: str, max_tokens: int) -> None:
        self.path, self._model, self._max_tokens = path, model, max_tokens

    def read(self) -> dict[str, str]:
        """Outputs by prompt. A line that a killed process left half-written is none.

        Raises:
            OutputError: the file cannot be read.
        """
        found = {}
        try:
            lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        except OSError as e:
            raise OutputError(f"the outputs cannot be read: {e.strerror}", where=self.path) from e
        for line in lines:
            try:
                said = msgspec.json.decode(line, type=_Line)
            except (ValueError, RecursionError):
                continue
            if (said.model, said.max_tokens) == (self._model, self._max_tokens):
                found[said.prompt] = said.output
        return found

    def add(self, prompt: str, output: str) -> None:
        """Raises OutputError if the disk is full."""
        line = msgspec.json.encode(_Line(self._model, self._max_tokens, prompt, output))
        try:
            with self.path.open("ab") as file:
                file.write(b"\n" + line + b"\n")  # whatever a killed process left before it
        except OSError as e:
            raise OutputError(f"the outputs cannot be kept: {e.strerror}", where=self.path, do="free some space") from e


class _Line(msgspec.Struct):
    model: str
    max_tokens: int
    prompt: str
    output: str


def ask(server: Server, prompts: Sequence[str], *, max_tokens: int, concurrency: int) -> Iterator[tuple[str, str]]:
    """Prompts and outputs, as they come. Each prompt is sent alone, without white space around it, as devices do.

    Raises:
        ServerError: it did not answer one of them; those that it had answered came before.
    """
    threads = ThreadPoolExecutor(concurrency)
    try:
        waiting = {threads.submit(server.complete, prompt.strip(), max_tokens): prompt for prompt in prompts}
        failed: BaseException | None = None
        for done in as_completed(waiting):
            if done.cancelled():
                continue
            if error := done.exception():
                failed = failed or error
                for other in waiting:
                    other.cancel()
            else:
                yield waiting[done], done.result()
        if failed:
            raise failed
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def ask_model(folder: Path, prompts: Sequence[str], *, max_tokens: int) -> Iterator[tuple[str, str]]:
    """The same of a Hugging Face folder, greedily, on a GPU if there is one: through its chat template, or as texts to continue.

    A prompt that its context has no room for gets an empty output.

    Raises:
        InvalidInput: there is no such model.
    """
    import torch

    try:
        tokenizer = models.load_tokenizer(folder, padding_side="left")
        model = models.load(folder)
    except (OSError, ValueError) as e:
        raise InvalidInput(
            f"this is no model: {e}", where=folder, do="give a Hugging Face folder, or a URL with https://"
        ) from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device) if device.type == "cuda" else model.float()
    tokenizer.pad_token_id = training.pad_id(tokenizer)
    tokens = {prompt: _as_asked(tokenizer, prompt) for prompt in prompts}
    longest = model.config.max_position_embeddings - 1
    for prompt in prompts:
        if len(tokens[prompt]) > longest:
            yield prompt, ""
    order = sorted((p for p in prompts if len(tokens[p]) <= longest), key=lambda prompt: len(tokens[prompt]))
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        batch = tokenizer.pad({"input_ids": [tokens[prompt] for prompt in some]}, return_tensors="pt").to(device)
        room = longest + 1 - batch["input_ids"].shape[1]
        with torch.inference_mode():
            rows = model.generate(**batch, do_sample=False, max_new_tokens=min(max_tokens, room))
        answers = rows[:, batch["input_ids"].shape[1] :]
        yield from zip(some, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True)


def _as_asked(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    if tokenizer.chat_template is None:
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
    message = [{"role": "user", "content": prompt.strip()}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    asked: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return asked


# What it is embedded with


class ModelEmbedder:
    """A Hugging Face folder of the pool's base, in float32, on a GPU if there is one.

    Raises:
        AdapterError: it is another base.
    """

    def __init__(self, folder: Path, pool: Pool) -> None:
        import torch

        _check_base(training.base_fingerprint(folder), pool, folder)
        self._layer = pool.manifest.embedding.tap_layer
        self._tokenizer = models.load_tokenizer(folder)
        self._place = training.accelerator()
        self._model = training.put(models.load(folder, torch.float32), self._place)
        self._limit: int = self._model.config.max_position_embeddings  # type: ignore[assignment, union-attr]

    def fitting(self, texts: Sequence[Text]) -> list[int]:
        found = []
        for i, text in enumerate(texts):
            tokens = training.tokenize(self._tokenizer, text)
            if len(tokens.ids) <= self._limit and tokens.in_completion.index(True) < len(tokens.ids) - 1:
                found.append(i)
        return found

    def embed(self, texts: Sequence[Text], part: Part, on_texts: OnTexts) -> Floats:
        corpus = Corpus(self._tokenizer, texts, self._limit)
        embedder = embeddings.with_model(self._model, corpus, self._layer, pad_id=training.pad_id(self._tokenizer))
        found = embeddings.embed(embedder, corpus, self._place, on_texts=on_texts)
        return {"prompt": found.prompt, "answer": found.answer, "all": found.everything}[part]


class BundleEmbedder:
    """An exported bundle of the pool's base: what devices compute."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def fitting(self, texts: Sequence[Text]) -> list[int]:
        tokenizer, backend = self._engine.tokenizer, self._engine.backend
        found = []
        for i, text in enumerate(texts):
            ids = prompt_ids(text.prompt + text.completion, tokenizer, backend.vocab_size)
            begin = common_prefix(ids, prompt_ids(text.prompt, tokenizer, backend.vocab_size))
            if 0 < begin < len(ids) <= backend.context_length:
                found.append(i)
        return found

    def embed(self, texts: Sequence[Text], part: Part, on_texts: OnTexts) -> Floats:
        rows = []
        for text in texts:
            rows.append(self._engine.embed([(text.prompt, text.completion)], part=part, base=True))
            on_texts(1)
        return np.concatenate(rows)


def open_engine(bundle: Path, pool: Pool, threads: int | None) -> Engine:
    """The engine of a bundle of the pool's base, with the pool's tap.

    Raises:
        AdapterError: it is of another base, or has another tap.
        BundleError, BackendError: it cannot be used.
    """
    manifest = pool.manifest
    return embeddings.open_engine(bundle, manifest.base_fingerprint, manifest.embedding.tap_layer, threads)


def _check_base(fingerprint: str, pool: Pool, where: Path) -> None:
    expected = pool.manifest.base_fingerprint
    if fingerprint != expected:
        raise AdapterError(
            f"pool {pool.manifest.name!r} is for another base ({expected[:12]}…; this one is {fingerprint[:12]}…)",
            where=where,
            do="give the model that the pool was built for",
        )


# The pool


def add_prototypes(
    pool: Pool,
    inputs: Sequence[Input],
    outputs: Mapping[str, str],
    embedder: Embedder,
    out: Path,
    *,
    model: str,
    choices: Mapping[str, object],
    on_texts: OnTexts = lambda _: None,
    replace: bool = False,
) -> Made:
    """Write a pool again, with prototypes, or with others than before. Its LoRAs and its projection stay as they are; version and serial
    are new.

    Args:
        pool: opened with verify=True, so that nothing damaged gets a new hash.
        inputs: sorted by cluster.
        outputs: of the server LLM, by prompt. Those that are empty, or that the base has no room for, are left out.
        out: may be where the pool is, with `replace`.
        model: the server LLM's name, for people; at most 200 characters of it are kept.
        choices: how all of this was done, for the pool's `settings`.
        on_texts: called with the number of outputs embedded since the last call.

    Raises:
        InvalidInput: no output can be used.
        OutputError: `out` exists and is not to be replaced, or cannot be written.
    """
    said = [text for text in inputs if outputs[text.prompt].strip()]
    texts = [Pair(text.prompt, _as_answer(outputs[text.prompt], text.completion)) for text in said]
    fitting = embedder.fitting(texts)
    if not fitting:
        raise InvalidInput(
            f"of {len(inputs)} outputs of the server LLM {len(inputs) - len(said)} are empty, and the others are too long for the base",
            do="look at them, in the file of outputs beside the pool",
        )
    kept = [said[i] for i in fitting]
    states = embedder.embed([texts[i] for i in fitting], "answer", on_texts)
    clusters = np.array([text.cluster for text in kept])
    prototypes = ClusteredPrototypes(states, clusters, states.mean(0), model[:LONGEST_NAME])
    empty, too_long = len(inputs) - len(said), len(said) - len(kept)
    settings = pool.manifest.settings | {"prototypes": dict(choices) | {"empty": empty, "too_long": too_long}}
    lines = [{"cluster": t.cluster, "prompt": t.prompt, "output": outputs[t.prompt]} for t in kept]
    written = _write(pool, prototypes, settings, lines, out, replace=replace)
    counts = np.bincount(clusters, minlength=pool.manifest.adapters).tolist()
    return Made(written, counts, empty, too_long)


def _as_answer(output: str, completion: str) -> str:
    """Begins as answers in the data begin."""
    return completion[: len(completion) - len(completion.lstrip())] + output.strip()


def _write(
    pool: Pool,
    prototypes: ClusteredPrototypes,
    settings: dict[str, object],
    lines: Iterable[Mapping[str, object]],
    out: Path,
    *,
    replace: bool,
) -> Pool:
    old = pool.manifest
    ours = (PROJECTION, FILE, OUTPUTS)
    further = {
        file.path: (pool.path / file.path).read_bytes()
        for file in old.files
        if "/" not in file.path and file.path not in ours
    }
    further[OUTPUTS] = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    return write_pool(
        out,
        msgspec.structs.replace(old, serial=max(int(time.time()), old.serial + 1), settings=settings),
        pool.projection,
        [pool.path / adapter_folder(n) for n in range(old.adapters)],
        prototypes=prototypes,
        further=further,
        replace=replace,
    )
