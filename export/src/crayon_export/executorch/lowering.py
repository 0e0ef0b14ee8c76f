"""ExecuTorch's exporter over a model whose weights are all stand-ins, and the template that is left when they are taken out.

A stand-in is memory that nothing was written to, which costs nothing, but for a few numbers at its beginning that tell it from all
others. What XNNPACK names after a hash of the bytes gets a name that says which tensor it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from executorch.exir._serialize._cord import Cord
from executorch.exir._serialize._serialize import _extract_external_tensor_layouts
from executorch.exir.schema import Buffer

from crayon_export import architecture as arch
from crayon_export.executorch import official
from crayon_export.executorch import quick as shortcuts
from crayon_export.executorch.official import Emitted
from crayon_export.executorch.quick import Absent, StandIn
from crayon_export.executorch.storage import PER_ROW, Stored, linear_form
from crayon_export.executorch.template import (
    ROTARY,
    Form,
    Layout,
    Part,
    Program,
    ProgramName,
    Run,
    Slot,
    Template,
    TemplateSpec,
)
from crayon_runtime.affine import Affine

_Array = npt.NDArray[Any]

ADAPTER = "adapter"
"""The name of the adapted model, and so of the file with its weights."""


def make_template(
    spec: TemplateSpec, on_stage: Callable[[str], None] = lambda _: None, *, quick: bool = True
) -> Template:
    """Make a template.

    Args:
        on_stage: told what comes next.
        quick: False: have the exporter do all of its work, which takes several times as long and comes to the same.
    """
    weights = StandIns(spec)
    with shortcuts.quick(weights.identify) if quick else nullcontext():
        lowered = _lowered(spec, weights, on_stage)
    on_stage("taking the weights out")
    programs: dict[ProgramName, Program] = {
        "model": weights.taken_out(lowered, lowered.emitted(official.BASE)),
        "single": weights.taken_out(lowered, lowered.single()),
    }
    if spec.adapter:
        programs["adapter"] = weights.taken_out(lowered, lowered.emitted(ADAPTER), with_adapter=True)
    return Template(spec, programs)


def _lowered(spec: TemplateSpec, weights: StandIns, on_stage: Callable[[str], None]) -> official.Programs:
    names = [official.BASE, ADAPTER] if spec.adapter else [official.BASE]
    traced = {}
    for name in names:
        on_stage(f"tracing the model{' with an adapter' if name == ADAPTER else ''}")
        with shortcuts.lazy_zeros():
            model = official.build(
                spec.architecture,
                weights.tensors,
                context_length=spec.context_length,
                kv_dtype=spec.kv_dtype,
                tap_layer=spec.tap_layer,
                adapter=weights.adapter if name == ADAPTER else None,
            )
        traced[name] = official.trace(model, name, context_length=spec.context_length)
    on_stage("lowering")
    constants = official.constants(spec.architecture, spec.bos, spec.eos)
    return official.lower(traced, constants, context_length=spec.context_length)


class StandIns:
    """What stands for the weights of a model and of its adapter, and what is known of each."""

    def __init__(self, spec: TemplateSpec) -> None:
        self._made: list[tuple[_Array, Slot]] = []
        self._by_marks: dict[tuple[Any, ...], tuple[_Array, Slot]] = {}
        a = spec.architecture
        per_row = PER_ROW if spec.weights else None
        modules = {linear.module for linear in arch.linears(a)} | {"lm_head"}
        shapes = {**dict(arch.tensors(a)), arch.HEAD: (a.vocab_size, a.hidden_size)}
        self.tensors: dict[str, Stored] = {}
        """As `official.build` takes them."""
        for name, shape in shapes.items():
            form = per_row if name == arch.EMBEDDING else None
            if name.removesuffix(".weight") in modules:
                form = linear_form(shape[-1], spec.weights, tied_head=spec.tied_embeddings and name == arch.HEAD)
            self.tensors[name] = self._stored(name, shape, form)
        self.adapter: dict[str, tuple[Stored, Stored]] = {}
        """By module, as `official.build` takes it."""
        for target in spec.targets:
            rank = spec.adapter.rank if spec.adapter else 0
            self.adapter[target.module] = (
                self._stored(f"{target.module}.lora_a", (rank, target.in_features), per_row),
                self._stored(f"{target.module}.lora_b", (target.out_features, rank), per_row),
            )
        for name, table in zip(ROTARY, arch.rotary_tables(a, spec.context_length), strict=True):
            self._register(np.concatenate((table, table), axis=1), name, "values", "fp32")

    def _stored(self, name: str, shape: tuple[int, ...], form: Affine | None) -> Stored:
        number = len(self._made)
        if form is None:
            values = np.zeros(shape, np.float32)
            values.flat[0] = 1 + number
            self._register(values, name, "values", "fp32")
            return Stored(values, None, None)
        # In digits that int4 and bfloat16 hold exactly.
        codes = np.zeros(shape, np.int8)
        codes.flat[:4] = [(number >> shift & 15) - 8 for shift in (0, 4, 8, 12)]
        scales = np.zeros((shape[0], shape[1] // form.group_size if form.group_size else 1), np.float32)
        scales.flat[0] = 128 + number % 128
        scales.flat[1:2] = 128 + number // 128
        self._register(codes, name, "codes", "int4" if form.bits == 4 else "int8")
        self._register(scales, name, "scales", "bf16" if form.group_size else "fp32")
        return Stored(codes, scales, form)

    def _register(self, values: _Array, tensor: str, part: Part, form: Form) -> None:
        name = ("scale_" if part == "scales" else "") + hashlib.sha256(f"{tensor} {part}".encode()).hexdigest()
        made = values, Slot(name, tensor, part, form, list(values.shape), 1)
        self._made.append(made)
        self._by_marks[_marks(values)] = made

    def identify(self, tensor: torch.Tensor) -> StandIn | None:
        """Whether a constant of a program is a stand-in, and which."""
        found = self._by_marks.get(_marks(tensor.numpy()))
        return None if found is None else StandIn(found[1], lambda: _packed_name(*found))

    def taken_out(self, lowered: official.Programs, program: Emitted, *, with_adapter: bool = False) -> Program:
        """A program without the stand-ins."""
        emitted, named = program
        by_name = {slot.name: slot for _, slot in self._made}
        keys = {key for entries in (named.pte_data, *named.external_data.values()) for key in entries}
        renamed: dict[str, str] = {}
        if not keys <= by_name.keys():
            renamed = {_packed_name(values, slot): slot.name for values, slot in self._made}
            by_name = {packed: by_name[name] for packed, name in renamed.items()}
        by_bytes = {hashlib.sha256(values.tobytes()).hexdigest(): slot for values, slot in self._made if _is_own(slot)}
        slots: list[Slot] = []
        layouts = _extract_external_tensor_layouts(emitted.program)
        constants = list(emitted.external_constant_buffer)
        for _, tagged in emitted.external_constant_map.items():
            for key, index in tagged.items():
                slot = by_bytes[hashlib.sha256(constants[index]).hexdigest()]
                layout = Layout(
                    int(layouts[key].scalar_type), layouts[key].sizes, [int(d) for d in layouts[key].dim_order]
                )
                slots.append(msgspec.structs.replace(slot, name=key, layout=layout))
        inside = [Buffer(b.storage) for b in emitted.program.constant_buffer]
        for buffer in inside:
            found = by_bytes.get(hashlib.sha256(buffer.storage).hexdigest())
            if found is not None:
                buffer.storage = Absent(msgspec.structs.replace(found, name=""))
        buffers = list(named.buffers)
        for entries in (named.pte_data, *named.external_data.values()):
            for key, entry in entries.items():
                slot = msgspec.structs.replace(by_name[key], alignment=entry.alignment)
                buffers[entry.buffer_index] = Absent(slot)
                if entries is named.pte_data or (slot.in_adapter and not with_adapter):
                    continue
                slots.append(slot)
        pte, _ = lowered.serialize(
            Emitted(
                replace(emitted, program=replace(emitted.program, constant_buffer=inside)),
                replace(named, buffers=buffers),
            )
        )
        return _cut(pte, slots, renamed)


def _cut(pte: Cord, slots: list[Slot], renamed: Mapping[str, str]) -> Program:
    """A program's file, apart from what is absent."""
    code, offset = bytearray(), 0
    runs: list[Run] = []
    for piece in pte._buffers:
        if isinstance(piece, Absent):
            slots.append(msgspec.structs.replace(piece.slot, offset=offset))
        elif piece:
            code += piece
            if runs and runs[-1].offset + runs[-1].nbytes == offset:
                runs[-1] = Run(runs[-1].offset, runs[-1].nbytes + len(piece))
            else:
                runs.append(Run(offset, len(piece)))
        offset += len(piece)
    final = bytes(code)
    for old, new in renamed.items():
        final = final.replace(old.encode(), new.encode())
    return Program(final, slots, offset, runs)


def _marks(values: _Array) -> tuple[Any, ...]:
    """What tells a stand-in from others, and from the constants of the exporter."""
    return values.dtype.str, values.shape, tuple(values.flat[:4])


def _is_own(slot: Slot) -> bool:
    """Whether a program reads it itself, and not XNNPACK for it."""
    return slot.tensor in (arch.EMBEDDING, arch.FINAL_NORM, *ROTARY) or "layernorm" in slot.tensor


def _packed_name(values: _Array, slot: Slot) -> str:
    """The name that XNNPACK gives to a part of a tensor."""
    if slot.form == "int4":
        unsigned = (values + 8).astype(np.uint8).reshape(-1)
        values = unsigned[1::2] << 4 | unsigned[::2]
    elif slot.form == "bf16":
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    return ("scale_" if slot.part == "scales" else "") + hashlib.sha256(values.tobytes()).hexdigest()
