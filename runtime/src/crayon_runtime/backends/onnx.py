"""ONNX Runtime as a backend.

Every buffer is allocated once a cache and bound by address: the KV cache is written in place (past and present are the same
memory), logits and taps land in arrays that are reused, and of the attention mask only the length changes. What a decoded token
costs beside the model itself is two bindings and one call.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from crayon_runtime.backends.base import Adapter, Step, check_base
from crayon_runtime.backends.onnx_adapter import read_matrix, scale_name
from crayon_runtime.errors import AdapterError, BackendError
from crayon_runtime.manifest import OnnxAdapterVariant, OnnxVariant

if TYPE_CHECKING:
    from crayon_runtime.backends.base import Ids
    from crayon_runtime.bundle import Bundle
    from crayon_runtime.manifest import AdapterDtype

_KV_TYPES: dict[str, type[np.generic]] = {"fp32": np.float32, "fp16": np.float16}
_ADAPTER_TYPES: dict[AdapterDtype, str] = {"fp32": "tensor(float)", "fp16": "tensor(float16)", "int8": "tensor(int8)"}
_QUIET = 3  # errors only: ONNX Runtime warns once for every adapter slot that keeps its default


class OnnxBackend:
    """A model bundle in ONNX Runtime, on the CPU."""

    name = "onnx"

    def __init__(self, session: Any, bundle: Bundle) -> None:
        model = bundle.model
        self.session = session
        self.vocab_size = model.architecture.vocab_size
        self.context_length = model.context_length
        self.tap_size = model.tap.size
        self.kv_slots = model.architecture.passes
        self.kv_shape = (1, model.architecture.kv_heads, model.context_length, model.architecture.head_size)
        self.kv_dtype = _KV_TYPES[model.kv_dtype]
        self._fingerprint = model.base_fingerprint
        # Adapter slots are overridable initializers: `get_inputs` does not list them.
        self._slots = {i.name: i.shape for i in session.get_overridable_initializers()}

    @classmethod
    def load(cls, bundle: Bundle, *, threads: int | None = None, profile: Path | None = None) -> OnnxBackend:
        """Load the bundle's ONNX variant.

        Args:
            threads: cores to compute on; None: as many as there are physical ones.
            profile: the beginning of the name of a file in which ONNX Runtime notes the time of every node; `session.end_profiling()`
                writes it.

        Raises:
            BackendError: the bundle has no ONNX variant, or ONNX Runtime refuses it.
        """
        variant = bundle.model.variants.onnx
        if not isinstance(variant, OnnxVariant):
            raise BackendError(
                "the bundle has no ONNX variant", where=bundle.path, do="export the model again with --backend onnx"
            )
        if bundle.model.kv_dtype not in _KV_TYPES:
            raise BackendError(f"ONNX Runtime cannot keep a {bundle.model.kv_dtype} KV cache here", where=bundle.path)
        model = bundle.file(variant.model)
        return cls(_session(model, cls.graph(model), threads, profile), bundle)

    @staticmethod
    def graph(model: Path) -> bytes | None:  # noqa: ARG004
        """Another graph over the weights of `model`, for a subclass that wants more of it; None: the model as it is."""
        return None

    def read_adapter(self, bundle: Bundle) -> OnnxAdapter:
        """Read an adapter bundle; its tensors stay in memory until the adapter is dropped."""
        manifest = bundle.as_adapter
        if not self._slots:
            raise AdapterError(
                "this model has no adapter slots",
                where=bundle.path,
                do="export it without --merge and with adapter slots",
            )
        check_base(bundle, self._fingerprint)
        variant = manifest.variants.onnx
        if not isinstance(variant, OnnxAdapterVariant):
            raise AdapterError("the adapter has no ONNX variant", where=bundle.path)
        adapter = OnnxAdapter(manifest.name, bundle.file(variant.file), variant.dtype)
        self._check(adapter)
        return adapter

    def new_cache(self, adapter: Adapter | None = None) -> OnnxCache:
        return OnnxCache(self, adapter)

    def close(self) -> None:
        self.session = None

    def _check(self, adapter: OnnxAdapter) -> None:
        for name, value in adapter.tensors.items():
            slot, shape = self._slots.get(name), value.shape()
            if slot is None:
                raise AdapterError(f"the model has no slot for {name}", where=adapter.path)
            fits = len(shape) == 2 and all(
                isinstance(want, str) or want == got for want, got in zip(slot, shape, strict=True)
            )
            if not fits:
                raise AdapterError(f"{name} has shape {shape}; the slot is {slot}", where=adapter.path)
            other = name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A")
            pair = adapter.tensors.get(other)
            if pair is None or pair.shape()["lora_A" in other] != shape["lora_A" in name]:
                raise AdapterError(f"{name} and {other} are not of one rank", where=adapter.path)


class OnnxAdapter:
    """The tensors of a `.onnx_adapter` file as float32, by the name of the input they are bound to.

    They are bound as inputs: `run_with_iobinding` ignores ONNX Runtime's own active adapters (1.31).
    """

    def __init__(self, name: str, path: Path, dtype: AdapterDtype) -> None:
        import onnxruntime as ort

        self.name = name
        self.path = path
        try:
            self._file = ort.AdapterFormat.read_adapter(str(path))  # owns the memory of the tensors
            stored: dict[str, Any] = self._file.get_parameters()
        except Exception as e:  # ONNX Runtime raises its own types, and RuntimeError
            raise AdapterError(f"not a readable .onnx_adapter file: {e}", where=path) from e
        self.tensors = self._read(stored, dtype)

    def _read(self, stored: dict[str, Any], dtype: AdapterDtype) -> dict[str, Any]:
        import onnxruntime as ort

        types = {name: _ADAPTER_TYPES[dtype] for name in stored if name.endswith(".weight")}
        if dtype == "int8":
            types |= {scale_name(name): _ADAPTER_TYPES["fp32"] for name in types}
        for name in [*types, *stored]:
            found = stored[name].data_type() if name in stored else "absent"
            if found != types.get(name):
                raise AdapterError(f"{name} is {found}, which is not of an adapter in {dtype}", where=self.path)
        tensors = {}
        for name in (name for name in types if name.endswith(".weight")):
            scale = stored.get(scale_name(name))
            matrix = read_matrix(name, stored[name].numpy(), scale and scale.numpy(), where=self.path)
            tensors[name] = stored[name] if dtype == "fp32" else ort.OrtValue.ortvalue_from_numpy(matrix)
        return tensors


class OnnxCache:
    """One sequence: its KV cache, and the buffers that a run reads and writes."""

    def __init__(self, backend: OnnxBackend, adapter: Adapter | None) -> None:
        self._backend: OnnxBackend | None = backend
        self._run = backend.session.run_with_iobinding
        self._binding = backend.session.io_binding()
        self._token = np.zeros((1, 1), np.int64)
        self._mask = np.ones((1, backend.context_length), np.int64)
        # Zeroed pages take no memory until a token is written to them.
        self._kv = {
            f"{layer}.{side}": np.zeros(backend.kv_shape, backend.kv_dtype)
            for layer in range(backend.kv_slots)
            for side in ("key", "value")
        }
        self._logits = np.zeros((1, 1, backend.vocab_size), np.float32)
        self._tap_sum = np.zeros((1, backend.tap_size), np.float32)
        self._tap_last = np.zeros((1, backend.tap_size), np.float32)
        self._step = Step(self._logits[0, 0], self._tap_sum[0], self._tap_last[0])
        self._bound_run = 0
        self._length = 0
        self._adapter: OnnxAdapter | None = None
        self._bind_output("logits", self._logits)
        self._bind_output("tap_sum", self._tap_sum)
        self._bind_output("tap_last", self._tap_last)
        for name, array in self._kv.items():
            self._bind_output(f"present.{name}", array)
        self._bind_inputs(adapter)

    @property
    def length(self) -> int:
        return self._length

    @property
    def adapter(self) -> Adapter | None:
        return self._adapter

    def prefill(self, ids: Ids) -> Step:
        run = np.ascontiguousarray(ids, dtype=np.int64).reshape(1, -1)
        self._bind_input("input_ids", run)
        self._bound_run = 0  # the address is gone when this call returns
        return self._advance(run.shape[1])

    def decode(self, token: int) -> Step:
        self._token[0, 0] = token
        if self._bound_run != 1:
            self._bind_input("input_ids", self._token)
            self._bound_run = 1
        return self._advance(1)

    def rewind(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise BackendError(f"cannot rewind a cache of {self._length} tokens to {length}")
        self._length = length

    def reset(self, adapter: Adapter | None) -> None:
        self._length = 0
        if adapter is not self._adapter:
            self._binding.clear_binding_inputs()
            self._bind_inputs(adapter)

    def close(self) -> None:
        self._backend = self._adapter = None
        self._kv.clear()
        self._binding = self._run = None

    def _advance(self, tokens: int) -> Step:
        total = self._length + tokens
        if total > self._mask.shape[1]:
            raise BackendError(f"{total} tokens in a cache of {self._mask.shape[1]}")
        mask = self._mask
        self._binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), mask.ctypes.data)
        try:
            self._run(self._binding)
        except Exception as e:
            raise BackendError(f"ONNX Runtime failed at position {self._length}: {e}") from e
        self._length = total
        return self._step

    def _bind_inputs(self, adapter: Adapter | None) -> None:
        if adapter is not None and not isinstance(adapter, OnnxAdapter):
            raise AdapterError(f"adapter {adapter.name!r} was read by another backend")
        self._adapter = adapter
        self._bound_run = 0
        for name, array in self._kv.items():
            self._bind_input(f"past_key_values.{name}", array)
        for name, value in adapter.tensors.items() if adapter else ():
            self._binding.bind_ortvalue_input(name, value)

    def _bind_input(self, name: str, array: npt.NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: npt.NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _session(model: Path, graph: bytes | None, threads: int | None, profile: Path | None) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as e:
        raise BackendError(f"onnxruntime cannot be imported: {e}", do="pip install onnxruntime") from e
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads or 0
    # Shapes change with every token: a memory plan per shape would be made once, never used again, and kept.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return ort.InferenceSession(graph or str(model), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} refuses the model: {e}",
            where=model,
            do="`crayon verify` tells whether the bundle is damaged; else upgrade onnxruntime",
        ) from e
