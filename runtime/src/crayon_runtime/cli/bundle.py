"""crayon verify, pack, unpack."""

from __future__ import annotations

from pathlib import Path

import click

from crayon_runtime import backends
from crayon_runtime import bundle as bundles
from crayon_runtime.cli.common import PATH, json_option, note, print_json, print_table, print_text, progress, size_text
from crayon_runtime.errors import GoldenMismatch
from crayon_runtime.manifest import ModelManifest


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--golden/--no-golden", default=True, help="Whether to run the model on its golden cases.")
@click.option(
    "--backend",
    type=click.Choice(["auto", *backends.NAMES]),
    default="auto",
    show_default=True,
    help="What runs the golden cases; auto: each that is here.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Cores to compute on.  [default: all physical ones]")
@click.option("--keys", type=PATH, help="A keys.json: refuse a bundle that none of its keys has signed.")
@json_option
def verify(bundle: Path, golden: bool, backend: str, threads: int | None, keys: Path | None, as_json: bool) -> None:
    """Check a bundle: the hash of every file, then what the model answers.

    BUNDLE is a folder or a .crayon archive. The golden cases that travel in a model are run on this machine and compared with
    what was recorded at export, for the base and for each adapter inside, by each backend that the bundle serves and that is installed.
    """
    with progress("hashes", _bytes(bundle)) as on_bytes:
        checked = bundles.Bundle.open(bundle, verify=True, on_bytes=on_bytes)
    note(f"{len(checked.manifest.files)} files, {size_text(checked.size)}: sizes and hashes are right")
    signer = None
    if keys is not None:
        from crayon_runtime.signing import TrustedKeys, verify_signature

        signer = verify_signature(checked, TrustedKeys.read(keys)).id
        note(f"signed by {signer}")

    results = None
    if golden and isinstance(checked.manifest, ModelManifest) and checked.manifest.golden is not None:
        from crayon_runtime.golden import replay

        with progress("golden cases", None, unit="cases") as on_case:
            results = replay(checked, backend=backend, threads=threads, on_case=lambda _: on_case(1))
        absent = set(backends.served(checked)) - set(backends.available(checked)) if backend == "auto" else ()
        for name in sorted(absent):
            note(f"golden cases: not run by {name}, which does not load here; --backend {name} says why")
    failed = [f"{result.name} ({result.backend})" for result in results or [] if not result.passed]
    if as_json:
        print_json(
            {
                "bundle": bundle,
                "kind": "model" if isinstance(checked.manifest, ModelManifest) else "adapter",
                "name": checked.manifest.name,
                "files": len(checked.manifest.files),
                "bytes": checked.size,
                "signed_by": signer,
                "golden": results,
                "passed": not failed,
            }
        )
    elif results is None:
        note("golden cases: not run" if golden is False else "golden cases: it has none")
    else:
        print_table(
            ["golden case", "adapter", "backend", "logit error", "tap error", "KL", ""],
            [
                [
                    r.name,
                    r.adapter or "-",
                    r.backend,
                    *(f"{e:.1e}" for e in (r.logit_error, r.tap_error, r.kl)),
                    r.problem or "ok",
                ]
                for r in results
            ],
        )
    if failed:
        raise GoldenMismatch(
            f"{len(failed)} of {len(results or [])} golden cases failed: {', '.join(failed)}",
            where=bundle,
            do="the files are as exported, so suspect the backend: try another version of it, and report it",
        )


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--out", type=PATH, help="The archive to write.  [default: BUNDLE.crayon]")
@json_option
def pack(bundle: Path, out: Path | None, as_json: bool) -> None:
    """Make one .crayon file of a bundle's folder.

    Every hash is checked on the way. An older archive of the same name is replaced when the new one is whole.
    """
    bundle = bundle.absolute()
    out = out or bundle.with_name(f"{bundle.name}.crayon")
    with progress("packing", _bytes(bundle)) as on_bytes:
        bundles.pack(bundle, out, on_bytes=on_bytes)
    size = out.stat().st_size
    if as_json:
        print_json({"archive": out, "bytes": size})
    else:
        print_text(f"{out}: {size_text(size)}")


@click.command()
@click.argument("archive", type=PATH)
@click.option("--out", type=PATH, help="The folder to write.  [default: ARCHIVE without its suffix]")
@click.option("--force", is_flag=True, help="Replace a bundle at --out.")
@json_option
def unpack(archive: Path, out: Path | None, force: bool, as_json: bool) -> None:
    """Install a .crayon file, or a bundle's folder, as a folder whose every hash was checked."""
    archive = archive.absolute()
    out = out or archive.with_name(archive.name.removesuffix(".crayon"))
    with progress("installing", _bytes(archive)) as on_bytes:
        installed = bundles.install(archive, out, replace=force, on_bytes=on_bytes)
    if as_json:
        print_json({"bundle": out, "files": len(installed.manifest.files), "bytes": installed.size})
    else:
        print_text(f"{out}: {len(installed.manifest.files)} files, {size_text(installed.size)}")


def _bytes(path: Path) -> int:
    """About how much a command will read."""
    files = path.rglob("*") if (path / "manifest.json").exists() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
