"""Writing a bundle: files are hashed while they are written, and the folder appears when all of them are there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self, cast

import msgspec

from crayon_runtime.bundle.checks import check_folder
from crayon_runtime.bundle.source import MANIFEST, Folder, read_file
from crayon_runtime.bundle.stamp import times, write_stamp
from crayon_runtime.errors import ManifestError, OutputError
from crayon_runtime.files import CHUNK, atomic_directory
from crayon_runtime.manifest import File, Manifest, ModelManifest, check_relative, parse, to_json

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from crayon_runtime.bundle.reader import Bundle


class BundleWriter:
    """A bundle that is being written.

        with BundleWriter(target) as writer:
            writer.add_file("tokenizer.json", source)
            with writer.open("model.onnx.data") as file:
                file.write(weights)
            writer.finish(manifest)

    Nothing is at `target` before the block ends, and nothing ever if it raises or `finish` was not called.

    Args:
        replace: swap an existing bundle at `target` against the new one, at the end.

    Raises:
        OutputError: the target exists, or cannot be written.
    """

    def __init__(self, target: Path, *, replace: bool = False) -> None:
        self._directory: AbstractContextManager[Path] = new_bundle(Path(target), replace=replace)
        self._files: dict[str, File] = {}
        self._adapters: list[str] = []
        self._finished = False

    def __enter__(self) -> Self:
        self._folder = self._directory.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> bool | None:
        if error is None and not self._finished:
            return self._directory.__exit__(_Abandoned, _Abandoned(), None)
        return self._directory.__exit__(kind, error, at)

    @property
    def files(self) -> list[File]:
        """Every file that is complete so far, sorted by path."""
        return [self._files[path] for path in sorted(self._files)]

    @contextmanager
    def open(self, path: str) -> Iterator[HashedFile]:
        """Write a file from its beginning to its end.

        Args:
            path: relative to the bundle, with forward slashes; its folders are made.

        Raises:
            ManifestError: the path is not one of a bundle, or was written already.
        """
        with self._new(path).open("xb") as raw:
            file = HashedFile(raw)
            yield file
            self._files[path] = File(path, file.tell(), file.sha256)

    @contextmanager
    def place(self, path: str) -> Iterator[BinaryIO]:
        """Write a file in any order; it is read once more at the end, to be hashed.

        Yields:
            The file, empty, open for reading and writing.
        """
        with self._new(path).open("x+b", buffering=0) as raw:
            file = cast(BinaryIO, raw)
            yield file
            self._files[path] = hashed(file, path)

    def add_bytes(self, path: str, content: bytes) -> None:
        with self.open(path) as file:
            file.write(content)

    def add_file(self, path: str, source: Path) -> None:
        """Copy a file."""
        with Path(source).open("rb", buffering=0) as original, self.open(path) as file:
            while chunk := original.read(CHUNK):
                file.write(chunk)

    def add_bundle(self, folder: str, bundle: Bundle) -> None:
        """Copy an adapter bundle into a folder of this one; `finish` lists it in `adapters`."""
        source = Folder(bundle.path)
        for file in bundle.as_adapter.files:
            with self.open(f"{folder}/{file.path}") as copy:
                for chunk in read_file(source, file):
                    copy.write(chunk)
        self.add_file(f"{folder}/{MANIFEST}", bundle.path / MANIFEST)
        self._adapters.append(folder)

    def _new(self, path: str) -> Path:
        check_relative(path, "BundleWriter")
        if path in self._files:
            raise ManifestError(f"{path!r} was written already", where="BundleWriter")
        place = self._folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest; the bundle is complete.

        Args:
            manifest: what the bundle says of itself. Its `files` are replaced by those written, and for a model the folders
                given to `add_bundle` are added to its `adapters`.

        Raises:
            BundleError: with this manifest, the bundle could not be opened: it refers to a file that was not written, or
                a file is not what its name says.
        """
        manifest = msgspec.structs.replace(manifest, files=self.files)
        if isinstance(manifest, ModelManifest):
            manifest = msgspec.structs.replace(manifest, adapters=sorted({*manifest.adapters, *self._adapters}))
        document = to_json(manifest)
        parse(document)
        (self._folder / MANIFEST).write_bytes(document)
        check_folder(Folder(self._folder), manifest, nothing_else=True)
        write_stamp(self._folder, document, times(self._folder, manifest))
        self._finished = True


class HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: ReadableBuffer) -> int:
        """Append bytes, or any contiguous array; returns the number of bytes."""
        self._digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    @property
    def sha256(self) -> str:
        """Of what was written so far, in lower-case hex."""
        return self._digest.hexdigest()


def hashed(file: BinaryIO, path: str) -> File:
    """What a manifest says of a file, which is read from its beginning to its end, and left at its beginning."""
    file.seek(0)
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
    file.seek(0)
    return File(path, size, digest.hexdigest())


@contextmanager
def new_bundle(target: Path, *, replace: bool) -> Iterator[Path]:
    """`atomic_directory` for a bundle: nothing but a bundle is ever replaced."""
    if replace and target.exists() and not (target / MANIFEST).is_file() and not _is_empty_folder(target):
        raise OutputError("the target exists and is not a bundle", where=target, do="choose another path")
    with atomic_directory(target, replace=replace) as folder:
        yield folder


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


class _Abandoned(Exception):
    """Tells the folder's context that the block ended before the bundle was finished."""
