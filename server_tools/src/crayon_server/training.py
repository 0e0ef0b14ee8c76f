"""One training loop, for pre-training and fine-tuning models, and for LoRAs.

A text is a prompt and a completion. The loss is the mean cross-entropy of their tokens, those of the prompt weighted by
`prompt_weight`: 0 for LoRAs, 0.2 for the embedded models (so that they also learn what is said), 1 where there is no prompt.
AdamW, linear warm-up, cosine decay.

Where it runs is accelerate's business: one CPU, one GPU, or the processes of `accelerate launch`. A batch is the same everywhere; it is
split into as many parts as there are processes and steps of gradient accumulation, and the loss of each part is divided by the token
weight of the whole batch. So the number of parts changes rounding, and nothing else.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

from crayon_runtime.errors import InvalidInput
from crayon_runtime.files import atomic_directory
from crayon_runtime.manifest import LINEARS
from crayon_server import models
from crayon_server.checkpoints import whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    import peft
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from crayon_server.checkpoints import Checkpoints

    OnStep = Callable[[int, float], None]
    """Called with the number of steps done and the loss of the last."""

    OnPart = Callable[[slice], None]
    """Called before the model sees a part of a batch, with the texts of the batch that are in it."""

    LossOf = Callable[[torch.nn.Module, "Batch"], torch.Tensor]
    """The loss of every token of a batch but the first, float32 [B, T - 1], as `token_losses`."""

Item = TypeVar("Item")
Precision = Literal["no", "bf16"]

FINAL_RATE = 0.05
"""What the learning rate of LoRAs and of the embedded models decays to, as a fraction of its peak."""

BUCKET = 1 << 26
"""Numbers that processes sum at once."""


class Text(Protocol):
    """What a model is trained on."""

    @property
    def prompt(self) -> str: ...

    @property
    def completion(self) -> str: ...


class Tokens(NamedTuple):
    """A tokenized text: bos, prompt, completion, eos; or several such exchanges in a row."""

    ids: list[int]
    in_completion: list[bool]
    """Whether the token is part of a completion (eos is)."""


class Batch(NamedTuple):
    """Padded texts, all tensors [B, T]."""

    ids: torch.Tensor
    """int64"""
    weights: torch.Tensor
    """float32: of the loss at each token; 0 for padding and for the first token."""


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        steps: optimizer steps.
        learning_rate: the peak, reached after `warmup` steps; it decays to `final_rate` of that.
        cosine_after_warmup: the cosine begins where warm-up ends, as is usual; else it is over all steps, and warm-up is a factor.
        prompt_weight: of a prompt token's loss, where a completion token's is 1.
        decay_vectors: whether weight decay is also for what has one dimension, such as the gains of norms.
        gradient_accumulation: parts that each process runs its share of a batch in: less memory, the same result.
        gradient_checkpointing: activations are computed again in the backward pass: less memory, more time.
        threads: of torch; None leaves its default.
    """

    steps: int
    learning_rate: float
    warmup: int = 20
    final_rate: float = FINAL_RATE
    cosine_after_warmup: bool = False
    prompt_weight: float = 0.0
    weight_decay: float = 0.0
    decay_vectors: bool = True
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    seed: int = 0
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    threads: int | None = None


def accelerator(precision: Precision | None = None) -> Accelerator:
    """Where this process trains: alone, or with the others that `accelerate launch` has started.

    Args:
        precision: of the arithmetic; None: what `accelerate launch` says, else float32.

    Raises:
        InvalidInput: accelerate is configured for another precision, or for one process where there are several.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # a process may train again, with another precision
    place = Accelerator(mixed_precision=precision)
    if place.mixed_precision not in ("no", "bf16"):
        raise InvalidInput(f"{place.mixed_precision} is not offered", where="accelerate", do="use bf16, or no")
    if place.num_processes != int(os.environ.get("WORLD_SIZE", place.num_processes)):
        raise InvalidInput(
            "several processes were started that know nothing of each other",
            where="WORLD_SIZE",
            do="set ACCELERATE_USE_CPU=true where there is no GPU",
        )
    return place


def put(model: torch.nn.Module, place: Accelerator, *, frozen: bool = True) -> torch.nn.Module:
    """A model where it runs: on the device of this process, or sharded over those of all, if accelerate is configured for FSDP.

    Raises:
        InvalidInput: accelerate is configured for FSDP version 1.
    """
    from accelerate.utils import DistributedType, fsdp2_prepare_model

    model.requires_grad_(not frozen)
    if place.distributed_type is not DistributedType.FSDP:
        return model.to(place.device)
    if not place.is_fsdp2:
        raise InvalidInput("FSDP version 1 is not offered", where="accelerate", do="set fsdp_version to 2")
    sharded: torch.nn.Module = fsdp2_prepare_model(place, model)
    return sharded.eval()


def tokenize(tokenizer: PreTrainedTokenizerBase, text: Text) -> Tokens:
    """Prompt and completion are tokenized as one text; a token that holds the end of one and the beginning of the other is one of
    the completion's. That is what a device does (`Engine.embed`), so both see the same tokens.
    """
    prompt: list[int] = tokenizer(text.prompt)["input_ids"]
    ids: list[int] = tokenizer(text.prompt + text.completion)["input_ids"]
    eos = tokenizer.eos_token_id
    # Some tokenizers end what they are given.
    prompt, ids = (row[:-1] if row[-1:] == [eos] else row for row in (prompt, ids))
    begin = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    return Tokens([*ids, eos], [i >= begin for i in range(len(ids) + 1)])


def join(exchanges: Iterable[Tokens]) -> Tokens:
    """Several exchanges as one text, as in a conversation."""
    parts = list(exchanges)
    return Tokens([i for part in parts for i in part.ids], [c for part in parts for c in part.in_completion])


def collate(texts: Sequence[Tokens], pad_id: int, prompt_weight: float) -> Batch:
    """Pad texts on the right to the longest of them."""
    import torch

    ids = torch.full((len(texts), max(len(text.ids) for text in texts)), pad_id, dtype=torch.int64)
    weights = torch.zeros(ids.shape)
    for row, text in enumerate(texts):
        n = len(text.ids)
        ids[row, :n] = torch.tensor(text.ids)
        weights[row, :n] = torch.where(torch.tensor(text.in_completion), 1.0, prompt_weight)
    weights[:, 0] = 0
    return Batch(ids, weights)


def token_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of every token but the first, given those before it: float32 [B, T - 1], in nats."""
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    targets = batch.ids[:, 1:]
    return cross_entropy(logits, targets)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of logits [B, T, V] and int64 [B, T]: float32 [B, T], in nats."""
    import torch.nn.functional as F  # noqa: N812 - everyone's name for it

    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


def mean_loss(
    model: torch.nn.Module,
    texts: Sequence[Tokens],
    *,
    batch_size: int,
    pad_id: int,
    prompt_weight: float,
    place: Accelerator,
) -> float:
    """Cross-entropy of texts that are not trained on, in nats per weighted token; every process computes all of it."""
    import torch

    was_training = model.training
    model.eval()
    loss = weight = 0.0
    with torch.no_grad():
        for begin in range(0, len(texts), batch_size):
            batch = collate(texts[begin : begin + batch_size], pad_id, prompt_weight)
            batch = Batch(*(tensor.to(place.device) for tensor in batch))
            with place.autocast():
                loss += (token_losses(model, batch) * batch.weights[:, 1:]).sum().item()
            weight += batch.weights[:, 1:].sum().item()
    model.train(was_training)
    return loss / weight


def epochs(texts: Sequence[Item], batch_size: int, seed: int) -> Iterator[list[Item]]:
    """Batches without end, every text once before any comes again."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        while len(order) < batch_size:
            order += torch.randperm(len(texts), generator=generator).tolist()
        yield [texts[i] for i in order[:batch_size]]
        del order[:batch_size]


def train(
    model: torch.nn.Module,
    batches: Iterator[Sequence[Tokens]],
    options: Options,
    *,
    pad_id: int,
    on_step: OnStep | None = None,
    on_part: OnPart | None = None,
    parameters: Sequence[torch.nn.Parameter] | None = None,
    place: Accelerator | None = None,
    checkpoints: Checkpoints | None = None,
    loss_of: LossOf | None = None,
) -> list[float]:
    """Train in place.

    Args:
        batches: at least `options.steps` of them, the same in every process.
        on_step: called after every step; at once for those that a checkpoint has.
        on_part: see `OnPart`.
        parameters: what to train, whole in every process or sharded by `put`; None: what of the model requires gradients.
        place: where; None: `accelerator()`. What is trained on a GPU goes back to where it was.
        checkpoints: where to go on from, and to save to; None: from the beginning.
        loss_of: what is minimized; None: `token_losses`.

    Returns:
        The loss of each step, in nats per weighted token.

    Raises:
        InvalidInput: a batch has fewer texts than parts, or the loss or its gradient is no longer finite: then nothing is saved.
    """
    import torch

    place = place or accelerator()
    parameters = parameters or [p for p in model.parameters() if p.requires_grad]
    losses: list[float] = []
    with threads(options.threads), _on_device(model, parameters, place.device), _training(model, options):
        optimizer = torch.optim.AdamW(_decay_groups(parameters, options), lr=options.learning_rate, betas=options.betas)
        if checkpoints:
            losses = checkpoints.load(parameters, optimizer, place)
        for step, loss in enumerate(losses, 1):
            next(
                batches
            )  # drawn again and not used: that is the position in the data, and that of its random generators
            if on_step:
                on_step(step, loss)
        for step in range(len(losses), options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * rate(step, options)
            optimizer.zero_grad()
            batch = collate(next(batches), pad_id, options.prompt_weight)
            shares = _backward(model, batch, options, place, on_part, loss_of or token_losses, parameters)
            loss = _reduce(shares, parameters, place)
            norm = whole(torch.nn.utils.clip_grad_norm_(parameters, options.clip)).item()
            if not math.isfinite(loss + norm):
                what = "gradient" if math.isfinite(loss) else "loss"
                raise InvalidInput(
                    f"the {what} of step {step + 1} is not finite",
                    where=checkpoints.folder if checkpoints else None,
                    do="train at a lower learning rate" + ("; the last checkpoint is kept" if checkpoints else ""),
                )
            optimizer.step()
            losses.append(loss)
            if checkpoints and checkpoints.due(step + 1, options.steps):
                checkpoints.save(parameters, optimizer, losses, place)
            if on_step:
                on_step(step + 1, loss)
    return losses


def _decay_groups(parameters: Sequence[torch.nn.Parameter], options: Options) -> list[dict[str, Any]]:
    """Parameters by their weight decay, for AdamW."""
    groups = [
        {"params": [p for p in parameters if (p.ndim < 2) == vectors], "weight_decay": decay}
        for vectors, decay in ((False, options.weight_decay), (True, options.weight_decay * options.decay_vectors))
    ]
    return [group for group in groups if group["params"]]


def _backward(
    model: torch.nn.Module,
    batch: Batch,
    options: Options,
    place: Accelerator,
    on_part: OnPart | None,
    loss_of: LossOf,
    parameters: Sequence[torch.nn.Parameter],
) -> torch.Tensor:
    """Add the gradients of this process's share of a batch; the share's part of the loss is returned."""
    import torch

    sharing = place.num_processes if _sharded(parameters) else 1  # FSDP's gradients are means over processes
    count = place.num_processes * options.gradient_accumulation
    if len(batch.ids) < count:
        raise InvalidInput(f"a batch of {len(batch.ids)} texts cannot be split into {count} parts", where="batch size")
    total = batch.weights[:, 1:].sum().to(place.device)
    bounds = [i * len(batch.ids) // count for i in range(count + 1)]
    losses = []
    for i in range(options.gradient_accumulation):
        first = place.process_index * options.gradient_accumulation + i
        part = slice(bounds[first], bounds[first + 1])
        if on_part:
            on_part(part)
        mine = _part(batch, part, place.device)
        with place.autocast():
            loss = (loss_of(model, mine) * mine.weights[:, 1:]).sum() / total
        place.backward(loss * sharing)
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def _part(whole: Batch, rows: slice, device: torch.device) -> Batch:
    """Rows of a batch, without the columns that none of them uses."""
    ids, weights = whole.ids[rows], whole.weights[rows]
    used = max([1, *weights.any(0).nonzero().flatten().tolist()]) + 1
    return Batch(ids[:, :used].to(device), weights[:, :used].to(device))


def _reduce(loss: torch.Tensor, parameters: Sequence[torch.nn.Parameter], place: Accelerator) -> float:
    """Sum loss and gradients over all processes.

    Not by a wrapper of accelerate's: LoRAs are whole in every process, even where the base is sharded. What is sharded itself has its
    sums already.
    """
    import torch

    if place.num_processes == 1:
        return loss.item()
    if not _sharded(parameters):
        for bucket in _buckets(parameters):
            shares = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = place.reduce(torch.cat([share.flatten() for share in shares]), "sum")
            for parameter, summed in zip(bucket, flat.split([share.numel() for share in shares]), strict=True):
                parameter.grad = summed.view_as(parameter).clone()
    total: float = place.reduce(loss.reshape(1).float(), "sum").item()
    return total


def _sharded(parameters: Sequence[torch.nn.Parameter]) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameters[0], DTensor)


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters in order, together where they have no more than `BUCKET` numbers."""
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    yield bucket


@contextlib.contextmanager
def _on_device(
    model: torch.nn.Module, parameters: Sequence[torch.nn.Parameter], device: torch.device
) -> Iterator[None]:
    home = parameters[0].device
    if home == device:
        yield
        return
    try:
        _move(model, parameters, device)
        yield
    finally:
        _move(model, parameters, home)


def _move(model: torch.nn.Module, parameters: Sequence[torch.nn.Parameter], device: torch.device) -> None:
    model.to(device)
    for parameter in parameters:
        parameter.data, parameter.grad = parameter.data.to(device), None


@contextlib.contextmanager
def _training(model: torch.nn.Module, options: Options) -> Iterator[None]:
    """The model in training mode."""
    model.train()
    if options.gradient_checkpointing:
        # the other form gives no gradients where the embedding is frozen
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    try:
        yield
    finally:
        if options.gradient_checkpointing:
            model.gradient_checkpointing_disable()  # type: ignore[operator]
        model.eval()


def rate(step: int, options: Options) -> float:
    """The learning rate of a step, as a fraction of its peak."""
    warmup = min(1.0, (step + 1) / max(1, options.warmup))
    done = step / options.steps
    if options.cosine_after_warmup:
        done = max(0, step + 1 - options.warmup) / max(1, options.steps - options.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return warmup * (options.final_rate + (1 - options.final_rate) * cosine)


def train_lora(
    model_dir: Path,
    texts: Sequence[Text],
    out: Path,
    *,
    rank: int = 4,
    alpha: int = 8,
    steps: int = 200,
    batch_size: int = 32,
    learning_rate: float = 8e-3,
    seed: int = 0,
    threads: int | None = None,
    on_step: OnStep | None = None,
    replace: bool = False,
) -> list[float]:
    """Fine-tune a LoRA on all seven linears of every block, and write it as a PEFT directory.

    The loss is that of the completions alone. The safetensors metadata has the `base_fingerprint` that binds the adapter to its base.

    Args:
        model_dir: the base, a Hugging Face folder; it stays as it is.
        out: the new PEFT directory; its name is the adapter's name.
        rank, alpha: the adapter adds (alpha / rank) B A to a weight.

    Returns:
        The loss of each step.

    Raises:
        OutputError: `out` exists and is not to be replaced, or cannot be written.
        InvalidInput: there are no texts.
    """
    import peft
    import torch

    if not texts:
        raise InvalidInput("there are no texts to train on", where=out)
    with atomic_directory(out, replace=replace) as folder:
        tokenizer = models.load_tokenizer(model_dir)
        base = models.load(model_dir, torch.float32)
        torch.manual_seed(seed)
        configuration = peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(LINEARS), lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(base, configuration)
        tokens = [tokenize(tokenizer, text) for text in texts]
        options = Options(steps, learning_rate, seed=seed, threads=threads)
        losses = train(model, epochs(tokens, batch_size, seed), options, pad_id=pad_id(tokenizer), on_step=on_step)
        _write_peft(model, model_dir, folder)
    return losses


def _write_peft(model: peft.PeftModel, model_dir: Path, folder: Path) -> None:
    """A PEFT directory that names its base by fingerprint, and no path of this machine."""
    from safetensors.torch import load_file, save_file

    from crayon_runtime.manifest import BASE_FINGERPRINT

    model.peft_config["default"].base_model_name_or_path = model_dir.name
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a model card with blanks to fill in
    weights = folder / "adapter_model.safetensors"
    metadata = {BASE_FINGERPRINT: base_fingerprint(model_dir)}  # one key: the order of several is random in the file
    save_file(load_file(weights), weights, metadata=metadata)
    weights.chmod(0o644)  # safetensors writes it for its owner alone


def base_fingerprint(model_dir: Path) -> str:
    """The fingerprint that binds adapters to the model in a folder; see `crayon_export.checkpoint`."""
    from crayon_export import architecture, checkpoint

    opened = checkpoint.Checkpoint.open(model_dir)
    return checkpoint.fingerprint(opened, architecture.read(opened.config, where=model_dir))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with. Padding comes last and has weight 0, so that any will do."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """That many threads for torch; None: as many as it has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
