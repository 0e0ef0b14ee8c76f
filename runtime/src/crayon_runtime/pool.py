"""A pool: N LoRAs of one base model, and what tells how much a user's texts belong to each of them.

POOL/pool.json                 `PoolManifest`
POOL/projection.safetensors    float32, the fields of `affinity.Projection`
POOL/adapters/000/ ...         PEFT folders: adapter_config.json, adapter_model.safetensors
POOL/typical.jsonl             optional: typical texts of each cluster, {"cluster", "prompt", "completion", "position"?}
POOL/prototypes.safetensors    optional: what the server LLM says to such texts, embedded; see `crayon_runtime.prototypes`
POOL/prototypes.jsonl          with it: {"cluster", "prompt", "output"} of each prototype, for people
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import numpy as np
from msgspec import Meta, Struct

from crayon_runtime import affinity
from crayon_runtime.affinity import Projection, Weighting
from crayon_runtime.blend import Blended, Mode, write_adapter_bundle
from crayon_runtime.errors import AdapterError, BundleError, IntegrityError, InvalidInput, ManifestError, OutputError
from crayon_runtime.files import atomic_directory, sha256_file
from crayon_runtime.manifest import (
    BASE_FINGERPRINT,
    BlendedFrom,
    Count,
    File,
    Name,
    PoolVersion,
    Serial,
    ServerModel,
    Sha256,
    check_relative,
    check_version,
)
from crayon_runtime.mapped import read_mapped
from crayon_runtime.prototypes import FILE as PROTOTYPES
from crayon_runtime.prototypes import ClusteredPrototypes, read_clustered

if TYPE_CHECKING:
    import numpy.typing as npt

    Matrix = npt.NDArray[Any]
    Pair = tuple[Matrix, Matrix]

__all__ = [
    "Blended",
    "Embedding",
    "Mode",
    "Pool",
    "PoolManifest",
    "PoolPrototypes",
    "TypicalText",
    "adapter_folder",
    "pool_name",
    "pool_version",
    "write_adapter_bundle",
    "write_pool",
]

MANIFEST = "pool.json"
PROJECTION = "projection.safetensors"
TYPICAL = "typical.jsonl"
OUTPUTS = "prototypes.jsonl"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class Embedding(Struct, frozen=True):
    """What of a text is embedded, always with the un-customized base."""

    tap_layer: Annotated[int, Meta(ge=0, description="index into transformers' hidden_states")]
    part: Literal["answer", "all", "prompt"]
    residual: Annotated[bool, Meta(description="freed of what the prompt predicts; part is then answer")]


class TypicalText(TypedDict):
    """A line of typical.jsonl."""

    cluster: Annotated[int, Meta(ge=0)]
    prompt: str
    completion: str
    position: NotRequired[list[float]]
    """z of the text at unit length, [k]: among the indicators."""


class PoolPrototypes(Struct, frozen=True):
    """What is in prototypes.safetensors."""

    model: ServerModel
    count: Annotated[int, Meta(ge=1, description="T, of all clusters together")]
    part: Annotated[Literal["answer"], Meta(description="what of a text is embedded, by the un-customized base")] = (
        "answer"
    )


class PoolManifest(Struct, frozen=True, kw_only=True, tag_field="kind", tag="pool"):
    """pool.json."""

    schema_version: str
    name: Name
    version: PoolVersion = ""
    """See `pool_version`."""
    serial: Serial = 0
    base_fingerprint: Annotated[Sha256, Meta(description="of the base model that all adapters were trained on")]
    adapters: Count
    rank: Count
    scale: Annotated[float, Meta(description="alpha / r: what B A is multiplied by")]
    targets: Annotated[list[str], Meta(min_length=1, description="modules, as model.layers.0.self_attn.q_proj")]
    embedding: Embedding
    dimensions: Annotated[int, Meta(ge=1, description="k, of the space that the indicators are in")]
    weighting: Weighting
    blend: Annotated[Mode, Meta(description="how the pool was trained to be blended")]
    grouped: Annotated[bool, Meta(description="whether the data said which texts belong together")]
    settings: Annotated[dict[str, Any], Meta(description="every choice and seed of the build")]
    prototypes: Annotated[PoolPrototypes | None, Meta(description="null: the pool has none")] = None
    files: list[File] = []

    @property
    def origin(self) -> BlendedFrom:
        """What an adapter that is blended from this pool says of it."""
        return BlendedFrom(self.name, self.version, self.serial)


@dataclass(frozen=True)
class Pool:
    """A pool whose files are in a folder of this machine. Adapters stay in their files until they are used."""

    path: Path
    manifest: PoolManifest = field(repr=False)
    projection: Projection = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> Pool:
        """Open a pool and check it: its manifest, the size of every file, and that the adapters are of its base and shape.

        Args:
            verify: also check every hash, and that no number in an adapter is NaN or infinite.

        Raises:
            ManifestError: there is no pool, or its manifest contradicts itself.
            IntegrityError: a file is missing, damaged or of another build.
            AdapterError: an adapter is of another base, or holds NaN or infinity; or the prototypes are of another base or size.
        """
        path = Path(path).resolve()
        manifest = _read_manifest(path)
        for file in manifest.files:
            _check_file(path, file, verify)
        pool = cls(path, manifest, read_projection(path / PROJECTION, manifest))
        _ = pool.prototypes
        for n in range(manifest.adapters):
            lora = pool.lora(n)
            if verify:
                _check_finite(lora, path / adapter_folder(n))
        return pool

    def lora(self, n: int) -> dict[str, Pair]:
        """Adapter n: by module A [r, in] and B [out, r], memory-mapped, float32 or float16, without the scale."""
        if not 0 <= n < self.manifest.adapters:
            raise InvalidInput(f"there is no adapter {n}; this pool has {self.manifest.adapters}", where=self.path)
        return self._loras[n]

    def blend(self, alpha: npt.ArrayLike, mode: Mode | None = None, rank: int | None = None) -> Blended:
        """The adapter of one alpha; nothing is computed before its tensors are asked for.

        Args:
            alpha: float [N].
            mode: see `Blended`; None: that which the pool was trained with.
            rank: of "svd"; None: the rank of one adapter.

        Raises:
            InvalidInput: alpha, mode or rank cannot be used.
        """
        weights = affinity.check_alpha(alpha, self.manifest.adapters, signed=self.manifest.weighting.signed)
        return Blended.of(
            [self.lora(n) for n in range(self.manifest.adapters)],
            weights,
            self.manifest.scale,
            mode or self.manifest.blend,
            rank,
        )

    def typical(self) -> list[TypicalText]:
        """The typical texts of the clusters; none if the pool has none.

        Raises:
            IntegrityError: a line is no such text, or of a cluster that the pool does not have.
        """
        path = self.path / TYPICAL
        decoder = msgspec.json.Decoder(TypicalText)
        try:
            texts = [decoder.decode(line) for line in path.read_bytes().split(b"\n") if line] if path.exists() else []
        except (ValueError, RecursionError) as e:  # also msgspec's
            raise IntegrityError(f"a line is no typical text: {e}", where=path, do="fetch the pool again") from None
        for text in texts:
            if text["cluster"] >= self.manifest.adapters:
                raise IntegrityError(f"there is no cluster {text['cluster']}", where=path, do="fetch the pool again")
            if len(text.get("position", [])) not in (0, self.manifest.dimensions):
                raise IntegrityError("a position has another length than the indicators", where=path)
        return texts

    @cached_property
    def prototypes(self) -> ClusteredPrototypes | None:
        """What the server LLM says to typical texts; None if the pool does not know. The states stay in their file."""
        if (info := self.manifest.prototypes) is None:
            return None
        return read_clustered(
            self.path / PROTOTYPES,
            self.manifest.base_fingerprint,
            model=info.model,
            count=info.count,
            adapters=self.manifest.adapters,
            size=len(self.projection.mean),
        )

    @cached_property
    def _loras(self) -> list[dict[str, Pair]]:
        return [_read_adapter(self.path / adapter_folder(n), self.manifest) for n in range(self.manifest.adapters)]


def adapter_folder(n: int) -> str:
    """Where adapter n lies, relative to its pool."""
    return f"adapters/{n:03d}"


def pool_name(out: str | os.PathLike[str]) -> str:
    """The name of a pool that is written to a folder: the folder's.

    Raises:
        InvalidInput: it cannot be a name.
    """
    name = Path(out).absolute().name
    try:
        return msgspec.convert(name, Name)
    except msgspec.ValidationError:
        do = "use letters, digits, '.', '_' and '-', and begin with one of the first two"
        raise InvalidInput(f"a pool cannot be called {name!r:.200}", where=out, do=do) from None


def pool_version(manifest: PoolManifest) -> str:
    """What tells two builds apart: the first 16 hex digits of the SHA-256 over what changes an adapter.

    That are the sorted lines "path sha256" of the files, and a line of JSON, keys sorted and without spaces, of the manifest's
    `blend`, `embedding`, `scale` and `weighting`.
    """
    lines = sorted(f"{file.path} {file.sha256}" for file in manifest.files)
    choices = {name: getattr(manifest, name) for name in ("blend", "embedding", "scale", "weighting")}
    lines.append(msgspec.json.encode(choices, order="sorted").decode())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def write_pool(
    out: str | os.PathLike[str],
    manifest: PoolManifest,
    projection: Projection,
    adapters: Iterable[Path | tuple[Mapping[str, Any] | None, Mapping[str, Pair]]],
    *,
    typical: Iterable[Mapping[str, Any]] = (),
    prototypes: ClusteredPrototypes | None = None,
    further: Mapping[str, bytes] = {},
    replace: bool = False,
) -> Pool:
    """Write a pool; it appears at `out` when it is whole.

    Args:
        manifest: what the pool says of itself; `version`, `prototypes` and `files` are filled in, and `serial` if it is 0.
        adapters: for each adapter what its adapter_config.json holds (None: a plain PEFT LoRA of the manifest's rank and scale), and
            by module A [r, in] and B [out, r], float32 or float16, without the scale. Or a folder of another pool's adapter, which is
            copied. Taken one at a time.
        typical: lines of typical.jsonl.
        further: files by name, for people to read.
        replace: swap an existing pool at `out` against this one, at the end.

    Raises:
        OutputError: the target exists, is something else, or cannot be written.
        BundleError, AdapterError: the arrays are not what the manifest says.
        InvalidInput: a prototype holds NaN, or what float16 cannot.
    """
    from safetensors.numpy import save_file

    out = Path(out)
    if replace and out.exists() and not (out / MANIFEST).is_file():
        raise OutputError("the target exists and is not a pool", where=out, do="choose another path")
    with atomic_directory(out, replace=replace) as folder:
        arrays = {f.name: getattr(projection, f.name) for f in fields(projection)}
        save_file(
            {k: np.ascontiguousarray(v, np.float32) for k, v in arrays.items() if v is not None}, folder / PROJECTION
        )
        for n, adapter in enumerate(adapters):
            place = folder / adapter_folder(n)
            place.mkdir(parents=True)
            if isinstance(adapter, Path):
                for file in (CONFIG, WEIGHTS):
                    shutil.copyfile(adapter / file, place / file)
                continue
            config, tensors = adapter
            (place / CONFIG).write_text(
                json.dumps(
                    config or peft_config(manifest.rank, manifest.scale, manifest.targets), indent=2, sort_keys=True
                )
                + "\n"
            )
            save_file(_peft_tensors(tensors), place / WEIGHTS, metadata={BASE_FINGERPRINT: manifest.base_fingerprint})
        if lines := [json.dumps(text, ensure_ascii=False) + "\n" for text in typical]:
            (folder / TYPICAL).write_text("".join(lines), encoding="utf-8")
        info = None
        if prototypes is not None:
            (folder / PROTOTYPES).write_bytes(prototypes.to_bytes(manifest.base_fingerprint))
            info = PoolPrototypes(prototypes.model, len(prototypes.states))
        for name, content in further.items():
            (folder / name).write_bytes(content)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in paths:
            path.chmod(0o644)  # safetensors writes for its owner alone
        files = [File(p.relative_to(folder).as_posix(), p.stat().st_size, sha256_file(p)) for p in paths]
        manifest = msgspec.structs.replace(
            manifest, serial=manifest.serial or int(time.time()), prototypes=info, files=files
        )
        manifest = msgspec.structs.replace(manifest, version=pool_version(manifest))
        (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
        Pool.open(folder)
    return Pool.open(out)


def _check_finite(lora: Mapping[str, Pair], where: Path) -> None:
    for module, matrices in lora.items():
        if not all(np.isfinite(matrix).all() for matrix in matrices):
            raise AdapterError(f"{module} holds NaN or infinity", where=where, do="fetch or build the pool again")


def _peft_tensors(tensors: Mapping[str, Pair]) -> dict[str, Matrix]:
    named = {}
    for module, (a, b) in tensors.items():
        named[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a)
        named[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b)
    return named


def peft_config(rank: int, scale: float, targets: Sequence[str], *, base: str | None = None) -> dict[str, Any]:
    """The adapter_config.json of a plain LoRA.

    Args:
        scale: alpha / r.
        base: the name of the base model.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": list(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _read_manifest(path: Path) -> PoolManifest:
    where = path / MANIFEST
    try:
        document = where.read_bytes()
    except OSError as e:
        raise ManifestError(f"there is no pool here: {e.strerror}", where=where, do="check the path") from None
    return parse_manifest(document, where=str(where))


def parse_manifest(document: bytes, *, where: str) -> PoolManifest:
    """Read a pool.json, and check everything about it that can be checked without its files.

    Raises:
        ManifestError: it is not JSON, breaks the schema, or contradicts itself.
        IntegrityError: its version is not that of the files that it lists.
    """
    try:
        raw = json.loads(document)
        check_version(raw, where)
        manifest = msgspec.convert(raw, PoolManifest)
    except (msgspec.ValidationError, RecursionError, ValueError) as e:
        raise ManifestError(str(e), where=where, do="fetch or build the pool again") from None
    paths = [file.path for file in manifest.files]
    for file in paths:
        check_relative(file, where)
    wanted = {
        PROJECTION,
        *(f"{adapter_folder(n)}/{name}" for n in range(manifest.adapters) for name in (CONFIG, WEIGHTS)),
        *([PROTOTYPES] if manifest.prototypes else []),
    }
    if len(set(paths)) != len(paths) or not wanted <= set(paths):
        missing = ", ".join(sorted(wanted - set(paths))[:3])
        raise ManifestError(f"`files` does not list {missing}" if missing else "`files` repeats a path", where=where)
    if manifest.version != pool_version(manifest):
        raise IntegrityError(
            f"its version {manifest.version} is not that of its files and choices ({pool_version(manifest)})",
            where=where,
            do="fetch the pool again; it was changed, or mixed from two builds",
        )
    return manifest


def _check_file(path: Path, file: File, verify: bool) -> None:
    try:
        status = os.lstat(path / file.path)
    except OSError as e:
        problem = f"cannot be read: {e.strerror}"
    else:
        if not stat.S_ISREG(status.st_mode):
            problem = "is not a plain file"
        elif status.st_size != file.size:
            problem = f"has {status.st_size} bytes; pool.json says {file.size}"
        elif verify and sha256_file(path / file.path) != file.sha256:
            problem = "is damaged, or of another build: its SHA-256 is not what pool.json says"
        else:
            return
    raise IntegrityError(f"{file.path} {problem}", where=path, do="fetch or build the pool again")


def read_projection(path: Path, manifest: PoolManifest) -> Projection:
    """Read a projection.safetensors into memory; IntegrityError if it is not what its pool's manifest asks for."""
    tensors, _ = read_mapped(path)
    d, k = tensors["projection"].shape if "projection" in tensors and tensors["projection"].ndim == 2 else (0, 0)
    shapes = {"mean": (d,), "projection": (d, manifest.dimensions), "indicators": (manifest.adapters, k)}
    if manifest.embedding.residual:
        shapes |= {"prompt_mean": (d,), "answer_mean": (d,), "ridge": (d, d)}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != shapes:
        raise IntegrityError(f"it holds {found}; the manifest asks for {shapes}", where=path, do="build the pool again")
    arrays = {name: np.array(tensor, np.float32) for name, tensor in tensors.items()}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise IntegrityError("it holds NaN or infinity", where=path, do="build the pool again")
    if not np.allclose(np.linalg.norm(arrays["indicators"], axis=1), 1, atol=1e-3):
        raise IntegrityError("its indicators are not of unit length", where=path, do="build the pool again")
    return Projection(**arrays)


def _read_adapter(folder: Path, manifest: PoolManifest) -> dict[str, Pair]:
    path = folder / WEIGHTS
    tensors, metadata = read_mapped(path)
    base = metadata.get(BASE_FINGERPRINT)
    if base != manifest.base_fingerprint:
        raise AdapterError(
            f"the adapter is of base {str(base)[:12]}…, its pool of {manifest.base_fingerprint[:12]}…",
            where=path,
            do="build the pool again; it was mixed from two builds",
        )
    pairs: dict[str, Pair] = {}
    for module in manifest.targets:
        a, b = (tensors.pop(f"base_model.model.{module}.lora_{side}.weight", None) for side in "AB")
        if (
            a is None
            or b is None
            or not a.dtype.kind == b.dtype.kind == "f"
            or not a.ndim == b.ndim == 2
            or not a.shape[0] == b.shape[1] == manifest.rank
        ):
            raise BundleError(
                f"{module} is not adapted with rank {manifest.rank}", where=path, do="build the pool again"
            )
        pairs[module] = a, b
    if tensors:
        raise BundleError(f"it adapts {next(iter(tensors))}, which pool.json does not name", where=path)
    return pairs
