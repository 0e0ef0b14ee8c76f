"""llama.cpp as a peer: a checkpoint as a GGUF file in Q4_0, and a sequence that llama.cpp computes from it.

The peer at its best: built for this machine, its weights repacked for its instruction set, and called through llama.cpp's C
interface rather than the classes of llama-cpp-python, which copy the scores of every token.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crayon_export.architecture import EMBEDDING, FINAL_NORM, HEAD, read, tensors
from crayon_export.checkpoint import Checkpoint
from crayon_runtime.errors import BackendError, UnsupportedModel
from crayon_runtime.files import atomic_directory
from crayon_runtime.manifest import Architecture

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

FILE = "model.gguf"

_BATCH = 512  # tokens at once: llama.cpp's own default
_ERROR = 4  # of ggml_log_level
_errors: list[str] = []

_NAMES = {
    EMBEDDING: "token_embd",
    FINAL_NORM: "output_norm",
    HEAD: "output",
    "self_attn.q_proj.weight": "attn_q",
    "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v",
    "self_attn.o_proj.weight": "attn_output",
    "mlp.gate_proj.weight": "ffn_gate",
    "mlp.up_proj.weight": "ffn_up",
    "mlp.down_proj.weight": "ffn_down",
    "input_layernorm.weight": "attn_norm",
    "post_attention_layernorm.weight": "ffn_norm",
}


def write_gguf(model: Path, folder: Path) -> Path:
    """Write a checkpoint as FOLDER/model.gguf, without a vocabulary: linears and head in Q4_0, the embedding in Q8_0, norms in fp32.

    A matrix whose width is no multiple of 32 has no Q4_0; it becomes fp16, as llama.cpp's own tools do it. A tied head is written
    beside the embedding, in Q4_0.

    Raises:
        UnsupportedModel: its rotary embedding is scaled.
    """
    import gguf

    checkpoint = Checkpoint.open(model)
    a = read(checkpoint.config)
    if a.rope.type != "default":
        raise UnsupportedModel(f"rope scaling {a.rope.type!r} is not written to GGUF here", where=model)
    planned = [(name, name, shape) for name, shape in tensors(a)]
    if a.tied_embeddings:
        planned.append((HEAD, EMBEDDING, (a.vocab_size, a.hidden_size)))
    with atomic_directory(folder) as partial:
        writer = gguf.GGUFWriter(partial / FILE, "llama")
        for key, value in _metadata(a).items():
            getattr(writer, f"add_{key}")(value)
        for name, _, shape in planned:
            kind = _type(name, shape)
            block, nbytes = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(
                f"{_gguf_name(name)}.weight", shape, np.float32, int(np.prod(shape)) // block * nbytes, kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, source, shape in planned:
            chunks = [gguf.quants.quantize(rows, _type(name, shape)) for _, rows in checkpoint.stream(source)]
            heads = a.heads if "q_proj" in name else a.kv_heads if "k_proj" in name else None
            writer.write_tensor_data(_interleave_halves(np.concatenate(chunks), heads))
        writer.close()
    return folder / FILE


class LlamaCpp:
    """One sequence in llama.cpp, with its defaults: keys and values in fp16, flash attention where it finds that useful.

    Several sequences may share the weights: `sequence` makes the next one.
    """

    def __init__(self, file: Path, *, threads: int, context_length: int) -> None:
        llama = _llama()
        self._weights = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
        if not self._weights:
            raise BackendError(f"llama.cpp refuses the model: {'; '.join(_errors)}", where=file)
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._weights))
        self._threads, self._context_length = threads, context_length
        self._contexts: list[Any] = []

    def sequence(self) -> LlamaCppSequence:
        llama = _llama()
        params = llama.llama_context_default_params()
        params.n_ctx = self._context_length
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.no_perf = True
        context = llama.llama_init_from_model(self._weights, params)
        if not context:
            raise BackendError(f"llama.cpp makes no context: {'; '.join(_errors)}")
        self._contexts.append(context)
        return LlamaCppSequence(context, self._vocab_size)

    def close(self) -> None:
        for context in self._contexts:
            _llama().llama_free(context)
        _llama().llama_model_free(self._weights)


class LlamaCppSequence:
    """A sequence of tokens with the calls of `crayon_runtime.backends.Cache` that benchmarks need; they return logits."""

    def __init__(self, context: Any, vocab_size: int) -> None:
        self._context, self._vocab_size = context, vocab_size
        self._batch = _llama().llama_batch_init(_BATCH, 0, 1)
        self._length = 0

    def prefill(self, ids: Ids) -> Floats:
        for start in range(0, len(ids), _BATCH):
            self._feed(ids[start : start + _BATCH].tolist())
        return self._logits()

    def decode(self, token: int) -> Floats:
        self._feed([token])
        return self._logits()

    def rewind(self, length: int) -> None:
        llama = _llama()
        llama.llama_memory_seq_rm(llama.llama_get_memory(self._context), 0, length, -1)
        self._length = length

    def _feed(self, tokens: list[int]) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self._length + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == len(tokens) - 1
        status = _llama().llama_decode(self._context, batch)
        if status:
            raise BackendError(f"llama.cpp failed with status {status} at position {self._length}")
        self._length += len(tokens)

    def _logits(self) -> Floats:
        """float32 [V], a view of what the next call overwrites."""
        return np.ctypeslib.as_array(_llama().llama_get_logits_ith(self._context, -1), (self._vocab_size,))


def available() -> str | None:
    """Why llama.cpp cannot be compared with; None if it can."""
    try:
        import gguf  # noqa: F401

        _llama()
    except (ImportError, OSError, RuntimeError) as e:
        return f"{e}; make bench installs it"
    return None


def description() -> str:
    """The version and what it was built for."""
    llama = _llama()
    features = llama.llama_print_system_info().decode().split("CPU : ")[-1]
    on = [part.split(" = ")[0].strip() for part in features.split("|") if part.strip().endswith("= 1")]
    return f"llama-cpp-python {llama.__version__} ({', '.join(on)})"


@cache
def _llama() -> Any:
    import llama_cpp

    @llama_cpp.llama_log_callback
    def keep_errors(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            _errors.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(keep_errors, None)
    llama_cpp.keep_errors = keep_errors  # or it is freed, and called
    return llama_cpp


def _metadata(a: Architecture) -> dict[str, Any]:
    """What llama.cpp must know, by the suffix of `GGUFWriter.add_…`."""
    return {
        "context_length": a.trained_context_length,
        "embedding_length": a.hidden_size,
        "block_count": a.layers,
        "feed_forward_length": a.ffn_size,
        "head_count": a.heads,
        "head_count_kv": a.kv_heads,
        "key_length": a.head_size,
        "value_length": a.head_size,
        "layer_norm_rms_eps": a.norm_eps,
        "rope_dimension_count": a.head_size,
        "rope_freq_base": a.rope.theta,
        "vocab_size": a.vocab_size,
        "tokenizer_model": "no_vocab",
    }


def _type(name: str, shape: tuple[int, ...]) -> Any:
    from gguf import GGMLQuantizationType as Type

    if len(shape) == 1:
        return Type.F32
    if shape[1] % 32:
        return Type.F16
    return Type.Q8_0 if name == EMBEDDING else Type.Q4_0


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, module = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[module]}"


def _interleave_halves(rows: npt.NDArray[Any], heads: int | None) -> npt.NDArray[Any]:
    """Query and key rows in the order of llama.cpp, which rotates neighbours where Hugging Face rotates the halves of a head."""
    return rows if heads is None else rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
