"""A LoRA as the `.ptd` file that a program with slots takes, and the program in which those slots hold it.

A program with slots is made once for a base. Each of its slots has an A of the same rank, and a B, under names that stand in for those of
the weights: `stand_ins`. An adapter of a smaller rank is padded with zeros, and so is what it leaves out, which changes no result.

int8: symmetric, with a float32 scale for each row of A [r, in] and of B [out, r], `crayon_runtime.affine`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from crayon_runtime.affine import Affine
from crayon_runtime.backends.flat_tensor import BY_HASH, Entry, FlatTensorWriter
from crayon_runtime.backends.patch import patch
from crayon_runtime.errors import AdapterError

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.backends.onnx_adapter import Tensor
    from crayon_runtime.manifest import ProgramSlots

    Floats = npt.NDArray[np.float32]

_ROWS = Affine(8, 0)
_A, _B = ".lora_A.weight", ".lora_B.weight"
_TOGETHER = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The layers of a block, those together that read one input: XNNPACK computes them in one piece, and so the exporter orders them."""


def slot_shapes(slots: ProgramSlots) -> Iterator[tuple[str, tuple[int, int]]]:
    """The order of the slots: `MODULE.lora_A.weight` with [rank, in] of all layers that read one input, then `MODULE.lora_B.weight` with
    [out, rank] of the same."""
    targets = {target.name: target for target in slots.targets}
    for layer in range(slots.layers):
        for together in _TOGETHER:
            used = [
                (f"model.layers.{layer}.{m}", targets[name])
                for m in together
                if (name := m.rpartition(".")[2]) in targets
            ]
            yield from ((module + _A, (slots.rank, target.in_features)) for module, target in used)
            yield from ((module + _B, (target.out_features, slots.rank)) for module, target in used)


def nbytes(slots: ProgramSlots) -> int:
    """Bytes of the weights of an adapter."""
    return sum(entry.nbytes for _, shape in slot_shapes(slots) for entry in _entries(shape, slots))


def stand_ins(slots: ProgramSlots) -> list[str]:
    """What the weights of the slots are called in the program that comes with the base, in the order of `write_executorch_adapter`."""
    names = []
    for name, _ in slot_shapes(slots):
        digest = hashlib.sha256(name.encode()).hexdigest()
        names += [digest, f"scale_{digest}"] if slots.dtype == "int8" else [digest]
    return names


def program_for(program: bytes, slots: ProgramSlots, names: Sequence[str]) -> bytes:
    """The program with slots of a base, for the adapter whose weights have these names.

    Raises:
        AdapterError: the names are not those of weights for these slots.
    """
    stands = stand_ins(slots)
    if len(stands) != len(names):
        raise AdapterError(
            f"the adapter has {len(names)} weights; the slots of this base are for {len(stands)}",
            do="convert the adapter again with `crayon adapter convert … --bundle` and this bundle",
        )
    return patch(program, dict(zip(stands, names, strict=True)))


def check_fit(tensors: Mapping[str, Tensor], slots: ProgramSlots) -> None:
    """Refuse an adapter that has no place in the slots.

    Args:
        tensors: as for an ONNX adapter, `MODULE.lora_A.weight` [in, r] and `MODULE.lora_B.weight` [r, out].

    Raises:
        AdapterError: its rank is larger, it targets layers that have no slot, or its shapes are others.
    """
    places = dict(slot_shapes(slots))
    for name, (shape, _) in tensors.items():
        place = places.get(name)
        if place is None:
            raise AdapterError(
                f"it changes {name.removesuffix(_A).removesuffix(_B)}; the program for ExecuTorch has slots in"
                f" {', '.join(target.name for target in slots.targets)} of {slots.layers} layers",
                do="export the base again with slots for it: --slot-target",
            )
        inside, rank, there, slot_rank = (
            (*shape, place[1], place[0]) if name.endswith(_A) else (shape[1], shape[0], *place)
        )
        if inside != there:
            raise AdapterError(f"{name} is for {inside} features; this base has {there}")
        if rank > slot_rank:
            raise AdapterError(
                f"its rank is {rank}; the program for ExecuTorch has slots of rank {slot_rank}",
                do=f"export the base again with --slot-rank {rank}, or train or ask for an adapter of a smaller rank",
            )


def write_executorch_adapter(file: BinaryIO, tensors: Mapping[str, Tensor], slots: ProgramSlots) -> list[str]:
    """Write the weights of an adapter as a `.ptd`.

    Args:
        file: empty, open for reading and writing.
        tensors: float32, `MODULE.lora_A.weight` [in, r] and `MODULE.lora_B.weight` [r, out], with alpha/r in B, both or none of a module.

    Returns:
        Their names, of each slot those of A and B, each before that of its scales if it has some.

    Raises:
        AdapterError: they do not fit the slots, or hold NaN or infinity.
    """
    check_fit(tensors, slots)
    shapes = list(slot_shapes(slots))
    entries = [entry for _, shape in shapes for entry in _entries(shape, slots)]
    writer = FlatTensorWriter(file, entries)
    parts = len(entries) // len(shapes)

    def padded(name: str, shape: tuple[int, int]) -> Floats | None:
        if name not in tensors:
            return None
        expected, compute = tensors[name]
        matrix = compute().T
        if matrix.shape != expected[::-1]:
            raise AdapterError(f"{name} has shape {list(matrix.T.shape)}, not {list(expected)}")
        if matrix.shape == shape:
            return np.ascontiguousarray(matrix, np.float32)
        whole = np.zeros(shape, np.float32)
        whole[: matrix.shape[0], : matrix.shape[1]] = matrix
        return whole

    def write(index: int, name: str, shape: tuple[int, int], matrix: Floats | None) -> None:
        stored = _stored(np.zeros(shape, np.float32) if matrix is None else matrix, slots)
        if not np.isfinite(stored[-1]).all():  # a scale, where there are some, is of all of its row
            raise AdapterError(f"{name} holds NaN or infinity")
        for part, array in enumerate(stored):
            writer.write(index * parts + part, array.data)

    # What a blend computes is waited for; what is made of it here, and hashed, is done meanwhile.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        waiting = [pool.submit(write, i, name, shape, padded(name, shape)) for i, (name, shape) in enumerate(shapes)]
        for done in waiting:
            done.result()
    return writer.finish()


def _entries(shape: tuple[int, int], slots: ProgramSlots) -> list[Entry]:
    rows, width = shape
    if slots.dtype == "fp32":
        return [Entry(BY_HASH, 4 * rows * width)]
    return [Entry(BY_HASH, rows * width), Entry(f"scale_{BY_HASH}", 4 * rows)]


def _stored(matrix: Floats, slots: ProgramSlots) -> list[npt.NDArray[Any]]:
    if slots.dtype == "fp32":
        return [matrix]
    with np.errstate(invalid="ignore"):  # of NaN, which the scales tell of
        codes, scales = _ROWS.quantize(matrix)
    return [codes, scales]
