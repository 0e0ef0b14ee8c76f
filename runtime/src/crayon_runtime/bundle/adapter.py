"""Writing an adapter, as a bundle or as an archive, from its tensors, one of them in memory at a time."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from crayon_runtime.backends.executorch_adapter import program_for, write_executorch_adapter
from crayon_runtime.backends.onnx_adapter import write_onnx_adapter
from crayon_runtime.bundle.archive import write_archive
from crayon_runtime.bundle.reader import Bundle
from crayon_runtime.bundle.writer import BundleWriter, HashedFile, hashed
from crayon_runtime.files import CHUNK, atomic_file
from crayon_runtime.manifest import (
    PRODUCER,
    SCHEMA_VERSION,
    AdapterDtype,
    AdapterManifest,
    AdapterPrototypes,
    AdapterTarget,
    AdapterVariants,
    BlendedFrom,
    ExecutorchAdapterVariant,
    File,
    OnnxAdapterVariant,
    ProgramSlots,
    SlotWeights,
    to_json,
)
from crayon_runtime.prototypes import FILE as PROTOTYPES

if TYPE_CHECKING:
    from crayon_runtime.backends.onnx_adapter import Tensor
    from crayon_runtime.prototypes import Prototypes

_ONNX, _DATA, _PROGRAM = "adapter.onnx_adapter", "adapter.ptd", "adapter.pte"
_A = ".lora_A.weight"


class Slots(NamedTuple):
    """What an adapter for ExecuTorch is made for."""

    slots: ProgramSlots
    program: bytes | None = None
    """That of the slots, to be written with the adapter's weights in their place, for runtimes other than this one. None: none is."""


def write_adapter(
    out: Path,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    base_fingerprint: str,
    dtype: AdapterDtype | None = "fp32",
    executorch: Slots | None = None,
    pool: BlendedFrom | None = None,
    prototypes: Prototypes | None = None,
    replace: bool = False,
) -> Bundle:
    """Write an adapter bundle that fits one base; it appears at `out` when it is whole.

    Args:
        tensors: for each target `MODULE.lora_A.weight` [in, r] and `MODULE.lora_B.weight` [r, out], with alpha/r in B.
        dtype: what ONNX Runtime's file stores them in; None: there is none. onnxruntime-genai takes fp32 alone.
        executorch: the slots of the base's program, for an adapter that ExecuTorch takes. None: it does not.
        pool: that it was blended from.
        prototypes: that travel with it; None: none do.

    Raises:
        OutputError: the target exists, or cannot be written.
        AdapterError: a tensor is not what its shape says, holds what the dtype cannot, has no slot, or there is more than an adapter file
            holds.
        InvalidInput: a prototype holds NaN, or what float16 cannot.
    """
    variants = AdapterVariants()
    with BundleWriter(out, replace=replace) as writer:
        if dtype is not None:
            with writer.open(_ONNX) as file:
                write_onnx_adapter(file, tensors, dtype)
            variants = msgspec.structs.replace(variants, onnx=OnnxAdapterVariant(_ONNX, dtype))
        if executorch is not None:
            with writer.place(_DATA) as data:
                weights = write_executorch_adapter(data, tensors, executorch.slots)
            if executorch.program is not None:
                writer.add_bytes(_PROGRAM, program_for(executorch.program, executorch.slots, weights))
            variants = msgspec.structs.replace(variants, executorch=_variant(executorch, weights))
        if prototypes is not None:
            writer.add_bytes(PROTOTYPES, prototypes.to_bytes(base_fingerprint, pool.version if pool else None))
        writer.finish(_manifest(tensors, name, base_fingerprint, variants, pool, prototypes))
    return Bundle.open(out)


def write_adapter_archive(
    archive: Path,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    base_fingerprint: str,
    dtype: AdapterDtype | None = "fp32",
    executorch: ProgramSlots | None = None,
    pool: BlendedFrom | None = None,
    prototypes: Prototypes | None = None,
    sign: Callable[[bytes], bytes] | None = None,
) -> None:
    """Write what packing that bundle would give, in place of an older file, without making the bundle.

    Args:
        executorch: the slots of the program that the receiver has.
        sign: makes a signature.json of a manifest; None: the bundle is not signed.

    Raises:
        OutputError, AdapterError, InvalidInput: see `write_adapter`.
    """
    variants = AdapterVariants()
    with ExitStack() as stack:
        out = stack.enter_context(atomic_file(archive))
        files = []
        if dtype is not None:
            scratch = stack.enter_context(tempfile.TemporaryFile(dir=archive.parent))
            content = HashedFile(scratch)
            write_onnx_adapter(content, tensors, dtype)
            variants = msgspec.structs.replace(variants, onnx=OnnxAdapterVariant(_ONNX, dtype))
            files.append((File(_ONNX, content.tell(), content.sha256), iter(lambda: scratch.read(CHUNK), b"")))
            scratch.seek(0)
        if executorch is not None:
            data = stack.enter_context(tempfile.TemporaryFile(dir=archive.parent))
            weights = write_executorch_adapter(data, tensors, executorch)
            variants = msgspec.structs.replace(variants, executorch=_variant(Slots(executorch), weights))
            files.append((hashed(data, _DATA), iter(lambda: data.read(CHUNK), b"")))
        if prototypes is not None:
            saved = prototypes.to_bytes(base_fingerprint, pool.version if pool else None)
            files.append((File(PROTOTYPES, len(saved), hashlib.sha256(saved).hexdigest()), iter([saved])))
        manifest = _manifest(tensors, name, base_fingerprint, variants, pool, prototypes)
        document = to_json(msgspec.structs.replace(manifest, files=[file for file, _ in files]))
        write_archive(out, document, sign(document) if sign else None, files)


def _variant(executorch: Slots, weights: list[str]) -> ExecutorchAdapterVariant:
    slots = executorch.slots
    return ExecutorchAdapterVariant(
        data=[_DATA],
        dtype=slots.dtype,
        program=_PROGRAM if executorch.program is not None else None,
        slots=SlotWeights(slots.rank, [target.name for target in slots.targets], weights),
    )


def _manifest(
    tensors: Mapping[str, Tensor],
    name: str,
    base_fingerprint: str,
    variants: AdapterVariants,
    pool: BlendedFrom | None,
    prototypes: Prototypes | None,
) -> AdapterManifest:
    ranks = {key.removesuffix(_A): shape[1] for key, (shape, _) in tensors.items() if key.endswith(_A)}
    return AdapterManifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        base_fingerprint=base_fingerprint,
        producer=PRODUCER,
        targets=[AdapterTarget(module, rank) for module, rank in ranks.items()],
        variants=variants,
        pool=pool,
        prototypes=AdapterPrototypes(PROTOTYPES, len(prototypes.states), prototypes.model) if prototypes else None,
        files=[],
    )
