"""What an export will do, decided and checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from crayon_export import architecture, hub, lora
from crayon_export.calibration import DEFAULT_TOKENS, GIVE, Calibration
from crayon_export.checkpoint import Checkpoint
from crayon_export.executorch.storage import GROUP_SIZES, weights_form
from crayon_export.executorch.template import AdapterSpec
from crayon_export.golden import TEXTS
from crayon_export.quantize import Blockwise
from crayon_export.rounding import ROUNDINGS
from crayon_runtime.errors import AdapterError, InvalidInput, UnsupportedModel
from crayon_runtime.manifest import LINEARS, MOST_RANK, Architecture, Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """Everything `export` has decided. `describe` is what `--dry-run` prints."""

    name: str
    backends: list[str]
    checkpoint: Checkpoint
    architecture: Architecture
    tokenizer: Path
    blockwise: Blockwise | None
    """The format of the linear layers; None: float32."""
    rounding: str
    """One of `rounding.ROUNDINGS`."""
    calibration: Calibration | None
    """For GPTQ."""
    context_length: int
    kv_dtype: str
    adapters: list[lora.PeftAdapter]
    merged: lora.PeftAdapter | None
    slots: list[str]
    official: bool
    """Whether ExecuTorch's program is made by its own exporter from the weights, not from a template."""
    single_file: bool
    """Whether ExecuTorch's program holds its weights."""
    program_slots: AdapterSpec | None
    """Of ExecuTorch's program; None: it takes no adapters, or brings those that it is exported with."""
    tap_layer: int
    golden_texts: Sequence[tuple[str, str]]

    @property
    def quantization(self) -> Quantization:
        """The same, with that of the embedding, in the terms of a manifest."""
        if self.blockwise is None:
            return Quantization("none", 0, "fp32")
        if "onnx" in self.backends:
            a = self.architecture
            shared = a.tied_embeddings and self.blockwise.shared(a.hidden_size)
            return Quantization(self.blockwise.name, self.blockwise.group_size, "int8" if shared else "fp16")
        form = weights_form(self.blockwise)
        return Quantization(self.blockwise.name, form.group_size if form else 0, "int8")

    @property
    def weight_bytes(self) -> int:
        """Bytes of float32 weight that the export handles: what its progress is measured in."""
        a = self.architecture
        head = a.vocab_size * a.hidden_size if a.tied_embeddings else 0  # the embedding, once more
        return 4 * (architecture.parameters(a) + head)

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "source": str(self.checkpoint.path),
            "backends": self.backends,
            "architecture": msgspec.to_builtins(self.architecture),
            "quantization": msgspec.to_builtins(self.quantization),
            "rounding": self.rounding,
            "calibration": str(self.calibration.file) if self.calibration else None,
            "context_length": self.context_length,
            "kv_dtype": self.kv_dtype,
            "tokenizer": str(self.tokenizer),
            "adapters": [a.name for a in self.adapters],
            "merged": self.merged.name if self.merged else None,
            "adapter_slots": self.slots,
            "official": self.official,
            "single_file": self.single_file,
            "program_slots": msgspec.to_builtins(self.program_slots),
            "tap_layer": self.tap_layer,
        }


def plan(
    model: str | Path,
    *,
    backend: str | Sequence[str] = "onnx",
    official: bool = False,
    quantize: str = "int4",
    group_size: int | None = None,
    rounding: str = "nearest",
    calibration: str | Path | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    context_length: int | None = None,
    kv_dtype: str = "fp32",
    adapters: Sequence[str | Path] = (),
    merge: bool = False,
    adapter_slots: bool = True,
    slot_rank: int | None = None,
    slot_targets: Sequence[str] = (),
    single_file: bool = False,
    tap_layer: int | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    golden_texts: Sequence[tuple[str, str]] = TEXTS,
) -> ExportPlan:
    """Read what an export needs to know, without touching a weight.

    Args:
        model: a folder with config.json and weights, or a Hub id.
        backend: "onnx", "executorch" or both: whom the bundle shall serve.
        official: have ExecuTorch's own exporter make its program from the weights: a check of the template, which is filled otherwise.
        quantize: "int4", "int8" or "none" (float32).
        group_size: input columns that share a scale; None: 32. ExecuTorch's int8 has one scale a row.
        rounding: "nearest", "mse" (scales that may clip) or "gptq" (errors are made good by later columns).
        calibration: a file of texts for "gptq"; see `calibration.Calibration`.
        calibration_tokens: how many of their tokens are used.
        context_length: tokens that the KV cache holds; None: what the model was trained on, at most 2048.
        kv_dtype: "fp32"; "fp16" with onnx alone, "int8" with executorch alone.
        adapters: PEFT folders. They travel inside the bundle, or with `merge` (one only) are added into the weights.
        adapter_slots: whether adapters can be attached at all; a graph without slots is 2-3 % faster.
        slot_rank: of the slots in ExecuTorch's program, the largest rank of an adapter; None: that of `adapters`, or 16.
        slot_targets: which linear layers have one, of `LINEARS`; none: all.
        single_file: put the weights into ExecuTorch's program, which then takes no adapters.
        tap_layer: index into transformers' `hidden_states`, which counts a block that is repeated once; None: after the last norm.
        tokenizer: a folder or file to use instead of the model's own.
        golden_texts: (prompt, continuation) pairs to record.

    Raises:
        CheckpointError, UnsupportedModel, AdapterError, InvalidInput: with the reason.
    """
    backends = _backends(backend)
    about = {
        "--official": official,
        "--single-file": single_file,
        "--slot-rank": slot_rank,
        "--slot-target": slot_targets,
    }
    for option in (option for option, given in about.items() if given and "executorch" not in backends):
        raise InvalidInput(f"{option} is about ExecuTorch's program", do="add --backend executorch, or leave it out")
    with_slots = "executorch" in backends and not (merge or official or single_file) and adapter_slots
    if (slot_rank is not None or slot_targets) and not with_slots:
        raise InvalidInput(
            "a rank or targets for slots in a program that has none", do="leave out --slot-rank and --slot-target"
        )
    blockwise = Blockwise.named(quantize, group_size)
    if group_size is not None and quantize == "int8" and backends == ["executorch"]:
        raise InvalidInput("int8 weights have one scale a row with the executorch backend", do="leave out --group-size")
    for name in backends:
        _check_formats(name, blockwise, kv_dtype)
    _check_rounding(rounding, blockwise, calibration)

    folder = hub.fetch(str(model), revision=revision, token=token)
    checkpoint = Checkpoint.open(folder)
    a = architecture.read(checkpoint.config, where=folder / "config.json", context_length=context_length)
    checkpoint.check(a)
    context_length = context(a, context_length)
    if tap_layer is not None and not 0 <= tap_layer <= a.layers:
        raise InvalidInput(f"tap layer {tap_layer} is not one of 0 to {a.layers}")

    opened = [lora.PeftAdapter.open(Path(p)) for p in adapters]
    for adapter in opened:
        lora.check(adapter, a)
    _distinct([adapter.name for adapter in opened])
    if merge and len(opened) != 1:
        raise InvalidInput(f"--merge takes exactly one adapter, not {len(opened)}")
    if opened and not merge and not adapter_slots:
        raise InvalidInput("adapters beside a graph without adapter slots", do="use --merge, or keep the slots")
    if single_file and opened and not merge:
        raise InvalidInput("a program in a single file takes no adapters", do="add --merge, or leave out --single-file")
    return ExportPlan(
        name=_bundle_name(folder),
        backends=backends,
        checkpoint=checkpoint,
        architecture=a,
        tokenizer=Path(tokenizer) if tokenizer else folder,
        blockwise=blockwise,
        rounding=rounding,
        calibration=Calibration.read(Path(calibration), calibration_tokens) if calibration else None,
        context_length=context_length,
        kv_dtype=kv_dtype,
        adapters=[] if merge else opened,
        merged=opened[0] if merge else None,
        slots=[] if merge or not adapter_slots or (single_file and "onnx" not in backends) else list(LINEARS),
        official=official,
        single_file=single_file,
        program_slots=_program_slots(opened, slot_rank, slot_targets) if with_slots else None,
        tap_layer=a.layers if tap_layer is None else tap_layer,
        golden_texts=golden_texts,
    )


BACKENDS = ("onnx", "executorch")
_KV_DTYPES = {"onnx": ("fp32", "fp16"), "executorch": ("fp32", "int8")}


def _backends(wanted: str | Sequence[str]) -> list[str]:
    """The backends that are asked for, each once, in the order of `BACKENDS`."""
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    do = f"use --backend {' or '.join(BACKENDS)}"
    for name in names:
        if name not in BACKENDS:
            raise InvalidInput(f"there is no exporter for {name!r}", do=do)
    if not names:
        raise InvalidInput("a bundle serves at least one backend", do=do)
    return [name for name in BACKENDS if name in names]


def _check_formats(backend: str, blockwise: Blockwise | None, kv_dtype: str) -> None:
    """Refuse what a backend has no kernel for."""
    kv_dtypes = _KV_DTYPES[backend]
    if kv_dtype not in kv_dtypes:
        raise InvalidInput(
            f"a {kv_dtype} KV cache is not available with the {backend} backend", do=f"use {' or '.join(kv_dtypes)}"
        )
    if backend != "executorch" or blockwise is None or blockwise.bits != 4:
        return
    if blockwise.group_size not in GROUP_SIZES:
        raise InvalidInput(
            f"the group size {blockwise.group_size} is not available with the executorch backend",
            do=f"use {', '.join(map(str, sorted(GROUP_SIZES)))}",
        )


def _check_rounding(rounding: str, blockwise: Blockwise | None, calibration: str | Path | None) -> None:
    if rounding not in ROUNDINGS:
        raise InvalidInput(f"the rounding is {rounding!r}", do=f"use {', '.join(ROUNDINGS[:-1])} or {ROUNDINGS[-1]}")
    if rounding != "nearest" and blockwise is None:
        raise InvalidInput(
            f"--rounding {rounding} with float32 weights", do="quantize to int4 or int8, or leave it out"
        )
    if rounding == "gptq" and calibration is None:
        raise InvalidInput("GPTQ needs texts that tell what goes into the layers", do=GIVE)
    if rounding != "gptq" and calibration is not None:
        raise InvalidInput(f"--rounding {rounding} uses no calibration texts", do="add --rounding gptq")


_DEFAULT_CONTEXT = 2048
_DEFAULT_RANK = 16


def _program_slots(adapters: Sequence[lora.PeftAdapter], rank: int | None, targets: Sequence[str]) -> AdapterSpec:
    """The slots of ExecuTorch's program, which hold all of the adapters."""
    largest = max((x.rank for adapter in adapters for x in adapter.targets.values()), default=_DEFAULT_RANK)
    rank = largest if rank is None else rank
    if not 1 <= rank <= MOST_RANK:
        raise InvalidInput(f"the rank of the slots is {rank}; it must be from 1 to {MOST_RANK}")
    unknown = [target for target in targets if target not in LINEARS]
    if unknown:
        raise InvalidInput(f"there is no linear layer {unknown[0]!r}", do=f"use some of {', '.join(LINEARS)}")
    wanted = sorted(set(targets or LINEARS))
    for adapter in adapters:
        for module, x in adapter.targets.items():
            if x.rank > rank:
                raise AdapterError(
                    f"adapter {adapter.name!r} has rank {x.rank} in {module}; the slots have {rank}",
                    where=adapter.path,
                    do=f"use --slot-rank {largest}, or leave it out",
                )
            if module.rpartition(".")[2] not in wanted:
                raise AdapterError(
                    f"adapter {adapter.name!r} changes {module}; the slots are in {', '.join(wanted)}",
                    where=adapter.path,
                    do="name all that adapters change with --slot-target, or leave it out",
                )
    return AdapterSpec(rank, wanted)


def context(a: Architecture, wanted: int | None) -> int:
    """The context length of an export; None: what the model was trained on, at most 2048."""
    if wanted is None:
        return min(a.trained_context_length, _DEFAULT_CONTEXT)
    if wanted < 1:
        raise InvalidInput(f"the context length is {wanted}")
    if wanted > a.trained_context_length:
        raise UnsupportedModel(
            f"a context of {wanted} tokens is more than the {a.trained_context_length} that the model was trained on",
            do=f"use --context-length {a.trained_context_length} or less",
        )
    return wanted


def _distinct(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise AdapterError(f"two adapters are called {name!r}", do="rename one of their folders")


def _bundle_name(folder: Path) -> str:
    """The folder's name, in the characters that a manifest allows."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in folder.resolve().name)
    return name.lstrip("._-")[:128] or "model"
