"""From a checkpoint to a bundle, in one pass over the weights."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crayon_export import tokenizer as source_tokenizer
from crayon_export.adapters import check_base, write_adapter
from crayon_export.checkpoint import Fingerprint
from crayon_export.golden import Recording, tolerance
from crayon_export.onnx.genai import genai_config
from crayon_export.onnx.graph import LlamaGraph
from crayon_export.onnx.tensors import ExternalData
from crayon_export.plan import ExportPlan, plan
from crayon_export.reference import forward
from crayon_export.report import Report
from crayon_export.streaming import WrittenWeights
from crayon_runtime.bundle import Bundle, BundleWriter
from crayon_runtime.manifest import (
    PRODUCER,
    SCHEMA_VERSION,
    AdapterSlots,
    Golden,
    Merged,
    ModelManifest,
    OnnxVariant,
    Tap,
    Variants,
)
from crayon_runtime.probe import peak_memory
from crayon_runtime.tokenizer import Tokenizer


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
    **options: Any,
) -> Exported:
    """Export a model to a bundle. `options` are those of `plan`.

    Nothing is at `out` until everything is: the bundle is written beside it and renamed.
    """
    return run(plan(model, **options), Path(out), replace=replace, on_bytes=on_bytes)


def run(p: ExportPlan, out: Path, *, replace: bool = False, on_bytes: Callable[[int], None] | None = None) -> Exported:
    """Carry out a plan.

    Args:
        replace: whether a bundle that is already there may be replaced.
        on_bytes: told the bytes of float32 weight that were handled; `p.weight_bytes` in all.

    Raises:
        OutputError: the disk is full, or `out` exists.
        CheckpointError: a tensor is damaged, or holds NaN or infinity.
    """
    started = time.perf_counter()
    a, q = p.architecture, p.quantization
    with BundleWriter(out, replace=replace) as writer, tempfile.TemporaryDirectory() as scratch:
        info = source_tokenizer.convert(p.tokenizer, Path(scratch), model_vocab_size=a.vocab_size)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            writer.add_file(name, Path(scratch, name))
        recording = Recording.plan(Tokenizer(info, Path(scratch, info.file)), p.golden_texts, p.context_length)

        fingerprint = Fingerprint()
        with writer.open("model.onnx.data") as file:
            data = ExternalData(file, "model.onnx.data")
            weights = WrittenWeights(
                p.checkpoint,
                a,
                fingerprint,
                data,
                blockwise=p.blockwise,
                embedding=q.embedding,
                adapters=p.adapters,
                merged=p.merged,
                threads=os.cpu_count() or 1,
                on_bytes=on_bytes or (lambda _: None),
            )
            try:
                outputs = forward(a, weights, recording.sequences, positions=recording.positions, tap_layer=p.tap_layer)
            finally:
                weights.close()
            graph = LlamaGraph(
                a,
                weights=p.blockwise,
                embedding=q.embedding,
                kv_dtype=p.kv_dtype,
                slots=p.slots,
                tap_layer=p.tap_layer,
            )
            model = graph.model(data, p.context_length)
        writer.add_bytes("model.onnx", model.SerializeToString(deterministic=True))
        writer.add_bytes(
            "genai_config.json", genai_config(a, info, model_file="model.onnx", context_length=p.context_length)
        )
        cases, tensors, case_reports = recording.results(
            outputs,
            [None, *(adapter.name for adapter in p.adapters)],
            weights.float_streams,
            weights.written_streams,
            [tolerance("onnx", quantize=q.weights, kv_dtype=p.kv_dtype)],
        )
        writer.add_bytes("golden.json", cases)
        writer.add_bytes("golden.safetensors", tensors)

        base = fingerprint.hexdigest()
        for adapter in p.adapters:
            nested = write_adapter(adapter, base, Path(scratch, "adapters", adapter.name))
            writer.add_bundle(f"adapters/{adapter.name}", nested)
        if p.merged is not None:
            check_base(p.merged, base)
        report = Report(
            model=p.name,
            base_fingerprint=base,
            quantization=q.weights,
            group_size=q.group_size,
            tensors=weights.reports,
            cases=case_reports,
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
                variants=Variants(onnx=OnnxVariant("model.onnx", ["model.onnx.data"])),
                adapter_slots=AdapterSlots(p.slots, None) if p.slots else None,
                tap=Tap(p.tap_layer, a.hidden_size),
                golden=Golden("golden.json", "golden.safetensors"),
                merged=[Merged(p.merged.name, p.merged.sha256)] if p.merged else [],
                adapters=[f"adapters/{adapter.name}" for adapter in p.adapters],
                files=[],
            )
        )
    return Exported(Bundle.open(out), report)
