"""Who made a bundle or a pool: Ed25519 signatures over manifests, the keys of a server, and those that a device trusts.

A manifest holds the SHA-256 of every other file, so whoever signs its bytes signs the bundle. The signature lies beside it, in
`signature.json`: the key's id, and the signature in base64. That of a pool is over its `pool.json`. A key's id is the beginning of the SHA-256 of its public half, so an
id cannot be given to another key.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey as Ed25519Key
from nacl.signing import VerifyKey

from crayon_runtime.bundle import Bundle
from crayon_runtime.bundle.source import SIGNATURE, Folder, read_manifest, read_signature
from crayon_runtime.errors import InvalidInput, OutputError, SignatureError
from crayon_runtime.files import atomic_file

KEYS = "keys.json"
"""The public half of a key store; a copy of it is what a device trusts."""

_SEED_SIZE = 32
_LARGEST_KEYS = 1 << 20

KeyId = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}$", description="of the SHA-256 of the public key")]


class Key(Struct, frozen=True, kw_only=True):
    """The public half of a key."""

    id: KeyId
    public: Annotated[bytes, Meta(min_length=32, max_length=32, description="Ed25519, base64")]
    created: datetime
    revoked: datetime | None = None


class Signature(Struct, frozen=True, kw_only=True):
    """signature.json."""

    algorithm: Literal["ed25519"] = "ed25519"
    key: KeyId
    signature: Annotated[
        bytes, Meta(min_length=64, max_length=64, description="over the bytes of manifest.json, base64")
    ]


class _KeyList(Struct, frozen=True):
    keys: list[Key]


@dataclass(frozen=True)
class TrustedKeys:
    """The keys whose signatures are accepted, and those that are revoked."""

    keys: tuple[Key, ...]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> TrustedKeys:
        """Read a `keys.json`.

        Raises:
            InvalidInput: it cannot be read, or an id in it is not that of its key.
        """
        return cls(_read_keys(Path(path)))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a `keys.json`, in place of an older one."""
        with atomic_file(Path(path)) as file:
            file.write(msgspec.json.format(msgspec.json.encode(_KeyList(list(self.keys))), indent=1) + b"\n")

    def get(self, key_id: str) -> Key | None:
        return next((key for key in self.keys if key.id == key_id), None)


@dataclass(frozen=True)
class SigningKey:
    """The secret half of a key. It is never printed."""

    id: str
    _key: Ed25519Key

    def sign(self, message: bytes) -> bytes:
        """64 bytes; the same for the same message."""
        return self._key.sign(message).signature

    def __repr__(self) -> str:
        return f"SigningKey({self.id})"


def sign(bundle: Bundle, key: SigningKey) -> None:
    """Sign a bundle in its folder, in place of an older signature.

    Raises:
        SignatureError: the manifest was changed since the bundle was opened.
        OutputError: the folder cannot be written to.
    """
    with atomic_file(bundle.path / SIGNATURE) as file:
        file.write(sign_document(_manifest(bundle), key))


def sign_document(document: bytes, key: SigningKey) -> bytes:
    """The content of a signature.json for a manifest."""
    signature = Signature(key=key.id, signature=key.sign(document))
    return msgspec.json.format(msgspec.json.encode(signature), indent=1) + b"\n"


def verify_signature(bundle: Bundle, trusted: TrustedKeys) -> Key:
    """Check that a trusted key has signed the manifest that the bundle was opened with.

    The files are what the manifest says since the bundle was opened. An adapter inside a signed model needs no signature of its
    own: the model's manifest lists its files.

    Returns:
        The key that signed it.

    Raises:
        SignatureError: the bundle is not signed, or by an unknown or a revoked key, or was changed since.
    """
    content = read_signature(Folder(bundle.path))
    if content is None:
        raise SignatureError(
            "the bundle is not signed",
            where=bundle.path,
            do="fetch it from a server that signs; or sign it with `crayon keys sign`, if you made it",
        )
    return verify_document(_manifest(bundle), content, trusted, where=str(bundle.path))


def verify_document(document: bytes, signature: bytes, trusted: TrustedKeys, *, where: str) -> Key:
    """Check that a trusted key has signed a manifest.

    Args:
        signature: the content of a signature.json.
        where: what the manifest is of, for errors.

    Returns:
        The key that signed it.

    Raises:
        SignatureError: the signature is malformed, of an unknown or a revoked key, or of other bytes.
    """
    try:
        read = msgspec.json.decode(signature, type=Signature)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        raise SignatureError(
            f"{SIGNATURE} is malformed: {e}", where=where, do="fetch it again, or sign it again"
        ) from None
    key = trusted.get(read.key)
    if key is None:
        raise SignatureError(
            f"it is signed by {read.key}, which is not a key that is trusted here",
            where=where,
            do="ask whoever runs the server for its present keys.json; do not take it from the bundle's source",
        )
    if key.revoked is not None:
        raise SignatureError(
            f"it is signed by {key.id}, which was revoked on {key.revoked:%Y-%m-%d}",
            where=where,
            do="fetch it again from its server, which signs with another key now",
        )
    try:
        VerifyKey(key.public).verify(document, read.signature)
    except BadSignatureError:
        raise SignatureError(
            f"the manifest is not what {key.id} signed",
            where=where,
            do="fetch it again; if it stays so, somebody changed it on the way",
        ) from None
    return key


def _manifest(bundle: Bundle) -> bytes:
    document = read_manifest(Folder(bundle.path))
    try:
        same = json.loads(document) == bundle.document
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise SignatureError("the manifest was changed since the bundle was opened", where=bundle.path)
    return document


class KeyStore:
    """The keys of a server: a folder of `keys.json`, which is public, and a secret `ID.seed` for each key that may sign.

    The newest key signs. Older ones stay trusted until they are revoked, so devices and bundles need not change at once.
    """

    def __init__(self, path: Path, keys: tuple[Key, ...]) -> None:
        self.path = path
        self.keys = keys
        """From the oldest to the newest."""

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> KeyStore:
        """Make the folder, closed to others, and its first key.

        Raises:
            OutputError: there is a key store already, or the folder cannot be written.
            InvalidInput: the folder exists, and others may write to it.
        """
        path = Path(path)
        with _output_errors(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_folder(path)
        store = cls(path, ())
        with store._changing():
            if os.path.lexists(path / KEYS):
                raise OutputError(
                    "there is a key store already", where=path, do="make another key with `crayon keys rotate`"
                )
            store._add()
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> KeyStore:
        """Raises InvalidInput: there is no key store, or its `keys.json` is damaged."""
        return cls(Path(path), _read_keys(Path(path) / KEYS))

    @property
    def trusted(self) -> TrustedKeys:
        """What a device that trusts this server should know."""
        return TrustedKeys(self.keys)

    @property
    def current(self) -> Key | None:
        """The key that signs: the newest that is not revoked."""
        return next((key for key in reversed(self.keys) if key.revoked is None), None)

    def signing_key(self) -> SigningKey:
        """The secret half of the current key.

        Raises:
            InvalidInput: every key is revoked; the seed is missing, readable by others, or that of another key; or others may
                write to the folder.
        """
        if self.current is None:
            raise InvalidInput("every key is revoked", where=self.path, do="make a new one with `crayon keys rotate`")
        path = self._seed(self.current.id)
        key = Ed25519Key(_read_seed(path))
        _check_folder(self.path)
        if bytes(key.verify_key) != self.current.public:
            raise InvalidInput("the seed is not that of its key", where=path, do="make a new key: `crayon keys rotate`")
        return SigningKey(self.current.id, key)

    def rotate(self) -> Key:
        """Make a new key, which signs from now on. Signatures of the older ones stay valid."""
        with self._changing():
            self.keys = _read_keys(self.path / KEYS)
            return self._add()

    def revoke(self, key_id: str) -> Key:
        """Declare a key invalid, with everything that it signed, and remove its seed. Devices know when they get `keys.json`.

        Raises:
            InvalidInput: there is no such key.
        """
        with self._changing():
            self.keys = _read_keys(self.path / KEYS)
            known = self.trusted.get(key_id)
            if known is None:
                ids = ", ".join(key.id for key in self.keys)
                raise InvalidInput(f"there is no key {key_id!r}", where=self.path, do=f"choose one of: {ids}")
            revoked = msgspec.structs.replace(known, revoked=known.revoked or _now())
            self._write(revoked if key.id == key_id else key for key in self.keys)
            with _output_errors(self._seed(key_id)):
                self._seed(key_id).unlink(missing_ok=True)
        return revoked

    def _add(self) -> Key:
        key = Ed25519Key.generate()
        public = bytes(key.verify_key)
        added = Key(id=_key_id(public), public=public, created=_now())
        with _output_errors(self._seed(added.id)):
            fd = os.open(self._seed(added.id), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(bytes(key))
                file.flush()
                os.fsync(fd)
        self._write([*self.keys, added])
        return added

    def _write(self, keys: Iterable[Key]) -> None:
        changed = tuple(keys)
        TrustedKeys(changed).write(self.path / KEYS)
        self.keys = changed

    def _seed(self, key_id: str) -> Path:
        return self.path / f"{key_id}.seed"

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One process at a time changes a store."""
        with _output_errors(self.path):
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _key_id(public: bytes) -> str:
    return hashlib.sha256(public).hexdigest()[:16]


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _read_keys(path: Path) -> tuple[Key, ...]:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_KEYS + 1)
    except OSError as e:
        raise InvalidInput(
            f"the keys cannot be read: {e.strerror}", where=path, do="make a key store with `crayon keys create`"
        ) from None
    try:
        keys = msgspec.json.decode(content[:_LARGEST_KEYS], type=_KeyList).keys
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        raise InvalidInput(f"this is not a list of keys: {e}", where=path, do=f"give the {KEYS} of a server") from None
    ids = {key.id for key in keys}
    wrong = next((key.id for key in keys if key.id != _key_id(key.public)), None)
    if wrong is not None or len(ids) != len(keys):
        problem = "a key is listed twice" if wrong is None else f"{wrong} is not the id of its key"
        raise InvalidInput(problem, where=path, do="fetch the file again; do not trust this one")
    return tuple(keys)


def _check_folder(path: Path) -> None:
    if path.stat().st_mode & 0o022:
        raise InvalidInput("other users may write to the key store", where=path, do=f"chmod 700 {path}")


def _read_seed(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        raise InvalidInput(
            f"the seed of the key cannot be read: {e.strerror}",
            where=path,
            do="run as the user who made the key store, or make a new key with `crayon keys rotate`",
        ) from None
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInput("the seed of the key is not a plain file", where=path)
        if status.st_mode & 0o077:
            raise InvalidInput(
                "other users may read the seed of the key",
                where=path,
                do=f"chmod 600 {path}; if others have used this machine, rotate and revoke the key",
            )
        seed = file.read(_SEED_SIZE + 1)
    if len(seed) != _SEED_SIZE:
        raise InvalidInput(f"a seed has {_SEED_SIZE} bytes", where=path, do="make a new key with `crayon keys rotate`")
    return seed


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OutputError(f"the key store cannot be written: {e.strerror}", where=path, do="choose another path") from e
