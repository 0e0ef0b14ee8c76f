"""Programs with stand-ins for their weights: made once for an architecture, kept, and filled with weights in a moment.

What ExecuTorch's exporter makes depends on the shapes of the weights and not on their values, but for the names under which a program
looks for them in its data file: those are hashes of the values. A template holds the programs with other names in their places, and
says which weight each of them stands for.

A template is a file: a zip of `index.json` (an `_Index`) and one member for each program. Everything in it is checked when it is read.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from crayon_export import architecture as arch
from crayon_export.executorch.storage import GROUP_SIZES, PER_ROW
from crayon_runtime.affine import Affine
from crayon_runtime.errors import TemplateError
from crayon_runtime.files import atomic_file
from crayon_runtime.manifest import LINEARS, Architecture, Rope, Tokenizer

EXECUTORCH = "1.5.1"
"""The version of ExecuTorch whose exporter makes templates: exactly this one, as in pyproject.toml. How it packs and names is part of
what fills them."""

SUFFIX = ".crayon-template"

Count = Annotated[int, Meta(ge=1, le=1 << 32)]
Size = Annotated[int, Meta(ge=0, le=1 << 48)]

ProgramName = Literal["model", "adapter", "single"]
Part = Literal["codes", "scales", "values"]
Form = Literal["int4", "int8", "bf16", "fp32"]
_BITS = {"int4": 4, "int8": 8, "bf16": 16, "fp32": 32}

ROTARY = ("rotary.cos", "rotary.sin")
"""Slots of the tables of the rotary embedding, each float32 [context, head_size]: `architecture.rotary_tables`, twice beside itself."""


class AdapterSpec(Struct, frozen=True):
    """The slots for an adapter: the same in every layer."""

    rank: Count
    targets: list[str]
    """Sorted; of `LINEARS`."""


class TemplateSpec(Struct, frozen=True, kw_only=True):
    """Everything that shapes a program. Two models with equal ones share a template."""

    layers: Count
    layer_repeats: Count = 1
    """How often in a row each of them is computed."""
    hidden_size: Count
    heads: Count
    kv_heads: Count
    head_size: Count
    ffn_size: Count
    vocab_size: Count
    tied_embeddings: bool
    """Then the output layer is int8 by row, as the embedding: the same bytes."""
    norm_eps: float
    weights: Affine | None
    """What was asked for; `storage.linear_form` says what it means for each width. None: everything is float32."""
    context_length: Count
    kv_dtype: Literal["fp32", "int8"]
    tap_layer: Annotated[int, Meta(ge=0)]
    bos: int | None
    eos: list[int]
    adapter: AdapterSpec | None = None
    executorch: str = EXECUTORCH

    def __post_init__(self) -> None:
        if self.weights not in (None, PER_ROW, *(Affine(4, size) for size in GROUP_SIZES)):
            raise ValueError(f"the weights are {self.weights}")
        if self.adapter and (
            not self.adapter.targets
            or self.adapter.targets != sorted(set(self.adapter.targets))
            or not set(self.adapter.targets) <= set(LINEARS)
        ):
            raise ValueError(f"the targets are {self.adapter.targets}")

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        tokenizer: Tokenizer,
        *,
        weights: Affine | None,
        context_length: int,
        kv_dtype: str,
        tap_layer: int,
        adapter: AdapterSpec | None = None,
    ) -> TemplateSpec:
        """What a model's template depends on.

        Args:
            weights: None: everything is float32.
        """
        a = architecture
        return cls(
            layers=a.layers,
            layer_repeats=a.layer_repeats,
            hidden_size=a.hidden_size,
            heads=a.heads,
            kv_heads=a.kv_heads,
            head_size=a.head_size,
            ffn_size=a.ffn_size,
            vocab_size=a.vocab_size,
            tied_embeddings=a.tied_embeddings,
            norm_eps=a.norm_eps,
            weights=weights,
            context_length=context_length,
            kv_dtype=kv_dtype,  # type: ignore[arg-type]
            tap_layer=tap_layer,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            adapter=adapter,
        )

    @property
    def architecture(self) -> Architecture:
        """An architecture of these shapes, in which a tied output layer is a layer of its own: its slots are. Its rotary tables are not the
        model's: they are data, like the weights."""
        return Architecture(
            model_type="llama",
            layers=self.layers,
            layer_repeats=self.layer_repeats,
            hidden_size=self.hidden_size,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            ffn_size=self.ffn_size,
            vocab_size=self.vocab_size,
            tied_embeddings=False,
            norm_eps=self.norm_eps,
            rope=Rope(theta=10_000.0),
            trained_context_length=self.context_length,
        )

    @property
    def targets(self) -> list[arch.Linear]:
        """The linear layers with slots for an adapter."""
        wanted = self.adapter.targets if self.adapter else []
        return [linear for linear in arch.linears(self.architecture) if linear.name in wanted]

    @property
    def key(self) -> str:
        """What tells templates apart: 32 hexadecimal digits, and where there are slots what they are."""
        document = msgspec.json.encode([_FORMAT, msgspec.to_builtins(self.without_slots)], order="sorted")
        base = hashlib.sha256(document).hexdigest()[:32]
        if self.adapter is None:
            return base
        targets = "all" if len(self.adapter.targets) == len(LINEARS) else "+".join(self.adapter.targets)
        return f"{base}-r{self.adapter.rank}-{targets}"

    @property
    def without_slots(self) -> TemplateSpec:
        """The same without slots. Its programs are those of a template with slots, but for the one of adapters."""
        return msgspec.structs.replace(self, adapter=None)


class Layout(Struct, frozen=True):
    """What a data file says of a tensor that the program itself reads; of what XNNPACK reads it says nothing."""

    scalar_type: int
    """In ExecuTorch's numbers: 1 is int8, 6 is float32."""
    sizes: list[int]
    dim_order: list[int]


class Slot(Struct, frozen=True):
    """A tensor that a program wants, or one part of it."""

    name: str
    """The stand-in for a name, which the program holds: 64 hexadecimal digits, or those after "scale_". With a layout: the name itself,
    which stays. Empty: it is found by its place."""
    tensor: str
    """As model.layers.3.mlp.down_proj.weight, lm_head.weight also where it is tied, one of `ROTARY`; of an adapter
    model.layers.3.mlp.down_proj.lora_a or .lora_b."""
    part: Part
    form: Form
    """"int4": two codes a byte, each plus 8, the first one in the lower half."""
    shape: list[int]
    """Of the part, in elements."""
    alignment: Count
    layout: Layout | None = None
    offset: Size | None = None
    """Where its bytes lie in a program that holds its weights itself."""

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return -(-count * _BITS[self.form] // 8)

    @property
    def in_adapter(self) -> bool:
        """Whether it belongs to the adapter's data file, and not to the model's."""
        return self.tensor.endswith((".lora_a", ".lora_b"))


class Run(Struct, frozen=True):
    """Consecutive bytes of the code, and where they lie in the program's file."""

    offset: Size
    nbytes: Size


class Program(Struct, frozen=True):
    """A program without its weights.

    With a data file, the code is the whole .pte. One that holds its weights itself is a file of `size` bytes: zeros, but for the code,
    cut into `runs`, and for the slots at their offsets.
    """

    code: bytes
    slots: list[Slot]
    """In the order in which the official exporter writes them: of each data file, or of the program's own file."""
    size: Size
    runs: list[Run]


class Template(Struct, frozen=True):
    spec: TemplateSpec
    programs: Mapping[ProgramName, Program]
    """"model": `forward` and `forward_tap`, its weights in a data file. "adapter": also `lora_forward` and `lora_forward_tap`, over the
    same cache; where the spec has slots. "single": "model" with its weights inside."""


# Files

_FORMAT = 1
_INDEX = "index.json"
_MAX_FILE_BYTES, _MAX_INDEX_BYTES, _MAX_PROGRAM_BYTES = 1 << 28, 1 << 28, 1 << 28
_EPOCH = (1980, 1, 1, 0, 0, 0)


class _Member(Struct, frozen=True):
    sha256: str
    nbytes: Annotated[int, Meta(ge=1, le=_MAX_PROGRAM_BYTES)]
    slots: list[Slot]
    size: Size
    runs: list[Run]


class _Index(Struct, frozen=True, kw_only=True):
    format: int
    sha256: str
    """Of this document with an empty string here."""
    spec: TemplateSpec
    programs: dict[ProgramName, _Member]


class _MadeFor(Struct):
    executorch: str


class _Versions(Struct):
    format: int
    spec: _MadeFor


def write_template(path: Path, template: Template) -> None:
    """Write a template to a file, whole or not at all. The same template makes the same bytes.

    Raises:
        OutputError: it cannot be written.
    """
    members = {
        name: _Member(
            hashlib.sha256(program.code).hexdigest(), len(program.code), program.slots, program.size, program.runs
        )
        for name, program in template.programs.items()
    }
    index = _Index(format=_FORMAT, sha256="", spec=template.spec, programs=members)
    index = msgspec.structs.replace(index, sha256=_digest(index))
    contents: dict[str, bytes] = {
        _INDEX: msgspec.json.encode(index),
        **{name: p.code for name, p in template.programs.items()},
    }
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content, compresslevel=9)


def read_template(path: Path) -> Template:
    """Read a template, and check every byte of it.

    Raises:
        TemplateError: it is damaged, no template, or one for another version of ExecuTorch or of this package.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise _damaged(f"it has more than {_MAX_FILE_BYTES} bytes", path)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            document = _member(archive, _INDEX, _MAX_INDEX_BYTES, path)
            _check_versions(document, path)
            index = msgspec.json.decode(document, type=_Index)
            if index.sha256 != _digest(msgspec.structs.replace(index, sha256="")):
                raise _damaged("its index is not what was written", path)
            if sorted(archive.namelist()) != sorted([_INDEX, *index.programs]):
                raise _damaged("it holds other files than its index says", path)
            programs = {name: _program(archive, name, member, path) for name, member in index.programs.items()}
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError, RuntimeError, ValueError) as e:
        # of a zip whose numbers are wrong; msgspec's are ValueErrors
        raise _damaged(f"it cannot be read: {e}", path) from e
    expected = {"model", "single"} | ({"adapter"} if index.spec.adapter else set())
    if programs.keys() != expected:
        raise _damaged(f"it holds the programs {', '.join(sorted(programs))}", path)
    return Template(index.spec, programs)


def _check_versions(document: bytes, path: Path) -> None:
    """Of these alone, before anything else is believed of its form."""

    versions = msgspec.json.decode(document, type=_Versions)
    if versions.format != _FORMAT:
        raise TemplateError(
            f"the template has format {versions.format}; this package reads {_FORMAT}",
            where=path,
            do="make it again with this version of crayon-edge",
        )
    if versions.spec.executorch != EXECUTORCH:
        raise TemplateError(
            f"the template was made for ExecuTorch {versions.spec.executorch[:40]}; this package needs {EXECUTORCH}",
            where=path,
            do=f"make it again with ExecuTorch {EXECUTORCH}",
        )


def _program(archive: zipfile.ZipFile, name: str, member: _Member, path: Path) -> Program:
    code = _member(archive, name, member.nbytes, path)
    if len(code) != member.nbytes or hashlib.sha256(code).hexdigest() != member.sha256:
        raise _damaged(f"the program {name!r} is not what was written", path)
    for slot in member.slots:
        named = slot.layout is not None or _STAND_IN.fullmatch(slot.name) is not None
        placed = slot.offset is not None and slot.offset + slot.nbytes <= member.size
        if not (named if name != "single" else placed) or slot.alignment & (slot.alignment - 1):
            raise _damaged(f"the slot {slot.name[:80]!r} contradicts itself", path)
    if sum(run.nbytes for run in member.runs) != len(code):
        raise _damaged(f"the parts of {name!r} do not fit", path)
    return Program(code, member.slots, member.size, member.runs)


_STAND_IN = re.compile(r"(scale_)?[0-9a-f]{64}")


def _member(archive: zipfile.ZipFile, name: str, limit: int, path: Path) -> bytes:
    """The content of a member, of at most so many bytes."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise _damaged(f"there is no {name!r} in it", path) from None
    if info.file_size > limit:
        raise _damaged(f"{name!r} has {info.file_size} bytes", path)
    with archive.open(info) as file:
        return file.read(limit + 1)


def _digest(index: _Index) -> str:
    return hashlib.sha256(msgspec.json.encode(index)).hexdigest()


def _damaged(what: str, path: Path) -> TemplateError:
    return TemplateError(
        f"the template is damaged, or is none: {what}",
        where=path,
        do="export it again where it was made, or make it anew",
    )
