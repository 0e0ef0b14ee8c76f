"""Pre-training and fine-tuning of whole models on texts of one's own, from nothing or from a folder, alone or from a teacher.

A run with a work folder goes on where it was killed. Tokens, the start and checkpoints lie there under names that are hashes of all that
they depend on, so that other texts or settings never find old ones.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from crayon_runtime.errors import InvalidInput, OutputError
from crayon_runtime.files import atomic_directory, sha256_file
from crayon_server import models, training
from crayon_server.checkpoints import Checkpoints, whole
from crayon_server.distillation import load_teacher
from crayon_server.losses import Log, Step, encode, plot
from crayon_server.packing import Packed, write_tokens
from crayon_server.pool.data import Corpus, Pair, is_plain, stream, stream_plain
from crayon_server.throughput import flops_per_token, measured_peak

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from crayon_server.training import Item, OnStep, Precision, Tokens

FROM_NOTHING, FROM_A_FOLDER = 2e-3, 2e-4
"""Peak learning rates: MobileLLM's (arXiv:2402.14905), and a tenth of it for weights that know something."""
VALIDATION = 256
"""Texts, and sequences of tokens, that the validation loss is of, at most."""
LIBRARIES = ("accelerate", "torch", "transformers")
"""Whose versions are written down."""


@dataclass(frozen=True)
class Settings:
    """Every choice of a training.

    Attributes:
        context_length: tokens of a sequence of plain text, and of the longest record; None: the model's context.
        steps: None: one pass over the texts.
        batch_size: sequences or records, of all processes.
        learning_rate: the peak; None: `FROM_NOTHING` or `FROM_A_FOLDER`.
        warmup: steps; None: a twentieth of all.
        prompt_weight: of the loss of a record's prompt.
        weight_decay: of matrices, that of the embedding among them, and not of the gains of norms, as in Megatron-LM, nanoGPT and
            transformers' Trainer.
        held_out: share of the texts that are not trained on, and that the validation loss is of.
        validate_every: steps; the last one always.
        distill_weight, temperature: see `crayon_server.distillation`, where there is a teacher.
        peak_tflops: of the device, for MFU; None: that of a matrix product is measured.
        mixed_precision: "bf16" computes in bfloat16; weights, their gradients and Adam's moments stay float32.
        gradient_accumulation, gradient_checkpointing, threads: see `training.Options`.
    """

    context_length: int | None = None
    steps: int | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    warmup: int | None = None
    prompt_weight: float = 0.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    final_rate: float = 0.1
    clip: float = 1.0
    seed: int = 0
    held_out: float = 0.01
    validate_every: int = 100
    distill_weight: float = 0.5
    temperature: float = 1.0
    peak_tflops: float | None = None
    mixed_precision: Precision | None = None
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    threads: int | None = None


class Trained(msgspec.Struct, frozen=True):
    """What became of a training; `training.json` in the model's folder.

    Attributes:
        loss: mean of the last twentieth of the steps, in nats per weighted token; with a teacher the mixed loss.
        validation_loss: after the last step, of the labels alone; None: nothing was held out.
        tokens: in all steps, padding not counted.
        tokens_per_second: median over the steps, in all processes together.
        mfu: share of `peak_flops` that the model's own operations need at that rate; a teacher's are not counted.
        peak_flops: operations a second of all processes, as stated, or as `crayon_server.throughput` measures them.
        sequences, held_out, left_out: to train on, to validate with, and records that were too long.
    """

    steps: int
    loss: float
    validation_loss: float | None
    tokens: int
    tokens_per_second: float
    mfu: float
    peak_flops: float
    parameters: int
    sequences: int
    held_out: int
    left_out: int
    processes: int
    mixed_precision: str
    settings: dict[str, Any]
    versions: dict[str, str]


class _Data(NamedTuple):
    texts: Sequence[Tokens]
    held_out: Sequence[Tokens]
    left_out: int
    digest: str


def train(
    start: str | Path,
    sources: Sequence[str],
    out: Path,
    *,
    work: Path,
    settings: Settings | None = None,
    fields: Mapping[str, str] | None = None,
    tokenizer: Path | None = None,
    teacher: Path | None = None,
    checkpoint_every: int = 100,
    place: Accelerator | None = None,
    on_start: Callable[[int], None] | None = None,
    on_step: OnStep | None = None,
    replace: bool = False,
) -> Trained:
    """Train a model on texts, and write its Hugging Face folder with `loss.jsonl`, `loss.svg` and `training.json`.

    Args:
        start: the name of an architecture, for random weights; or a Hugging Face folder, which a path always is.
        sources: of plain text or of prompts and completions, all of one kind; see `crayon_server.pool.data`.
        work: a folder for tokens and checkpoints, from which a training that was killed goes on; all processes see it.
        fields: what "text", or prompt and completion, are called in the sources, where they are called otherwise.
        tokenizer: of a new model, see `models.create`.
        teacher: a Hugging Face folder to learn from as well.
        checkpoint_every: steps.
        place: where; None: `training.accelerator`.
        on_start: told the number of steps.
        on_step: called after every step.

    Raises:
        InvalidInput: start, texts, teacher or a setting cannot be used, or the loss is no longer finite.
        IntegrityError: the checkpoint is damaged.
        OutputError: `out` exists and is not to be replaced, or something cannot be written; the last checkpoint is still there.
    """
    settings = settings or Settings()
    if out.exists() and not replace:
        raise OutputError("the target exists", where=out, do="choose another path, or replace it with --force")
    place = place or training.accelerator(settings.mixed_precision)
    folder = _start(start, work, settings.seed, tokenizer, place)
    student, words = _load(folder)
    kind, stored, config = type(student), student.dtype, student.config
    length = min(settings.context_length or config.max_position_embeddings, config.max_position_embeddings)
    data = _read(words, sources, fields, length, work, settings, place)
    options = _options(settings, len(data.texts), random=start in models.ARCHITECTURES)
    guide = None
    if teacher is not None:
        guide = load_teacher(
            teacher, words, config.vocab_size, length, place,
            weight=settings.distill_weight, temperature=settings.temperature,
        )  # fmt: skip
    chosen = asdict(settings) | {"context_length": length, "steps": options.steps}
    chosen |= {"learning_rate": options.learning_rate, "warmup": options.warmup}
    key = {name: value for name, value in chosen.items() if name not in ("threads", "peak_tflops")}
    key |= {"start": _digest(folder), "teacher": teacher and _digest(teacher), "data": data.digest}
    run = work / f"training-{hashlib.sha256(msgspec.json.encode(key, order='deterministic')).hexdigest()[:16]}"
    if place.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
    place.wait_for_everyone()
    model = training.put(student.float(), place, frozen=False)
    log = Log(run / "loss.jsonl" if place.is_main_process else None)
    if on_start:
        on_start(options.steps)
    watch = _Watch(model, data, options, settings, training.pad_id(words), place, log, on_step)
    checkpoints = Checkpoints(run / "checkpoint", checkpoint_every)
    watch.resumed = checkpoints.steps()
    losses = training.train(
        model,
        watch.batches(),
        options,
        pad_id=training.pad_id(words),
        on_step=watch.on_step,
        place=place,
        checkpoints=checkpoints,
        loss_of=guide.loss if guide else None,
    )
    trained = _summary(model, config, data, losses, log, place, settings, chosen)
    state = {}
    for name, tensor in model.state_dict().items():
        gathered = whole(tensor)
        if place.is_main_process:
            state[name] = gathered.to("cpu", stored)
    if place.is_main_process:
        finished = kind(config)
        finished.to(stored).load_state_dict(state)
        _write(finished, folder, out, log, losses, trained, replace=replace)
    place.wait_for_everyone()
    return trained


def _options(settings: Settings, texts: int, *, random: bool) -> training.Options:
    steps = settings.steps or -(-texts // settings.batch_size)
    warmup = -(-steps // 20) if settings.warmup is None else settings.warmup
    return training.Options(
        steps,
        settings.learning_rate or (FROM_NOTHING if random else FROM_A_FOLDER),
        warmup=warmup,
        final_rate=settings.final_rate,
        cosine_after_warmup=True,
        prompt_weight=settings.prompt_weight,
        weight_decay=settings.weight_decay,
        decay_vectors=False,
        betas=settings.betas,
        clip=settings.clip,
        seed=settings.seed,
        gradient_accumulation=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        threads=settings.threads,
    )


# Where it begins


def _start(start: str | Path, work: Path, seed: int, tokenizer: Path | None, place: Accelerator) -> Path:
    """The folder of a model, made where a name says which."""
    if start not in models.ARCHITECTURES:
        if not Path(start).is_dir():
            known = ", ".join(models.ARCHITECTURES)
            raise InvalidInput(f"there is no architecture and no folder {str(start)!r}", do=f"choose one of {known}")
        if tokenizer is not None:
            raise InvalidInput("the model has a tokenizer of its own", where=start, do="leave out --tokenizer")
        return Path(start)
    if tokenizer is None and start not in models.NANO:
        raise InvalidInput(f"a new {start} has no tokenizer", do="name one with --tokenizer")
    made = work / "start"
    if place.is_main_process:
        models.create(str(start), made, seed=seed, tokenizer=tokenizer, replace=True)
    place.wait_for_everyone()
    return made


def _load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        words = models.load_tokenizer(folder)
        return models.load(folder), words
    except (OSError, ValueError, RuntimeError) as e:
        raise InvalidInput(
            f"this is no model with a tokenizer: {e}", where=folder, do="give a Hugging Face folder"
        ) from e


def _digest(folder: Path) -> str:
    """SHA-256 over what a model and its tokenizer are made of, in hex."""
    names = ("*.safetensors", "*.bin", "config.json", "tokenizer.json", "tokenizer.model")
    hashes = [sha256_file(file) for name in names for file in sorted(folder.glob(name))]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


# What it is trained on


def _read(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    fields: Mapping[str, str] | None,
    length: int,
    work: Path,
    settings: Settings,
    place: Accelerator,
) -> _Data:
    if length < 2:
        raise InvalidInput(f"a context of {length} tokens has nothing to predict", where="context length")
    if not 0 <= settings.held_out < 1:
        raise InvalidInput(
            f"{settings.held_out} is no share of the texts that leaves some to train on", where="held-out"
        )
    if ("text" in fields) if fields else is_plain(sources[0]):
        name = (fields or {}).get("text", "text")
        paths = [work / "train.tokens", work / "held-out.tokens"]
        if place.is_main_process:
            texts, aside = _hold_out((text for source in sources for text in stream_plain(source, name)), settings)
            write_tokens(tokenizer, texts, paths[0])
            write_tokens(tokenizer, aside, paths[1])
        place.wait_for_everyone()
        if not paths[0].stat().st_size:
            raise InvalidInput(
                "there are no texts to train on", where=", ".join(sources), do="check that it holds text"
            )
        packed = Packed(paths[0], length)
        validation = Packed(paths[1], length)[:VALIDATION] if paths[1].stat().st_size else []
        return _Data(packed, validation, 0, packed.digest)

    lines = (line for source in sources for line in stream(source, fields))
    pairs, held = _hold_out((Pair(line.prompt, line.completion) for line in lines), settings)
    corpus = Corpus(tokenizer, pairs, length)
    validation = [text for text in (training.tokenize(tokenizer, pair) for pair in held) if len(text.ids) <= length]
    return _Data(corpus, validation, corpus.left_out, corpus.digest)


def _hold_out(texts: Iterator[Item], settings: Settings) -> tuple[Iterator[Item], list[Item]]:
    """Those to train on, and the first of those held out, which are there when the others were read.

    Whether a text is held out depends on its place and on the seed alone, so it is so whatever else there is.
    """
    held: list[Item] = []

    def others() -> Iterator[Item]:
        for i, text in enumerate(texts):
            drawn = int.from_bytes(hashlib.sha256(f"{settings.seed} {i}".encode()).digest()[:8], "big") / 2**64
            if drawn >= settings.held_out:
                yield text
            elif len(held) < VALIDATION:
                held.append(text)

    return others(), held


# While it is trained, and after


class _Watch:
    """Draws batches, and after each step validates, where it is time, and logs.

    Attributes:
        resumed: the steps that a checkpoint has: they are told, and neither validated nor timed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data: _Data,
        options: training.Options,
        settings: Settings,
        pad_id: int,
        place: Accelerator,
        log: Log,
        on_step: OnStep | None,
    ) -> None:
        self.resumed, self._tokens, self._then = 0, 0, time.perf_counter()
        self._model, self._data, self._options, self._settings = model, data, options, settings
        self._pad_id, self._place, self._log, self._told = pad_id, place, log, on_step

    def batches(self) -> Iterator[list[Tokens]]:
        for batch in training.epochs(self._data.texts, self._settings.batch_size, self._options.seed):
            self._tokens = sum(len(text.ids) for text in batch)
            yield batch

    def on_step(self, step: int, loss: float) -> None:
        seconds = time.perf_counter() - self._then if step > self.resumed else None
        due = step % self._settings.validate_every == 0 or step == self._options.steps
        validation = None
        if due and step >= self.resumed and self._data.held_out:
            validation = training.mean_loss(
                self._model, self._data.held_out, batch_size=self._settings.batch_size, pad_id=self._pad_id,
                prompt_weight=self._options.prompt_weight, place=self._place,
            )  # fmt: skip
        if not self._log.has(step, loss):
            rate = self._options.learning_rate * training.rate(step - 1, self._options)
            self._log.add(Step(step, loss, rate, self._tokens, seconds, validation))
        if self._told:
            self._told(step, loss)
        self._then = time.perf_counter()


def _summary(
    model: torch.nn.Module,
    config: Any,
    data: _Data,
    losses: Sequence[float],
    log: Log,
    place: Accelerator,
    settings: Settings,
    chosen: dict[str, Any],
) -> Trained:
    import torch

    with training.threads(settings.threads):
        measured = measured_peak(place.device, torch.bfloat16 if place.mixed_precision == "bf16" else torch.float32)
    peak = place.num_processes * (settings.peak_tflops * 1e12 if settings.peak_tflops else measured)
    rates = [step.tokens / step.seconds for step in log.steps if step.tokens and step.seconds] or [0.0]
    tokens = sum(step.tokens or 0 for step in log.steps)
    mean_length = tokens / (len(losses) * settings.batch_size)
    return Trained(
        steps=len(losses),
        loss=fmean(losses[-max(1, len(losses) // 20) :]),
        validation_loss=log.steps[-1].validation_loss,
        tokens=tokens,
        tokens_per_second=median(rates),
        mfu=median(rates) * flops_per_token(config, round(mean_length)) / peak,
        peak_flops=peak,
        parameters=sum(p.numel() for p in model.parameters()),
        sequences=len(data.texts),
        held_out=len(data.held_out),
        left_out=data.left_out,
        processes=place.num_processes,
        mixed_precision=place.mixed_precision,
        settings=msgspec.to_builtins(chosen),
        versions={name: version(name) for name in LIBRARIES},
    )


def _write(
    model: PreTrainedModel,
    start: Path,
    out: Path,
    log: Log,
    losses: Sequence[float],
    trained: Trained,
    *,
    replace: bool,
) -> None:
    validation = {step.step: step.validation_loss for step in log.steps if step.validation_loss is not None}
    with atomic_directory(out, replace=replace) as folder:
        models.save_weights(model, folder)
        for name in models.TOKENIZER_FILES:
            if (start / name).exists():
                shutil.copyfile(start / name, folder / name)
        (folder / "loss.jsonl").write_bytes(encode(log.steps))
        (folder / "loss.svg").write_bytes(plot(losses, "loss, nats per token", validation))
        (folder / "training.json").write_bytes(msgspec.json.format(msgspec.json.encode(trained)) + b"\n")
