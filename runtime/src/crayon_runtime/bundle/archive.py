"""`.crayon`: a bundle as one file, a zip archive whose entries are stored as they are, the manifest and its signature first.

Nothing is compressed: quantized weights do not shrink, a reader in any language can seek to a file, and no archive can unfold to
more than its own size. Packing the same bundle twice gives the same bytes.
"""

from __future__ import annotations

import stat
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

from crayon_runtime.bundle.checks import read_source
from crayon_runtime.bundle.source import MANIFEST, SIGNATURE, Entry, Folder, OnBytes, read_file, read_signature
from crayon_runtime.errors import BundleError
from crayon_runtime.files import atomic_file
from crayon_runtime.manifest import File

if TYPE_CHECKING:
    import zipfile  # 15 ms; imported where an archive is opened or written

_STORED = 0
_ENCRYPTED = 0x41  # flag bits: encrypted, strongly encrypted
_DAWN = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip archive can hold


class Archive:
    """A bundle as one file. Use it in a `with` block."""

    def __init__(self, path: Path) -> None:
        import zipfile

        self.path = path
        self.read_errors: tuple[type[Exception], ...] = (
            OSError, EOFError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile,
        )  # fmt: skip
        try:
            self._zip = zipfile.ZipFile(path)
        except self.read_errors as e:
            raise BundleError(
                f"not a readable .crayon archive: {e}", where=path, do="fetch it again, or pack the bundle again"
            ) from e
        infos = self._zip.infolist()
        times = Counter(info.filename for info in infos)
        self.entries = {info.filename: Entry(info.file_size, _fault(info, times[info.filename])) for info in infos}

    def open(self, path: str) -> IO[bytes]:
        return self._zip.open(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._zip.close()


def _fault(info: zipfile.ZipInfo, times: int) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if times > 1:
        return "is in the archive more than once"
    if kind not in (0, stat.S_IFREG):
        return "is a symbolic link" if kind == stat.S_IFLNK else "is not a regular file"
    if info.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if info.compress_type != _STORED or info.compress_size != info.file_size:
        return "is compressed; use `crayon pack` to make archives"
    return None


def pack(bundle: Path, archive: Path, *, on_bytes: OnBytes | None = None) -> Path:
    """Write a bundle's folder as one `.crayon` file, in place of an older one. Every hash is checked on the way.

    Returns:
        The path of the archive.

    Raises:
        BundleError: the folder is not exactly what its manifest says.
        OutputError: the archive cannot be written.
    """
    source = Folder(Path(bundle))
    document, manifest = read_source(source)
    signature = read_signature(source)

    def counted(file: File) -> Iterator[bytes]:
        for chunk in read_file(source, file):
            yield chunk
            if on_bytes:
                on_bytes(len(chunk))

    with atomic_file(Path(archive)) as out:
        write_archive(out, document, signature, [(file, counted(file)) for file in manifest.files])
    return Path(archive)


def write_archive(
    out: IO[bytes], document: bytes, signature: bytes | None, files: Iterable[tuple[File, Iterable[bytes]]]
) -> None:
    """Write what a `.crayon` file holds: a manifest, its signature, and the files that the manifest lists, in pieces."""
    import zipfile

    with zipfile.ZipFile(out, "w") as packed:
        packed.writestr(_info(MANIFEST, len(document)), document)
        if signature is not None:
            packed.writestr(_info(SIGNATURE, len(signature)), signature)
        for file, chunks in sorted(files, key=lambda item: item[0].path):
            with packed.open(_info(file.path, file.size), "w") as entry:
                for chunk in chunks:
                    entry.write(chunk)


def _info(path: str, size: int) -> zipfile.ZipInfo:
    import zipfile

    info = zipfile.ZipInfo(path, _DAWN)
    info.file_size = size  # decides between zip and zip64
    info.create_system = 3  # Unix, on any system
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    return info
