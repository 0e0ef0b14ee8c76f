"""A bundle on this machine: opened, checked, installed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from crayon_runtime.bundle.archive import Archive
from crayon_runtime.bundle.checks import check_folder, read_source
from crayon_runtime.bundle.source import (
    MANIFEST,
    SIGNATURE,
    Folder,
    OnBytes,
    Source,
    check_files,
    read_file,
    read_manifest,
    read_signature,
)
from crayon_runtime.bundle.stamp import check_manifest, holds, times, write_stamp
from crayon_runtime.bundle.writer import new_bundle
from crayon_runtime.errors import BundleError, InvalidInput, ManifestError, OutputError
from crayon_runtime.manifest import AdapterManifest, Manifest, ModelManifest, parse


@dataclass(frozen=True)
class Bundle:
    """A model or an adapter whose files are in a folder of this machine."""

    path: Path
    manifest: Manifest = field(repr=False)
    document: dict[str, Any] = field(repr=False)
    """manifest.json as it was read, with the fields that this version does not know."""

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False, on_bytes: OnBytes | None = None) -> Bundle:
        """Open a bundle and check it.

        The manifest, the size of every file and the headers of known formats are always checked. Hashes are checked when the
        folder has no valid install stamp: once after it was copied or touched.

        Args:
            path: the bundle's folder; or a `.crayon` archive, which is first installed into the user's cache.
            verify: check the hashes in any case, and that there is nothing that the manifest does not list.
            on_bytes: called while hashes are checked, with the number of bytes done since the last call.

        Raises:
            BundleError: there is no bundle, or it is not what its manifest says.
        """
        path = Path(path)
        if not _is_folder(path):
            return _open_archive(path, verify, on_bytes)
        path = path.resolve()
        source = Folder(path)
        document = read_manifest(source)
        manifest = parse(document, where=str(path / MANIFEST))
        check_manifest(path, document)
        check_folder(source, manifest, nothing_else=False)
        now = times(path, manifest)
        if verify or not holds(path, now):
            check_files(source, manifest, on_bytes)
            with suppress(OutputError):  # a read-only folder is checked each time
                write_stamp(path, document, now)
        return cls(path, manifest, json.loads(document))

    def verify(self, on_bytes: OnBytes | None = None) -> None:
        """Check every size and hash, and that there are no links and no other files.

        Raises:
            BundleError: the folder is not exactly what the manifest says.
        """
        Bundle.open(self.path, verify=True, on_bytes=on_bytes)

    @property
    def size(self) -> int:
        """Bytes of all files that the manifest lists."""
        return sum(file.size for file in self.manifest.files)

    @property
    def model(self) -> ModelManifest:
        """The manifest of a model; ManifestError if this is an adapter."""
        if isinstance(self.manifest, ModelManifest):
            return self.manifest
        raise ManifestError(
            f"{self.manifest.name} is an adapter, not a model", where=self.path, do="give the bundle of its model"
        )

    @property
    def as_adapter(self) -> AdapterManifest:
        """The manifest of an adapter; ManifestError if this is a model."""
        if isinstance(self.manifest, AdapterManifest):
            return self.manifest
        raise ManifestError(
            f"{self.manifest.name} is a model, not an adapter",
            where=self.path,
            do="make an adapter bundle of a PEFT folder with `crayon adapter convert`",
        )

    def file(self, relative: str) -> Path:
        """Where a file of the bundle lies, named as in the manifest."""
        if all(file.path != relative for file in self.manifest.files):
            raise BundleError(f"the bundle has no file {relative!r}", where=self.path)
        return self.path / relative

    def read(self, relative: str) -> bytes:
        """The content of a file of the bundle, named as in the manifest; IntegrityError if it is not what the manifest says."""
        self.file(relative)
        listed = next(file for file in self.manifest.files if file.path == relative)
        return b"".join(read_file(Folder(self.path), listed))

    @property
    def adapter_names(self) -> list[str]:
        """The adapters that travel inside this model."""
        folders = self.manifest.adapters if isinstance(self.manifest, ModelManifest) else []
        return [PurePosixPath(folder).name for folder in folders]

    def adapter(self, name: str) -> Bundle:
        """One of the adapters that travel inside this model.

        Raises:
            InvalidInput: there is no such adapter.
        """
        if name not in self.adapter_names:
            names = ", ".join(self.adapter_names)
            raise InvalidInput(
                f"there is no adapter {name!r} in the bundle",
                where=self.path,
                do=f"choose one of: {names}" if names else "give the path of an adapter bundle",
            )
        path = self.path / self.model.adapters[self.adapter_names.index(name)]
        document = read_manifest(Folder(path))  # checked, as all files, when this bundle was opened
        return Bundle(path, parse(document, where=str(path / MANIFEST)), json.loads(document))


def install(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    replace: bool = False,
    on_bytes: OnBytes | None = None,
) -> Bundle:
    """Copy a bundle, a folder or a `.crayon` archive, to a folder that appears only when every hash was right.

    Args:
        replace: swap an existing bundle at `target` against this one, at the end.
        on_bytes: called with the number of bytes copied since the last call.

    Raises:
        BundleError: the source is not exactly what its manifest says.
        OutputError: the target exists, or cannot be written.
    """
    source, target = Path(source), Path(target)
    if _is_folder(source):
        _install(Folder(source), target, replace, on_bytes)
    else:
        with Archive(source) as archive:
            _install(archive, target, replace, on_bytes)
    return Bundle.open(target)


unpack = install


def _is_folder(path: Path) -> bool:
    """Whether a bundle is a folder; otherwise it is a file."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise BundleError(f"there is no bundle here: {reason}", where=path, do="check the path") from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise BundleError("this is neither a folder nor a file", where=path, do="check the path")
    return stat.S_ISDIR(mode)


def _install(source: Source, target: Path, replace: bool, on_bytes: OnBytes | None) -> None:
    document, manifest = read_source(source)
    signature = read_signature(source)
    with new_bundle(target, replace=replace) as folder:
        for file in manifest.files:
            path = folder / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb", buffering=0) as out:
                for chunk in read_file(source, file):
                    out.write(chunk)
                    if on_bytes:
                        on_bytes(len(chunk))
        (folder / MANIFEST).write_bytes(document)
        if signature is not None:
            (folder / SIGNATURE).write_bytes(signature)
        check_folder(Folder(folder), manifest, nothing_else=True)
        write_stamp(folder, document, times(folder, manifest))


def _open_archive(path: Path, verify: bool, on_bytes: OnBytes | None) -> Bundle:
    from platformdirs import user_cache_path

    with Archive(path) as archive:
        document, manifest = read_source(archive)
        key = hashlib.sha256(document + (read_signature(archive) or b"")).hexdigest()[:16]
        folder = user_cache_path("crayon", appauthor=False) / "bundles" / f"{manifest.name}-{key}"
        try:
            bundle = Bundle.open(folder)
        except BundleError:
            _install(archive, folder, True, on_bytes)
            return Bundle.open(folder)
        if verify:
            check_files(archive, manifest, on_bytes)
        return bundle
