"""Prototypes: which of them are S, and files of them that lie. Judge of the choice: its definition, one cluster at a time, in fractions."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from crayon_runtime.bundle import Bundle, pack, write_adapter, write_adapter_archive
from crayon_runtime.errors import AdapterError, BundleError, IntegrityError, InvalidInput, ManifestError
from crayon_runtime.files import sha256_file
from crayon_runtime.manifest import MOST_PROTOTYPES, BlendedFrom
from crayon_runtime.pool import Pool, PoolManifest, pool_version
from crayon_runtime.prototypes import Prototypes, choose, read_prototypes
from tests.runtime import bundles, pools
from tests.support import ROOT

CLUSTERS = np.repeat([0, 1, 3], [4, 2, 30])
ORIGIN = BlendedFrom("random", "0123456789abcdef", 7)
TENSORS: dict[str, Any] = {
    "m.lora_A.weight": ((2, 1), lambda: np.ones((2, 1), np.float32)),
    "m.lora_B.weight": ((1, 2), lambda: np.ones((1, 2), np.float32)),
}


def counts(alpha: list[float], size: int, clusters: Any = CLUSTERS) -> list[int]:
    chosen = choose(alpha, clusters, size)
    assert chosen.dtype == np.int64
    assert (np.diff(chosen) > 0).all()
    for cluster in set(np.asarray(clusters)[chosen].tolist()):
        first = int(np.flatnonzero(clusters == cluster)[0])
        own = chosen[np.asarray(clusters)[chosen] == cluster]
        np.testing.assert_array_equal(own, first + np.arange(len(own)), "the first ones of a cluster")
    return np.bincount(np.asarray(clusters)[chosen], minlength=len(alpha)).tolist()


# Which of them are S


@pytest.mark.parametrize(
    "alpha, size, expected",
    [
        ([1, 0, 0, 0], 3, [3, 0, 0, 0]),
        ([0.25, 0.25, 0.0, 0.5], 4, [1, 1, 0, 2]),
        ([0.3, 0.3, 0.0, 0.4], 5, [2, 1, 0, 2]),  # 1.5, 1.5, 2: of equal remainders the earlier
        ([0.9, 0.05, 0.0, 0.05], 10, [4, 2, 0, 4]),  # 9 of a cluster of 4: the others give what it lacks
        ([1.0, 0.0, 0.0, 0.0], 7, [4, 2, 0, 1]),  # those without a weight give the rest, evenly
        ([0.0, 0.0, 1.0, 0.0], 4, [2, 1, 0, 1]),  # a cluster that has none
        ([-1.0, 0.5, 0.0, -0.5], 3, [1, 2, 0, 0]),  # negative weights count for nothing
        ([0.0, 0.0, 0.0, 0.0], 3, [1, 1, 0, 1]),
        ([0.2, 0.3, 0.1, 0.4], 36, [4, 2, 0, 30]),
        ([0.2, 0.3, 0.1, 0.4], 1000, [4, 2, 0, 30]),
        ([0.2, 0.3, 0.1, 0.4], 0, [0, 0, 0, 0]),
    ],
)
def test_each_cluster_gives_its_share(alpha: list[float], size: int, expected: list[int]) -> None:
    assert counts(alpha, size) == expected


def test_shares_are_within_one_of_alpha() -> None:
    clusters = np.repeat(np.arange(8), 100)
    for seed in range(20):
        alpha = np.random.default_rng(seed).dirichlet(np.ones(8)).round(4)
        total = sum(map(Fraction, map(str, alpha)))
        for size in (1, 7, 64, 100):
            found = counts(alpha.tolist(), size, clusters)
            assert sum(found) == size
            assert all(abs(n - size * Fraction(str(a)) / total) < 1 for n, a in zip(found, alpha, strict=True))


def test_what_cannot_be_chosen() -> None:
    for alpha, size in (([1.0, 0, 0], 3), ([1.0, 0, 0, 0], -1), ([1.0, float("nan"), 0, 0], 3)):
        with pytest.raises(InvalidInput):
            choose(alpha, CLUSTERS, size)


def test_s_of_one_alpha(tmp_path: Path) -> None:
    made = pools.prototypes()
    picked = pools.write(tmp_path / "pool", server=made).prototypes.picked([0.5, 0.0, 0.5], 3)  # type: ignore[union-attr]
    assert picked is not None
    assert picked.model == "a-server-llm"
    assert picked.states.dtype == np.float32
    np.testing.assert_array_equal(picked.states, made.states[[0, 1, 5]])
    np.testing.assert_array_equal(picked.mean, made.mean)
    assert made.picked([0.5, 0.0, 0.5], 0) is None


# In a pool


def test_a_pool_with_prototypes(tmp_path: Path) -> None:
    made = pools.prototypes()
    plain, pool = pools.write(tmp_path / "plain"), pools.write(tmp_path / "pool", server=made)
    assert (plain.prototypes, plain.manifest.prototypes) == (None, None)
    info, found = pool.manifest.prototypes, Pool.open(pool.path, verify=True).prototypes
    assert info is not None
    assert (info.model, info.count, info.part) == ("a-server-llm", 6, "answer")
    assert found is not None
    for name in ("states", "clusters", "mean"):
        np.testing.assert_array_equal(getattr(found, name), getattr(made, name))
    assert isinstance(found.states.base.base, np.memmap)
    assert "prototypes.safetensors" in {file.path for file in pool.manifest.files}
    other = pools.write(tmp_path / "other", server=pools.prototypes(seed=1))
    assert len({p.manifest.version for p in (plain, pool, other)}) == 3


def rewrite(path: Path, edit: Any, origin: str | None = None) -> None:
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() if origin is None else {"origin": origin}
    edit(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, metadata)


def pool_of(folder: Path, edit: Any = lambda _: None, origin: str | None = None) -> Path:
    """A pool whose hashes are right, whatever is in it."""
    pool = pools.write(folder / "pool", server=pools.prototypes())
    path = pool.path / "prototypes.safetensors"
    rewrite(path, edit, origin)
    document = json.loads((pool.path / "pool.json").read_bytes())
    (entry,) = (file for file in document["files"] if file["path"] == path.name)
    entry |= {"size": path.stat().st_size, "sha256": sha256_file(path)}
    document["version"] = pool_version(msgspec.convert(document, PoolManifest))
    (pool.path / "pool.json").write_text(json.dumps(document))
    return pool.path


@pytest.mark.parametrize(
    "edit, error, message",
    [
        (lambda t: t.update(states=t["states"][:5]), AdapterError, "expected"),
        (lambda t: t.update(states=t["states"][:, :7]), AdapterError, r"expected .*\(6, 8\)"),
        (lambda t: t.update(mean=t["mean"][:7]), AdapterError, "expected"),
        (lambda t: t.pop("mean"), AdapterError, "expected"),
        (lambda t: t.update(more=t["mean"]), AdapterError, "expected"),
        (lambda t: t["states"].__setitem__((3, 2), np.nan), IntegrityError, "NaN or infinity"),
        (lambda t: t["mean"].__setitem__(0, np.inf), IntegrityError, "NaN or infinity"),
        (lambda t: t.update(clusters=np.int32([0, 0, 1, 0, 1, 2])), IntegrityError, "not in order, or not there"),
        (lambda t: t.update(clusters=np.int32([0, 0, 0, 1, 1, 3])), IntegrityError, "not in order, or not there"),
        (lambda t: t.update(clusters=np.int32([-1, 0, 0, 1, 1, 2])), IntegrityError, "not in order, or not there"),
        (lambda t: t.update(clusters=t["clusters"].astype(np.float32)), IntegrityError, "no numbers of the kind"),
        (lambda t: t.update(states=t["states"].astype(np.int32)), IntegrityError, "no numbers of the kind"),
        (lambda t: t.update(states=t["states"].astype(np.float64)), IntegrityError, "can be read"),
    ],
)
def test_prototypes_of_a_pool_that_lie(tmp_path: Path, edit: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Pool.open(pool_of(tmp_path, edit))


def test_prototypes_of_another_base_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"of another base \(cccccccccccc…; expected bbbbbbbbbbbb…\)"):
        Pool.open(pool_of(tmp_path, origin="c" * 64))


def test_a_pool_whose_prototypes_are_missing(tmp_path: Path) -> None:
    pool = pools.write(tmp_path / "pool", server=pools.prototypes())
    (pool.path / "prototypes.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"prototypes.safetensors cannot be read"):
        Pool.open(pool.path)
    document = json.loads((pools.write(tmp_path / "plain").path / "pool.json").read_bytes())
    document["prototypes"] = {"model": "m", "count": 3, "part": "answer"}
    (tmp_path / "plain/pool.json").write_text(json.dumps(document))
    with pytest.raises(ManifestError, match=r"does not list prototypes.safetensors"):
        Pool.open(tmp_path / "plain")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_states_that_no_file_can_hold(tmp_path: Path, value: float) -> None:
    made = pools.prototypes()
    states = made.states.astype(np.float32)
    states[2, 2] = value
    wrong = type(made)(states, made.clusters, made.mean, made.model)
    with pytest.raises(InvalidInput, match="NaN, or a number that is too large for float16"):
        pools.write(tmp_path / "pool", server=wrong)
    assert list(tmp_path.iterdir()) == []


# In an adapter


def some(count: int = 5, d: int = 8) -> Prototypes:
    made = pools.prototypes((0,) * count, d)
    return Prototypes(made.states.astype(np.float32), made.mean, "a-server-llm")


def adapter(out: Path, prototypes: Prototypes | None) -> Bundle:
    return write_adapter(out, TENSORS, name="alice", base_fingerprint=bundles.BASE, pool=ORIGIN, prototypes=prototypes)


def test_an_adapter_brings_them_along(tmp_path: Path) -> None:
    bundle = adapter(tmp_path / "alice", some())
    info = bundle.as_adapter.prototypes
    assert info is not None
    assert (info.file, info.count, info.model) == ("prototypes.safetensors", 5, "a-server-llm")
    bundle.verify()
    found = read_prototypes(bundle, 8)
    assert found is not None
    assert found.states.dtype == found.mean.dtype == np.float32
    assert found.states.flags.owndata
    np.testing.assert_array_equal(found.states, some().states)
    np.testing.assert_array_equal(found.mean, some().mean)
    assert found.model == "a-server-llm"
    assert read_prototypes(adapter(tmp_path / "bob", None), 8) is None
    with pytest.raises(ManifestError, match="is a model, not an adapter"):
        read_prototypes(Bundle.open(bundles.write_model(tmp_path / "model")), 8)


def test_an_archive_is_the_packed_bundle_with_them_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"name": "alice", "base_fingerprint": bundles.BASE, "pool": ORIGIN, "prototypes": some()}
    write_adapter_archive(tmp_path / "direct.crayon", TENSORS, **options)
    pack(write_adapter(tmp_path / "alice", TENSORS, **options).path, tmp_path / "packed.crayon")
    assert (tmp_path / "direct.crayon").read_bytes() == (tmp_path / "packed.crayon").read_bytes()


def test_the_same_prototypes_have_the_same_bytes_in_every_process() -> None:
    program = """
        import hashlib
        from tests.runtime.test_prototypes import some
        print(hashlib.sha256(some().to_bytes("b" * 64, "0" * 16)).hexdigest())
    """.replace("\n        ", "\n")
    run = [subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True) for _ in range(3)]
    assert len({done.stdout for done in run}) == 1


@pytest.mark.parametrize(
    "edit, origin, error, message",
    [
        (None, "c" * 64 + f" {ORIGIN.version}", AdapterError, "of another base"),
        (None, bundles.BASE + " " + "f" * 16, AdapterError, r"of another version of the pool \(ffff.*expected 0123"),
        (None, bundles.BASE, AdapterError, "of another version of the pool"),
        (None, "", AdapterError, "of another base"),
        (lambda t: t["states"].__setitem__((1, 1), np.inf), None, IntegrityError, "NaN or infinity"),
        (lambda t: t["mean"].__setitem__(1, np.nan), None, IntegrityError, "NaN or infinity"),
        (lambda t: t.update(states=t["states"][:4]), None, AdapterError, r"expected .*\(5, 8\)"),
        (lambda t: t.update(states=t["states"][:, :4], mean=t["mean"][:4]), None, AdapterError, r"expected .*\(5, 8\)"),
        (lambda t: t.update(states=t["states"].astype(np.int32)), None, IntegrityError, "no numbers of the kind"),
        (lambda t: t.update(more=np.zeros(9000, np.float16)), None, AdapterError, "take less room than this"),
    ],
)
def test_prototypes_of_an_adapter_that_lie(
    tmp_path: Path, edit: Any, origin: str | None, error: type[Exception], message: str
) -> None:
    bundle = adapter(tmp_path / "alice", some())
    path = bundle.path / "prototypes.safetensors"
    rewrite(path, edit or (lambda _: None), origin)

    def relist(document: dict[str, Any]) -> None:
        document["files"][1] |= {"size": path.stat().st_size, "sha256": sha256_file(path)}

    bundles.edit_manifest(bundle.path, relist)
    with pytest.raises(error, match=message):
        read_prototypes(Bundle.open(bundle.path, verify=True), 8)


def test_prototypes_for_states_of_another_size(tmp_path: Path) -> None:
    bundle = adapter(tmp_path / "alice", some())
    for size in (4, 9):
        with pytest.raises(AdapterError):
            read_prototypes(bundle, size)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"file": "other.safetensors"}, "`files` does not list"),
        ({"file": "../prototypes.safetensors"}, "`files` does not list"),
        ({"count": 0}, "Expected `int` >= 1"),
        ({"count": MOST_PROTOTYPES + 1}, "Expected `int` <= 1024"),
        ({"model": "m" * 201}, "length <= 200"),
    ],
)
def test_manifests_that_lie_about_them(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    bundle = adapter(tmp_path / "alice", some())
    bundles.edit_manifest(bundle.path, lambda document: document["prototypes"].update(changes))
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle.path)
