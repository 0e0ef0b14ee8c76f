"""The examples that a user customizes with: read, and scored. They never leave the device."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from crayon_runtime.errors import ContextOverflow, IntegrityError, InvalidInput
from crayon_runtime.mapped import read_mapped
from crayon_runtime.request import prompt_ids
from crayon_runtime.session import common_prefix

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.backends.base import Adapter
    from crayon_runtime.engine import Engine, Part

    Floats = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.int64]


PARTS: tuple[Part, ...] = ("prompt", "answer", "all")

LARGEST_STATES = 256 << 20
"""Bytes: 8000 examples of a 7B model."""

_AGAIN = "customize again"


class Example(NamedTuple):
    """A prompt, and how this user wants it answered."""

    prompt: str
    completion: str


class Score(NamedTuple):
    """How a model does on examples."""

    log_loss: float
    """Mean over all tokens of the answers, eos included, in nats."""
    first_logits: Floats
    """float32 [n, V]: after each prompt."""
    means: dict[Part, Floats]
    """float32 [n, D] by part: the tapped hidden states, as `Engine.embed` gives them."""
    log_probability: Floats
    """float32 [n]: mean over the tokens of each answer, eos included, in nats."""

    @property
    def states(self) -> ExampleStates:
        """What of it is kept."""
        return ExampleStates(self.means["prompt"], self.means["answer"], self.log_probability)


@dataclass(frozen=True)
class ExampleStates:
    """What a customized model made of the n examples that it was customized with: for it to tell whether a query is like them.

    Attributes:
        prompt, answer: float32 [n, D]: mean tapped states over the tokens of the prompt, and of the answer, with the adapter.
        log_probability: float32 [n]: mean over the tokens of each answer, eos included, in nats.
    """

    prompt: Floats
    answer: Floats
    log_probability: Floats

    def to_bytes(self) -> bytes:
        """As `read` reads them: safetensors, float32."""
        from safetensors.numpy import save

        return save({name: np.ascontiguousarray(array, np.float32) for name, array in vars(self).items()})

    @classmethod
    def read(cls, path: Path) -> ExampleStates:
        """Read a file of them, at most `LARGEST_STATES` bytes.

        Raises:
            IntegrityError: it cannot be read, is larger, or holds something else, NaN or infinity.
        """
        size = path.stat().st_size if path.is_file() else 0
        if size > LARGEST_STATES:
            raise IntegrityError(f"the examples' states have {size} bytes, which is too much", where=path, do=_AGAIN)
        found = {name: np.array(tensor) for name, tensor in read_mapped(path)[0].items()}
        n, d = found["prompt"].shape if "prompt" in found and found["prompt"].ndim == 2 else (0, 0)
        shapes = {"prompt": (n, d), "answer": (n, d), "log_probability": (n,)}
        floats = all(array.dtype == np.float32 and np.isfinite(array).all() for array in found.values())
        if not n or not d or not floats or {name: array.shape for name, array in found.items()} != shapes:
            raise IntegrityError("these are no states of examples", where=path, do=_AGAIN)
        return cls(**found)


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """Read a jsonl file of {"prompt", "completion"}; other fields are ignored, and so are empty lines.

    Raises:
        InvalidInput: the file cannot be read, is not UTF-8 or holds no examples; or a line is not such an object.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise InvalidInput(f"the examples cannot be read: {e.strerror}", where=path, do="check the path") from None
    except UnicodeDecodeError as e:
        raise InvalidInput(f"not UTF-8 at byte {e.start}", where=path, do="convert the file to UTF-8 first") from None
    lines = enumerate(text.split("\n"), 1)
    return check_examples(_parse(line, f"{path}:{number}") for number, line in lines if line.strip())


def check_examples(examples: Iterable[Sequence[str]]) -> list[Example]:
    """Refuse, with InvalidInput, pairs that are empty, and their absence."""
    checked = [Example(*example) for example in examples]
    for number, example in enumerate(checked, 1):
        for field, text in example._asdict().items():
            if not text.strip():
                raise InvalidInput(
                    f"its {field} is empty", where=f"example {number}", do="complete it, or leave it out"
                )
    if not checked:
        raise InvalidInput(
            "there are no examples", where="examples", do='give about ten lines of {"prompt": …, "completion": …}'
        )
    return checked


def to_jsonl(examples: Iterable[Example]) -> bytes:
    """As `read_examples` reads them."""
    return b"".join(msgspec.json.encode(example._asdict()) + b"\n" for example in examples)


def answer_log_loss(engine: Engine, examples: Sequence[Sequence[str]], adapter: Adapter | None = None) -> float:
    """Mean negative log-probability of the answers' tokens, in nats; each token is given all before it (teacher forcing).

    Args:
        examples: pairs of a prompt and its answer, which ends with the model's first eos token.
        adapter: what `engine.read_adapter` gave; None: the base. What the engine answers others with does not change.

    Raises:
        InvalidInput: there are no examples, or one cannot be scored.
        ContextOverflow: one is longer than the context.
    """
    return score(engine, examples, adapter).log_loss


def score(engine: Engine, examples: Sequence[Sequence[str]], adapter: Adapter | None = None) -> Score:
    """As `answer_log_loss`; the tokens of one answer continue its prompt in the KV cache, one call each."""
    total, count = 0.0, 0
    likely = np.empty(len(examples), np.float32)
    first = np.empty((len(examples), engine.backend.vocab_size), np.float32)
    means: dict[Part, Floats] = {part: np.empty((len(examples), engine.backend.tap_size), np.float32) for part in PARTS}
    with engine.session() as session:
        for i, (head, answer) in enumerate(_token_ids(engine, check_examples(examples))):
            step = session.prefill(head[session.begin(head, adapter) :])
            assert step is not None  # nothing cancels it
            first[i], head_sum = step.logits, session.tap_sum
            targets = [*answer, *engine.tokenizer.info.eos[:1]]
            own = _negative_log_probability(step.logits, targets[0])
            for token, target in zip_longest(answer, targets[1:]):
                logits = session.decode(token).logits
                own += _negative_log_probability(logits, target) if target is not None else 0.0
            total, count, likely[i] = total + own, count + len(targets), -own / len(targets)
            both = session.tap_sum
            means["prompt"][i] = head_sum / len(head)
            means["answer"][i] = (both - head_sum) / len(answer)
            means["all"][i] = both / session.length
    return Score(total / count, first, means, likely)


def _token_ids(engine: Engine, examples: Sequence[Example]) -> list[tuple[Ids, list[int]]]:
    """The prompt's ids, int64 [S], and those of the answer, which are those that the text has after the prompt."""
    vocab_size, context_length = engine.backend.vocab_size, engine.backend.context_length
    split = []
    for number, (prompt, completion) in enumerate(examples, 1):
        ids = prompt_ids(prompt + completion, engine.tokenizer, vocab_size)
        start = common_prefix(ids, prompt_ids(prompt, engine.tokenizer, vocab_size))
        if not 0 < start < len(ids):
            raise InvalidInput("its prompt or its completion has no tokens of its own", where=f"example {number}")
        if len(ids) > context_length:
            raise ContextOverflow(
                f"it has {len(ids)} tokens; the context holds {context_length}",
                where=f"example {number}",
                do="shorten it, or leave it out",
            )
        split.append((ids[:start], ids[start:].tolist()))
    return split


def _negative_log_probability(logits: Floats, token: int) -> float:
    highest = logits.max()
    return float(highest - logits[token]) + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))


def _parse(line: str, where: str) -> Example:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InvalidInput(f"not JSON: {e}", where=where, do="write one JSON object on each line") from None
    if not isinstance(value, dict):
        raise InvalidInput("not a JSON object", where=where, do='write {"prompt": …, "completion": …}')
    for field in Example._fields:
        if not isinstance(value.get(field), str):
            problem = "is not a text" if field in value else "is missing"
            raise InvalidInput(f'its "{field}" {problem}', where=where, do='write {"prompt": …, "completion": …}')
        if not value[field].strip():
            raise InvalidInput(f'its "{field}" is empty', where=where, do="complete it, or leave it out")
    return Example(value["prompt"], value["completion"])
