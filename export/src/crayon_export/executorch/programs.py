"""From stored weights to program files, without importing torch before that is needed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from crayon_export.executorch.quiet import quiet
from crayon_export.executorch.storage import ProgramStorage
from crayon_export.lora import PeftAdapter
from crayon_runtime.affine import Affine
from crayon_runtime.bundle import BundleWriter
from crayon_runtime.errors import BackendError, MissingExtra
from crayon_runtime.manifest import Architecture, ExecutorchVariant, ProgramDtype, Tokenizer


class ProgramSpec(NamedTuple):
    """What a program depends on beside its weights."""

    name: str
    """For messages."""
    architecture: Architecture
    tokenizer: Tokenizer
    context_length: int
    kv_dtype: str
    """"fp32" or "int8"."""
    tap_layer: int
    """Index into transformers' `hidden_states`."""
    single_file: bool
    """Whether the base's program holds its weights."""


class ProgramFiles(NamedTuple):
    program: Path
    data: Path | None
    """None: the weights are in the program."""


def check_installed() -> None:
    """Raises: MissingExtra: ExecuTorch's exporter is not installed."""
    if importlib.util.find_spec("executorch") is None or importlib.util.find_spec("torch") is None:
        raise MissingExtra("pte", "exporting for ExecuTorch")


def make_programs(
    storage: ProgramStorage,
    adapters: Sequence[PeftAdapter],
    spec: ProgramSpec,
    folder: Path,
    on_stage: Callable[[str], None] = lambda _: None,
) -> list[ProgramFiles]:
    """Make the programs of a model and of its adapters.

    Args:
        storage: filled with the weights.
        folder: for the files.
        on_stage: told what comes next.

    Returns:
        The base's files, then those of each adapter.

    Raises:
        BackendError: ExecuTorch's exporter fails.
    """
    try:
        return _make(storage, adapters, spec, folder, on_stage)
    except (OSError, MemoryError):
        raise
    except Exception as e:  # of torch, torchao and executorch, which have no common one
        raise BackendError(
            f"ExecuTorch's exporter failed: {type(e).__name__}: {str(e)[:500]}",
            where=spec.name,
            do="see docs/troubleshooting.md; --backend onnx does without it",
        ) from e


def _make(
    storage: ProgramStorage,
    adapters: Sequence[PeftAdapter],
    spec: ProgramSpec,
    folder: Path,
    on_stage: Callable[[str], None],
) -> list[ProgramFiles]:
    on_stage("loading ExecuTorch's exporter")
    with quiet():
        from crayon_export.executorch import official

    names = [official.BASE, *(f"adapter-{i}" for i in range(len(adapters)))]
    traced = {}
    for name, adapter in zip(names, [None, *adapters], strict=True):
        on_stage(f"tracing {adapter.name if adapter else spec.name}")
        targets = adapter.targets if adapter else ()
        with quiet():
            model = official.build(
                spec.architecture,
                storage.tensors,
                context_length=spec.context_length,
                kv_dtype=spec.kv_dtype,
                tap_layer=spec.tap_layer,
                adapter={module: storage.stored_adapter(adapter, module) for module in targets if adapter},
            )
            traced[name] = official.trace(model, name, context_length=spec.context_length)
    constants = official.constants(spec.architecture, spec.tokenizer.bos, spec.tokenizer.eos)
    on_stage(f"lowering, about {10 * spec.architecture.passes * len(names)} seconds of one core")
    with quiet():
        lowered = official.lower(traced, constants, context_length=spec.context_length)
    on_stage("writing programs")
    files = [ProgramFiles(folder / f"{name}.pte", folder / f"{name}.ptd") for name in names]
    if spec.single_file:
        files = [ProgramFiles(files[0].program, None)]
    with quiet():
        for name, (program, data) in zip(names, files, strict=True):
            if data is None:
                lowered.write_single(program)
            else:
                lowered.write(name, program, data)
    return files


class Official:
    """A model whose programs ExecuTorch's exporter makes of the weights themselves.

    Args:
        adapters: each becomes a program that computes the base and this adapter.
        scratch: for the weights, and for the programs before they are copied.
        weights, pool: see `ProgramStorage`.
        on_stage: told what comes next.
    """

    def __init__(
        self,
        spec: ProgramSpec,
        adapters: Sequence[PeftAdapter],
        scratch: Path,
        *,
        weights: Affine | None,
        pool: ThreadPoolExecutor,
        on_stage: Callable[[str], None],
    ) -> None:
        tied = spec.architecture.tied_embeddings
        self.storage = ProgramStorage(scratch, weights=weights, tied=tied, pool=pool)
        self.dtype: ProgramDtype = "int8" if weights else "fp32"
        self._spec, self._adapters, self._scratch, self._on_stage = spec, adapters, scratch, on_stage
        self._made: list[ProgramFiles] = []

    def finish(self, architecture: Architecture) -> None:
        """After all weights."""
        assert architecture == self._spec.architecture
        self._made = make_programs(self.storage, self._adapters, self._spec, self._scratch, self._on_stage)

    def add_to(self, writer: BundleWriter) -> ExecutorchVariant:
        """Add the base's program to a bundle."""
        program, data = self._made[0]
        writer.add_file("model.pte", program)
        if data is None:
            return ExecutorchVariant("model.pte", [])
        writer.add_file("model.ptd", data)
        return ExecutorchVariant("model.pte", ["model.ptd"])

    def files(self, adapter: PeftAdapter) -> ProgramFiles:
        return self._made[1 + self._adapters.index(adapter)]
