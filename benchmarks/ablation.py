"""MobileLLM's choices, at one number of parameters and on this CPU: about an hour on two cores, and it goes on with --work.

It needs plain texts, of a few megabytes: `--text SOURCE`, as `crayon model train --data` takes them, with `--text-field` if they are not
called "text"; without, that task is left out. CRAYON_ABLATION_STEPS makes all runs shorter.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
import torch

from benchmarks.measure import interleaved
from benchmarks.table import Row
from crayon_runtime.files import atomic_directory, atomic_file
from crayon_server import models, svg, training
from crayon_server.cli import quiet
from crayon_server.data.phone_assistant import CONVENTIONS, Example, stream
from crayon_server.distillation import Teacher
from crayon_server.evaluate.float_model import FloatModel
from crayon_server.models import tokenizer as nano_tokenizer
from crayon_server.models.mobilellm import MobileLLMConfig, MobileLLMForCausalLM
from crayon_server.models.train import Settings, train
from crayon_server.packing import Packed, write_tokens
from crayon_server.pool.data import stream_plain

STEPS = int(os.environ.get("CRAYON_ABLATION_STEPS", "300"))
SEEDS = (0, 1, 2)
RATES = (2e-3, 4e-3, 8e-3)
"""The learning rates that each shape is tuned over, on its first seed, by the loss on validation texts."""
BATCH_SIZE, LENGTH = 16, 64
TEXTS, HELD_OUT = 8000, 250
"""Requests to train on; requests to validate with, and as many to test with."""
WORDS = 1024
"""Tokens that are learnt from the plain texts."""
EVERY = 20
"""One plain text in so many is to validate with, and one to test with."""


class Shape(NamedTuple):
    """A model of the ablation; its heads have 32 channels."""

    layers: int
    heads: int
    kv_heads: int
    parameters: int = 1_000_000
    tied: bool = True
    repeats: int = 1

    def config(self, vocab_size: int) -> MobileLLMConfig:
        """With the FFN as wide as the parameters are for, in steps of 8."""
        width = 32 * self.heads
        rest = self.parameters - vocab_size * width * (1 if self.tied else 2) - width
        block = 2 * width * width + 64 * width * self.kv_heads + 2 * width
        ffn = 8 * round((rest / self.layers - block) / (3 * width * 8))
        return MobileLLMConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=self.tied,
            layer_repeats=self.repeats,
            pad_token_id=nano_tokenizer.PAD_ID,
            bos_token_id=nano_tokenizer.BOS_ID,
            eos_token_id=nano_tokenizer.EOS_ID,
        )


DEEP = Shape(12, 3, 1)
WIDE = Shape(3, 6, 2)
SHAPES = {
    "deep and thin": DEEP,
    "wide and shallow": WIDE,
    "embedding not shared": DEEP._replace(tied=False),
    "no grouped queries": DEEP._replace(kv_heads=3),
    "layers shared (LS)": DEEP._replace(repeats=2),
}
SMALLER = {
    "deep and thin": (Shape(8, 2, 1, 250_000), Shape(9, 3, 1, 500_000)),
    "wide and shallow": (Shape(2, 4, 2, 250_000), Shape(2, 6, 2, 500_000)),
}
"""Further points of the chart, trained at the rates that were tuned at 1 M."""
TEACHER = Shape(6, 8, 2, 3_000_000)


class Job(NamedTuple):
    """A training run, and where its result is kept."""

    task: str
    name: str
    shape: Shape
    seed: int
    rate: float
    steps: int = STEPS
    taught: bool = False

    def __str__(self) -> str:
        return f"{self.task}, {self.name}, {self.steps} steps, rate {self.rate:g}, seed {self.seed}"


TAUGHT_BY = Job("phone", "teacher", TEACHER, SEEDS[0], RATES[0], 2 * STEPS)


Kept = TypeVar("Kept")
Results = Callable[[Sequence[Job]], "list[Result]"]


class Result(msgspec.Struct):
    """Log-losses are in nats per token: of completions, or of all plain text."""

    parameters: int
    validation: float
    test: float
    exact_match: float | None = None


def run(work: Path, text: str | None = None, text_field: str = "text") -> Iterator[Row]:
    folder = work / "ablation"
    with quiet(), ProcessPoolExecutor(min(2, os.cpu_count() or 1), get_context("spawn")) as processes:

        def results(jobs: Sequence[Job]) -> list[Result]:
            return _results(jobs, folder, processes)

        _prepare_requests(folder)
        tasks = ["phone"]
        if text is not None:
            _prepare_text(text, text_field, folder)
            tasks.append("text")
        rates: dict[tuple[str, str], float] = {}
        found: dict[tuple[str, str], list[Result]] = {}
        for task in tasks:
            grid = [Job(task, name, shape, SEEDS[0], rate) for name, shape in SHAPES.items() for rate in RATES]
            for job, result in zip(grid, results(grid), strict=True):
                key = (task, job.name)
                if key not in found or result.validation < found[key][0].validation:
                    found[key], rates[key] = [result], job.rate
            jobs = [Job(task, n, s, seed, rates[task, n]) for n, s in SHAPES.items() for seed in SEEDS[1:]]
            for job, result in zip(jobs, results(jobs), strict=True):
                found[task, job.name].append(result)
            yield from _rows(task, found, rates)
        yield from _distillation(folder, results, found["phone", "deep and thin"], rates["phone", "deep and thin"])
        yield from _sizes(work / "ablation.svg", results, found, rates)


def _rows(task: str, found: dict[tuple[str, str], list[Result]], rates: dict[tuple[str, str], float]) -> Iterator[Row]:
    for name in SHAPES:
        results = found[task, name]
        what = f"{task}: {name}, {results[0].parameters / 1e6:.3f} M, learning rate {rates[task, name]:g}"
        yield Row(what, "", _measured(results))


def _measured(results: Sequence[Result]) -> str:
    exact = [r.exact_match for r in results if r.exact_match is not None]
    said = [f"exact match {_spread(exact)}"] if exact else []
    return ", ".join([*said, f"log-loss {_spread([r.test for r in results])}"])


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ± {stdev(values):.3f}"


def _distillation(folder: Path, results: Results, plain: list[Result], rate: float) -> Iterator[Row]:
    """At equal steps, and at the steps that labels alone do in the same time."""
    (taught_by,) = results([TAUGHT_BY])
    yield Row(f"phone: the teacher, {taught_by.parameters / 1e6:.1f} M", "", f"exact match {taught_by.exact_match:.3f}")
    ratio = _kept(folder / "time.json", float, lambda: _time_ratio(folder))
    longer = round(STEPS * ratio)
    jobs = [Job("phone", "distilled", DEEP, seed, rate, taught=True) for seed in SEEDS]
    jobs += [Job("phone", "plain, longer", DEEP, seed, rate, longer) for seed in SEEDS]
    done = results(jobs)
    yield Row(f"phone: labels alone, {STEPS} steps", "", _measured(plain))
    yield Row(f"phone: labels and teacher, {STEPS} steps, {ratio:.2f} times the time", "", _measured(done[:3]))
    yield Row(f"phone: labels alone, {longer} steps, the same time", "", _measured(done[3:]))


def _time_ratio(folder: Path) -> float:
    """Time of a step with a teacher, in units of one without."""
    tokenizer = models.load_tokenizer(folder / "phone-tokenizer")
    texts = [training.tokenize(tokenizer, e) for e in _requests("train")[:BATCH_SIZE]]
    student = MobileLLMForCausalLM(DEEP.config(nano_tokenizer.VOCAB_SIZE))
    teacher = Teacher(models.load(_trained(TAUGHT_BY, folder), torch.float32).requires_grad_(False))
    options, place = training.Options(1, 1e-3, threads=1), training.accelerator()
    seconds = interleaved(
        {
            "plain": lambda: training.train(student, iter([texts]), options, pad_id=0, place=place),
            "taught": lambda: training.train(
                student, iter([texts]), options, pad_id=0, place=place, loss_of=teacher.loss
            ),
        },
        9,
    )
    return float(np.median(np.array(seconds["taught"]) / np.array(seconds["plain"])))


def _sizes(
    chart: Path,
    results: Results,
    found: dict[tuple[str, str], list[Result]],
    rates: dict[tuple[str, str], float],
) -> Iterator[Row]:
    """Two shapes at further sizes, and the chart of accuracy against size."""
    jobs = [
        Job("phone", f"{name}, {shape.parameters}", shape, seed, rates["phone", name])
        for name, shapes in SMALLER.items()
        for shape in shapes
        for seed in SEEDS
    ]
    done = results(jobs)
    curves = {name: [found["phone", name]] for name in SHAPES}
    for i, job in enumerate(jobs[:: len(SEEDS)]):
        some = done[i * len(SEEDS) : (i + 1) * len(SEEDS)]
        name = job.name.partition(",")[0]
        curves[name].insert(-1, some)
        yield Row(f"phone: {name}, {some[0].parameters / 1e6:.3f} M", "", _measured(some))
    with atomic_file(chart) as file:
        file.write(_chart(curves, {name: found.get(("text", name)) for name in SHAPES}))
    yield Row("the chart", "", str(chart))


def _chart(curves: dict[str, list[list[Result]]], text: dict[str, list[Result] | None]) -> bytes:
    """Exact match against parameters, and log-loss of plain texts, with deviations over seeds: SVG."""

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (name, points) in enumerate(curves.items()):
        sizes = [some[0].parameters / 1e6 for some in points]
        exact = [[r.exact_match or 0.0 for r in some] for some in points]
        style = {"marker": "o", "capsize": 3, "label": name, "markersize": 4}
        left.errorbar(sizes, [fmean(e) for e in exact], [stdev(e) for e in exact], **style)
        if some := text[name]:
            losses = [r.test for r in some]
            right.errorbar([place], [fmean(losses)], [stdev(losses)], **style)
    left.set(xlabel="parameters, millions", ylabel="exact match, phone-assistant requests", ylim=(0, None))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(curves), fontsize=8)
    right.set(ylabel="nats per token, plain texts", xticks=[])
    return svg.render(figure)


# Texts


def _requests(part: str) -> list[Example]:
    """Requests of all domains with the calls that answer them, in one convention: a model can know them all."""
    count = TEXTS if part == "train" else HELD_OUT
    return list(itertools.islice(stream(f"ablation {part}", conventions=CONVENTIONS[:1]), count))


def _prepare_requests(folder: Path) -> None:
    lines = [msgspec.json.encode({"prompt": e.prompt, "completion": e.completion}) for e in _requests("train")]
    with atomic_file(folder / "train.jsonl") as file:
        file.write(b"\n".join(lines) + b"\n")
    with atomic_directory(folder / "phone-tokenizer", replace=True) as words:
        nano_tokenizer.write(nano_tokenizer.learn(), words)


def _prepare_text(source: str, field: str, folder: Path) -> None:
    """Plain texts, none twice, in three files, and a tokenizer learnt from those to train on."""
    texts = list(dict.fromkeys(" ".join(text.split()) for text in stream_plain(source, field)))
    parts = {"validation": texts[::EVERY], "test": texts[1::EVERY]}
    parts["train"] = [text for i, text in enumerate(texts) if i % EVERY > 1]
    for part, some in parts.items():
        with atomic_file(folder / f"{part}.txt") as file:
            file.write("\n\n".join(some).encode())
    with atomic_directory(folder / "text-tokenizer", replace=True) as words:
        nano_tokenizer.write(nano_tokenizer.train(parts["train"], WORDS), words)


def _text_loss(model: Path, path: Path) -> float:
    """Nats per token of the texts in a file."""
    tokens = path.with_name(f"{model.parent.name}.{path.stem}")
    write_tokens(models.load_tokenizer(model), stream_plain(path), tokens)
    packed = Packed(tokens, LENGTH)
    tokens.unlink()  # it stays as long as it is mapped
    return training.mean_loss(
        models.load(model),
        packed[:],
        batch_size=64,
        pad_id=nano_tokenizer.PAD_ID,
        prompt_weight=0.0,
        place=training.accelerator(),
    )


# One run


def _trained(job: Job, folder: Path) -> Path:
    """The model of a job."""
    return folder / "runs" / str(job) / "trained"


def _results(jobs: Sequence[Job], folder: Path, processes: ProcessPoolExecutor) -> list[Result]:
    """Of all jobs, some at a time; those that are there already are not run again."""
    done: list[Result] = []
    for job, result in zip(jobs, processes.map(_result, jobs, itertools.repeat(folder)), strict=True):
        print(f"  {job}: {msgspec.json.encode(result).decode()}", file=sys.stderr, flush=True)
        done.append(result)
    return done


def _result(job: Job, folder: Path) -> Result:
    def compute() -> Result:
        with quiet():
            return _run(job, folder)

    return _kept(folder / "results" / f"{job}.json", Result, compute)


def _kept(path: Path, kind: type[Kept], compute: Callable[[], Kept]) -> Kept:
    """What a file says, or else what is computed, and written there."""
    if path.exists():
        return msgspec.json.decode(path.read_bytes(), type=kind)
    value = compute()
    with atomic_file(path) as file:
        file.write(msgspec.json.encode(value))
    return value


def _run(job: Job, folder: Path) -> Result:
    """A run that was killed goes on from its last checkpoint."""
    out = _trained(job, folder)
    work, start = out.parent, out.with_name("model")
    words = folder / f"{job.task}-tokenizer"
    vocab_size = len(models.load_tokenizer(words))
    torch.manual_seed(job.seed)
    models.save_weights(MobileLLMForCausalLM(job.shape.config(vocab_size)), start)
    for name in models.TOKENIZER_FILES:
        if (words / name).exists():
            (start / name).write_bytes((words / name).read_bytes())
    settings = Settings(
        context_length=LENGTH if job.task == "text" else None,
        steps=job.steps,
        batch_size=BATCH_SIZE,
        learning_rate=job.rate,
        prompt_weight=0.2,
        seed=job.seed,
        held_out=0.0,
        threads=1,
    )
    data = folder / ("train.txt" if job.task == "text" else "train.jsonl")
    teacher = _trained(TAUGHT_BY, folder) if job.taught else None
    trained = train(start, [str(data)], out, work=work, settings=settings, teacher=teacher, replace=True)
    if job.task == "text":
        return Result(trained.parameters, *(_text_loss(out, folder / name) for name in ("validation.txt", "test.txt")))
    model = FloatModel(out)
    validation, test = (model.force(model.tokenize(_requests(name))) for name in ("validation", "test"))
    losses = [float(forced.log_loss.mean()) for forced in (validation, test)]
    return Result(trained.parameters, *losses, exact_match=float(test.exact.mean()))
