"""The engine: a prompt goes in, tokens come out.

One answer, from top to bottom:

    Engine.generate     collects a stream
    Engine.stream       checks what was asked for, and captures the adapter of this moment
    _answer             takes a session, feeds it the prompt, then samples and decodes, token by token
    Session             a KV cache that knows its tokens: what the prompt has in common with them is not computed again
    Backend             multiplies the matrices

Any number of threads may call one engine, and a thread may hold several streams: each answer has a session of its own, and only
single backend calls exclude each other, so that answers take turns token by token.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack
from weakref import WeakSet

import numpy as np

from crayon_runtime import backends
from crayon_runtime.bundle import Bundle
from crayon_runtime.errors import AdapterError, ContextOverflow, EngineClosed, InvalidInput
from crayon_runtime.generation import GenerateOptions, Generation, Piece, Stream
from crayon_runtime.request import Prompt, Request, check_choice, prompt_ids, slide
from crayon_runtime.sampling import Sampler, is_integer
from crayon_runtime.session import Session, common_prefix
from crayon_runtime.stopping import StopStrings
from crayon_runtime.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    import numpy.typing as npt

    from crayon_runtime.backends.base import Adapter, Backend
    from crayon_runtime.constraint import Matcher
    from crayon_runtime.generation import AdapterLike
    from crayon_runtime.routing.router import Answer, Router

Part = Literal["all", "prompt", "answer"]


class Engine:
    """A loaded model that answers.

    Args:
        backend: runs the model; the engine closes it.
        tokenizer: of the same model.
        bundle: where both came from; adapters inside it can be set by name.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer, bundle: Bundle | None = None) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.bundle = bundle
        # Reentrant: the garbage collector may close a forgotten stream at any moment, also while this thread holds the lock.
        self._lock = threading.RLock()
        self._closed = False
        self._adapter: Adapter | None = None
        self._adapters: dict[Path, tuple[Bundle, Adapter]] = {}
        self._sessions: WeakSet[Session] = WeakSet()
        self._idle: Session | None = None
        self._router: Router | None = None

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        *,
        backend: str = "auto",
        threads: int | None = None,
        adapter: str | os.PathLike[str] | Bundle | None = None,
    ) -> Engine:
        """Load a model bundle.

        Args:
            bundle: its folder, its `.crayon` archive, or the opened bundle.
            backend: "onnx", "executorch", or "auto" for the faster one of those that are here and that the bundle serves.
            threads: how many cores to compute on; None: the backend chooses.
            adapter: what to answer with, as in `set_adapter`; "auto" takes a backend that it was made for.

        Raises:
            BundleError: it is not a whole model bundle.
            BackendError: the backend is not there, or cannot run it.
            AdapterError: there is no such adapter, or it does not fit this model.
        """
        if threads is not None and (not is_integer(threads) or threads < 1):
            raise InvalidInput(f"threads is {threads!r}; it must be a whole number from 1", where="threads")
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        info = bundle.model.tokenizer
        tokenizer = Tokenizer(info, bundle.file(info.file))
        wanted = adapter_bundle(bundle, adapter) if isinstance(adapter, str | os.PathLike) else adapter
        engine = cls(backends.load(bundle, backend, threads=threads, adapter=wanted), tokenizer, bundle)
        try:
            engine.set_adapter(wanted)
        except BaseException:
            engine.close()
            raise
        return engine

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Answer a prompt.

        Args:
            prompt: text, or token ids, which are fed as they are.
            options: see `GenerateOptions`.

        Raises:
            InvalidInput: the prompt or an option cannot be served.
            ContextOverflow: the prompt leaves no room for an answer.
            BackendError: the backend failed.
        """
        with self.stream(prompt, **options) as stream:
            for _ in stream:
                pass
        return stream.generation

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Answer a prompt piece by piece: as `generate`, whose result the stream has at its end."""
        self._check_open()
        adapter = self.find_adapter(options.pop("adapter")) if "adapter" in options else self._adapter
        request = Request.check(self.tokenizer, self.backend.vocab_size, self.backend.context_length, prompt, **options)
        generation = Generation(prompt_tokens=len(request.ids))
        return Stream(_answer(self, request, adapter, generation), generation)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerateOptions]) -> Generation:
        """Answer a conversation, in the form of the model's chat template.

        Args:
            messages: each with a "role" and a "content". To stream the answer, stream the tokens that
                `engine.tokenizer.apply_chat_template` makes of them.

        Raises:
            InvalidInput: as `generate`, and if the model has no chat template.
        """
        return self.generate(self.tokenizer.apply_chat_template(messages), **options)

    def embed(
        self, texts: Sequence[str | tuple[str, str]], *, part: Part = "all", base: bool = False
    ) -> npt.NDArray[np.float32]:
        """The tapped hidden state of each text, mean over its tokens, computed with the present adapter.

        Args:
            texts: n of them: a prompt, or a prompt and the answer that continues it.
            part: which tokens to average over. The bos token is one of the prompt's; a token that holds the end of the prompt and the
                beginning of the answer is one of the answer's.
            base: compute with the un-customized model, whatever the present adapter is.

        Returns:
            float32 [n, D].

        Raises:
            InvalidInput: that part of a text has no tokens.
            ContextOverflow: a text is longer than the context.
        """
        if isinstance(texts, str):
            raise InvalidInput("embed takes a list of texts", where="texts", do="put the text into a list")
        check_choice("part", part, ("all", "prompt", "answer"))
        means = np.empty((len(texts), self.backend.tap_size), np.float32)
        adapter = None if base else self._adapter
        session = self._borrow(None)
        try:
            for i, text in enumerate(texts):
                means[i] = self._mean_tap(session, adapter, text, part, where=f"text {i}")
        finally:
            self._give_back(session, idle=True)
        return means

    @property
    def router(self) -> Router:
        """What decides who answers; without a server, until it is set to one that has one."""
        if self._router is None:
            from crayon_runtime.routing.router import Router

            self._router = Router(self)
        return self._router

    @router.setter
    def router(self, router: Router) -> None:
        self._router = router

    def answer(self, prompt: Prompt, *, query: str | None = None, **options: Unpack[GenerateOptions]) -> Answer:
        """Answer a prompt on the device, or have the server answer it: see `Router.answer`, of this engine's `router`."""
        return self.router.answer(prompt, query=query, **options)

    def session(self) -> Session:
        """A KV cache of one's own, for a conversation whose turns should stay fast whatever else the engine does."""
        backend = self.backend
        with self._lock:
            self._check_open()
            session = Session(
                backend.new_cache(self._adapter),
                self._lock,
                context_length=backend.context_length,
                tap_size=backend.tap_size,
            )
            self._sessions.add(session)
        return session

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that the next request is answered with; None: the base model."""
        return self._adapter.name if self._adapter else None

    def set_adapter(self, adapter: AdapterLike | None) -> None:
        """Answer all further requests with an adapter. Answers that are running keep theirs.

        Args:
            adapter: as in `find_adapter`.

        Raises:
            AdapterError: there is no such adapter, or it does not fit this model.
        """
        self._adapter = self.find_adapter(adapter)

    @property
    def present_adapter(self) -> Adapter | None:
        """What the next request is answered with; None: the base model."""
        return self._adapter

    def bundle_of(self, adapter: Adapter) -> Bundle | None:
        """The bundle that an adapter of this engine was read from; None if the engine did not keep it, or another one is in its place now."""
        for bundle, kept in list(self._adapters.values()):
            if kept is adapter:
                with suppress(OSError, ValueError):
                    document = json.loads((bundle.path / "manifest.json").read_bytes())
                    return bundle if document == bundle.document else None
        return None

    def find_adapter(self, adapter: AdapterLike | None) -> Adapter | None:
        """Read an adapter, to answer single requests with it: `generate(…, adapter=…)`.

        Args:
            adapter: the name of one inside the bundle, the path of an adapter bundle, the opened bundle, or what the backend
                has read of it; None: the base model. What was read stays in memory, to be found again at once.

        Raises:
            AdapterError: there is no such adapter, or it does not fit this model.
        """
        self._check_open()
        if isinstance(adapter, str | os.PathLike):
            adapter = adapter_bundle(self.bundle, adapter)
        return self._read_adapter(adapter) if isinstance(adapter, Bundle) else adapter

    def read_adapter(self, bundle: Bundle) -> Adapter:
        """Read an adapter bundle without answering with it; unlike with `find_adapter`, the engine does not keep it.

        Raises:
            AdapterError: it does not fit this model.
        """
        with self._lock:
            self._check_open()
            return self.backend.read_adapter(bundle)

    def close(self) -> None:
        """Free the model and all sessions. Answers that are still running end with `EngineClosed`."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for session in self._sessions:
                    session.close()
                self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mean_tap(
        self, session: Session, adapter: Adapter | None, text: str | tuple[str, str], part: Part, where: str
    ) -> npt.NDArray[np.float64]:
        prompt, answer = _pair(text, where)
        if part == "answer" and not answer:
            raise InvalidInput("there is no answer to embed", where=where, do="pass pairs of a prompt and its answer")
        vocab_size, context_length = self.backend.vocab_size, self.backend.context_length
        # The answer's tokens are those that it has after the prompt; alone it might be split in another way.
        ids = prompt_ids(prompt + answer, self.tokenizer, vocab_size)
        split = common_prefix(ids, prompt_ids(prompt, self.tokenizer, vocab_size))
        head, tail = ids[:split], ids[split:] if part != "prompt" else ids[:0]
        length = len(head) + len(tail)
        if length > context_length:
            raise ContextOverflow(
                f"the text has {length} tokens; the context holds {context_length}", where=where, do="shorten it"
            )
        session.prefill(head[session.begin(head, adapter) :])
        head_sum = session.tap_sum
        session.prefill(tail)
        return (session.tap_sum - head_sum) / len(tail) if part == "answer" else session.tap_sum / length

    def _read_adapter(self, bundle: Bundle) -> Adapter:
        with self._lock:
            self._check_open()
            known, adapter = self._adapters.get(bundle.path, (None, None))
            if (
                adapter is None or known is None or known.manifest != bundle.manifest
            ):  # not read yet, or another one now
                adapter = self.backend.read_adapter(bundle)
                self._adapters[bundle.path] = (bundle, adapter)
            return adapter

    def _borrow(self, wanted: Session | None) -> Session:
        """A session for one answer: the one that is wanted, the idle one, or a new one."""
        with self._lock:
            self._check_open()
            if wanted is None:
                session, self._idle = self._idle, None
                session = session or self.session()
            elif wanted in self._sessions and not wanted.busy:
                session = wanted
            else:
                raise InvalidInput(
                    "another answer is running in this session" if wanted.busy else "this session is another engine's",
                    where="session",
                    do="make one for each conversation, with `engine.session()`",
                )
            session.busy = True
        return session

    def _give_back(self, session: Session, *, idle: bool) -> None:
        """One idle session is kept, the latest: a second KV cache would be memory that nobody asked for."""
        with self._lock:
            session.busy = False
            if idle and not self._closed:
                if self._idle:
                    self._idle.close()
                self._idle = session

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed", do="load it again, or close it later")


def adapter_bundle(model: Bundle | None, name: str | os.PathLike[str]) -> Bundle:
    """An adapter inside a model, or at a path."""
    names = model.adapter_names if model else []
    if model and name in names:
        return model.adapter(str(name))
    if Path(name).exists():
        return Bundle.open(name)
    raise AdapterError(
        f"there is no adapter {str(name)!r}",
        where=model.path if model else None,
        do=f"choose one of {', '.join(names)}, or give a path" if names else "give the path of an adapter bundle",
    )


def _pair(text: object, where: str) -> tuple[str, str]:
    """A prompt and its answer, which may be empty."""
    match text:
        case str(prompt):
            return prompt, ""
        case [str(prompt), str(answer)]:
            return prompt, answer
    raise InvalidInput("a text to embed is a prompt, or a pair of a prompt and its answer", where=where)


def _answer(
    engine: Engine, request: Request, adapter: Adapter | None, generation: Generation
) -> Generator[Piece, None, None]:
    """The loop: one piece and one backend call a token. Fills in `generation`."""
    started = perf_counter()
    backend = engine.backend
    end_tokens = () if request.ignore_eos else engine.tokenizer.info.eos
    sampler = Sampler(request.sampling, backend.vocab_size)
    sampler.observe(request.ids)
    decoder, stops = StreamDecoder(engine.tokenizer, continues=True), StopStrings(request.stop)
    texts: list[str] = []
    answer_sum = generation.answer_sum = np.zeros(backend.tap_size, np.float64)

    session = engine._borrow(request.session)
    try:
        resumed = perf_counter()
        generation.reused_tokens = session.begin(request.ids, adapter)
        step = session.prefill(request.ids[generation.reused_tokens :], request.cancelled)
        if step is None:
            return
        generation.prompt_seconds = perf_counter() - resumed
        generation.prompt_tap = (session.tap_sum / len(request.ids)).astype(np.float32)

        while True:
            token = _sample(sampler, request.matcher, step.logits)
            generation.token_ids.append(token)
            generation.log_probabilities.append(sampler.log_probability)
            top = sampler.most_likely(step.logits, request.top)
            generation.top_log_probabilities.append(top)

            ended = token in end_tokens or generation.generated_tokens == request.limit
            text = "" if token in end_tokens else stops.push(decoder.push(token))
            if ended and not stops.found:
                text += stops.push(decoder.flush()) + stops.flush()
                generation.finish_reason = "stop" if token in end_tokens else "length"
            if stops.found:
                ended, generation.finish_reason, generation.stop = True, "stop", stops.found
            texts.append(text)

            if generation.generated_tokens == 1:
                generation.first_token_seconds = perf_counter() - started
            else:
                generation.decode_seconds += perf_counter() - resumed
            yield Piece(text, token, sampler.log_probability, top)
            if ended or request.cancelled():
                return

            resumed = perf_counter()
            if session.length < backend.context_length:
                step = session.decode(token)
            else:
                ids = slide(np.array([*session.tokens, token]), request.keep, backend.context_length - 1)
                step = session.prefill(ids[session.begin(ids, adapter) :], request.cancelled)
                if step is None:
                    return
            np.add(answer_sum, step.tap_last, out=answer_sum)
            generation.answer_fed += 1
    finally:
        session.checkpoint()
        engine._give_back(session, idle=request.session is None)
        generation.text = "".join(texts)


def _sample(sampler: Sampler, matcher: Matcher | None, logits: npt.NDArray[np.float32]) -> int:
    """The next token, of those that the constraint allows."""
    if matcher is None:
        return sampler.sample(logits)
    token = sampler.sample(logits, matcher.allowed())
    matcher.consume(token)
    return token
