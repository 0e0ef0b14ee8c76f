"""Constrained output: are all calls whole, what does a token cost more, and what does it cost to begin."""

from __future__ import annotations

import itertools
import json
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import calls
from benchmarks.bundles import tinyllama
from benchmarks.table import Row
from crayon_export import export
from crayon_runtime import Constraint, Engine, Tokenizer
from crayon_runtime.manifest import Tokenizer as Info
from crayon_runtime.sampling import Sampler, SamplingOptions
from crayon_server.data import phone_assistant as pa
from crayon_server.models import load_nano

CALLS = 1000
VOCAB_SIZE = 32_000
RUN = 60
"""Tokens of one answer."""
PAIRS = {"nano": 3000, "TinyLlama-1.1B": 240}
"""Tokens that are compared."""

ENTRY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["alarm", "timer", "message"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 5000},
        "on": {"type": "boolean"},
    },
    "required": ["name", "kind", "count", "on"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": ENTRY, "minItems": 10_000}
"""Free text, fixed text, numbers and choices, for as long as is measured."""
TOOLS = [{"type": "function", "function": {"name": f"tool{i}", "parameters": ENTRY}} for i in range(20)]


def run(work: Path) -> Iterator[Row]:
    nano = export(load_nano(), work / "constrained.bundle", replace=True).bundle.path
    with Engine.load(nano, threads=1) as engine:
        yield _calls(engine)
        yield from _decode("nano", engine, None)
    tokenizer = _tokenizer(work)
    yield from _beginning(tokenizer)
    yield from _token(tokenizer)
    with Engine.load(tinyllama(work), threads=2) as loaded, Engine(loaded.backend, tokenizer) as engine:
        yield from _decode("TinyLlama-1.1B", engine, 0.95)


def _calls(engine: Engine) -> Row:
    """Calls of a model at temperature 1, each in a convention that the request does not ask for."""
    grammars = [Constraint.lark(pa.grammar(convention)) for convention in pa.CONVENTIONS]
    broken, tokens, started = 0, 0, time.perf_counter()
    requests = pa.stream("constrained", domains=(*pa.DOMAINS, *pa.SERVER_ONLY))
    for number, example in enumerate(itertools.islice(requests, CALLS)):
        which = number % len(grammars)
        done = engine.generate(
            example.prompt, constraint=grammars[which], temperature=1.0, seed=number, max_new_tokens=300
        )
        tokens += done.generated_tokens
        try:
            calls.check(done.text, pa.CONVENTIONS[which])
        except Exception:  # noqa: BLE001, whatever a judge finds wrong
            broken += 1
    seconds = time.perf_counter() - started
    return Row(
        f"nano, {CALLS} calls at temperature 1, over all {len(grammars)} conventions: whole",
        "100 %",
        f"{1 - broken / CALLS:.1%} ({tokens} tokens, {seconds:.0f} s)",
        not broken,
    )


def _decode(name: str, engine: Engine, reach: float | None) -> Iterator[Row]:
    """Decoding against decoding without a constraint: two answers that take turns, token by token."""
    constraint = Constraint.json_schema(ENDLESS)
    for what, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        seconds: list[list[float]] = []
        while len(seconds) < PAIRS[name]:
            options: Any = {"temperature": temperature, "seed": len(seconds), "max_new_tokens": RUN + 1}
            streams = [
                engine.stream([1], **options, ignore_eos=True),
                engine.stream([1], **options, constraint=constraint),
            ]
            for stream in streams:
                next(stream)
            for turn in range(RUN):
                pair = [0.0, 0.0]
                for which in (0, 1) if turn % 2 else (1, 0):
                    started = time.perf_counter()
                    next(streams[which])
                    pair[which] = time.perf_counter() - started
                seconds.append(pair)
        free, bound = np.array(seconds).T
        ratio = float(np.median(free / bound))
        low, high = np.quantile(free / bound, [0.25, 0.75])
        yield Row(
            f"{name}{' shapes, V = 32,000' if reach else ''}, {what}: speed of constrained decoding against free",
            f">= {reach}" if reach else "",
            f"{ratio:.3f} (half of {len(free)} pairs: {low:.2f} to {high:.2f}; free: {np.median(free) * 1e3:.2f} ms a token)",
            ratio >= reach if reach else None,
        )


def _beginning(tokenizer: Tokenizer) -> Iterator[Row]:
    def milliseconds(call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1000

    first = milliseconds(lambda: Constraint.regex("a").matcher(tokenizer, VOCAB_SIZE))
    yield Row("a tokenizer of 32,000 tokens, once for an engine", "", f"{first:.0f} ms")
    for what, make in {
        "a schema of 4 properties": lambda: Constraint.json_schema(ENTRY),
        "20 tools": lambda: Constraint.tools(TOOLS),
        "the phone assistant's grammar": lambda: Constraint.lark(pa.grammar(pa.CONVENTIONS[0])),
    }.items():
        times = [milliseconds(lambda: make().matcher(tokenizer, VOCAB_SIZE)) for _ in range(9)]  # noqa: B023
        again = make()
        again.matcher(tokenizer, VOCAB_SIZE)
        more = [milliseconds(lambda: again.matcher(tokenizer, VOCAB_SIZE)) for _ in range(9)]  # noqa: B023
        yield Row(
            f"compile {what}, V = 32,000",
            "",
            f"{np.median(times):.1f} ms; for a second answer {np.median(more):.2f} ms",
        )


def _token(tokenizer: Tokenizer) -> Iterator[Row]:
    """What comes to a token: the allowed ones, and sampling among them instead of among all."""
    logits = np.random.default_rng(0).standard_normal((64, VOCAB_SIZE)).astype(np.float32)
    constraint = Constraint.json_schema(ENDLESS)
    for what, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        options = SamplingOptions(temperature=temperature, seed=1)
        bound, free = Sampler(options, VOCAB_SIZE), Sampler(options, VOCAB_SIZE)
        matcher = constraint.matcher(tokenizer, VOCAB_SIZE)
        more, ends = [], []
        for step in range(400):
            marks = [time.perf_counter()]
            free.sample(logits[step % 64])
            marks.append(time.perf_counter())
            allowed = matcher.allowed()
            token = bound.sample(logits[step % 64], allowed)
            matcher.consume(token)
            marks.append(time.perf_counter())
            more.append((marks[2] - marks[1]) - (marks[1] - marks[0]))
            ends.append(marks[2] - marks[1])
        yield Row(
            f"a token at V = 32,000, {what}: added by the constraint",
            "<= 2 ms",
            f"{np.mean(more) * 1e3:.3f} ms (slowest whole step {max(ends) * 1e3:.1f} ms)",
            float(np.mean(more)) <= 2e-3,
        )


def _tokenizer(work: Path) -> Tokenizer:
    """As LLaMA's: 32,000 pieces with byte fallback, learnt from the sources of Python's standard library."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    path = work / "tokenizer-32000.json"
    if not path.exists():
        library = Library(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        library.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        library.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        reserved = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=reserved, max_token_length=16, show_progress=False
        )
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
        texts = (p.read_text(errors="ignore") for p in sources if "site-packages" not in p.parts)
        library.train_from_iterator(
            itertools.islice((line for t in texts for line in t.splitlines()), 200_000), trainer
        )
        document = json.loads(library.to_str())  # bytes are pieces like others, not control tokens
        document["added_tokens"] = document["added_tokens"][:3]
        path.write_text(json.dumps(document))
    return Tokenizer(Info("tokenizer.json", vocab_size=VOCAB_SIZE, add_bos=True, bos=1, eos=[2]), path)
