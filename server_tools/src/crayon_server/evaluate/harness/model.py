"""An exported bundle as a model of lm-evaluation-harness.

    import lm_eval, crayon_server.evaluate.harness.model
    lm_eval.simple_evaluate("crayon", model_args={"bundle": "nano-bundle"}, tasks=["arc_easy"])

Texts are split, cut and scored as by the harness's own `hf` model (lm_eval/models/huggingface.py, 0.4.13), so that the numbers of a
bundle and of the model that it was exported from compare:

* a text begins with the bos token where the model wants one, and control tokens in it are read as those;
* an empty context is the bos token, or the eos token of a model that has none;
* of a context that is too long the beginning is left out; a text is scored in windows that do not overlap;
* an answer is decoded by itself: a space before its first word is dropped where the tokenizer drops that at the start of a text.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from crayon_runtime import Engine, backends
from crayon_runtime.bundle import Bundle
from crayon_runtime.errors import ContextOverflow, InvalidInput
from crayon_runtime.tokenizer import Tokenizer
from crayon_server.evaluate.harness.rows import RowsBackend
from crayon_server.evaluate.harness.scoring import Scorer, Text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from lm_eval.api.instance import Instance

    Progress = Callable[..., AbstractContextManager[Callable[[int], None]]]

_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
"""Generation arguments that are passed on under their own names."""


def load(
    bundle: str | Path, *, backend: str = "auto", adapter: str | None = None, threads: int | None = None
) -> Engine:
    """An engine that gives the scores after every token, where its backend can.

    Args:
        backend: "auto" is ONNX Runtime where the bundle, and the adapter, have it: a text is one step there.
        adapter: the name of one inside the bundle, or the path of an adapter bundle.

    Raises:
        BundleError, BackendError, AdapterError: as `Engine.load`.
    """
    opened = Bundle.open(bundle)
    if backend == "auto" and "onnx" in backends.served(opened):
        backend = "onnx"
    if backend != "onnx":
        return Engine.load(opened, backend=backend, threads=threads, adapter=adapter)
    info = opened.model.tokenizer
    engine = Engine(RowsBackend.load(opened, threads=threads), Tokenizer(info, opened.file(info.file)), opened)
    try:
        engine.set_adapter(adapter)
    except BaseException:
        engine.close()
        raise
    return engine


@register_model("crayon")
class CrayonLM(TemplateLM):  # type: ignore[misc]
    """A bundle, answering with one adapter or none.

    Args:
        bundle: its folder or archive.
        backend, adapter, threads: as in `load`.
        reuse: compute what requests have in common once; False is for measuring what that saves.
        progress: as `crayon_runtime.cli.common.progress`.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        backend: str = "auto",
        adapter: str | None = None,
        threads: int | None = None,
        reuse: bool = True,
        progress: Progress = lambda *_, **__: nullcontext(lambda _: None),
    ) -> None:
        super().__init__()
        self.engine = load(bundle, backend=backend, adapter=adapter, threads=threads)
        self.scorer = Scorer(self.engine, reuse=reuse)
        self._session = self.engine.session() if reuse else None
        self._progress = progress
        self._info = self.engine.tokenizer.info

    @property
    def eot_token_id(self) -> int:
        return self._info.eos[0]

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        return self.eot_token_id if self._info.bos is None else self._info.bos

    @property
    def max_length(self) -> int:
        """The most tokens that the bundle's context holds."""
        return self.engine.backend.context_length

    @property
    def max_gen_toks(self) -> int:
        """The most tokens of an answer, where a task does not say; the harness's own number."""
        return 256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """The ids of a text; without bos token only if `add_special_tokens` is False."""
        return self.engine.tokenizer.encode(string, add_bos=add_special_tokens is not False, parse_special=True)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the natural logarithm of the continuation's probability, and whether it is the greedy answer."""
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scored

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Of each (text,): the natural logarithm of its probability, in windows of the context length."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            found = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for window in map(make_disjoint_window, found):
                windows.append((None, *window))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += score
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """Answer each (context, generation arguments)."""
        wanted = [self._prompt(context, arguments) for context, arguments in (r.args for r in requests)]
        answers = [""] * len(requests)
        with self._progress("answering", len(requests), unit="prompts") as done:
            for i in sorted(
                range(len(requests)), key=lambda i: wanted[i][0]
            ):  # one after the other, of what have most in common
                ids, stops, options = wanted[i]
                generation = self.engine.generate(ids, stop=stops, session=self._session, **options)
                text = self.engine.tokenizer.decode(generation.token_ids)
                answers[i] = postprocess_generated_text(text, stops, think_end_token=None)
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                done(1)
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without generation prompt it is open at the end, so that the last message goes on."""
        text = self.engine.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The bundle's template."""
        return self._info.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        bundle = self.engine.bundle
        return str(bundle.model.base_fingerprint) if bundle else ""

    def close(self) -> None:
        self.scorer.close()
        self.engine.close()

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        **options: object,  # noqa: ARG002, those of the harness's own models
    ) -> list[tuple[float, bool]]:
        """Of each (cache key, context, continuation), in tokens."""
        texts = [self._text(context, continuation) for _, context, continuation in requests]
        with self._progress("scoring", len(texts), unit="texts") as done:
            scores = [(score.log_likelihood, score.is_greedy) for score in self.scorer.score(texts, done)]
        for (key, _, _), score in zip(requests, scores, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, score)
        return scores

    def _text(self, context: list[int], continuation: list[int]) -> Text:
        """What is scored, its beginning left out where it is too long."""
        if not 0 < len(continuation) <= self.max_length:
            raise ContextOverflow(
                f"a continuation of {len(continuation)} tokens cannot be scored; this bundle's context holds {self.max_length}",
                do="leave that text out, or export the model with a larger --context-length",
            )
        ids = np.array([*context, *continuation], np.int64)[-(self.max_length + 1) :]
        return Text(ids, len(ids) - len(continuation))

    def _prompt(self, context: str, arguments: dict[str, Any]) -> tuple[list[int], list[str], dict[str, Any]]:
        """Prompt, stop strings, and options of the engine."""
        given = normalize_gen_kwargs(arguments, self.max_gen_toks)
        stops = [stop for stop in handle_stop_sequences(given.pop("until"), eos=None) if stop]
        most, sampled = given.pop("max_gen_toks"), given.pop("do_sample")
        options: dict[str, Any] = {"max_new_tokens": most}
        options["temperature"] = given.pop("temperature", 1.0) if sampled else 0.0
        options |= {name: given.pop(name) for name in _SAMPLING if name in given}
        if sampled:  # the harness seeds NumPy
            options["seed"] = int(np.random.randint(2**31))
        given.pop("temperature", None)
        if given:
            raise InvalidInput(
                f"these generation arguments are not known here: {', '.join(sorted(given))}",
                do=f"use until, max_gen_toks, do_sample, temperature, {', '.join(_SAMPLING)}",
            )
        room = self.max_length - most
        if room < 1:
            raise ContextOverflow(
                f"answers of {most} tokens leave no room for a prompt; this bundle's context holds {self.max_length}",
                do="export the model with a larger --context-length, or ask for a smaller max_gen_toks",
            )
        return (self.tok_encode(context) or [self.prefix_token_id])[-room:], stops, options
