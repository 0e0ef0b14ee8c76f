"""ExecuTorch's official LLaMA, its official lowering to XNNPACK, and one program with a method for every use.

Only the driver is ours. The model's classes, the attention with its custom operators, the quantized tensors, the passes and the
partitioners are those that `executorch.examples.models.llama.export_llama_lib` puts together; what differs:

- blocks that are computed several times (MobileLLM-LS) are layers over the same weights, each with a KV cache;
- weights come quantized, from `ProgramStorage`, so that the golden cases are computed with the very same numbers;
- rotary tables are ours, which also know linear and llama3 scaling in the layout of transformers;
- each linear layer has a group size that divides it;
- the model returns a tap beside its logits (`forward_tap`). `forward`, which stock runners want with one output, is the same plan
  with the other outputs left out, so nothing is lowered twice;
- the base and all adapters are lowered together, over one KV cache; an adapter's program is cut out of the result.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from executorch.backends.xnnpack._passes.convert_to_linear import ConvertToLinearPass
from executorch.examples.models.llama.llama_transformer import Transformer, construct_transformer
from executorch.examples.models.llama.model_args import ModelArgs
from executorch.examples.models.llama.source_transformation.custom_kv_cache import (
    replace_kv_cache_with_custom_kv_cache,
    replace_kv_cache_with_quantized_kv_cache,
)
from executorch.examples.models.llama.source_transformation.quantize import QuantizedGroupEmbedding
from executorch.examples.models.llama.source_transformation.sdpa import (
    replace_sdpa_with_custom_op,
    replace_sdpa_with_quantized_sdpa,
)
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir._serialize._cord import Cord
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir._serialize._serialize import serialize_for_executorch
from executorch.exir.emit import EmitterOutput, emit_program
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.external_constants_pass import delegate_external_constants_pass_unlifted
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from executorch.extension.llm.export.export_passes import RemoveRedundantTransposes
from executorch.extension.llm.export.partitioner_lib import get_xnnpack_partitioner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchao.quantization import IntxUnpackedToInt8Tensor

from crayon_export import architecture as arch
from crayon_export.executorch.storage import Floats, Stored
from crayon_runtime.affine import Affine, Codes
from crayon_runtime.manifest import Architecture

BASE = "model"
"""What the base's files are called."""

MAX_TOKENS = 256
"""Tokens of a prompt in one step, as many as the engine feeds at a time."""

_MODULES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


class Tapped(torch.nn.Module):
    """The official model, with the tap: tokens int64 [1, S] and the position int64 [1] of the first of them to the logits [1, V]
    after the last, the sum of the tapped hidden states [1, D] and the last of them [1, D].

    Args:
        tapped_after: how many layers come before the tap.
    """

    def __init__(self, transformer: Transformer, tapped_after: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.tapped_after = tapped_after

    def forward(self, tokens: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        t = self.transformer
        h = tapped = t.tok_embeddings(tokens)
        cos, sin = t.rope.get_freqs(position, tokens.shape[1])
        for index, layer in enumerate(t.layers):
            h, _ = layer(h, cos, sin, {"input_pos": position})
            if index + 1 == self.tapped_after:
                tapped = h
        if self.tapped_after == len(t.layers):
            tapped = t.norm(h)
            last = tapped[:, -1, :]
        else:
            last = t.norm(h[:, -1, :])
        return t.output(last), tapped.sum(dim=1), tapped[:, -1, :]


class LoraLinear(torch.nn.Module):
    """A linear layer with an adapter beside it. alpha/r is part of B, so one multiplication less than in the official class."""

    def __init__(self, linear: torch.nn.Linear, a: Stored, b: Stored) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a = _linear(a)
        self.lora_b = _linear(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x) + self.lora_b(self.lora_a(x))
        return y


def build(
    a: Architecture,
    tensors: Mapping[str, Stored],
    *,
    context_length: int,
    kv_dtype: str,
    tap_layer: int,
    adapter: Mapping[str, tuple[Stored, Stored]] | None = None,
) -> Tapped:
    """The official model over stored weights, which are not copied."""
    args = ModelArgs(
        dim=a.hidden_size,
        n_layers=a.passes,
        n_heads=a.heads,
        n_kv_heads=a.kv_heads,
        head_dim=a.head_size,
        hidden_dim=a.ffn_size,
        vocab_size=a.vocab_size,
        norm_eps=a.norm_eps,
        rope_theta=a.rope.theta,
        use_hf_rope=True,  # queries and keys in the layout of transformers
        max_batch_size=1,
        max_seq_len=min(MAX_TOKENS, context_length),
        max_context_len=context_length,
        use_kv_cache=True,
        use_sdpa_with_kv_cache_op=True,
        enable_dynamic_shape=True,
    )
    with torch.device("meta"):
        model = construct_transformer(args)
    cos, sin = (torch.from_numpy(np.concatenate((t, t), axis=1)) for t in arch.rotary_tables(a, context_length))
    model.rope.freqs_cos, model.rope.freqs_sin = cos, sin
    model.tok_embeddings = _embedding(tensors[arch.EMBEDDING])
    model.output = _linear(tensors[arch.HEAD])
    model.norm.weight = _parameter(tensors[arch.FINAL_NORM].values)
    for index, layer in enumerate(model.layers):
        for theirs, ours in ((theirs, ours) for ours, theirs in _MODULES.items()):
            module = f"model.layers.{index // a.layer_repeats}.{ours}"
            stored = tensors[f"{module}.weight"]
            parent, _, attribute = theirs.rpartition(".")
            if not parent:
                getattr(layer, theirs).weight = _parameter(stored.values)
                continue
            linear = _linear(stored)
            pair = (adapter or {}).get(module)
            setattr(layer.get_submodule(parent), attribute, LoraLinear(linear, *pair) if pair else linear)
    replace_kv_cache_with_custom_kv_cache(replace_sdpa_with_custom_op(model))
    if kv_dtype == "int8":
        replace_sdpa_with_quantized_sdpa(replace_kv_cache_with_quantized_kv_cache(model))
    return Tapped(model, tap_layer * a.layer_repeats).eval()


def trace(model: Tapped, name: str, *, context_length: int) -> torch.export.ExportedProgram:
    """The graph of a model, its constants marked with the file that they belong to.

    Args:
        name: `BASE`, or for an adapted model that of the adapter's file.
    """
    longest = min(MAX_TOKENS, context_length)
    graph = RemoveRedundantTransposes()(_trace(model, longest).module()).graph_module
    delegate_external_constants_pass_unlifted(graph, lambda node: name if "lora_" in node.name else BASE)
    return _trace(graph, longest)


def constants(a: Architecture, bos: int | None, eos: Sequence[int]) -> dict[str, Any]:
    """What a runner asks a program about its model, by the names of methods."""
    return {
        "get_n_layers": a.passes,
        "get_vocab_size": a.vocab_size,
        "get_tap_size": a.hidden_size,
        "get_eos_ids": list(eos),
        **({} if bos is None else {"get_bos_id": bos}),
    }


def lower(
    traced: Mapping[str, torch.export.ExportedProgram], constants: Mapping[str, Any], *, context_length: int
) -> Programs:
    """Lower models together.

    Args:
        traced: the base as `BASE`, and adapted ones, by the names that their files shall have.
        constants: constant methods, by name.
    """
    edge = to_edge_transform_and_lower(
        dict(traced),
        # In this order, as the official exporter says: first the linear layers that quantize their input, then all the rest.
        partitioner=[get_xnnpack_partitioner(dynamic_quant_only_partitioner=only) for only in (True, False)],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods={
            "get_max_seq_len": min(MAX_TOKENS, context_length),
            "get_max_context_len": context_length,
            "use_kv_cache": True,
            "use_sdpa_with_kv_cache": True,
            "enable_dynamic_shape": True,
            **constants,
        },
    )
    edge.transform([ConvertToLinearPass()])
    config = ExecutorchBackendConfig(
        extract_delegate_segments=True,
        do_quant_fusion_and_const_prop=True,
        memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False, share_mutable_buffers=True),
        sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        external_constants=_base_only,
    )
    return Programs(edge.to_executorch(config), config)


class Emitted(NamedTuple):
    """A program as data, before it is serialized: what the program itself reads is in `emitted`, what XNNPACK reads in `named`."""

    emitted: EmitterOutput
    named: NamedDataStoreOutput


class Programs:
    """What was lowered, to be written as one program for each model."""

    def __init__(self, lowered: ExecutorchProgramManager, config: ExecutorchBackendConfig) -> None:
        self._lowered = lowered
        self._config = config

    def write(self, name: str, program: Path, data: Path) -> None:
        """Write the base, or the base with an adapter, and the weights that are its own.

        Args:
            name: of the model, as given to `lower`.
            program: the .pte: `forward` and `forward_tap`, and of an adapter `lora_forward` and `lora_forward_tap`.
            data: the .ptd.
        """
        pte, ptd = self.serialize(self.emitted(name))
        for file, content in ((program, pte), (data, ptd[name])):
            with file.open("xb") as out:
                content.write_to_file(out)

    def write_single(self, program: Path) -> None:
        """Write the base as one .pte that holds its weights: `forward` and `forward_tap`."""
        with program.open("xb") as out:
            self.serialize(self.single())[0].write_to_file(out)

    def serialize(self, program: Emitted) -> tuple[Cord, dict[str, Cord]]:
        """The .pte, and the .ptd of each model whose weights it reads, by their names."""
        pte: Cord
        pte, data = serialize_for_executorch(
            program.emitted, self._config, self._lowered._data_serializer, program.named
        )
        return pte, data

    def emitted(self, name: str) -> Emitted:
        """The base, or the base with an adapter."""
        emitted = self._lowered._emitter_output
        plans = {BASE: "forward"} if name == BASE else {BASE: "forward", name: "lora_forward"}
        return Emitted(dataclasses.replace(emitted, program=_select(emitted.program, plans)), self._lowered._named_data)

    def single(self) -> Emitted:
        """The base with its weights inside: what the exporter emits where no constant is tagged with a file."""
        base = self._lowered.exported_program(BASE)
        # The first emission has left out the outputs that are written into buffers; any others do in their places, to be left out again.
        output = base.graph.output_node()
        left_out = len(base.graph_signature.output_specs) - len(output.args[0])
        output.args = ((output.args[0][0],) * left_out + tuple(output.args[0]),)
        tagged = [node for node in base.graph.nodes if "constant_tag" in node.meta]
        tags = [(node, node.meta.pop("constant_tag"), node.meta["spec"].extra_tensor_info) for node in tagged]
        for node in tagged:
            node.meta["spec"].extra_tensor_info = None
        try:
            emitted = emit_program(
                {BASE: base},
                self._config.emit_stacktrace,
                self._lowered._config_methods,
                self._config.emit_mutable_buffer_names,
            )
        finally:
            for node, tag, info in tags:
                node.meta["constant_tag"], node.meta["spec"].extra_tensor_info = tag, info
        named = self._lowered._named_data
        inside = NamedDataStoreOutput(named.buffers, dict(named.external_data[BASE]), {})
        return Emitted(dataclasses.replace(emitted, program=_select(emitted.program, {BASE: "forward"})), inside)


def _select(program: Any, plans: Mapping[str, str]) -> Any:
    """A program of some of the methods, each under two names: `NAME_tap` with all outputs, `NAME` with the first."""
    by_name = {plan.name: plan for plan in program.execution_plan}
    chosen = [plan for plan in program.execution_plan if plan.name.startswith(("get_", "use_", "enable_"))]
    for theirs, ours in plans.items():
        plan = by_name[theirs]
        for name, outputs in ((ours, plan.outputs[:1]), (f"{ours}_tap", plan.outputs)):
            chosen.append(dataclasses.replace(copy.deepcopy(plan), name=name, outputs=outputs))
    # Delegates refer to their compiled graphs by index; those of the methods left out are left out, too.
    kept: dict[int, int] = {}
    for plan in chosen:
        for delegate in plan.delegates:
            reference = delegate.processed
            reference.index = kept.setdefault(reference.index, len(kept))
    graphs = [program.backend_delegate_data[index] for index in kept]
    return dataclasses.replace(program, execution_plan=chosen, backend_delegate_data=graphs)


def _trace(model: torch.nn.Module, longest: int) -> torch.export.ExportedProgram:
    shapes = ({1: torch.export.Dim("tokens", max=longest)}, None) if longest > 1 else None
    example = (torch.zeros((1, min(3, longest)), dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with sdpa_kernel([SDPBackend.MATH]), torch.no_grad():
        traced: torch.export.ExportedProgram = torch.export.export(
            model, example, dynamic_shapes=shapes, strict=True
        ).run_decompositions({})  # which also takes torchao's tensors apart
    return traced


def _base_only(node: torch.fx.Node) -> str:
    """Whose file a constant that XNNPACK does not take belongs to: those of adapters are all XNNPACK's."""
    assert "lora_" not in node.name, node.name
    return BASE


def _parameter(values: torch.Tensor | Codes | Floats) -> torch.nn.Parameter:
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
    return torch.nn.Parameter(tensor, requires_grad=False)


def _linear(stored: Stored) -> torch.nn.Linear:
    rows, width = stored.values.shape
    linear = torch.nn.Linear(width, rows, bias=False, device="meta")
    linear.weight = _parameter(_quantized(stored, stored.form) if stored.form else stored.values)
    return linear


def _quantized(stored: Stored, form: Affine) -> torch.Tensor:
    """The tensor that torchao's Int8DynamicActivationIntxWeightConfig makes."""
    assert stored.scales is not None
    tensor: torch.Tensor = IntxUnpackedToInt8Tensor(
        qdata=torch.from_numpy(stored.values),
        scale=torch.from_numpy(stored.scales),
        zero_point=torch.zeros(stored.scales.shape, dtype=torch.int8),
        target_dtype=getattr(torch, form.name),
        block_size=(1, form.group_size or stored.values.shape[1]),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )
    return tensor


def _embedding(stored: Stored) -> torch.nn.Module:
    rows, width = stored.values.shape
    if stored.scales is None:
        table = torch.nn.Embedding(rows, width, device="meta")
        table.weight = _parameter(stored.values)
        return table
    quantized: torch.nn.Module = QuantizedGroupEmbedding(
        device="meta", vocab_size=rows, embedding_dim=width, dtype=torch.float32, scales_precision=torch.float32
    )
    quantized.weight, quantized.scales = torch.from_numpy(stored.values), torch.from_numpy(stored.scales[:, 0])
    return quantized
