"""A template filled with weights, which are quantized and written to their places while they pass by."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from crayon_export import architecture as arch
from crayon_export.architecture import linears
from crayon_export.executorch.storage import PER_ROW, linear_form, stored_adapter, worth
from crayon_export.executorch.template import ROTARY, Part, Program, Slot, Template, TemplateSpec
from crayon_export.lora import PeftAdapter
from crayon_export.report import TensorReport
from crayon_export.rounding import Rounding, nearest
from crayon_export.storage import Error, Matrix, in_pieces
from crayon_runtime.affine import Affine, Codes, bfloat16
from crayon_runtime.backends.executorch_adapter import slot_shapes, stand_ins
from crayon_runtime.backends.flat_tensor import BY_HASH, Entry, FlatTensorWriter, Layout, write_at
from crayon_runtime.backends.patch import names as names_in
from crayon_runtime.backends.patch import patch
from crayon_runtime.bundle import BundleWriter
from crayon_runtime.bundle.adapter import Slots
from crayon_runtime.errors import TemplateError
from crayon_runtime.manifest import Architecture, ExecutorchSlots, ExecutorchVariant, SlotTarget

Floats = npt.NDArray[np.float32]


class _Weights(Protocol):
    """Where the parts of weights go, each in pieces, by the index of its slot."""

    def write(self, index: int, data: memoryview) -> None: ...

    def finish(self) -> list[str]: ...


class Filling:
    """A template on its way into a bundle.

    Args:
        file: the model's data, or with `single_file` its program: empty, open for reading and writing.
        with_slots: whether the bundle gets a program with those that the template has.
    """

    def __init__(
        self,
        template: Template,
        file: BinaryIO,
        *,
        with_slots: bool,
        single_file: bool,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._template = template
        self._with_slots = with_slots
        program = template.programs["single" if single_file else "model"]
        self._single = SingleFile(file, program) if single_file else None
        weights = self._single or FlatTensorWriter(file, entries(program.slots))
        self.storage = FilledProgram(program.slots, weights, template.spec, pool=pool)
        self._names: dict[str, str] = {}

    def finish(self, architecture: Architecture) -> None:
        """Complete the file, after all weights."""
        self.storage.rotary(architecture, self._template.spec.context_length)
        self._names = self.storage.finish()
        if self._single is not None:
            self._single.write_code(self._names)

    def add_to(self, writer: BundleWriter) -> ExecutorchVariant:
        """Add the programs that find those weights to a bundle."""
        if self._single is not None:
            return ExecutorchVariant("model.pte", [])
        writer.add_bytes("model.pte", checked(self._template.programs["model"].code, self._names))
        slots = self.slots
        if slots is None:
            return ExecutorchVariant("model.pte", ["model.ptd"])
        assert isinstance(slots.slots, ExecutorchSlots)
        assert slots.program is not None
        writer.add_bytes(slots.slots.program, slots.program)
        return ExecutorchVariant("model.pte", ["model.ptd"], slots.slots)

    @cached_property
    def slots(self) -> Slots | None:
        """The slots for adapters, after `finish`, with their program."""
        spec = self._template.spec
        if spec.adapter is None or not self._with_slots:
            return None
        targets = [x for x in linears(spec.architecture) if x.layer == 0 and x.name in spec.adapter.targets]
        slots = ExecutorchSlots(
            program="adapter-slots.pte",
            rank=spec.adapter.rank,
            dtype="int8" if spec.weights else "fp32",
            layers=spec.layers,
            targets=[SlotTarget(x.name, x.in_features, x.out_features) for x in targets],
        )
        program = self._template.programs["adapter"]
        wanted = [slot for slot in program.slots if slot.in_adapter]
        tensors = [
            name.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b")
            for name, _ in slot_shapes(slots)
        ]
        if [slot.tensor for slot in wanted if slot.part != "scales"] != tensors:
            raise TemplateError("the template orders the slots of adapters otherwise than this package", do=_OTHER)
        stands = dict(zip((slot.name for slot in wanted), stand_ins(slots), strict=True))
        return Slots(slots, checked(program.code, self._names | stands))


class FilledProgram:
    """`storage.Storage` that leaves every tensor where the program will look for it. No tensor is in memory whole.

    Args:
        program: of a template.
        weights: what its slots, `slots`, are written to: a `FlatTensorWriter` of `entries`, or a `SingleFile`.
        spec: what the template was made for.
        pool: quantizes.
    """

    backend = "executorch"

    def __init__(
        self, slots: Sequence[Slot], weights: _Weights, spec: TemplateSpec, *, pool: ThreadPoolExecutor
    ) -> None:
        self._slots = slots
        self._indices: dict[tuple[str, str], list[int]] = {}
        for index, slot in enumerate(slots):
            self._indices.setdefault((slot.tensor, slot.part), []).append(index)
        self._weights = weights
        self._spec = spec
        self._pool = pool

    @property
    def lossy(self) -> bool:
        return self._spec.weights is not None

    def embedding(self, name: str, rows: int, width: int) -> Matrix:
        return _Matrix(self, name, rows, width, PER_ROW if self.lossy else None, nearest)

    def linear(self, module: str, rows: int, width: int, rounding: Rounding) -> Matrix:
        tied = self._spec.tied_embeddings and module == "lm_head"
        form = linear_form(width, self._spec.weights, tied_head=tied)
        return _Matrix(self, f"{module}.weight", rows, width, form, nearest if tied else rounding)

    def vector(self, name: str, values: Floats) -> None:
        self.write(self.slots(name, "values", values.shape, "fp32"), values)

    def adapter(self, adapter: PeftAdapter, module: str) -> tuple[Floats, Floats]:
        a, b = (worth(stored) for stored in stored_adapter(adapter, module, quantize=self.lossy))
        return a, b

    def rotary(self, architecture: Architecture, context_length: int) -> None:
        """Write the tables of the rotary embedding, which are no tensors of a checkpoint."""
        for name, table in zip(ROTARY, arch.rotary_tables(architecture, context_length), strict=True):
            self.vector(name, np.concatenate((table, table), axis=1))

    def finish(self) -> dict[str, str]:
        """After all weights: what the program calls each of its stand-ins."""
        names = self._weights.finish()
        return {
            slot.name: name for slot, name in zip(self._slots, names, strict=True) if slot.layout is None and slot.name
        }

    def slots(self, tensor: str, part: Part, shape: tuple[int, ...], form: str) -> list[int]:
        """The slots of a part of a tensor: one, or where a block is repeated and its norms have other names in each pass, several.

        Raises:
            TemplateError: the template has none, or one of another shape or form.
        """
        indices = self._indices.get((tensor, part))
        if indices is None:
            raise TemplateError(f"the template has no place for the {part} of {tensor}", do=_OTHER)
        slot = self._slots[indices[0]]
        if (_without_ones(slot.shape), slot.form) != (_without_ones(shape), form):
            raise TemplateError(
                f"the {part} of {tensor} are {form} {list(shape)}; the template is for {slot.form} {slot.shape}",
                do=_OTHER,
            )
        return indices

    def write(self, indices: Sequence[int], array: npt.NDArray[np.generic]) -> None:
        data = memoryview(np.ascontiguousarray(array)).cast("B")  # type: ignore[arg-type]
        for index in indices:
            self._weights.write(index, data)

    def in_pieces(
        self, rows: Floats, form: Affine, rounding: Rounding
    ) -> list[tuple[npt.NDArray[np.uint8], Floats, Floats]]:
        """Packed codes, scales, and what they are worth, of pieces of consecutive rows."""

        def one(piece: Floats, scales: Floats | None) -> tuple[npt.NDArray[np.uint8], Floats, Floats]:
            codes, scales = form.quantize(piece, scales)
            return _packed(codes, form), scales, form.dequantize(codes, scales)

        return in_pieces(self._pool, one, *rounding(form, rows))


def _without_ones(shape: Sequence[int]) -> list[int]:
    """One scale of each row may be [rows] or [rows, 1]."""
    return [size for size in shape if size != 1]


_OTHER = "remove the template with `crayon template`, or use --official"


class _Matrix:
    def __init__(
        self, storage: FilledProgram, name: str, rows: int, width: int, form: Affine | None, rounding: Rounding
    ) -> None:
        self._storage, self._name, self._form, self._rounding = storage, name, form, rounding
        self._shape = rows, width
        self._error = Error()
        if form is None:
            self._values = storage.slots(name, "values", (rows, width), "fp32")
            return
        groups = (rows, width // form.group_size) if form.group_size else (rows,)
        self._values = storage.slots(name, "codes", (rows, width), form.name)
        self._scales = storage.slots(name, "scales", groups, "bf16" if form.group_size else "fp32")

    def add(self, rows: Floats) -> Floats:
        form = self._form
        if form is None:
            self._storage.write(self._values, rows)
            return rows
        pieces = self._storage.in_pieces(rows, form, self._rounding)
        for codes, scales, _ in pieces:
            self._storage.write(self._values, codes)
            self._storage.write(self._scales, _halves(scales) if form.group_size else scales)
        whole = np.concatenate([worth for _, _, worth in pieces])
        self._error.add(rows, whole)
        return whole

    def close(self) -> TensorReport:
        form, (rows, width) = self._form, self._shape
        stored_as = form.name if form else "fp32"
        group_size, nbytes = (form.group_size, form.nbytes(rows, width)) if form else (0, 4 * rows * width)
        return self._error.report("executorch", self._name, stored_as, group_size, nbytes)


def _packed(codes: Codes, form: Affine) -> npt.NDArray[np.uint8]:
    """As XNNPACK has them: two int4 a byte, each plus 8, the first in the lower half."""
    if form.bits == 8:
        return codes.view(np.uint8)
    unsigned = codes.view(np.uint8) + np.uint8(8)
    return unsigned[:, ::2] | unsigned[:, 1::2] << np.uint8(4)


def _halves(scales: Floats) -> npt.NDArray[np.uint16]:
    return (bfloat16(scales).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def entries(slots: Sequence[Slot]) -> list[Entry]:
    """The slots, as a `.ptd` holds them."""
    return [
        Entry(
            _name(slot), slot.nbytes, Layout(slot.layout.scalar_type, tuple(slot.layout.sizes)) if slot.layout else None
        )
        for slot in slots
    ]


class SingleFile:
    """A program that is written with its weights inside.

    Args:
        file: empty, open for reading and writing.
        program: of a template, with places in the file.
    """

    def __init__(self, file: BinaryIO, program: Program) -> None:
        self._fd, self._program = file.fileno(), program
        self._digests = [hashlib.sha256() for _ in program.slots]
        self._written = [0] * len(program.slots)
        os.ftruncate(self._fd, program.size)

    def write(self, index: int, data: memoryview) -> None:
        slot = self._program.slots[index]
        if slot.offset is None or self._written[index] + len(data) > slot.nbytes:
            raise ValueError(f"{slot.tensor} has more than its {slot.nbytes} bytes")
        self._digests[index].update(data)
        write_at(self._fd, data, slot.offset + self._written[index])
        self._written[index] += len(data)

    def finish(self) -> list[str]:
        for slot, written in zip(self._program.slots, self._written, strict=True):
            if written != slot.nbytes:
                raise ValueError(f"{slot.tensor} has {written} of its {slot.nbytes} bytes")
        return [
            _name(slot).replace(BY_HASH, digest.hexdigest())
            for slot, digest in zip(self._program.slots, self._digests, strict=True)
        ]

    def write_code(self, names: Mapping[str, str]) -> None:
        """Write what is no weight, after `FilledProgram.finish`."""
        code, start = memoryview(checked(self._program.code, names)), 0
        for run in self._program.runs:
            write_at(self._fd, code[start : start + run.nbytes], run.offset)
            start += run.nbytes


def checked(code: bytes, names: Mapping[str, str]) -> bytes:
    """A template's program with the names of weights in the place of its stand-ins, all of which it must have been given.

    Raises:
        TemplateError: it wants a weight that is not among them.
    """
    missing = names_in(code) - names.keys()
    if missing:
        raise TemplateError(
            f"the template wants {len(missing)} weights that it has no slots for, as {min(missing)}", do=_OTHER
        )
    return patch(code, names)


def _name(slot: Slot) -> str:
    if slot.layout is not None:
        return slot.name
    return f"scale_{BY_HASH}" if slot.name.startswith("scale_") else BY_HASH
