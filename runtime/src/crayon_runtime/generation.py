"""What an answer is: its options, its pieces while it runs, and the whole at its end."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Self, TypeAlias, TypedDict

import numpy as np

from crayon_runtime.errors import InvalidInput

if TYPE_CHECKING:
    import os

    import numpy.typing as npt

    from crayon_runtime.backends.base import Adapter
    from crayon_runtime.bundle import Bundle
    from crayon_runtime.constraint import Constraint
    from crayon_runtime.session import Session

    Floats = npt.NDArray[np.float32]
    AdapterLike: TypeAlias = str | os.PathLike[str] | Bundle | Adapter


class GenerateOptions(TypedDict, total=False):
    """The keywords of `Engine.generate`, `stream` and `chat`."""

    max_new_tokens: int
    """The most tokens to answer with; 256."""
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    """These six are the fields of `SamplingOptions`; greedy."""
    stop: str | Sequence[str]
    """Texts that end the answer, and are not part of it; none."""
    constraint: Constraint | None
    """What the whole answer must be; the eos token follows when it is. An answer that ends with "stop" is, unless a stop string cut
    it short; one that ends with "length" is a beginning. None: any text."""
    session: Session | None
    """Where to run, and what to continue; None: an idle session of the engine, or a new one."""
    adapter: AdapterLike | None
    """Answer this one request with an adapter, as in `Engine.find_adapter`, or, with None, with the base model; without this keyword,
    with the engine's present adapter."""
    overflow: Literal["error", "slide"]
    """When the context is full. "error": a prompt that leaves no room is a `ContextOverflow`, and an answer ends there with "length".
    "slide": the first `keep` tokens stay, the older half of the others is forgotten, and what is left is computed again."""
    keep: int | None
    """None: the bos token, if the model wants one."""
    cancel: threading.Event | None
    """Set it, from any thread, to end the answer before its next backend call."""
    parse_special: bool
    """Read the text of control tokens in the prompt as those tokens; False. Never do that with text of others."""
    ignore_eos: bool
    """Go on past eos tokens, which then have no text: for measurements of a fixed length; False."""
    top_log_probabilities: int
    """Of so many most likely tokens, at each step, the log-probabilities too; 0."""


class Piece(NamedTuple):
    """One token of a stream."""

    text: str
    """What can be shown with this token: nothing in the middle of a character, or of what may become a stop string."""
    token_id: int
    log_probability: float
    """Natural logarithm of its probability, before any sampling option."""
    top_log_probabilities: Sequence[tuple[int, float]] = ()
    """Ids and log-probabilities of the most likely tokens in its place, as many as were asked for, the most likely first."""


@dataclass(slots=True)
class Generation:
    """An answer."""

    prompt_tokens: int
    """Tokens of the prompt; with "slide", those that were kept of it."""
    reused_tokens: int = 0
    """How many of them were in the session already."""
    text: str = ""
    """The answer, without control tokens and stop string. Of a cancelled one, what was handed out."""
    token_ids: list[int] = field(default_factory=list)
    """Every token that was sampled, also the eos token or the tokens of the stop string that ended it."""
    log_probabilities: list[float] = field(default_factory=list)
    """Of each of them: the natural logarithm of its probability, before any sampling option."""
    top_log_probabilities: list[Sequence[tuple[int, float]]] = field(default_factory=list)
    """For each of them, the most likely tokens in its place, as in `Piece`; none unless they were asked for."""
    finish_reason: Literal["stop", "length", "cancelled"] = "cancelled"
    """ "stop": an eos token or a stop string; "length": `max_new_tokens`, or the end of the context; "cancelled": it was interrupted."""
    stop: str | None = None
    """The stop string that ended it."""
    prompt_tap: Floats | None = None
    """float32 [D]: the tapped hidden state, mean over the prompt's tokens. None if they were not all fed."""
    answer_sum: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    """float64 [D]: the tapped hidden states of those tokens of the answer that were fed, which are all but the last, summed."""
    answer_fed: int = field(default=0, repr=False)
    """How many these are."""
    prompt_seconds: float = 0.0
    """Feeding the prompt."""
    first_token_seconds: float = 0.0
    """From the start until the first token was there (TTFT)."""
    decode_seconds: float = 0.0
    """All further tokens, without the time that the reader of the stream took."""

    @property
    def answer_tap(self) -> Floats | None:
        """float32 [D]: the tapped hidden state, mean over those tokens of the answer that were fed: all but the last. None if there
        are none."""
        if self.answer_sum is None or not self.answer_fed:
            return None
        mean: Floats = (self.answer_sum / self.answer_fed).astype(np.float32)
        return mean

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def prompt_tokens_per_second(self) -> float:
        """Of the tokens that were fed."""
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Without the first token, which the prompt gave."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


class Stream(Iterator[Piece]):
    """A running answer. Nothing is computed until the first piece is asked for. Closing it, or dropping it, cancels it."""

    def __init__(self, pieces: Generator[Piece, None, None], generation: Generation) -> None:
        self._pieces = pieces
        self._generation = generation
        self._ended = False

    def __next__(self) -> Piece:
        try:
            return next(self._pieces)
        except BaseException:
            self._ended = True
            raise

    def close(self) -> None:
        """End here, and free the session. (Another thread sets `cancel` instead.)"""
        self._pieces.close()
        self._ended = True

    @property
    def so_far(self) -> Generation:
        """The answer as far as it is there, at any moment. Its text and its finish reason come with its end."""
        return self._generation

    @property
    def generation(self) -> Generation:
        """The whole answer; InvalidInput before the stream has ended."""
        if not self._ended:
            raise InvalidInput("the stream has not ended", do="read all its pieces, or close it, before its generation")
        return self._generation

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
