"""Runs ExecuTorch programs of language models without torch: ctypes over `libcrayon_native.so`, whose C ABI is in `crayon_native.h`.

A `Program` is a `.pte` file with its `.ptd` weights, a `Cache` one sequence of tokens. Methods of several programs can
run over one cache in turn. One step computes at a time, on one pool of threads; a cache must not be used by two
threads at once.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from enum import IntEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Cache",
    "NativeError",
    "Program",
    "Result",
    "Status",
    "__version__",
    "instruction_set",
    "library",
    "start",
    "threads",
]

try:
    __version__ = version("crayon-edge-native")
except PackageNotFoundError:  # run from its folder
    __version__ = "0"

_ABI = 2


class Status(IntEnum):
    """What kind of error it was: `crayon_native_status`."""

    BAD_ARGUMENT = 1
    NO_FILE = 2
    BAD_PROGRAM = 3
    BAD_DATA = 4
    NO_METHOD = 5
    NO_OPERATOR = 6
    NO_MEMORY = 7
    CACHE_FULL = 8
    FAILED = 9


class NativeError(RuntimeError):
    """What the library refused: `status`, and ExecuTorch's own code in `executorch` (0 where it was not asked)."""

    def __init__(self, message: str, status: Status, executorch: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.executorch = executorch


class Result(NamedTuple):
    """What a step returns. The arrays are views of buffers that the cache's next step overwrites."""

    logits: NDArray[np.float32]
    """Of the last token: [V]."""
    tap_sum: NDArray[np.float32] | None
    """The tap's sum over the step's tokens: [D]; None where the method has no tap."""
    tap_last: NDArray[np.float32] | None
    """The tap of the last token: [D]."""


class _Error(ctypes.Structure):
    _fields_ = (("status", ctypes.c_int32), ("executorch", ctypes.c_int32), ("message", ctypes.c_char * 1016))


class _Options(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("program", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_char_p)),
        ("data_count", ctypes.c_size_t),
        ("program_bytes", ctypes.c_char_p),
        ("program_size", ctypes.c_size_t),
    )


class _StepResult(ctypes.Structure):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("vocab_size", ctypes.c_int64),
        ("tap_sum", ctypes.c_void_p),
        ("tap_last", ctypes.c_void_p),
        ("tap_size", ctypes.c_int64),
    )


def _load(path: Path) -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as e:
        raise ImportError(f"cannot load the native runner: {e}", path=str(path)) from e
    p, error = ctypes.c_void_p, ctypes.POINTER(_Error)
    for name, result, arguments in [
        ("abi", ctypes.c_int32, []),
        ("instruction_set", ctypes.c_char_p, []),
        ("start", ctypes.c_int32, [ctypes.c_int32, error]),
        ("threads", ctypes.c_int32, []),
        ("open", ctypes.c_int32, [ctypes.POINTER(_Options), ctypes.POINTER(p), error]),
        ("close", None, [p]),
        ("methods", ctypes.c_int32, [p, ctypes.c_char_p, ctypes.c_size_t, error]),
        ("constant", ctypes.c_int32, [p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64), error]),
        ("new_cache", ctypes.c_int32, [p, ctypes.POINTER(p), error]),
        ("free_cache", None, [p]),
        ("use", ctypes.c_int32, [p, p, ctypes.c_char_p, error]),
        ("step", ctypes.c_int32, [p, p, ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(_StepResult), error]),
        ("trace", ctypes.c_int32, [p, ctypes.c_char_p, error]),
    ]:
        function = getattr(lib, f"crayon_native_{name}")
        function.restype, function.argtypes = result, arguments
        if name == "abi" and function() != _ABI:
            raise ImportError(f"the native runner speaks ABI {function()}, this module {_ABI}", path=str(path))
    return lib


library = Path(os.environ.get("CRAYON_NATIVE_LIBRARY") or Path(__file__).with_name("libcrayon_native.so"))
"""The shared library. The environment variable CRAYON_NATIVE_LIBRARY names another build of it."""
_lib = _load(library)


def _call(name: str, *arguments: Any) -> None:
    error = _Error()
    if status := getattr(_lib, f"crayon_native_{name}")(*arguments, ctypes.byref(error)):
        raise NativeError(error.message.decode(errors="replace"), Status(status), error.executorch)


def instruction_set() -> str:
    """What the kernels were chosen for: baseline, avx2, avx512 and so on."""
    name: bytes = _lib.crayon_native_instruction_set()
    return name.decode()


def start(threads: int = 0) -> None:
    """Starts the process's one pool of threads; 0: as many as there are fast cores.

    Raises:
        NativeError: BAD_ARGUMENT if it has another number already, and a program is open.
    """
    _call("start", threads)


def threads() -> int:
    """Threads that steps compute on."""
    count: int = _lib.crayon_native_threads()
    return count


class _Handle:
    """A pointer that the library frees when this is gone, or closed."""

    def __init__(self, what: str, pointer: ctypes.c_void_p, free: Any) -> None:
        self._what, self._free = what, free
        self._pointer: ctypes.c_void_p | None = pointer

    @property
    def pointer(self) -> ctypes.c_void_p:
        if not self._pointer:
            raise NativeError(f"the {self._what} is closed", Status.BAD_ARGUMENT)
        return self._pointer

    def close(self) -> None:
        pointer, self._pointer = self._pointer, None  # not a null pointer: when Python ends, ctypes may be gone
        if pointer:
            self._free(pointer)

    def __del__(self) -> None:
        self.close()


class Program:
    """An ExecuTorch program: mapped, not read. Nothing is computed before a cache uses a method of it.

    Args:
        path: The `.pte` file; with `program`, what messages call it.
        data: Its `.ptd` files.
        program: The program, if it is not in a file.

    Raises:
        NativeError: A file is missing, is not a program, is damaged.
    """

    def __init__(
        self,
        path: str | Path,
        data: Sequence[str | Path] = (),
        *,
        program: bytes | None = None,
    ) -> None:
        self.path = Path(path)
        files = (ctypes.c_char_p * len(data))(*(os.fsencode(d) for d in data))
        options = _Options(
            ctypes.sizeof(_Options),
            os.fsencode(path),
            files,
            len(data),
            program,
            0 if program is None else len(program),
        )
        pointer = ctypes.c_void_p()
        _call("open", ctypes.byref(options), ctypes.byref(pointer))
        self._handle = _Handle("program", pointer, _lib.crayon_native_close)

    @property
    def methods(self) -> list[str]:
        """The methods' names, sorted."""
        names = ctypes.create_string_buffer(1 << 16)
        _call("methods", self._handle.pointer, names, len(names))
        return names.value.decode(errors="replace").splitlines()

    def constant(self, name: str) -> int:
        """The integer that the constant method `name` returns, such as get_max_context_len.

        Raises:
            NativeError: NO_METHOD, or BAD_PROGRAM where it returns something else.
        """
        value = ctypes.c_int64()
        _call("constant", self._handle.pointer, name.encode(), ctypes.byref(value))
        return value.value

    def new_cache(self) -> Cache:
        """Memory for the keys and values of one sequence; none is taken before it is written."""
        pointer = ctypes.c_void_p()
        _call("new_cache", self._handle.pointer, ctypes.byref(pointer))
        return Cache(_Handle("cache", pointer, _lib.crayon_native_free_cache))

    def close(self) -> None:
        """Lets go of the program; caches that use it go on working."""
        self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Cache:
    """One sequence of tokens: its keys and values. Made by `Program.new_cache`."""

    def __init__(self, handle: _Handle) -> None:
        self._handle = handle
        self._views: dict[tuple[int, int], NDArray[np.float32]] = {}

    def use(self, program: Program, method: str) -> None:
        """Chooses the method that the next steps run, and makes it ready the first time. What the cache holds stays.

        Raises:
            NativeError: NO_METHOD; BAD_PROGRAM if the program plans keys and values otherwise than the cache's own, or
                the method is not a language model's; BAD_DATA if a weight is in none of the program's files.
        """
        _call("use", self._handle.pointer, program._handle.pointer, method.encode())

    def step(self, ids: NDArray[np.int64] | Sequence[int], position: int) -> Result:
        """Feeds the token ids `ids`, int64 [S], from `position` on.

        Raises:
            NativeError: BAD_ARGUMENT for an id outside the vocabulary, no ids, or more than the method takes at once;
                CACHE_FULL where they end behind the context length.
        """
        tokens = np.ascontiguousarray(ids, dtype=np.int64)
        if tokens.ndim != 1:
            raise NativeError(f"the ids have {tokens.ndim} dimensions, not one", Status.BAD_ARGUMENT)
        result = _StepResult()
        _call("step", self._handle.pointer, tokens.ctypes.data, len(tokens), position, ctypes.byref(result))
        logits = self._view(result.logits, result.vocab_size)
        if result.tap_sum is None:
            return Result(logits, None, None)
        return Result(logits, self._view(result.tap_sum, result.tap_size), self._view(result.tap_last, result.tap_size))

    def trace(self, path: str | Path | None) -> None:
        """Records the time of every operator from here on; with None writes what was recorded and stops.

        The file is an ETDump; ExecuTorch's `Inspector` reads it.
        """
        _call("trace", self._handle.pointer, None if path is None else os.fsencode(path))

    def close(self) -> None:
        """Frees the memory now. Arrays that `step` returned must not be used any more; without `close` they keep it."""
        self._views.clear()
        self._handle.close()

    def _view(self, address: int, size: int) -> NDArray[np.float32]:
        if (address, size) not in self._views:
            buffer = (ctypes.c_float * size).from_address(address)
            buffer.owner = self._handle  # type: ignore[attr-defined]
            self._views[address, size] = np.ctypeslib.as_array(buffer)
        return self._views[address, size]
