"""ExecuTorch's exporter without the work that it does over and over.

Three quarters of what it does for a deep model is the same in every layer, or repeated over the whole program. Within `quick` some of
its functions are replaced by ones that remember, and come to the same result; tests hold both ways to the same bytes. What is replaced
is compared with the code that this was written for.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple
from unittest.mock import patch
from weakref import WeakSet

import numpy as np
import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.operators.node_visitor import NodeVisitor
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNGraph
from executorch.backends.xnnpack.xnnpack_preprocess import DEFAULT_DEBUG_HANDLE, XnnpackBackend
from executorch.exir import lowered_backend_module
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir.backend import backend_api
from executorch.exir.backend.backend_details import BackendDetails, CompileSpec, PreprocessResult
from executorch.exir.backend.canonical_partitioners import group_partitioner
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.variables import builder
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx.graph import _Namespace
from torch.fx.passes.infra import partitioner
from torch.fx.passes.tools_common import legalize_graph

from crayon_export.executorch.template import Slot
from crayon_runtime.errors import BackendError


class StandIn(NamedTuple):
    """A constant that is one."""

    slot: Slot
    packed_name: Callable[[], str]
    """What XNNPACK calls it."""


Identify = Callable[[torch.Tensor], "StandIn | None"]


class Absent(FileBackedData):  # type: ignore[misc]
    """The bytes of a stand-in, in the eyes of the exporter, which asks how many there are and compares them with others."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def __len__(self) -> int:
        return self.slot.nbytes

    def __deepcopy__(self, _: object) -> Absent:
        return self

    def prefix(self, size: int) -> bytes:
        return self.sha256()[:size]

    def sha256(self) -> bytes:
        return hashlib.sha256(f"{self.slot.tensor} {self.slot.part}".encode()).digest()

    def to_bytes(self) -> bytes:
        raise AssertionError(self.slot)

    def write_to_file(self, _: object) -> None:
        raise AssertionError(self.slot)


@contextmanager
def quick(identify: Identify) -> Iterator[None]:
    """Within, the exporter lowers a model of stand-ins quickly, and calls them by the names of their slots.

    Raises:
        BackendError: the exporter is not the one that this was written for.
    """
    _check()
    with (
        patch.object(XnnpackBackend, "preprocess", staticmethod(_Preprocess(identify))),
        # All parts would be copied before the first one is compiled. `_Preprocess` copies the one at hand.
        patch.object(XnnpackBackend, "copy_exported_program_for_preprocess", _not_copied),
        patch.object(ExportedProgram, "run_decompositions", _decompositions()),
        patch.object(torch._library.utils, "is_builtin", _is_remembered),
        patch.object(builder, "_clone_input", _cloned_input()),
        # A guard of all shapes, with a condition for each operator. It is compiled, and never called.
        patch.object(GuardBuilder, "add_python_lambda_leaf_guard_to_root", _unguarded),
        patch.object(backend_api, "_create_partitions", _partitions()),
        patch.object(lowered_backend_module, "legalize_graph", _sorted_in_place),
        patch.object(partitioner, "_DependencyViewer", _Below),
        patch.object(group_partitioner, "_DependencyViewer", _Below),
    ):
        yield


def _unguarded(*_: Any, **__: Any) -> None: ...


def _not_copied(program: ExportedProgram, _: list[CompileSpec]) -> ExportedProgram:
    return program


def _copied(program: ExportedProgram) -> ExportedProgram:
    """A copy over the same constants."""
    constants = (*program.state_dict.values(), *program.constants.values())
    return copy.deepcopy(program, {id(constant): constant for constant in constants})


class _Part(NamedTuple):
    """A part of a program that XNNPACK takes."""

    key: tuple[Any, ...]
    """Everything that its compiler sees, but for which stand-ins they are, and the numbers that nodes have in debugging."""
    stand_ins: list[StandIn]
    """In order."""
    handles: list[int]
    """The numbers, in order."""


class _Compiled(NamedTuple):
    """What became of the first part of a kind."""

    graph: XNNGraph
    data: NamedDataStoreOutput
    stand_ins: Mapping[str, int]
    """Which of the part's, by the name that XNNPACK gave it."""
    handles: Mapping[int, int]
    """Which of the part's."""


class _Preprocess:
    """XNNPACK's compiler: each kind of part is compiled once."""

    def __init__(self, identify: Identify) -> None:
        self._identify = identify
        self._compile = XnnpackBackend.preprocess
        self._known: dict[tuple[Any, ...], _Compiled] = {}

    def __call__(self, edge_program: ExportedProgram, compile_specs: list[CompileSpec]) -> PreprocessResult:
        part = _part(edge_program, compile_specs, self._identify)
        compiled = self._known.get(part.key)
        if compiled is None:
            compiled = self._known[part.key] = self._compiled(edge_program, compile_specs, part)

        def name(key: str) -> str:
            index = compiled.stand_ins.get(key)
            return key if index is None else part.stand_ins[index].slot.name

        graph = copy.deepcopy(compiled.graph)
        for constant in graph.constant_data:
            constant.named_key = name(constant.named_key)
        for node in graph.xnodes:
            if node.debug_handle != DEFAULT_DEBUG_HANDLE:
                node.debug_handle = part.handles[compiled.handles[node.debug_handle]]
        buffers = list(compiled.data.buffers)
        outside = {
            tag: {name(k): e for k, e in entries.items()} for tag, entries in compiled.data.external_data.items()
        }
        inside = {name(k): e for k, e in compiled.data.pte_data.items()}
        by_name = {x.slot.name: x.slot for x in part.stand_ins}
        for entries in (inside, *outside.values()):
            for key, entry in entries.items():
                if key in by_name:
                    buffers[entry.buffer_index] = Absent(by_name[key])
        processed = xnnpack_preprocess.serialize_xnnpack_binary(graph, bytearray())
        return PreprocessResult(processed, {}, NamedDataStoreOutput(buffers, inside, outside))

    def _compiled(self, edge_program: ExportedProgram, compile_specs: list[CompileSpec], part: _Part) -> _Compiled:
        graphs: list[XNNGraph] = []
        serialize = xnnpack_preprocess.serialize_xnnpack_binary

        def seen(graph: XNNGraph, constants: bytearray) -> bytes:
            assert not constants
            graphs.append(graph)
            return bytes(serialize(graph, constants))

        with patch.object(xnnpack_preprocess, "serialize_xnnpack_binary", seen):
            result = self._compile(_copied(edge_program), compile_specs)
        (graph,) = graphs
        assert not result.debug_handle_map
        data = result.data_store_output
        stand_ins = {x.packed_name(): index for index, x in enumerate(part.stand_ins)}
        # What is known of a stand-in is its length; the bytes that stood for it are dropped.
        buffers: list[Any] = list(data.buffers)
        for entries in (data.pte_data, *data.external_data.values()):
            for key, entry in entries.items():
                if key in stand_ins:
                    slot = part.stand_ins[stand_ins[key]].slot
                    assert slot.nbytes == len(buffers[entry.buffer_index])
                    buffers[entry.buffer_index] = Absent(slot)
        handles = {handle: index for index, handle in enumerate(part.handles)}
        return _Compiled(graph, NamedDataStoreOutput(buffers, data.pte_data, data.external_data), stand_ins, handles)


def _part(program: ExportedProgram, specs: list[CompileSpec], identify: Identify) -> _Part:
    signature = program.graph_signature
    kinds = {spec.arg.name: spec.kind.name for spec in signature.input_specs}
    targets = {spec.arg.name: spec.target for spec in signature.input_specs if spec.target}
    order: dict[torch.fx.Node, int] = {}
    stand_ins: list[StandIn] = []
    handles: dict[int, int] = {}
    nodes: list[Any] = []

    def plain(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return "node", order[value]
        if isinstance(value, list | tuple):
            return tuple(plain(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, plain(v)) for k, v in value.items())
        if isinstance(value, torch.Tensor):
            return str(value.dtype), tuple(map(str, value.shape)), tuple(map(str, value.stride()))
        return type(value).__name__, str(value)

    def constant(name: str) -> Any:
        target = targets[name]
        tensor = program.state_dict[target] if target in program.state_dict else program.constants[target]
        stand_in = identify(tensor)
        if stand_in is None:
            return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        names = [x.slot.name for x in stand_ins]
        if stand_in.slot.name not in names:
            stand_ins.append(stand_in)
            names.append(stand_in.slot.name)
        return names.index(stand_in.slot.name)

    for node in program.graph.nodes:
        order[node] = len(order)
        handle = node.meta.get("debug_handle")
        nodes.append(
            (
                node.op,
                # The names of placeholders differ; what they are is in the signature.
                "" if node.op == "placeholder" else str(node.target),
                plain(node.args),
                plain(node.kwargs),
                plain(node.meta.get("val")),
                plain(node.meta.get("custom")),
                node.name in targets and (kinds[node.name], constant(node.name)),
                None if handle is None else handles.setdefault(handle, len(handles)),
            )
        )
    ranges = {str(symbol): str(r) for symbol, r in program.range_constraints.items()}
    compile_specs = tuple((spec.key, bytes(spec.value)) for spec in specs)
    return _Part((tuple(nodes), tuple(ranges.items()), compile_specs), stand_ins, list(handles))


def _decompositions() -> Callable[..., ExportedProgram]:
    """`ExportedProgram.run_decompositions`, that leaves a program alone that it has made, and in which nothing is to be decomposed."""
    run = ExportedProgram.run_decompositions
    made: WeakSet[ExportedProgram] = WeakSet()

    def run_decompositions(program: ExportedProgram, table: Any = None, *args: Any, **kwargs: Any) -> ExportedProgram:
        if program in made and table is not None:
            modules = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
            targets = {node.target for m in modules for node in m.graph.nodes if node.op == "call_function"}
            if not any(target in table for target in targets - _INDIVISIBLE):
                return program
        done: ExportedProgram = run(program, table, *args, **kwargs)
        made.add(done)
        return done

    return run_decompositions


class _Below:
    """The partitioners' `_DependencyViewer`: which nodes depend on one. It keeps a bit for each; sets come to gigabytes."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self._nodes = list(module.graph.nodes)
        numbers = {node: number for number, node in enumerate(self._nodes)}
        self._below: dict[torch.fx.Node, int] = {}
        for node in reversed(self._nodes):
            self._below[node] = reduce(operator.or_, (self._below[user] | 1 << numbers[user] for user in node.users), 0)

    def downstreams_of(self, node: torch.fx.Node) -> Iterator[torch.fx.Node]:
        bits = self._below.get(node, 0).to_bytes(len(self._nodes) // 8 + 1, "little")
        found = np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little"))
        return (self._nodes[number] for number in found)


def _partitions() -> Callable[..., Any]:
    """The exporter's `_create_partitions`, that writes the code of the whole program once, and not for each part that it takes out."""
    create, recompile = backend_api._create_partitions, torch.fx.GraphModule.recompile

    def create_partitions(module: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        def others(other: torch.fx.GraphModule) -> Any:
            return None if other is module else recompile(other)

        with patch.object(torch.fx.GraphModule, "recompile", others):
            created = create(module, *args, **kwargs)
        module.recompile()
        return created

    return create_partitions


def _sorted_in_place(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`legalize_graph`, in the same order of nodes, of their users and of names: it copies the whole program for each part that is taken out."""
    graph = module.graph
    waits_for = {node: len(node.all_input_nodes) for node in graph.nodes}
    ready = deque(node for node, count in waits_for.items() if count == 0)
    order = []
    while ready:
        node = ready.popleft()
        order.append(node)
        for user in node.users:
            waits_for[user] -= 1
            if waits_for[user] == 0:
                first = user.op == "call_function" and user.target in _FIRST
                (ready.appendleft if first else ready.append)(user)
    if len(order) < len(waits_for):
        raise RuntimeError("the program has a cycle")
    graph._graph_namespace = _Namespace()
    for node in order:
        graph._root.prepend(node)
        for used in node.all_input_nodes:
            used.users[node] = used.users.pop(node)
        name = graph._graph_namespace.create_name(node.name, None)
        assert name == node.name
    return module


_FIRST = {
    operator.add, operator.mul, operator.sub, operator.floordiv, operator.truediv, operator.mod, operator.le, operator.lt, operator.ge, operator.gt,
    operator.eq, operator.ne, torch.ops.aten.sym_constrain_range.default, torch.ops.aten.sym_constrain_range_for_size.default,
    torch.ops.aten._assert_async.msg, torch.ops.aten.scalar_tensor.default, torch.ops.aten._assert_scalar.default,
}  # fmt: skip
"""What `legalize_graph` puts first."""


def _cloned_input() -> Callable[[Any, Any], Any]:
    """dynamo's `_clone_input`, that leaves weights alone: it copies them all for the case that their values decide what is traced."""
    clone = builder._clone_input

    def clone_input(value: Any, fake_mode: Any) -> Any:
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            return value
        return clone(value, fake_mode)

    return clone_input


@contextmanager
def lazy_zeros() -> Iterator[None]:
    """Within, `torch.zeros` takes no memory before something is written; KV caches are gigabytes that nobody reads."""
    zeros, numbers = torch.zeros, {torch.float32: np.float32, torch.int8: np.int8}

    def lazy(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> torch.Tensor:
        where = torch.get_default_device() if device is None else torch.device(device)
        if kwargs or dtype not in numbers or where.type != "cpu":
            return zeros(*size, dtype=dtype, device=device, **kwargs)
        return torch.from_numpy(np.zeros(size if isinstance(size[0], int) else tuple(size[0]), numbers[dtype]))

    with patch.object(torch, "zeros", lazy):
        yield


def _is_remembered(op: torch._ops.OpOverload) -> bool:
    """Whether the shape of a result may be remembered for arguments of the same shapes: torch's own operators, and those with which torchao
    quantizes and dequantizes, each of which it takes apart into a dozen others to find out."""
    return op.namespace in ("aten", "prim", "prims") or str(op.name()) in _OF_TORCHAO  # type: ignore[no-untyped-call]


_OF_TORCHAO = {f"torchao::{name}" for name in ("choose_qparams_affine", "quantize_affine", "dequantize_affine")}

_INDIVISIBLE = {torch.ops.aten.sym_size.int}
"""What tables of decompositions name, and nothing comes of it."""

_WRITTEN_FOR = {
    XnnpackBackend.preprocess: "62f7dc915f1ef40c",
    BackendDetails.copy_exported_program_for_preprocess: "161d76674b18cbbd",
    BackendDetails.preprocess_multimethod: "4a833eb94738777c",
    NodeVisitor.get_serialized_buffer_index: "e5e2a2aaa02290608",
    NodeVisitor.get_quant_params: "2af420bb177ef9ba",
    ExportedProgram.run_decompositions: "c74cbc17d387402",
    backend_api._create_partitions: "a3259c8d375ddf13",
    partitioner._DependencyViewer: "47bacdf03efdce20",
    group_partitioner._DependencyViewer: "a6d3ee37edb6ec3a",
    group_partitioner.GroupBasedPartitioner._can_merge_partitions: "08428a6ba5abd129",
    GuardBuilder.add_python_lambda_leaf_guard_to_root: "a1ec2ecc3cedb7cc",
    legalize_graph: "6dc8094b32ebd463",
    builder._clone_input: "fdee93dcef3fc957",
    torch._library.utils.is_builtin: "f8524c97621ee850",
}
"""The functions that are replaced, or whose results are, and the beginnings of the SHA-256 of their sources."""


def _check() -> None:
    for function, digest in _WRITTEN_FOR.items():
        if not hashlib.sha256(inspect.getsource(function).encode()).hexdigest().startswith(digest):
            raise BackendError(
                f"{function.__module__}.{function.__qualname__} is not what this version of crayon-edge knows",
                do="install the pinned versions of torch and executorch (constraints.txt), or use --official",
            )
