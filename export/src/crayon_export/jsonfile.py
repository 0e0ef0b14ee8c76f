"""JSON objects from files that strangers wrote."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from crayon_runtime.errors import CheckpointError

_LIMIT = 64 << 20
"""Bytes; the largest published index or tokenizer configuration is below 20 MB."""


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is no such file, it is absurdly large, not JSON, not an object, or names a key twice.
    """
    try:
        if path.stat().st_size > _LIMIT:
            raise CheckpointError(f"it is {path.stat().st_size} bytes of JSON; the limit is {_LIMIT}", where=path)
        document = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path.name}", where=path.parent, do="give a complete folder") from None
    except OSError as e:
        raise CheckpointError(f"cannot read it: {e.strerror}", where=path) from None
    return parse(document, where=path)


def parse(document: bytes, *, where: str | Path) -> dict[str, Any]:
    """The object in a JSON document; errors as `read`."""
    try:
        value = json.loads(document, object_pairs_hook=_unique)
    except _DuplicateKey as e:
        raise CheckpointError(f"it names {e.args[0]!r:.200} twice", where=where) from None
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"not JSON: {e}", where=where, do="download the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"it holds {type(value).__name__}, not a JSON object", where=where)
    return value


class _DuplicateKey(Exception):
    """A JSON object has the same key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _DuplicateKey(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found
