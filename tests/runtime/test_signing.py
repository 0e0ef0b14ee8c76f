from __future__ import annotations

import base64
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from nacl.signing import SigningKey as Ed25519Key

from crayon_runtime import cli
from crayon_runtime.bundle import Bundle, install, pack, unpack
from crayon_runtime.errors import BundleError, IntegrityError, InvalidInput, ManifestError, OutputError, SignatureError
from crayon_runtime.signing import KeyStore, TrustedKeys, sign, verify_signature
from tests.runtime.bundles import contents, edit_manifest, flip_byte, write_adapter, write_model

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore.create(tmp_path / "keys")


@pytest.fixture
def adapter(tmp_path: Path, store: KeyStore) -> Bundle:
    """A signed adapter."""
    bundle = Bundle.open(write_adapter(tmp_path / "alice"))
    sign(bundle, store.signing_key())
    return bundle


def signature_file(bundle: Bundle) -> Path:
    return bundle.path / "signature.json"


# Signatures


def test_a_signed_bundle_is_accepted(adapter: Bundle, store: KeyStore) -> None:
    assert verify_signature(adapter, store.trusted) == store.current
    adapter.verify()
    assert verify_signature(Bundle.open(adapter.path), store.trusted).id == store.keys[0].id


def test_signing_again_gives_the_same_bytes(adapter: Bundle, store: KeyStore) -> None:
    before = signature_file(adapter).read_bytes()
    sign(adapter, store.signing_key())
    assert signature_file(adapter).read_bytes() == before


def test_signature_json_is_what_the_documentation_says(adapter: Bundle, store: KeyStore) -> None:
    document = json.loads(signature_file(adapter).read_bytes())
    seed = (store.path / f"{document['key']}.seed").read_bytes()
    expected = Ed25519Key(seed).sign((adapter.path / "manifest.json").read_bytes()).signature
    assert document == {
        "algorithm": "ed25519",
        "key": store.keys[0].id,
        "signature": base64.b64encode(expected).decode(),
    }


def test_a_model_is_signed_with_all_that_is_in_it(tmp_path: Path, store: KeyStore) -> None:
    bundle = Bundle.open(write_model(tmp_path / "m"))
    sign(bundle, store.signing_key())
    bundle.verify()
    verify_signature(bundle, store.trusted)
    flip_byte(bundle.path / "adapters" / "alice" / "adapter.onnx_adapter")
    with pytest.raises(IntegrityError, match="damaged"):
        Bundle.open(bundle.path)


def test_an_unsigned_bundle_is_refused_only_where_keys_are_pinned(tmp_path: Path, store: KeyStore) -> None:
    bundle = Bundle.open(write_adapter(tmp_path / "alice"))
    bundle.verify()
    with pytest.raises(SignatureError, match="not signed"):
        verify_signature(bundle, store.trusted)


def test_an_unknown_key_is_refused(adapter: Bundle, store: KeyStore, tmp_path: Path) -> None:
    other = KeyStore.create(tmp_path / "other")
    with pytest.raises(SignatureError, match=f"signed by {store.keys[0].id}, which is not a key that is trusted"):
        verify_signature(adapter, other.trusted)
    with pytest.raises(SignatureError, match="not a key that is trusted"):
        verify_signature(adapter, TrustedKeys(()))


def test_rotation_keeps_what_was_signed_and_revocation_ends_it(adapter: Bundle, store: KeyStore) -> None:
    old = store.keys[0]
    new = store.rotate()
    assert store.signing_key().id == new.id != old.id
    assert verify_signature(adapter, store.trusted) == old
    revoked = store.revoke(old.id)
    assert revoked.revoked is not None
    with pytest.raises(SignatureError, match=rf"signed by {old.id}, which was revoked on \d{{4}}-\d\d-\d\d"):
        verify_signature(adapter, store.trusted)
    sign(adapter, store.signing_key())
    assert verify_signature(adapter, KeyStore.open(store.path).trusted) == new


def test_a_changed_manifest_is_refused(adapter: Bundle, store: KeyStore) -> None:
    edit_manifest(adapter.path, lambda document: document.update(name="mallory"))
    with pytest.raises(SignatureError, match="changed since the bundle was opened"):
        verify_signature(adapter, store.trusted)
    with pytest.raises(SignatureError, match="changed since the bundle was opened"):
        sign(adapter, store.signing_key())
    with pytest.raises(SignatureError, match=f"not what {store.keys[0].id} signed"):
        verify_signature(Bundle.open(adapter.path), store.trusted)


def test_the_signature_is_over_bytes_not_over_values(adapter: Bundle, store: KeyStore) -> None:
    edit_manifest(adapter.path, lambda document: None)  # the same values, spaced in another way
    with pytest.raises(SignatureError, match="not what"):
        verify_signature(adapter, store.trusted)


def test_the_signature_of_another_bundle_is_refused(adapter: Bundle, store: KeyStore, tmp_path: Path) -> None:
    bob = Bundle.open(write_adapter(tmp_path / "bob", "bob"))
    shutil.copy(signature_file(adapter), bob.path)
    with pytest.raises(SignatureError, match="not what"):
        verify_signature(bob, store.trusted)


def test_a_new_key_cannot_take_the_id_of_a_trusted_one(adapter: Bundle, store: KeyStore, tmp_path: Path) -> None:
    mallory = KeyStore.create(tmp_path / "mallory")
    edit_manifest(adapter.path, lambda document: document.update(name="mallory"))
    forged = Bundle.open(adapter.path)
    sign(forged, mallory.signing_key())
    document = json.loads(signature_file(forged).read_bytes())
    signature_file(forged).write_text(json.dumps(document | {"key": store.keys[0].id}))
    with pytest.raises(SignatureError, match="not what"):
        verify_signature(forged, store.trusted)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"\xff\xfe",
        b"[" * 4000,
        b'{"key": "0123456789abcdef"}',
        b'{"key": "0123456789abcdef", "signature": "AAAA"}',
        b'{"key": "../../etc/passwd", "signature": "' + base64.b64encode(bytes(64)) + b'"}',
        b'{"algorithm": "none", "key": "0123456789abcdef", "signature": "' + base64.b64encode(bytes(64)) + b'"}',
    ],
)
def test_a_malformed_signature_is_refused(adapter: Bundle, store: KeyStore, content: bytes) -> None:
    signature_file(adapter).write_bytes(content)
    with pytest.raises(SignatureError, match="malformed"):
        verify_signature(adapter, store.trusted)


def test_every_flipped_bit_of_a_signature_is_noticed(adapter: Bundle, store: KeyStore) -> None:
    document = json.loads(signature_file(adapter).read_bytes())
    right = base64.b64decode(document["signature"])
    for bit in range(8 * len(right)):
        wrong = bytearray(right)
        wrong[bit // 8] ^= 1 << bit % 8
        signature_file(adapter).write_text(json.dumps(document | {"signature": base64.b64encode(wrong).decode()}))
        with pytest.raises(SignatureError, match="not what"):
            verify_signature(adapter, store.trusted)


# Bundles carry signatures


def test_pack_unpack_and_install_carry_the_signature(adapter: Bundle, store: KeyStore, tmp_path: Path) -> None:
    archive = pack(adapter.path, tmp_path / "alice.crayon")
    assert archive.read_bytes() == pack(adapter.path, tmp_path / "again.crayon").read_bytes()
    with zipfile.ZipFile(archive) as packed:
        assert packed.namelist() == ["manifest.json", "signature.json", "adapter.onnx_adapter"]
    for copy in (unpack(archive, tmp_path / "unpacked"), install(adapter.path, tmp_path / "copied")):
        assert contents(copy.path) == contents(adapter.path)
        assert verify_signature(copy, store.trusted) == store.current


def test_an_archive_in_the_cache_has_its_own_signature(adapter: Bundle, store: KeyStore, tmp_path: Path) -> None:
    unsigned = write_adapter(tmp_path / "unsigned")
    Bundle.open(pack(unsigned, tmp_path / "unsigned.crayon"))
    signed = pack(adapter.path, tmp_path / "signed.crayon")
    assert verify_signature(Bundle.open(signed), store.trusted) == store.current
    store.rotate()
    sign(adapter, store.signing_key())
    assert verify_signature(Bundle.open(pack(adapter.path, signed)), store.trusted) == store.current


def link(path: Path) -> None:
    target = path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(target)


@pytest.mark.parametrize(
    "damage, message",
    [
        (link, "is a symbolic link"),
        (lambda path: path.write_bytes(b" " * 4097), "has 4097 bytes"),
    ],
    ids=["link", "too-long"],
)
def test_a_signature_is_a_small_plain_file(
    adapter: Bundle, store: KeyStore, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(signature_file(adapter))
    attempts: list[Callable[[], object]] = [
        adapter.verify,
        lambda: verify_signature(adapter, store.trusted),
        lambda: pack(adapter.path, tmp_path / "alice.crayon"),
        lambda: install(adapter.path, tmp_path / "copy"),
    ]
    for attempt in attempts:
        with pytest.raises(SignatureError, match=message):
            attempt()
    assert not (tmp_path / "copy").exists()
    assert not (tmp_path / "alice.crayon").exists()


def test_a_manifest_cannot_list_the_signature(adapter: Bundle) -> None:
    entry = {"path": "Signature.json", "size": 0, "sha256": "0" * 64}
    edit_manifest(adapter.path, lambda document: document["files"].append(entry))
    with pytest.raises(ManifestError, match="plain relative path"):
        Bundle.open(adapter.path)


# Keys


def test_a_key_store_is_closed_to_others(store: KeyStore) -> None:
    key = store.keys[0]
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((store.path / f"{key.id}.seed").stat().st_mode) == 0o600
    assert {path.name for path in store.path.iterdir()} == {"keys.json", f"{key.id}.seed"}


def test_secrets_are_not_shown(store: KeyStore) -> None:
    key = store.signing_key()
    seed = (store.path / f"{key.id}.seed").read_bytes()
    assert repr(key) == f"SigningKey({key.id})"
    public = (store.path / "keys.json").read_bytes()
    assert seed not in public
    assert base64.b64encode(seed) not in public


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_seed_that_others_may_read_is_refused(store: KeyStore, mode: int) -> None:
    (store.path / f"{store.keys[0].id}.seed").chmod(mode)
    with pytest.raises(InvalidInput, match="other users may read the seed") as caught:
        store.signing_key()
    assert "chmod 600" in str(caught.value)


def test_a_folder_that_others_may_write_to_is_refused(store: KeyStore, tmp_path: Path) -> None:
    store.path.chmod(0o770)
    with pytest.raises(InvalidInput, match="other users may write"):
        store.signing_key()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(InvalidInput, match="other users may write"):
        KeyStore.create(tmp_path / "open")
    assert list((tmp_path / "open").iterdir()) == []


def test_a_seed_that_is_not_one_is_refused(store: KeyStore, tmp_path: Path) -> None:
    seed = store.path / f"{store.keys[0].id}.seed"
    right = seed.read_bytes()
    for content, message in [(right[:-1], "32 bytes"), (right + b"\n", "32 bytes"), (bytes(32), "not that of its key")]:
        seed.write_bytes(content)
        with pytest.raises(InvalidInput, match=message):
            store.signing_key()
    seed.unlink()
    with pytest.raises(InvalidInput, match="cannot be read"):
        store.signing_key()
    (tmp_path / "seed").write_bytes(right)
    seed.symlink_to(tmp_path / "seed")
    with pytest.raises(InvalidInput, match="cannot be read"):
        store.signing_key()
    seed.unlink()
    os.mkfifo(seed, 0o600)
    with pytest.raises(InvalidInput, match="not a plain file"):
        store.signing_key()


def test_create_keeps_an_existing_store(store: KeyStore) -> None:
    before = contents(store.path)
    with pytest.raises(OutputError, match="already"):
        KeyStore.create(store.path)
    assert contents(store.path) == before


def test_create_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "keys"):
        with pytest.raises(OutputError):
            KeyStore.create(path)


def test_revoking_removes_the_seed_and_is_idempotent(store: KeyStore) -> None:
    first = store.revoke(store.keys[0].id)
    assert not list(store.path.glob("*.seed"))
    assert store.revoke(first.id) == first
    with pytest.raises(InvalidInput, match="every key is revoked"):
        store.signing_key()
    assert store.rotate() == store.current
    store.signing_key()
    with pytest.raises(InvalidInput, match="no key 'nobody'"):
        store.revoke("nobody")


def test_a_store_that_was_opened_before_sees_what_others_changed(store: KeyStore) -> None:
    other = KeyStore.open(store.path)
    new = other.rotate()
    store.revoke(store.keys[0].id)
    assert [key.id for key in store.keys] == [key.id for key in KeyStore.open(store.path).keys]
    assert store.current == new


def test_trusted_keys_come_back_as_written(store: KeyStore, tmp_path: Path) -> None:
    store.rotate()
    store.revoke(store.keys[0].id)
    assert TrustedKeys.read(store.path / "keys.json") == store.trusted
    store.trusted.write(tmp_path / "pinned.json")
    assert TrustedKeys.read(tmp_path / "pinned.json") == store.trusted


def test_lists_of_keys_that_lie_are_refused(store: KeyStore, tmp_path: Path) -> None:
    path = store.path / "keys.json"
    (entry,) = json.loads(path.read_bytes())["keys"]
    other = base64.b64encode(bytes(Ed25519Key.generate().verify_key)).decode()
    for content, message in [
        (json.dumps({"keys": [entry | {"public": other}]}), "not the id of its key"),
        (json.dumps({"keys": [entry, entry | {"revoked": entry["created"]}]}), "listed twice"),
        (json.dumps({"keys": [entry | {"public": "AAAA"}]}), "not a list of keys"),
        ("{", "not a list of keys"),
        ("[" * 100_000, "not a list of keys"),
    ]:
        path.write_text(content)
        with pytest.raises(InvalidInput, match=message):
            TrustedKeys.read(path)
    with pytest.raises(InvalidInput, match="cannot be read"):
        TrustedKeys.read(tmp_path / "absent.json")
    with pytest.raises(InvalidInput, match="cannot be read"):
        KeyStore.open(tmp_path)


# crayon keys, crayon verify --keys


def crayon(*args: str | Path) -> int:
    verbs = [
        EntryPoint("keys", "crayon_runtime.cli.keys:keys", cli.GROUP),
        EntryPoint("verify", "crayon_runtime.cli.bundle:verify", cli.GROUP),
    ]
    return cli.main([str(arg) for arg in args], verbs=verbs)


def test_the_life_of_a_key(tmp_path: Path, capsys: Output) -> None:
    store, bundle, pinned = tmp_path / "keys", write_adapter(tmp_path / "alice"), tmp_path / "pinned.json"
    assert crayon("keys", "create", store) == 0
    old = capsys.readouterr().out.strip()
    assert crayon("verify", bundle, "--keys", store / "keys.json") == 1
    assert "not signed" in capsys.readouterr().err
    assert crayon("keys", "sign", store, bundle) == 0
    shutil.copy(store / "keys.json", pinned)
    capsys.readouterr()
    assert crayon("verify", bundle, "--keys", pinned, "--json") == 0
    assert json.loads(capsys.readouterr().out)["signed_by"] == old
    assert crayon("keys", "rotate", store, "--json") == 0
    new = json.loads(capsys.readouterr().out)["key"]["id"]
    assert crayon("keys", "list", store) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [(line.split()[0], line.split()[3]) for line in lines[1:]] == [(old, "valid"), (new, "signs")]
    assert crayon("keys", "revoke", store, old) == 0
    capsys.readouterr()
    assert crayon("keys", "list", store, "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["current"] == new
    assert [key["revoked"] is None for key in listed["keys"]] == [False, True]
    assert crayon("verify", bundle, "--keys", pinned) == 0  # this device has not heard of it
    assert crayon("verify", bundle, "--keys", store / "keys.json") == 1
    assert "was revoked" in capsys.readouterr().err


def test_what_cannot_be_signed(tmp_path: Path, store: KeyStore, adapter: Bundle, capsys: Output) -> None:
    archive = pack(adapter.path, tmp_path / "alice.crayon")
    assert crayon("keys", "sign", store.path, archive) == 2
    assert crayon("keys", "sign", store.path, tmp_path / "keys") == 1
    assert "not a bundle" in capsys.readouterr().err
    assert crayon("keys", "list", tmp_path / "absent") == 1
    assert "crayon keys create" in capsys.readouterr().err


def test_signature_errors_are_bundle_errors() -> None:
    assert issubclass(SignatureError, BundleError)
