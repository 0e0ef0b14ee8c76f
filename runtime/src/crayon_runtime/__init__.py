"""The runtime of a customized LLM on a device.

from crayon_runtime import Engine

with Engine.load("bundle") as engine:
    print(engine.generate("Wake me at", max_new_tokens=64).text)
"""

from crayon_runtime._version import __version__
from crayon_runtime.bundle import Bundle
from crayon_runtime.constraint import Constraint
from crayon_runtime.engine import Engine
from crayon_runtime.errors import CrayonError
from crayon_runtime.generation import GenerateOptions, Generation, Piece, Stream
from crayon_runtime.sampling import SamplingOptions
from crayon_runtime.session import Session
from crayon_runtime.tokenizer import Tokenizer

__all__ = [
    "Bundle",
    "Constraint",
    "CrayonError",
    "Engine",
    "GenerateOptions",
    "Generation",
    "Piece",
    "SamplingOptions",
    "Session",
    "Stream",
    "Tokenizer",
    "__version__",
]
