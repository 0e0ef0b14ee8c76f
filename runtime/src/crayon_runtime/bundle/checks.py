"""Everything that is checked of a bundle without hashing it: at most a few bytes of each file are read, and no weights."""

from __future__ import annotations

from collections.abc import Callable

from crayon_runtime.backends.onnx_adapter import IDENTIFIER
from crayon_runtime.bundle.source import MANIFEST, Folder, Source, check_entries, read_head, read_manifest
from crayon_runtime.bundle.stamp import check_manifest
from crayon_runtime.errors import IntegrityError, ManifestError
from crayon_runtime.manifest import AdapterManifest, Manifest, ModelManifest, parse

_HEAD = 16


def read_source(source: Source) -> tuple[bytes, Manifest]:
    """The manifest, as bytes and parsed, of a source that is to be copied.

    Raises:
        BundleError: the manifest is not valid, or was changed since the folder was installed; or, as far as names, kinds and
            sizes tell, the source does not hold exactly what it lists.
    """
    document = read_manifest(source)
    manifest = parse(document, where=str(source.path / MANIFEST))
    if isinstance(source, Folder):
        check_manifest(source.path, document)
    check_entries(source, manifest, nothing_else=True)
    return document, manifest


def check_folder(folder: Folder, manifest: Manifest, *, nothing_else: bool) -> None:
    """Check the sizes of all files, the headers of known formats, and the manifests of the adapters inside.

    Args:
        nothing_else: also refuse files that the manifest does not list.

    Raises:
        IntegrityError: a file is not what the manifest or its name says.
        ManifestError: an adapter's manifest does not agree with the model's.
    """
    check_entries(folder, manifest, nothing_else=nothing_else)
    for file in manifest.files:
        _check_header(folder, file.path, file.size)
    if isinstance(manifest, ModelManifest):
        for adapter in manifest.adapters:
            _check_adapter(folder, adapter, manifest)


def _check_adapter(folder: Folder, adapter: str, model: ModelManifest) -> None:
    """An adapter inside a model: its manifest must not name any file that the model's does not vouch for."""
    path = f"{adapter}/{MANIFEST}"
    where = folder.path / path
    inner = parse(read_manifest(folder, path), where=str(where))
    vouched = {(file.path, file.size, file.sha256) for file in model.files}
    if not isinstance(inner, AdapterManifest):
        problem = "it is not the manifest of an adapter"
    elif inner.base_fingerprint != model.base_fingerprint:
        problem = "the adapter is for another base model"
    elif not {(f"{adapter}/{file.path}", file.size, file.sha256) for file in inner.files} <= vouched:
        problem = "the adapter's files are not those that the model's manifest lists"
    else:
        return
    raise ManifestError(problem, where=where, do="convert the adapter for this model, and export the bundle again")


def _check_header(folder: Folder, path: str, size: int) -> None:
    suffix = path[path.rfind(".") :]
    is_right = _FORMATS.get(suffix)
    if is_right is None:
        return
    if not is_right(read_head(folder, path, _HEAD), size):
        raise IntegrityError(
            f"{path} does not begin as {suffix} files do", where=folder.path, do="fetch or export the bundle again"
        )


def _safetensors(head: bytes, size: int) -> bool:
    """8 bytes are the length of the JSON that follows, little-endian."""
    return head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= size


def _onnx(head: bytes, size: int) -> bool:
    """A protobuf message; every writer begins with its first field, `ir_version`, a varint."""
    return head[:1] == b"\x08" and size > 2


def _flatbuffer(identifier: bytes) -> Callable[[bytes, int], bool]:
    """The offset of its root, and an identifier of four bytes."""
    return lambda head, size: head[4:8] == identifier and int.from_bytes(head[:4], "little") < size


_FORMATS: dict[str, Callable[[bytes, int], bool]] = {
    ".safetensors": _safetensors,
    ".onnx": _onnx,
    ".onnx_adapter": _flatbuffer(IDENTIFIER),
    ".pte": _flatbuffer(b"ET12"),
    ".ptd": _flatbuffer(b"FT01"),
}
