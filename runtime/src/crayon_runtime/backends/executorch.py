"""ExecuTorch as a backend, without torch: the distribution `crayon-edge-native` runs the programs.

A program has the methods `forward_tap` and, an adapter's, `lora_forward_tap`, all over one plan of keys and values: a cache goes
from one adapter to another by running another method, and the weights stay where they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crayon_runtime.backends.base import Adapter, Step, check_base
from crayon_runtime.backends.executorch_adapter import program_for
from crayon_runtime.errors import AdapterError, BackendError, CrayonError, IntegrityError
from crayon_runtime.files import sha256_file
from crayon_runtime.manifest import ExecutorchAdapterVariant, ExecutorchVariant

if TYPE_CHECKING:
    from types import ModuleType

    from crayon_native import NativeError, Program
    from crayon_runtime.backends.base import Ids
    from crayon_runtime.bundle import Bundle

_BASE, _ADAPTED = "forward_tap", "lora_forward_tap"
_KV_TYPES = ("fp32", "int8")


def native() -> ModuleType:
    """The module that runs programs.

    Raises:
        BackendError: it is not installed, or its library does not load here.
    """
    try:
        import crayon_native
    except ImportError as e:
        installed = not isinstance(e, ModuleNotFoundError)
        raise BackendError(
            f"crayon_native cannot be imported: {e}" if installed else "crayon_native, which runs ExecuTorch programs, is not installed",
            do="pip install 'crayon-edge[executorch]'; in a clone of the sources: make native",
        ) from e  # fmt: skip
    return crayon_native


def is_installed() -> bool:
    """Whether programs can be run here."""
    try:
        native()
    except BackendError:
        return False
    return True


class ExecutorchBackend:
    """A model bundle in ExecuTorch, on the CPU."""

    name = "executorch"

    def __init__(self, program: Program, bundle: Bundle) -> None:
        model = bundle.model
        self.program = program
        self.vocab_size = model.architecture.vocab_size
        self.context_length = model.context_length
        self.tap_size = model.tap.size
        self.longest_step: int = program.constant("get_max_seq_len")
        self._bundle = bundle

    @classmethod
    def load(cls, bundle: Bundle, *, threads: int | None = None) -> ExecutorchBackend:
        """Load the bundle's ExecuTorch variant.

        Args:
            threads: cores to compute on, for all models of the process; None: as many as there are fast ones.

        Raises:
            BackendError: the bundle has no ExecuTorch variant, the runner is not installed or refuses the program, or the process
                computes on another number of threads already.
            IntegrityError: the program is not the one that the manifest lists.
        """
        variant = bundle.model.variants.executorch
        if not isinstance(variant, ExecutorchVariant):
            raise BackendError(
                "the bundle has no ExecuTorch variant",
                where=bundle.path,
                do="export the model again with --backend executorch",
            )
        if bundle.model.kv_dtype not in _KV_TYPES:
            raise BackendError(f"ExecuTorch cannot keep a {bundle.model.kv_dtype} KV cache here", where=bundle.path)
        crayon_native = native()
        _start(threads)
        try:
            program = _open(bundle, variant.program, variant.data, [])
            with_tap = _BASE in program.methods and program.constant("get_tap_size") == bundle.model.tap.size
            if not with_tap or program.constant("get_max_context_len") != bundle.model.context_length:
                raise BackendError("the program is not the one that the manifest describes", where=program.path)
            return cls(program, bundle)
        except crayon_native.NativeError as e:
            raise _error(e, bundle.file(variant.program)) from e

    def read_adapter(self, bundle: Bundle) -> ExecutorchAdapter:
        """Map an adapter's program and its tensors.

        They are read when a cache first computes with them. Only then does it show whether this export has all weights that the program
        names; that is an AdapterError too.
        """
        manifest = bundle.as_adapter
        model = self._bundle.model
        check_base(bundle, model.base_fingerprint)
        variant, base = manifest.variants.executorch, model.variants.executorch
        if not isinstance(variant, ExecutorchAdapterVariant) or not isinstance(base, ExecutorchVariant):
            raise AdapterError(
                f"adapter {manifest.name!r} has no ExecuTorch variant",
                where=bundle.path,
                do="answer with it in ONNX Runtime: --backend onnx",
            )
        crayon_native = native()
        files = [self._bundle.file(path) for path in base.data]
        where = bundle.file(variant.program) if variant.program else bundle.path
        try:
            if variant.program is not None:
                program = _open(bundle, variant.program, variant.data, files)
            else:
                program = self._filled(bundle, variant, base, files)
            if _ADAPTED not in program.methods or any(
                program.constant(name) != self.program.constant(name)
                for name in ("get_max_context_len", "get_max_seq_len", "get_tap_size")
            ):
                raise AdapterError(
                    f"adapter {manifest.name!r} was made for another export of this model",
                    where=bundle.path,
                    do="convert the adapter again with `crayon adapter convert … --bundle` and this bundle",
                )
        except crayon_native.NativeError as e:
            raise _error(e, where, manifest.name) from e
        return ExecutorchAdapter(manifest.name, program, where)

    def _filled(
        self, bundle: Bundle, variant: ExecutorchAdapterVariant, base: ExecutorchVariant, files: list[Path]
    ) -> Program:
        """The base's program with slots, with an adapter in them."""
        held, slots = variant.slots, base.slots
        name = bundle.as_adapter.name
        if held is None or slots is None:
            raise AdapterError(
                f"adapter {name!r} comes without a program of its own, and this bundle has none with slots",
                where=bundle.path,
                do="export the model again with adapter slots",
            )
        own = (slots.rank, [target.name for target in slots.targets], slots.dtype)
        if (held.rank, held.targets, variant.dtype) != own:
            raise AdapterError(
                f"adapter {name!r} was made for slots of rank {held.rank} in {variant.dtype}, at {', '.join(held.targets)};"
                f" those of this bundle are of rank {own[0]} in {own[2]}, at {', '.join(own[1])}",
                where=bundle.path,
                do="convert the adapter again with `crayon adapter convert … --bundle` and this bundle",
            )
        for path in variant.data:
            _check(bundle, path)
        filled = program_for(self._bundle.read(slots.program), slots, held.weights)
        data = [*files, *(bundle.file(path) for path in variant.data)]
        program: Program = native().Program(self._bundle.file(slots.program), data, program=filled)
        return program

    def new_cache(self, adapter: Adapter | None = None) -> ExecutorchCache:
        return ExecutorchCache(self, adapter)

    def close(self) -> None:
        self.program.close()


class ExecutorchAdapter:
    """A program that computes the base with an adapter."""

    def __init__(self, name: str, program: Program, where: Path) -> None:
        self.name = name
        self.program = program
        self.where = where


class ExecutorchCache:
    """One sequence: its KV cache, and what computes it."""

    def __init__(self, backend: ExecutorchBackend, adapter: Adapter | None) -> None:
        self._backend = backend
        self._native_error: type[NativeError] = native().NativeError
        self._token = np.zeros(1, np.int64)
        # Copies: the runner's own buffers end with the cache, which another thread may close while the scores are still read.
        tap = np.zeros((2, backend.tap_size), np.float32)
        self._step = Step(np.zeros(backend.vocab_size, np.float32), tap[0], tap[1])
        self._length = 0
        self._adapter: ExecutorchAdapter | None = None
        try:
            self._cache: Any = backend.program.new_cache()
        except self._native_error as e:
            raise _error(e, backend.program.path) from e
        self._use(adapter)

    @property
    def length(self) -> int:
        return self._length

    @property
    def adapter(self) -> Adapter | None:
        return self._adapter

    def prefill(self, ids: Ids) -> Step:
        return self._advance(np.asarray(ids))

    def decode(self, token: int) -> Step:
        self._token[0] = token
        return self._advance(self._token)

    def rewind(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise BackendError(f"cannot rewind a cache of {self._length} tokens to {length}")
        self._length = length

    def reset(self, adapter: Adapter | None) -> None:
        self._length = 0
        if adapter is not self._adapter:
            self._use(adapter)

    def trace(self, path: Path | None) -> None:
        """Record the time of every operator from now on, and with None write it to the path given before, as an ETDump."""
        try:
            self._cache.trace(path)
        except self._native_error as e:
            raise _error(e, self._backend.program.path) from e

    def close(self) -> None:
        self._adapter = None
        self._cache.close()

    def _advance(self, ids: Ids) -> Step:
        total, context_length = self._length + len(ids), self._backend.context_length
        if len(ids) == 0:
            raise BackendError("there are no tokens to feed")
        if total > context_length:
            raise BackendError(f"{total} tokens in a cache of {context_length}")
        step, longest = self._step, self._backend.longest_step
        step.tap_sum[:] = 0
        for start in range(0, len(ids), longest):
            try:
                result = self._cache.step(ids[start : start + longest], self._length + start)
            except self._native_error as e:
                raise BackendError(f"ExecuTorch failed at position {self._length + start}: {e}") from e
            np.add(step.tap_sum, result.tap_sum, out=step.tap_sum)
        np.copyto(step.logits, result.logits)
        np.copyto(step.tap_last, result.tap_last)
        self._length = total
        return step

    def _use(self, adapter: Adapter | None) -> None:
        if adapter is not None and not isinstance(adapter, ExecutorchAdapter):
            raise AdapterError(f"adapter {adapter.name!r} was read by another backend")
        program, method = (adapter.program, _ADAPTED) if adapter else (self._backend.program, _BASE)
        try:
            self._cache.use(program, method)
        except self._native_error as e:
            where = adapter.where if adapter else program.path
            raise _error(e, where, adapter.name if adapter else None) from e
        self._adapter = adapter


def _start(threads: int | None) -> None:
    """Start the threads that all programs of this process compute on."""
    crayon_native = native()
    try:
        crayon_native.start(threads or 0)
    except crayon_native.NativeError as e:
        raise BackendError(
            f"ExecuTorch cannot compute on {threads} threads: {e}",
            do=f"all models of a process share its threads: load each with {crayon_native.threads()}, or without a number",
        ) from e


def _open(bundle: Bundle, program: str, data: list[str], base: list[Path]) -> Program:
    """A program and its data. ExecuTorch trusts the tables of a program, and what is computed of an adapter's weights is kept under their
    names, so both are hashed now. The base's weights were when the bundle was opened, unless they were before and nothing touched them."""
    for file in (program, *(data if base else ())):
        _check(bundle, file)
    opened: Program = native().Program(bundle.file(program), [*base, *map(bundle.file, data)])
    return opened


def _check(bundle: Bundle, file: str) -> None:
    listed = next(f for f in bundle.manifest.files if f.path == file)
    if sha256_file(bundle.file(file)) != listed.sha256:
        raise IntegrityError(
            f"{file} is damaged: its SHA-256 is not what the manifest says",
            where=bundle.path,
            do="fetch, copy or export the bundle again",
        )


def _error(error: NativeError, program: Path, adapter: str | None = None) -> CrayonError:
    """What the runner refused, as one of our errors."""
    status = native().Status
    advice = {
        status.NO_MEMORY: "export the model with a smaller --context-length, or with --kv-dtype int8",
        status.NO_OPERATOR: "upgrade crayon-edge-native",
    }
    do = advice.get(
        error.status, "`crayon verify` tells whether the bundle is damaged; else upgrade crayon-edge-native"
    )
    if adapter is None:
        return BackendError(f"ExecuTorch refuses the program: {error}", where=program, do=do)
    if error.status in (status.BAD_DATA, status.BAD_PROGRAM):
        do = "convert the adapter again with `crayon adapter convert … --bundle` and this bundle"
    return AdapterError(f"ExecuTorch cannot run adapter {adapter!r}: {error}", where=program, do=do)
