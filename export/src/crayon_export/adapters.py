"""From a PEFT LoRA to an adapter bundle."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from crayon_export import hub, lora
from crayon_export.checkpoint import Checkpoint, Fingerprint
from crayon_export.executorch.programs import ProgramFiles, ProgramSpec, check_installed, make_programs
from crayon_export.executorch.storage import ProgramStorage
from crayon_export.lora import PeftAdapter
from crayon_export.onnx.adapter import onnx_tensors
from crayon_export.reference import forward
from crayon_export.streaming import WrittenWeights
from crayon_runtime.backends.onnx_adapter import write_onnx_adapter
from crayon_runtime.bundle import Bundle, BundleWriter
from crayon_runtime.errors import AdapterError
from crayon_runtime.manifest import (
    PRODUCER,
    SCHEMA_VERSION,
    AdapterDtype,
    AdapterManifest,
    AdapterTarget,
    AdapterVariants,
    ExecutorchAdapterVariant,
    ExecutorchVariant,
    OnnxAdapterVariant,
    OnnxVariant,
)


def convert_adapter(
    adapter: str | Path,
    bundle: str | Path | Bundle,
    out: str | Path,
    *,
    model: str | Path | None = None,
    replace: bool = False,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Convert a PEFT folder into an adapter bundle, bound to the base that `bundle` was exported from.

    Args:
        model: what the bundle was exported from, a folder or a Hub id: a program for ExecuTorch is made of the base's weights too.
            None: it becomes an adapter for ONNX Runtime alone.
        on_stage: told what comes next; making a program takes minutes.

    Raises:
        AdapterError: its shapes or targets do not fit that base, it says that it belongs to another one, the bundle has no adapter
            slots, or serves ExecuTorch alone and `model` is missing or another.
        UnsupportedModel: it is no plain LoRA; what it is instead is named.
        MissingExtra: `model` is given, and ExecuTorch's exporter is not installed.
    """
    base = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    manifest = base.model
    if manifest.adapter_slots is None:
        raise AdapterError("the bundle has no adapter slots", where=base.path, do="export it again with adapter slots")
    opened = PeftAdapter.open(Path(adapter))
    lora.check(opened, manifest.architecture)
    check_base(opened, manifest.base_fingerprint)
    onnx = isinstance(manifest.variants.onnx, OnnxVariant)
    if not isinstance(manifest.variants.executorch, ExecutorchVariant):
        model = None
    elif model is None and not onnx:
        raise AdapterError(
            "an adapter for ExecuTorch is made together with the base's weights, and the bundle serves ExecuTorch alone",
            where=base.path,
            do="add --model MODEL: what the bundle was exported from",
        )
    with tempfile.TemporaryDirectory() as scratch:
        program = None if model is None else _program(opened, base, model, Path(scratch), on_stage)
        return write_adapter(
            opened,
            manifest.base_fingerprint,
            Path(out),
            onnx=onnx,
            program=program,
            program_dtype="fp32" if manifest.quantization.weights == "none" else "int8",
            replace=replace,
        )


def _program(
    adapter: PeftAdapter, base: Bundle, model: str | Path, scratch: Path, on_stage: Callable[[str], None]
) -> ProgramFiles:
    """The program of an adapter, from the checkpoint of its base."""
    check_installed()
    manifest = base.model
    checkpoint = Checkpoint.open(hub.fetch(str(model)))
    checkpoint.check(manifest.architecture)
    fingerprint = Fingerprint()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        storage = ProgramStorage(scratch, group_size=manifest.quantization.group_size or None, pool=pool)
        weights = WrittenWeights(
            checkpoint, manifest.architecture, fingerprint, [storage], adapters=[], merged=None, on_bytes=lambda _: None
        )
        # One token: the weights are read in the order of computation, and end up in the storage.
        token = np.zeros(1, np.int64)
        forward(manifest.architecture, weights, [token], positions=token, tap_layer=manifest.tap.layer)
        if fingerprint.hexdigest() != manifest.base_fingerprint:
            raise AdapterError(
                f"the bundle was not exported from this model (its base is {manifest.base_fingerprint[:12]}…)",
                where=checkpoint.path,
                do="give the model that the bundle was exported from",
            )
        spec = ProgramSpec(
            adapter.name,
            manifest.architecture,
            manifest.tokenizer,
            manifest.context_length,
            manifest.kv_dtype,
            manifest.tap.layer,
        )
        return make_programs(storage, [adapter], spec, scratch, on_stage)[1]


def write_adapter(
    adapter: PeftAdapter,
    base_fingerprint: str,
    out: Path,
    *,
    onnx: bool = True,
    program: ProgramFiles | None = None,
    program_dtype: AdapterDtype = "fp32",
    replace: bool = False,
) -> Bundle:
    """Write a PEFT LoRA as an adapter bundle that fits one base.

    Args:
        onnx: write the file that the ONNX graph takes.
        program: the adapter's program for ExecuTorch.
        program_dtype: of A and B in there.

    Raises:
        AdapterError: the adapter says that it belongs to another base.
    """
    check_base(adapter, base_fingerprint)
    variants = AdapterVariants()
    with BundleWriter(out, replace=replace) as writer:
        if onnx:
            with writer.open("adapter.onnx_adapter") as file:
                write_onnx_adapter(file, onnx_tensors(adapter))
            variants = msgspec.structs.replace(variants, onnx=OnnxAdapterVariant("adapter.onnx_adapter"))
        if program is not None:
            writer.add_file("adapter.pte", program.program)
            writer.add_file("adapter.ptd", program.data)
            variants = msgspec.structs.replace(
                variants, executorch=ExecutorchAdapterVariant("adapter.pte", ["adapter.ptd"], program_dtype)
            )
        writer.finish(
            AdapterManifest(
                schema_version=SCHEMA_VERSION,
                name=adapter.name,
                base_fingerprint=base_fingerprint,
                producer=PRODUCER,
                targets=[AdapterTarget(module, lora.rank) for module, lora in adapter.targets.items()],
                variants=variants,
                files=[],
            )
        )
    return Bundle.open(out)


def check_base(adapter: PeftAdapter, base_fingerprint: str) -> None:
    if adapter.base_fingerprint not in (None, base_fingerprint):
        raise AdapterError(
            f"adapter {adapter.name!r} was trained on another base ({str(adapter.base_fingerprint)[:12]}…; "
            f"this one is {base_fingerprint[:12]}…)",
            where=adapter.path,
            do="export the base that it was trained on",
        )
