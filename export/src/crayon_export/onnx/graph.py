"""The ONNX graph of a LLaMA-style decoder, written node by node.

Nothing is traced: the graph is the few fused operators that ONNX Runtime decodes fastest with (MatMulNBits, GroupQueryAttention,
SkipSimplifiedLayerNormalization), named after the modules that they compute, so that a profile reads like the model.

Inputs and outputs carry the names that onnxruntime-genai uses. Beside them:

* two optional inputs a linear layer, `MODULE.lora_A.weight` [in, r] and `MODULE.lora_B.weight` [r, out]. Their defaults have r = 0,
  so that the same graph runs without an adapter; alpha/r is part of B.
* for each pass of a block a KV cache: a block that is repeated (MobileLLM-LS) is computed by nodes of its own in each pass, whose names
  end in `/pass2` …, over the same weights and adapter;
* `tap_sum` and `tap_last` [batch, hidden]: the hidden state of the tapped layer, summed over this run's tokens and of the last one.

`logits` are those of the last token only: [batch, 1, vocabulary].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from crayon_export.architecture import linears, rotary_tables
from crayon_export.onnx.tensors import ExternalData
from crayon_export.quantize import Blockwise
from crayon_runtime.manifest import Architecture

OPSET = 21
IR_VERSION = 10
_MS = "com.microsoft"
_FLOAT = TensorProto.FLOAT
# MatMulNBits: 4 lets the kernels quantize the activations to int8, which is what makes it fast on a CPU.
_ACCURACY_LEVEL = 4
_EMBEDDING = "model.embed_tokens"


class _Pass(NamedTuple):
    """One computation of a block."""

    block: str
    """model.layers.3: its weights, and its nodes in the first pass."""
    slot: int
    """Of the KV cache."""
    suffix: str
    """Of the names of its nodes: empty in the first pass."""


class _Graph:
    """Nodes in order, with the tensors that they bring along."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def __call__(
        self, op: str, inputs: Sequence[str], outputs: str | Sequence[str], *, domain: str = "", **attributes: Any
    ) -> str:
        """Append a node called after its first output, and return that output."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        called = next(n for n in names if n)
        self.nodes.append(helper.make_node(op, list(inputs), names, name=called, domain=domain, **attributes))
        return called

    def constant(self, name: str, value: Any, dtype: type[np.generic] = np.int64) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value, dtype=dtype), name)
        return name

    def input(self, name: str, dtype: int, shape: Sequence[str | int]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[str | int]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))


class LlamaGraph:
    """Emits the graph; the weights it refers to have been appended to an `ExternalData` under the names used here.

    Args:
        architecture: the shape of the model.
        weights: the format of the linear layers; None: float32.
        kv_dtype: element type of the cache, "fp32" or "fp16".
        slots: the linear layers, as "q_proj", that take an adapter.
        tap_layer: index into transformers' `hidden_states`, which counts blocks, not their passes.
        embedding: how the embedding table is stored, "fp32" or "fp16"; "int8": see `OnnxStorage`.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        weights: Blockwise | None,
        embedding: str,
        kv_dtype: str,
        slots: Sequence[str],
        tap_layer: int,
    ) -> None:
        self._a = architecture
        self._weights = weights
        self._embedding = embedding
        self._kv_type = {"fp32": _FLOAT, "fp16": TensorProto.FLOAT16}[kv_dtype]
        self._slots = frozenset(slots)
        self._tap_layer = tap_layer
        self._shared = weights.shared(architecture.hidden_size) if weights and embedding == "int8" else None
        self._linears = {x.module: x for x in linears(architecture)}
        self._g = _Graph()

    def model(self, data: ExternalData, context_length: int) -> onnx.ModelProto:
        """The finished model. Appends the rotary tables to `data`."""
        a, g = self._a, self._g
        g.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
        g.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
        g.output("logits", _FLOAT, ["batch_size", 1, a.vocab_size])
        self._lengths()
        cos, sin = rotary_tables(a, context_length)
        kv_float = np.float16 if self._kv_type == TensorProto.FLOAT16 else np.float32
        data.add("rotary.cos", cos.astype(kv_float))
        data.add("rotary.sin", sin.astype(kv_float))

        passes = [
            _Pass(f"model.layers.{slot // a.layer_repeats}", slot, _suffix(slot % a.layer_repeats))
            for slot in range(a.passes)
        ]
        residual = self._embed(data)
        self._tap(0, residual)
        hidden = g(
            "SimplifiedLayerNormalization",
            [residual, "model.layers.0.input_layernorm.weight"],
            "model.layers.0.input_layernorm",
            axis=-1,
            epsilon=a.norm_eps,
            stash_type=1,
        )
        for current, following in pairwise([*passes, None]):
            assert current is not None
            hidden, residual = self._add_norm(
                residual,
                self._attention(current, hidden),
                f"{current.block}.post_attention_layernorm",
                current.suffix,
            )
            update = self._mlp(current, hidden)
            if following is None:
                hidden, residual = self._add_norm(residual, update, "model.norm")
            else:
                norm = f"{following.block}.input_layernorm"
                hidden, residual = self._add_norm(residual, update, norm, following.suffix)
            blocks, unfinished = divmod(current.slot + 1, a.layer_repeats)
            if not unfinished:
                self._tap(blocks, hidden if following is None else residual)
        last_token = g("Gather", [hidden, g.constant("index.last", [-1])], "model.norm/last", axis=1)
        if a.tied_embeddings and self._embedding != "fp16":
            self._product(_EMBEDDING, last_token, a.vocab_size, a.hidden_size, "logits", self._shared)
        else:
            self._linear("lm_head", last_token, a.vocab_size, a.hidden_size, "logits")

        graph = helper.make_graph(
            g.nodes, a.model_type, g.inputs, g.outputs, [*g.constants.values(), *data.initializers]
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(_MS, 1)],
            ir_version=IR_VERSION,
            producer_name="crayon-edge",
        )

    def _lengths(self) -> None:
        """Scalars that GroupQueryAttention wants, from the shapes of the inputs.

        The mask is all ones and only its length counts, as in onnxruntime-genai: one sequence, no padding.
        """
        g = self._g
        one = g.constant("one", [1])
        total = g("Shape", ["attention_mask"], "total_length", start=1, end=2)
        g("Cast", [g("Squeeze", [total], "total_length/scalar")], "total_length/int32", to=TensorProto.INT32)
        ones = g("ReduceSum", ["attention_mask", one], "attention_mask/sum", keepdims=0)
        g("Cast", [g("Sub", [ones, one], "last_position")], "last_position/int32", to=TensorProto.INT32)
        if not self._rotary_in_attention:
            g("Sub", [total, g("Shape", ["input_ids"], "run_length", start=1, end=2)], "first_position")

    @property
    def _rotary_in_attention(self) -> bool:
        """GroupQueryAttention rotates only heads whose size 16 divides (ONNX Runtime 1.31: "head_size must be a multiple of 16")."""
        return self._a.head_size % 16 == 0

    def _embed(self, data: ExternalData) -> str:
        g, name, shared = self._g, _EMBEDDING, self._shared
        if shared is not None:
            # The output layer has its codes in groups, the lookup in rows.
            codes, rows = f"{name}.weight_codes", f"{name}.weight_rows"
            data.view(rows, codes, (self._a.vocab_size, self._a.hidden_size))
            return g(
                "GatherBlockQuantized",
                [rows, "input_ids", f"{name}.weight_scales"],
                name,
                domain=_MS,
                bits=shared.bits,
                block_size=shared.group_size,
                gather_axis=0,
                quantize_axis=1,
            )
        if self._embedding == "fp32":
            return g("Gather", [f"{name}.weight", "input_ids"], name)
        return g("Cast", [g("Gather", [f"{name}.weight", "input_ids"], f"{name}/fp16")], name, to=_FLOAT)

    def _tap(self, layer: int, hidden: str) -> None:
        if layer != self._tap_layer:
            return
        g = self._g
        g("ReduceSum", [hidden, g.constant("one", [1])], "tap_sum", keepdims=0)
        g("Gather", [hidden, g.constant("index.last.scalar", -1)], "tap_last", axis=1)
        for name in ("tap_sum", "tap_last"):
            g.output(name, _FLOAT, ["batch_size", self._a.hidden_size])

    def _add_norm(self, residual: str, update: str, norm: str, suffix: str = "") -> tuple[str, str]:
        """residual + update, and its RMS norm: (normalized, sum)."""
        node = f"{norm}{suffix}"
        total = f"{node}/residual"
        self._g(
            "SkipSimplifiedLayerNormalization",
            [residual, update, f"{norm}.weight"],
            [node, "", "", total],
            domain=_MS,
            epsilon=self._a.norm_eps,
        )
        return node, total

    def _linear(self, module: str, x: str, rows: int, width: int, node: str) -> str:
        """W x in a node of that name, plus the adapter's part where the module has a slot."""
        g, slot = self._g, module.rpartition(".")[2] in self._slots
        base = self._product(module, x, rows, width, f"{node}/base" if slot else node, self._weights)
        if not slot:
            return base
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        if a not in g.constants:
            rank = f"{module}.rank"  # a symbol of its own: ONNX Runtime gives equal symbols one buffer, and ranks may differ
            g.input(a, _FLOAT, [width, rank])
            g.input(b, _FLOAT, [rank, rows])
            g.constant(a, np.zeros((width, 0)), np.float32)
            g.constant(b, np.zeros((0, rows)), np.float32)
        delta = g("MatMul", [g("MatMul", [x, a], f"{node}/lora_A"), b], f"{node}/lora_B")
        return g("Add", [base, delta], node)

    def _product(self, module: str, x: str, rows: int, width: int, node: str, weights: Blockwise | None) -> str:
        """W x with the weight of a module, in a node of that name."""
        if weights is None:
            # The weight stays [out, in] as in the checkpoint, so that it can be streamed by rows.
            return self._g("FusedMatMul", [x, f"{module}.weight"], node, domain=_MS, transB=1)
        return self._g(
            "MatMulNBits",
            [x, f"{module}.weight_codes", f"{module}.weight_scales"],
            node,
            domain=_MS,
            K=width,
            N=rows,
            bits=weights.bits,
            block_size=weights.group_size,
            accuracy_level=_ACCURACY_LEVEL,
        )

    def _module(self, at: _Pass, module: str, x: str) -> str:
        linear = self._linears[f"{at.block}.{module}"]
        return self._linear(linear.module, x, linear.out_features, linear.in_features, f"{linear.module}{at.suffix}")

    def _attention(self, at: _Pass, x: str) -> str:
        a, g = self._a, self._g
        q, k, v = (self._module(at, f"self_attn.{p}_proj", x) for p in "qkv")
        rotary = ["rotary.cos", "rotary.sin"]
        if self._kv_type != _FLOAT:
            q, k, v = (g("Cast", [t], f"{t}/cache", to=self._kv_type) for t in (q, k, v))
        if not self._rotary_in_attention:
            # Position ids of shape [1] are the offset of the first token.
            q, k = (
                g("RotaryEmbedding", [t, "first_position", *rotary], f"{t}/rotary", domain=_MS, num_heads=heads)
                for t, heads in ((q, a.heads), (k, a.kv_heads))
            )
        shape: list[str | int] = ["batch_size", a.kv_heads, "past_sequence_length", a.head_size]
        past = [g.input(f"past_key_values.{at.slot}.{s}", self._kv_type, shape) for s in ("key", "value")]
        present = [f"present.{at.slot}.{s}" for s in ("key", "value")]
        for p in present:
            g.output(p, self._kv_type, ["batch_size", a.kv_heads, "total_sequence_length", a.head_size])
        out = f"{at.block}.self_attn.attention{at.suffix}"
        g(
            "GroupQueryAttention",
            [
                q,
                k,
                v,
                *past,
                "last_position/int32",
                "total_length/int32",
                *(rotary if self._rotary_in_attention else []),
            ],
            [out, *present],
            domain=_MS,
            num_heads=a.heads,
            kv_num_heads=a.kv_heads,
            do_rotary=int(self._rotary_in_attention),
            scale=a.head_size**-0.5,
        )
        if self._kv_type != _FLOAT:
            out = g("Cast", [out], f"{out}/float", to=_FLOAT)
        return self._module(at, "self_attn.o_proj", out)

    def _mlp(self, at: _Pass, x: str) -> str:
        g, name = self._g, f"{at.block}.mlp{at.suffix}"
        gate = self._module(at, "mlp.gate_proj", x)
        up = self._module(at, "mlp.up_proj", x)
        silu = g("Mul", [gate, g("Sigmoid", [gate], f"{name}/sigmoid")], f"{name}/silu")
        return self._module(at, "mlp.down_proj", g("Mul", [silu, up], f"{name}/product"))


def _suffix(repeat: int) -> str:
    """Of the nodes of a block that is computed for the `repeat`-th time after the first."""
    return f"/pass{repeat + 1}" if repeat else ""
