"""From a checkpoint to a bundle, in one pass over the weights."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from crayon_export import tokenizer as source_tokenizer
from crayon_export.adapters import check_base, write_adapter, write_official
from crayon_export.checkpoint import Fingerprint
from crayon_export.executorch.filled import Filling
from crayon_export.executorch.programs import Official, ProgramSpec, check_installed
from crayon_export.executorch.storage import weights_form
from crayon_export.executorch.templates import spec_of, template_for
from crayon_export.golden import Recorded, Recording, golden_files, tolerance
from crayon_export.onnx.genai import genai_config
from crayon_export.onnx.graph import LlamaGraph
from crayon_export.onnx.storage import OnnxStorage
from crayon_export.onnx.tensors import ExternalData
from crayon_export.plan import ExportPlan, plan
from crayon_export.reference import Outputs, forward
from crayon_export.report import Report
from crayon_export.rounding import Clipping, nearest
from crayon_export.storage import Storage
from crayon_export.streaming import WrittenWeights
from crayon_runtime.bundle import Bundle, BundleWriter
from crayon_runtime.manifest import (
    LINEARS,
    PRODUCER,
    SCHEMA_VERSION,
    AdapterSlots,
    Golden,
    Merged,
    ModelManifest,
    OnnxVariant,
    Tap,
    Tokenizer,
    Variants,
)
from crayon_runtime.probe import peak_memory
from crayon_runtime.tokenizer import Tokenizer as Encoder

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True)
class Exported:
    bundle: Bundle
    report: Report


def export(
    model: str | Path,
    out: str | Path,
    *,
    replace: bool = False,
    on_bytes: Callable[[int], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    **options: Any,
) -> Exported:
    """Export a model to a bundle. `options` are those of `plan`.

    Nothing is at `out` until everything is: the bundle is written beside it and renamed.
    """
    return run(plan(model, **options), Path(out), replace=replace, on_bytes=on_bytes, on_stage=on_stage)


def run(
    p: ExportPlan,
    out: Path,
    *,
    replace: bool = False,
    on_bytes: Callable[[int], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Exported:
    """Carry out a plan.

    Args:
        replace: whether a bundle that is already there may be replaced.
        on_bytes: told the bytes of float32 weight that were handled; `p.weight_bytes` in all.
        on_stage: told what comes next, once the weights are handled; making a template or a program for ExecuTorch takes minutes.

    Raises:
        OutputError: the disk is full, or `out` exists.
        CheckpointError: a tensor is damaged, or holds NaN or infinity.
        MissingExtra: executorch is asked for, there is no template of this architecture, and its exporter is not installed.
    """
    started = time.perf_counter()
    a, q = p.architecture, p.quantization
    if p.official:
        check_installed()
    with ExitStack() as stack:
        writer = stack.enter_context(BundleWriter(out, replace=replace))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count() or 1))
        info = source_tokenizer.convert(p.tokenizer, scratch, model_vocab_size=a.vocab_size)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            writer.add_file(name, scratch / name)
        encoder = Encoder(info, scratch / info.file)
        recording = Recording.plan(encoder, p.golden_texts, p.context_length)
        calibration = p.calibration.sequences(encoder, p.context_length) if p.calibration else ()

        fingerprint = Fingerprint(a.layer_repeats)
        variants = Variants()
        program: Filling | Official | None = None
        with ExitStack() as files:
            storages: dict[str, Storage] = {}
            if "onnx" in p.backends:
                data = ExternalData(files.enter_context(writer.open("model.onnx.data")), "model.onnx.data")
                storages["onnx"] = OnnxStorage(
                    data, blockwise=p.blockwise, embedding=q.embedding, tied=a.tied_embeddings, pool=pool
                )
            if "executorch" in p.backends:
                program = files.enter_context(_program(p, info, writer, scratch, pool, on_stage or (lambda _: None)))
                storages["executorch"] = program.storage
            weights = WrittenWeights(
                p.checkpoint,
                a,
                fingerprint,
                list(storages.values()),
                adapters=p.adapters,
                merged=p.merged,
                rounding=Clipping(pool) if p.rounding == "mse" else nearest,
                calibration=calibration,
                on_bytes=on_bytes or (lambda _: None),
            )
            outputs = forward(a, weights, recording.sequences, positions=recording.positions, tap_layer=p.tap_layer)
            if "onnx" in p.backends:
                graph = _onnx_graph(p, data)
            if program is not None:
                program.finish(a)
        if "onnx" in p.backends:
            variants = msgspec.structs.replace(variants, onnx=_add_onnx(writer, p, info, graph))
        if program is not None:
            variants = msgspec.structs.replace(variants, executorch=program.add_to(writer))
        recorded = _record(p, recording, outputs, weights, list(storages.values()))
        tolerances = [tolerance(name, quantize=q.weights, kv_dtype=p.kv_dtype) for name in p.backends]
        cases, tensors = golden_files(recorded, tolerances)
        writer.add_bytes("golden.json", cases)
        writer.add_bytes("golden.safetensors", tensors)

        base = fingerprint.hexdigest()
        _add_adapters(writer, p, base, program, scratch / "adapters")
        if p.merged is not None:
            check_base(p.merged, base)
        report = Report(
            model=p.name,
            base_fingerprint=base,
            quantization=q.weights,
            group_size=q.group_size,
            rounding=p.rounding,
            tensors=weights.reports,
            cases=[case for r in recorded for case in r.reports],
            bundle_bytes=sum(f.size for f in writer.files),
            peak_rss_bytes=peak_memory(),
            seconds=time.perf_counter() - started,
        )
        writer.add_bytes("report.json", report.to_json())
        writer.finish(
            ModelManifest(
                schema_version=SCHEMA_VERSION,
                name=p.name,
                base_fingerprint=base,
                producer=PRODUCER,
                architecture=a,
                quantization=q,
                context_length=p.context_length,
                kv_dtype=p.kv_dtype,  # type: ignore[arg-type]
                tokenizer=info,
                variants=variants,
                adapter_slots=_adapter_slots(p),
                tap=Tap(p.tap_layer, a.hidden_size),
                golden=Golden("golden.json", "golden.safetensors"),
                merged=[Merged(p.merged.name, p.merged.sha256)] if p.merged else [],
                adapters=[f"adapters/{adapter.name}" for adapter in p.adapters],
                files=[],
            )
        )
    return Exported(Bundle.open(out), report)


def _onnx_graph(p: ExportPlan, data: ExternalData) -> onnx.ModelProto:
    graph = LlamaGraph(
        p.architecture,
        weights=p.blockwise,
        embedding=p.quantization.embedding,
        kv_dtype=p.kv_dtype,
        slots=p.slots,
        tap_layer=p.tap_layer,
    )
    return graph.model(data, p.context_length)


def _add_onnx(writer: BundleWriter, p: ExportPlan, info: Tokenizer, graph: onnx.ModelProto) -> OnnxVariant:
    writer.add_bytes("model.onnx", graph.SerializeToString(deterministic=True))
    config = genai_config(p.architecture, info, model_file="model.onnx", context_length=p.context_length)
    writer.add_bytes("genai_config.json", config)
    return OnnxVariant("model.onnx", ["model.onnx.data"])


@contextmanager
def _program(
    p: ExportPlan,
    info: Tokenizer,
    writer: BundleWriter,
    scratch: Path,
    pool: ThreadPoolExecutor,
    on_stage: Callable[[str], None],
) -> Iterator[Filling | Official]:
    """ExecuTorch's program, while its weights are written."""
    if p.official:
        spec = ProgramSpec(p.name, p.architecture, info, p.context_length, p.kv_dtype, p.tap_layer, p.single_file)
        yield Official(spec, p.adapters, scratch, weights=weights_form(p.blockwise), pool=pool, on_stage=on_stage)
        return
    template = template_for(spec_of(p, info), on_stage)
    with writer.place("model.pte" if p.single_file else "model.ptd") as file:
        yield Filling(template, file, with_slots=p.program_slots is not None, single_file=p.single_file, pool=pool)


def _adapter_slots(p: ExportPlan) -> AdapterSlots | None:
    """Of the graph; where there is none, of the program."""
    if p.backends == ["executorch"] and p.program_slots is not None:
        return AdapterSlots([name for name in LINEARS if name in p.program_slots.targets], p.program_slots.rank)
    return AdapterSlots(p.slots, None) if p.slots else None


def _add_adapters(
    writer: BundleWriter, p: ExportPlan, base: str, program: Filling | Official | None, scratch: Path
) -> None:
    """Write the adapters, and copy them into the bundle.

    Args:
        base: its fingerprint.
    """
    onnx = "onnx" in p.backends
    for adapter in p.adapters:
        out = scratch / adapter.name
        if isinstance(program, Official):
            written = write_official(adapter, base, out, program.files(adapter), program.dtype, onnx=onnx)
        else:
            written = write_adapter(adapter, base, out, onnx=onnx, executorch=program.slots if program else None)
        writer.add_bundle(f"adapters/{adapter.name}", written)


def _record(
    p: ExportPlan, recording: Recording, outputs: Outputs, weights: WrittenWeights, storages: list[Storage]
) -> list[Recorded]:
    """The golden cases: once for all backends, or where they quantize in different ways for each its own."""
    adapters = [None, *(adapter.name for adapter in p.adapters)]
    floats = weights.streams()
    if len(storages) == 1 or not any(storage.lossy for storage in storages):
        return [recording.results(outputs, adapters, floats, weights.streams(storages[0]))]
    return [
        recording.results(
            outputs,
            adapters,
            floats,
            weights.streams(storage),
            backend=storage.backend,
            suffix="" if storage is storages[0] else f"@{storage.backend}",
        )
        for storage in storages
    ]
