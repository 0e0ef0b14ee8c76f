"""manifest.json: what a bundle says about itself, and the only thing that every part of the project agrees on.

The structs below are the schema. `manifest.schema.json` beside this file is generated from them (`python -m
crayon_runtime.manifest`) for readers in other languages; a test holds the two together.

Versions: `schema_version` is "MAJOR.MINOR". A reader refuses a larger major version, and ignores fields it does not know, so a
minor version may add fields. Whoever rewrites a manifest edits the parsed JSON, not these structs, so that unknown fields stay.
"""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from crayon_runtime._version import __version__
from crayon_runtime.errors import ManifestError, SchemaTooNew

SCHEMA_MAJOR, SCHEMA_MINOR = 1, 0
SCHEMA_VERSION = f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}"

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$", description="SHA-256, lower-case hex")]
Count = Annotated[int, Meta(ge=1)]
Size = Annotated[int, Meta(ge=0, description="bytes")]
Path = Annotated[str, Meta(min_length=1, description="relative to the bundle, with forward slashes and without '..'")]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
PoolVersion = Annotated[
    str, Meta(pattern="^[0-9a-f]{16}$", description="of a pool's files and choices; tells builds apart")
]
Serial = Annotated[int, Meta(ge=0, description="of a pool's build, larger for a newer one: Unix time, unless chosen")]
ServerModel = Annotated[str, Meta(min_length=1, max_length=200, description="the server LLM's name, for people")]
TokenId = Annotated[int, Meta(ge=0)]
AdapterDtype = Literal["fp32", "fp16", "int8"]
ProgramDtype = Literal["fp32", "int8"]
WeightName = Annotated[
    str, Meta(pattern="^(scale_)?[0-9a-f]{64}$", description="SHA-256 of a weight, or of its scales")
]
Features = Annotated[int, Meta(ge=1, le=1 << 22)]

MOST_RANK = 4096
"""Of a program's slots."""

MOST_PROTOTYPES = 1024
"""Of an adapter."""

MOST_REPEATS = 64
"""Of a block."""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block that an adapter may target, in the order of computation."""

BASE_FINGERPRINT = "base_fingerprint"
"""The metadata key by which a PEFT adapter's safetensors file may name its base."""


class File(Struct, frozen=True):
    path: Path
    size: Size
    sha256: Sha256


class Producer(Struct, frozen=True):
    name: str
    version: str


PRODUCER = Producer("crayon-edge", __version__)


class Rope(Struct, frozen=True):
    """Rotary position embedding, in the terms of a transformers config."""

    theta: Annotated[float, Meta(gt=0)]
    type: Literal["default", "linear", "llama3"] = "default"
    factor: float | UnsetType = UNSET
    low_freq_factor: float | UnsetType = UNSET
    high_freq_factor: float | UnsetType = UNSET
    original_context_length: Count | UnsetType = UNSET


class Architecture(Struct, frozen=True):
    """The shape of a LLaMA-style decoder."""

    model_type: str
    layers: Count
    hidden_size: Count
    heads: Count
    kv_heads: Count
    head_size: Count
    ffn_size: Count
    vocab_size: Count
    tied_embeddings: bool
    norm_eps: float
    rope: Rope
    trained_context_length: Count
    layer_repeats: Annotated[
        int,
        Meta(
            ge=1,
            le=MOST_REPEATS,
            description="how often in a row each of the `layers` blocks is computed, with a KV cache each time",
        ),
    ] = 1

    @property
    def passes(self) -> int:
        """Computations of a block for each token; each has a slot of the KV cache."""
        return self.layers * self.layer_repeats


class Quantization(Struct, frozen=True):
    """How the weights of the linear layers are stored. Symmetric; one scale per group of input columns of a row.

    Of a bundle with several variants: weights and group size are those of all, the embedding is that of the ONNX variant.
    """

    weights: Literal["int4", "int8", "none"]
    group_size: Annotated[int, Meta(ge=0, description="0: not quantized")]
    embedding: Literal["fp32", "fp16", "int8", "int4"]


class Tokenizer(Struct, frozen=True):
    file: Path
    vocab_size: Count
    add_bos: Annotated[bool, Meta(description="every sequence starts with the bos token")]
    bos: TokenId | None
    eos: Annotated[list[TokenId], Meta(description="tokens that end an answer")]
    pad: TokenId | None = None
    chat_template: Annotated[
        str | None, Meta(description="Jinja, in the conventions of transformers' apply_chat_template")
    ] = None


class OnnxVariant(Struct, frozen=True):
    """A graph for ONNX Runtime: inputs and outputs as onnxruntime-genai names them, and the taps."""

    model: Path
    data: list[Path]


class SlotTarget(Struct, frozen=True):
    """A kind of linear layer."""

    name: Annotated[str, Meta(description="as q_proj")]
    in_features: Features
    out_features: Features


class ProgramSlots(Struct, frozen=True, kw_only=True):
    """Where ExecuTorch's program takes an adapter: the same in every layer."""

    rank: Annotated[int, Meta(ge=1, le=MOST_RANK)]
    dtype: Annotated[
        ProgramDtype, Meta(description="that A and B are stored in. int8: one scale for each output channel")
    ]
    layers: Annotated[int, Meta(ge=1, le=4096)]
    targets: Annotated[list[SlotTarget], Meta(min_length=1, max_length=7)]


class ExecutorchSlots(ProgramSlots, frozen=True, kw_only=True):
    """A program that computes the base with any adapter that fits, once it has been given the names of the adapter's weights."""

    program: Annotated[Path, Meta(description="with names that stand for those of A and B; docs/bundle.md says which")]


class ExecutorchVariant(Struct, frozen=True, omit_defaults=True):
    """A program for ExecuTorch, with its weights; docs/bundle.md lists its methods."""

    program: Path
    data: Annotated[list[Path], Meta(description=".ptd files that hold the weights; none: they are in the program")]
    slots: Annotated[ExecutorchSlots | None, Meta(description="null: adapters cannot be attached")] = None


class Variants(Struct, frozen=True, omit_defaults=True):
    """The same model for each backend that the bundle serves."""

    onnx: OnnxVariant | UnsetType = UNSET
    executorch: ExecutorchVariant | UnsetType = UNSET


class AdapterSlots(Struct, frozen=True):
    """Where a LoRA may be attached while the model runs."""

    targets: Annotated[list[str], Meta(description="names of linear layers, as q_proj")]
    rank_limit: Annotated[int | None, Meta(description="null: any rank")]
    scale_folded_into: Annotated[Literal["B"], Meta(description="the factor alpha/r is part of the stored B")] = "B"


class Tap(Struct, frozen=True):
    """The hidden state that the model returns beside its logits, for embeddings and routing."""

    layer: Annotated[
        int,
        Meta(
            ge=0,
            description="index into transformers' hidden_states: 0 the embedding, `layers` after the last norm. Blocks are counted once",
        ),
    ]
    size: Count


class Golden(Struct, frozen=True):
    """Recorded cases: `cases` is JSON, `tensors` is safetensors; docs/bundle.md says what is in them."""

    cases: Path
    tensors: Path


class Merged(Struct, frozen=True):
    """An adapter that was added into the weights before quantization."""

    name: Name
    sha256: Annotated[Sha256, Meta(description="of the adapter's safetensors file")]


class ModelManifest(Struct, frozen=True, kw_only=True, tag_field="kind", tag="model"):
    schema_version: str
    name: Name
    base_fingerprint: Annotated[
        Sha256, Meta(description="over the sorted lines 'name dtype shape sha256(bytes)' of the source tensors")
    ]
    producer: Producer
    architecture: Architecture
    quantization: Quantization
    context_length: Count
    kv_dtype: Literal["fp32", "fp16", "int8"]
    tokenizer: Tokenizer
    variants: Variants
    adapter_slots: Annotated[AdapterSlots | None, Meta(description="null: adapters cannot be attached")]
    tap: Tap
    golden: Golden | None
    merged: list[Merged] = []
    adapters: Annotated[list[Path], Meta(description="folders of adapter bundles that travel inside this one")] = []
    files: list[File]


class AdapterTarget(Struct, frozen=True):
    """One linear layer that the adapter changes."""

    module: Annotated[str, Meta(description="as model.layers.0.self_attn.q_proj")]
    rank: Count


class OnnxAdapterVariant(Struct, frozen=True):
    file: Annotated[
        Path,
        Meta(description=".onnx_adapter: MODULE.lora_A.weight [in, r], MODULE.lora_B.weight [r, out], alpha/r in B"),
    ]
    dtype: Annotated[
        AdapterDtype,
        Meta(
            description="of the stored A and B. int8: one scale for each rank, MODULE.lora_A.scale and .lora_B.scale [r], float32"
        ),
    ] = "fp32"


class SlotWeights(Struct, frozen=True):
    """How an adapter fills the slots of a base's program."""

    rank: Annotated[int, Meta(ge=1, le=MOST_RANK, description="of the slots: A and B are padded with zeros up to it")]
    targets: Annotated[list[str], Meta(description="of the slots, names of linear layers, as q_proj")]
    weights: Annotated[
        list[WeightName], Meta(description="the names of A and B in `data`, slot by slot; docs/bundle.md has the order")
    ]


class ExecutorchAdapterVariant(Struct, frozen=True, omit_defaults=True):
    """The weights of an adapter for ExecuTorch, and the program that computes the base and the adapter over one KV cache, or how it is
    made of the base's program with slots; or both."""

    data: Annotated[
        list[Path], Meta(description=".ptd files that hold A and B, with alpha/r in B; all else is in the base's files")
    ]
    dtype: Annotated[ProgramDtype, Meta(description="of the stored A and B. int8: one scale for each output channel")]
    program: Path | None = None
    slots: SlotWeights | None = None


class AdapterVariants(Struct, frozen=True, omit_defaults=True):
    onnx: OnnxAdapterVariant | UnsetType = UNSET
    executorch: ExecutorchAdapterVariant | UnsetType = UNSET


class BlendedFrom(Struct, frozen=True):
    """The pool that an adapter was blended from."""

    name: Name
    version: PoolVersion
    serial: Serial


class AdapterPrototypes(Struct, frozen=True):
    """Embeddings of the server LLM's outputs that travel with an adapter; see `crayon_runtime.prototypes`."""

    file: Annotated[
        Path, Meta(description="safetensors: states [count, D], float16, and mean [D], float32; D is the tap's size")
    ]
    count: Annotated[int, Meta(ge=1, le=MOST_PROTOTYPES)]
    model: ServerModel


class AdapterManifest(Struct, frozen=True, kw_only=True, tag_field="kind", tag="adapter"):
    schema_version: str
    name: Name
    base_fingerprint: Annotated[Sha256, Meta(description="of the only base that this adapter fits")]
    producer: Producer
    targets: list[AdapterTarget]
    variants: AdapterVariants
    pool: Annotated[BlendedFrom | None, Meta(description="null: it was not blended")] = None
    prototypes: Annotated[AdapterPrototypes | None, Meta(description="null: none came along")] = None
    files: list[File]


Manifest = ModelManifest | AdapterManifest


def parse(document: bytes, *, where: str = "manifest.json") -> Manifest:
    """Read a manifest, and check everything about it that can be checked without its files.

    Raises:
        SchemaTooNew: its major version is larger than ours.
        ManifestError: it is not JSON, breaks the schema, or names a path that it must not.
    """
    try:
        raw = json.loads(document)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError is a ValueError
        raise ManifestError(f"not JSON: {e}", where=where, do="fetch or export the bundle again") from None
    check_version(raw, where)
    try:
        manifest: Manifest = msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as e:
        raise ManifestError(str(e), where=where, do="see manifest.schema.json") from None
    _check_paths(manifest, where)
    return manifest


def to_json(manifest: Manifest) -> bytes:
    """The bytes of a manifest.json: indented, UTF-8, ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def schema() -> dict[str, Any]:
    """The JSON Schema of a manifest (draft 2020-12)."""
    (reference,), definitions = msgspec.json.schema_components([Manifest], ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"crayon bundle manifest, schema version {SCHEMA_VERSION}",
        **reference,
        "$defs": definitions,
    }


def check_version(raw: Any, where: str) -> None:
    """Refuse a document of a larger major version, or without one."""
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", version) if isinstance(version, str) else None
    if match is None:
        raise ManifestError("it has no schema_version of the form MAJOR.MINOR", where=where)
    if int(match[1]) > SCHEMA_MAJOR:
        raise SchemaTooNew(
            f"the bundle has schema version {version}; this crayon reads up to {SCHEMA_MAJOR}.x",
            where=where,
            do="upgrade crayon-edge on this device, or export the bundle with an older one",
        )


def _check_paths(manifest: Manifest, where: str) -> None:
    listed = [f.path for f in manifest.files]
    for path in listed:
        check_relative(path, where)
    if len(set(map(str.casefold, listed))) != len(listed):
        raise ManifestError("two entries of `files` have the same path", where=where)
    folders = {str(folder) for path in listed for folder in PurePosixPath(path).parents}
    for path in sorted(folders & set(listed)):
        raise ManifestError(f"{path!r} in `files` is both a file and a folder", where=where)
    for path in sorted(_referenced(manifest) - set(listed)):
        raise ManifestError(f"it refers to {path!r}, which `files` does not list", where=where)
    if isinstance(manifest, AdapterManifest):
        executorch = manifest.variants.executorch
        if isinstance(executorch, ExecutorchAdapterVariant) and not executorch.program and not executorch.slots:
            raise ManifestError("its variant for ExecuTorch has neither a program nor slots", where=where)
    else:
        _check_model(manifest, listed, where)


def _check_model(manifest: ModelManifest, listed: list[str], where: str) -> None:
    for folder in manifest.adapters:
        check_relative(folder, where)
        if f"{folder}/manifest.json" not in listed:
            raise ManifestError(f"the adapter folder {folder!r} has no manifest in `files`", where=where)
    if len({PurePosixPath(folder).name.casefold() for folder in manifest.adapters}) != len(manifest.adapters):
        raise ManifestError("two folders in `adapters` have the same name", where=where)
    a, t = manifest.architecture, manifest.tap
    if t.layer > a.layers or t.size != a.hidden_size:
        raise ManifestError(
            f"tap layer {t.layer} of width {t.size} does not exist in {a.layers} layers of {a.hidden_size}",
            where=where,
        )


def check_relative(path: str, where: str) -> None:
    """Refuse any path that could leave the bundle's folder, on any operating system."""
    parts = PurePosixPath(path).parts
    bad = (
        path.startswith("/")
        or re.search(r"[\x00-\x1f\x7f\\:\ud800-\udfff]", path) is not None
        or ".." in parts
        or path != str(PurePosixPath(path))
        or path == "."
        or path.casefold() in ("manifest.json", "signature.json")
        or parts[-1].casefold() == ".installed.json"
    )
    if bad:
        raise ManifestError(
            f"the path {path!r} is not a plain relative path inside the bundle",
            where=where,
            do="do not use this bundle; whoever made it is broken or hostile",
        )


def _referenced(manifest: Manifest) -> set[str]:
    """Every file that the manifest points to outside `files`."""
    found: list[str] = []
    if isinstance(manifest, AdapterManifest):
        adapter = manifest.variants
        if isinstance(adapter.onnx, OnnxAdapterVariant):
            found.append(adapter.onnx.file)
        if isinstance(adapter.executorch, ExecutorchAdapterVariant):
            found += [*([adapter.executorch.program] if adapter.executorch.program else []), *adapter.executorch.data]
        found += [manifest.prototypes.file] if manifest.prototypes else []
    else:
        v = manifest.variants
        if isinstance(v.onnx, OnnxVariant):
            found += [v.onnx.model, *v.onnx.data]
        if isinstance(v.executorch, ExecutorchVariant):
            slots = v.executorch.slots
            found += [v.executorch.program, *v.executorch.data, *([slots.program] if slots else [])]
        found.append(manifest.tokenizer.file)
        if manifest.golden:
            found += [manifest.golden.cases, manifest.golden.tensors]
    return set(found)


if __name__ == "__main__":
    from pathlib import Path as _Path

    _Path(__file__).with_name("manifest.schema.json").write_text(json.dumps(schema(), indent=1) + "\n")
