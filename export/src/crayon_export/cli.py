"""The exporter's verbs: `crayon export`, `crayon adapter convert`, `crayon template`, `crayon estimate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from crayon_runtime.cli.common import json_option, note, print_json, print_text, progress
from crayon_runtime.manifest import LINEARS

_FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("model")
@click.option("--out", type=_FOLDER, help="The bundle to write.  [required unless --dry-run]")
@click.option(
    "--backend",
    type=click.Choice(["onnx", "executorch"]),
    multiple=True,
    default=["onnx"],
    show_default=True,
    help="Whom the bundle shall serve. Repeatable.",
)
@click.option("--official", is_flag=True, help="Have ExecuTorch's own exporter make its program, in minutes.")
@click.option("--quantize", type=click.Choice(["int4", "int8", "none"]), default="int4", show_default=True)
@click.option("--group-size", type=int, help="Weights that share a scale: 32, 64 or 128.  [default: 32]")
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "mse", "gptq"]),
    default="nearest",
    show_default=True,
    help="How weights find their codes.",
)
@click.option("--calibration", type=_FOLDER, metavar="FILE", help="Texts for gptq: plain, or JSON lines (.jsonl).")
@click.option(
    "--calibration-tokens", type=int, default=8192, show_default=True, help="How many of their tokens are used."
)
@click.option(
    "--context-length", type=int, help="Tokens that the KV cache holds.  [default: the model's, at most 2048]"
)
@click.option(
    "--kv-dtype",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="fp16 with onnx alone, int8 with executorch alone.",
)
@click.option("--adapter", "adapters", multiple=True, type=_FOLDER, help="A PEFT LoRA to ship inside. Repeatable.")
@click.option("--merge", is_flag=True, help="Add the one adapter into the weights instead.")
@click.option("--adapter-slots/--no-adapter-slots", default=True, help="Whether adapters can be attached at all.")
@click.option(
    "--slot-rank", type=click.IntRange(min=1), help="Of ExecuTorch's slots.  [default: that of the adapters, or 16]"
)
@click.option(
    "--slot-target",
    "slot_targets",
    multiple=True,
    type=click.Choice(LINEARS),
    help="Linear layers with such slots. Repeatable.  [default: all]",
)
@click.option("--single-file", is_flag=True, help="Put the weights into ExecuTorch's program; it takes no adapters.")
@click.option("--tap-layer", type=int, help="Hidden state to return beside the logits.  [default: the last]")
@click.option("--tokenizer", type=_FOLDER, help="A tokenizer.json, tokenizer.model or folder, if not the model's own.")
@click.option("--revision", help="Branch, tag or commit, where MODEL is a Hub id.")
@click.option("--token", envvar="HF_TOKEN", help="Hub access token.  [env: HF_TOKEN]")
@click.option("--force", is_flag=True, help="Replace the bundle at --out.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and stop.")
@json_option
def export(model: str, out: Path | None, force: bool, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Export MODEL (a folder or a Hub id) to a quantized bundle."""
    from crayon_export.exporter import run
    from crayon_export.plan import plan

    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out'.")
    decided = plan(model, **options)
    if out is None or dry_run:
        print_json(decided.describe())
        return
    with progress(f"exporting {decided.name}", decided.weight_bytes) as advance:
        done = run(decided, out, replace=force, on_bytes=advance, on_stage=_stage)
    if as_json:
        print_json({"bundle": str(done.bundle.path), "report": done.report.to_dict()})
    else:
        print_text(f"{done.report.to_text()}\n\n{done.bundle.path}")


def _stage(text: str) -> None:
    if sys.stderr.isatty():
        note(f"{text} ...")


@click.group()
def adapter() -> None:
    """Convert LoRA adapters for a bundle."""


@adapter.command()
@click.argument("peft_dir", type=_FOLDER)
@click.option("--bundle", required=True, type=_FOLDER, help="The base that the adapter is for.")
@click.option("--out", required=True, type=_FOLDER, help="The adapter bundle to write.")
@click.option("--force", is_flag=True, help="Replace the adapter bundle at --out.")
@json_option
def convert(peft_dir: Path, bundle: Path, out: Path, force: bool, as_json: bool) -> None:
    """Convert a PEFT LoRA into an adapter bundle for one base."""
    from crayon_export.adapters import convert_adapter

    done = convert_adapter(peft_dir, bundle, out, replace=force)
    manifest = done.as_adapter
    if as_json:
        print_json({"adapter": str(done.path), "name": manifest.name, "targets": len(manifest.targets)})
    else:
        ranks = sorted({t.rank for t in manifest.targets})
        print_text(f"{manifest.name}: {len(manifest.targets)} layers, rank {', '.join(map(str, ranks))}\n{done.path}")


@click.group()
def template() -> None:
    """Programs for ExecuTorch without their weights, which take minutes to make: see them, take them to other computers."""


@template.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the templates on this computer: those that come with the package, and those in your cache."""
    from crayon_export.executorch import templates

    found = templates.list_templates()
    if as_json:
        print_json({"templates": [x.to_dict() for x in found]})
    else:
        print_text("\n".join(x.to_text() for x in found) or "there are no templates")


@template.command("export")
@click.argument("source", metavar="KEY_OR_MODEL")
@click.argument("file", type=_FOLDER)
@click.option("--quantize", type=click.Choice(["int4", "int8", "none"]), default="int4", show_default=True)
@click.option("--group-size", type=int, help="Weights that share a scale: 32, 64 or 128.  [default: 32]")
@click.option("--context-length", type=int, help="As for `crayon export`.")
@click.option("--kv-dtype", type=click.Choice(["fp32", "int8"]), default="fp32", show_default=True)
@click.option(
    "--adapter", "adapters", multiple=True, type=_FOLDER, help="A PEFT LoRA that the slots shall hold. Repeatable."
)
@click.option("--adapter-slots/--no-adapter-slots", default=True, help="Whether adapters can be attached.")
@click.option("--slot-rank", type=click.IntRange(min=1), help="Of the slots.  [default: that of the adapters, or 16]")
@click.option(
    "--slot-target", "slot_targets", multiple=True, type=click.Choice(LINEARS), help="As for `crayon export`."
)
@click.option("--tap-layer", type=int, help="Hidden state to return beside the logits.  [default: the last]")
@click.option("--tokenizer", type=_FOLDER, help="A tokenizer.json, tokenizer.model or folder, if not the model's own.")
@json_option
def export_template(source: str, file: Path, as_json: bool, **options: Any) -> None:
    """Write a template to FILE: by the beginning of its key, or the one that exports of a model need, made if it has to be."""
    from crayon_export.executorch import templates

    written = templates.export_template(source, file, on_stage=_stage, **options)
    if as_json:
        print_json({"file": str(file), "key": written.key})
    else:
        print_text(f"{written.key}\n{file}")


@template.command("import")
@click.argument("file", type=_FOLDER)
@json_option
def import_(file: Path, as_json: bool) -> None:
    """Put a template from elsewhere into your cache."""
    from crayon_export.executorch import templates

    spec = templates.import_template(file)
    if as_json:
        print_json({"key": spec.key})
    else:
        print_text(spec.key)


@click.command()
@click.argument("model")
@click.option("--quantize", type=click.Choice(["int4", "int8", "none"]), default="int4", show_default=True)
@click.option("--group-size", type=int, help="Weights that share a scale: 32, 64 or 128.  [default: 32]")
@click.option(
    "--context-length", type=int, help="Tokens that the KV cache holds.  [default: the model's, at most 2048]"
)
@click.option("--kv-dtype", type=click.Choice(["fp32", "fp16", "int8"]), default="fp32", show_default=True)
@click.option("--device", help="One of the known devices, or 'this machine'.  [default: all]")
@click.option("--revision", help="Branch, tag or commit, where MODEL is a Hub id.")
@click.option("--token", envvar="HF_TOKEN", help="Hub access token.  [env: HF_TOKEN]")
@json_option
def estimate(model: str, as_json: bool, **options: Any) -> None:
    """Estimate size, memory and speed of MODEL on devices, from its config alone."""
    from crayon_export import estimate as library

    estimated = library.estimate(model, **options)
    if as_json:
        print_json(estimated.to_dict())
    else:
        print_text(estimated.to_text())
