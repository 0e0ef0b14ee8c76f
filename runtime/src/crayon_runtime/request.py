"""What an engine is asked for, checked before anything is computed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from crayon_runtime.constraint import Constraint, Matcher
from crayon_runtime.errors import ContextOverflow, InvalidInput
from crayon_runtime.sampling import SamplingOptions, is_integer

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.session import Session
    from crayon_runtime.tokenizer import Tokenizer

    Ids = npt.NDArray[np.int64]

Prompt = str | Sequence[int]

MOST_TOP = 20
"""Tokens whose log-probabilities can be asked for at each step; OpenAI's limit."""


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to give. The fields are those of `GenerateOptions`, without what need not be known any more."""

    ids: Ids
    """int64 [S]: the prompt, 1 <= S < context length."""
    sampling: SamplingOptions
    limit: int
    """The most tokens to sample."""
    stop: tuple[str, ...]
    matcher: Matcher | None
    """Of the constraint, for this answer."""
    session: Session | None
    keep: int
    cancelled: Callable[[], bool]
    ignore_eos: bool
    top: int
    """How many of the most likely tokens to tell at each step."""

    @classmethod
    def check(
        cls,
        tokenizer: Tokenizer,
        vocab_size: int,
        context_length: int,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        constraint: Constraint | None = None,
        session: Session | None = None,
        overflow: Literal["error", "slide"] = "error",
        keep: int | None = None,
        cancel: threading.Event | None = None,
        parse_special: bool = False,
        ignore_eos: bool = False,
        top_log_probabilities: int = 0,
        **sampling: Any,
    ) -> Request:
        """Read the keywords of `GenerateOptions`; here are their defaults.

        Raises:
            InvalidInput: the prompt or an option cannot be served.
            ContextOverflow: the prompt leaves no room for an answer.
        """
        if not is_integer(max_new_tokens) or max_new_tokens < 1:
            raise InvalidInput(
                f"max_new_tokens is {max_new_tokens!r}; it must be a whole number from 1", where="max_new_tokens"
            )
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(s, str) and s for s in stop):
            raise InvalidInput("a stop string must be a text that is not empty", where="stop")
        if constraint is not None and not isinstance(constraint, Constraint):
            raise InvalidInput(f"a Constraint is wanted, not {type(constraint).__name__}", where="constraint")
        if constraint is not None and ignore_eos:
            raise InvalidInput("an eos token ends a constrained answer; it cannot be ignored", where="ignore_eos")
        if not is_integer(top_log_probabilities) or not 0 <= top_log_probabilities <= MOST_TOP:
            raise InvalidInput(
                f"top_log_probabilities is {top_log_probabilities!r}; it must be a whole number from 0 to {MOST_TOP}",
                where="top_log_probabilities",
            )
        check_choice("overflow", overflow, ("error", "slide"))
        if keep is None:
            keep = int(tokenizer.info.add_bos)
        if not is_integer(keep) or not 0 <= keep <= context_length - 2:
            raise InvalidInput(
                f"keep is {keep!r}; it must be a whole number from 0 to {context_length - 2}", where="keep"
            )
        ids = prompt_ids(prompt, tokenizer, vocab_size, parse_special=parse_special)
        if overflow == "slide":
            ids = slide(ids, keep, context_length - 1)
        elif len(ids) >= context_length:
            raise ContextOverflow(
                f"the prompt has {len(ids)} tokens; the context holds {context_length}, and the answer needs one of them",
                where="prompt",
                do='shorten the prompt, or let the engine forget its beginning: overflow="slide"',
            )
        else:
            max_new_tokens = min(max_new_tokens, context_length - len(ids))
        return cls(
            ids=ids,
            sampling=SamplingOptions(**sampling),
            limit=max_new_tokens,
            stop=stop,
            matcher=constraint.matcher(tokenizer, vocab_size) if constraint else None,
            session=session,
            keep=keep,
            cancelled=cancel.is_set if cancel else _never,
            ignore_eos=ignore_eos,
            top=top_log_probabilities,
        )


def prompt_ids(
    prompt: Prompt, tokenizer: Tokenizer, vocab_size: int, *, parse_special: bool = False, add_bos: bool = True
) -> Ids:
    """int64 [S], S >= 1: the ids of a text, or the given ones; InvalidInput if there are none, or one is not in the vocabulary."""
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, parse_special=parse_special, add_bos=add_bos) if prompt else []
    elif isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence | np.ndarray):
        raise InvalidInput(f"a prompt is text or token ids, not {type(prompt).__name__}", where="prompt")
    else:
        ids = [*prompt]
    if not ids:
        raise InvalidInput(
            "the prompt is empty", where="prompt", do="to start from nothing, pass the id of the bos token"
        )
    for i, token in enumerate(ids):
        if not is_integer(token) or not 0 <= token < vocab_size:
            raise InvalidInput(
                f"token {i} is {token!r}; ids are whole numbers from 0 to {vocab_size - 1} in this model",
                where="prompt",
            )
    return np.array(ids, np.int64)


def slide(ids: Ids, keep: int, limit: int) -> Ids:
    """Until there are at most `limit` tokens: leave the first `keep`, forget the older half of the others."""
    while len(ids) > limit:
        forgotten = (len(ids) - keep + 1) // 2
        ids = np.concatenate([ids[:keep], ids[keep + forgotten :]])
    return ids


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidInput(f"{name} is {value!r}; it must be one of {', '.join(choices)}", where=name)


def _never() -> bool:
    return False
