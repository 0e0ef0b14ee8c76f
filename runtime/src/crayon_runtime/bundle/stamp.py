"""The install stamp: proof that the files of a folder were hashed here, and have not been touched since.

It holds the SHA-256 of the manifest, and the size and times of every file. The change time is part of it because, unlike the
modification time, no tool can set it: a copied folder never passes for a checked one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from crayon_runtime.bundle.source import STAMP
from crayon_runtime.errors import IntegrityError
from crayon_runtime.files import atomic_file
from crayon_runtime.manifest import Manifest

Times = dict[str, list[int]]
"""By file: its size, modification time and change time, in bytes and nanoseconds."""


def times(folder: Path, manifest: Manifest) -> Times:
    """What the stamp records of the files. Taken before they are hashed, so that a change meanwhile is noticed."""
    found = {}
    for file in manifest.files:
        status = (folder / file.path).stat()
        found[file.path] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return found


def write_stamp(folder: Path, document: bytes, checked: Times) -> None:
    """Record that the files, as they were at these times, are what the manifest says.

    Raises:
        OutputError: the folder cannot be written to.
    """
    with atomic_file(folder / STAMP) as file:
        file.write(json.dumps({"manifest": _sha256(document), "files": checked}, indent=1).encode())


def holds(folder: Path, now: Times) -> bool:
    """Whether these are the files that were hashed here. False without a stamp, or with that of another place."""
    return bool(_read(folder).get("files") == now)


def check_manifest(folder: Path, document: bytes) -> None:
    """Refuse a manifest that is not the one the folder was stamped with. Without a stamp there is nothing to compare.

    Raises:
        IntegrityError: it is another one.
    """
    if _read(folder).get("manifest", _sha256(document)) != _sha256(document):
        raise IntegrityError(
            "manifest.json is not the one that was installed here",
            where=folder,
            do=f"install the bundle again, or remove {STAMP} if you changed the manifest yourself",
        )


def _read(folder: Path) -> dict[str, Any]:
    try:
        stamp = json.loads((folder / STAMP).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _sha256(document: bytes) -> str:
    return hashlib.sha256(document).hexdigest()
