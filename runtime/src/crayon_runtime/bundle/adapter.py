"""Writing an adapter, as a bundle or as an archive, from its tensors, one of them in memory at a time."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from crayon_runtime.backends.onnx_adapter import write_onnx_adapter
from crayon_runtime.bundle.archive import write_archive
from crayon_runtime.bundle.reader import Bundle
from crayon_runtime.bundle.writer import BundleWriter, HashedFile
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
    File,
    OnnxAdapterVariant,
    to_json,
)
from crayon_runtime.prototypes import FILE as PROTOTYPES

if TYPE_CHECKING:
    from crayon_runtime.backends.onnx_adapter import Tensor
    from crayon_runtime.prototypes import Prototypes

_FILE = "adapter.onnx_adapter"
_A = ".lora_A.weight"


def write_adapter(
    out: Path,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    base_fingerprint: str,
    dtype: AdapterDtype = "fp32",
    pool: BlendedFrom | None = None,
    prototypes: Prototypes | None = None,
    replace: bool = False,
) -> Bundle:
    """Write an adapter bundle that fits one base; it appears at `out` when it is whole.

    Args:
        tensors: for each target `MODULE.lora_A.weight` [in, r] and `MODULE.lora_B.weight` [r, out], with alpha/r in B.
        dtype: what the tensors are stored in. onnxruntime-genai takes fp32 alone.
        pool: that it was blended from.
        prototypes: that travel with it; None: none do.

    Raises:
        OutputError: the target exists, or cannot be written.
        AdapterError: a tensor is not what its shape says, holds what the dtype cannot, or there is more than an adapter file holds.
        InvalidInput: a prototype holds NaN, or what float16 cannot.
    """
    manifest = _manifest(tensors, name, base_fingerprint, dtype, pool, prototypes)
    with BundleWriter(out, replace=replace) as writer:
        with writer.open(_FILE) as file:
            write_onnx_adapter(file, tensors, dtype)
        if prototypes is not None:
            writer.add_bytes(PROTOTYPES, prototypes.to_bytes(base_fingerprint, pool.version if pool else None))
        writer.finish(manifest)
    return Bundle.open(out)


def write_adapter_archive(
    archive: Path,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    base_fingerprint: str,
    dtype: AdapterDtype = "fp32",
    pool: BlendedFrom | None = None,
    prototypes: Prototypes | None = None,
    sign: Callable[[bytes], bytes] | None = None,
) -> None:
    """Write what packing that bundle would give, in place of an older file, without making the bundle.

    Args:
        sign: makes a signature.json of a manifest; None: the bundle is not signed.

    Raises:
        OutputError, AdapterError, InvalidInput: see `write_adapter`.
    """
    with atomic_file(archive) as out, tempfile.TemporaryFile(dir=archive.parent) as scratch:
        content = HashedFile(scratch)
        write_onnx_adapter(content, tensors, dtype)
        adapter = File(_FILE, content.tell(), content.sha256)
        scratch.seek(0)
        files = [(adapter, iter(lambda: scratch.read(CHUNK), b""))]
        if prototypes is not None:
            saved = prototypes.to_bytes(base_fingerprint, pool.version if pool else None)
            files.append((File(PROTOTYPES, len(saved), hashlib.sha256(saved).hexdigest()), iter([saved])))
        manifest = _manifest(tensors, name, base_fingerprint, dtype, pool, prototypes)
        document = to_json(msgspec.structs.replace(manifest, files=[file for file, _ in files]))
        write_archive(out, document, sign(document) if sign else None, files)


def _manifest(
    tensors: Mapping[str, Tensor],
    name: str,
    base_fingerprint: str,
    dtype: AdapterDtype,
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
        variants=AdapterVariants(onnx=OnnxAdapterVariant(_FILE, dtype)),
        pool=pool,
        prototypes=AdapterPrototypes(PROTOTYPES, len(prototypes.states), prototypes.model) if prototypes else None,
        files=[],
    )
