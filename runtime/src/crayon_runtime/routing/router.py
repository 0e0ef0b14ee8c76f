"""Answers from the device or from the server LLM, whichever should.

One answer, from top to bottom:

    Router.answer      collects a stream
    Router.stream      checks what was asked for, and finds what is known of the present adapter: its policy, and what to compare with
    _Work              lets the device answer, computes signals, decides, asks the server, and falls back on the device

The server is asked for what the policy does not leave to the device, and is sent the query's text and nothing else. Whatever is wrong with
it, there is the device's answer. While the server is asked, a device that was stopped early waits, and goes on if it has to.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self, Unpack

from crayon_runtime.customized import ADAPTER, ROUTING, example_states, state_folder
from crayon_runtime.errors import ContextOverflow, CrayonError, InvalidInput
from crayon_runtime.generation import Generation, Piece, Stream
from crayon_runtime.prototypes import read_prototypes
from crayon_runtime.routing.calibration import Calibration, adapter_sha256, read_calibration, uncalibrated
from crayon_runtime.routing.policies import PLAIN, WEIGHED, Decision, Policy, Route
from crayon_runtime.routing.signals import Reference, signals
from crayon_runtime.stopping import StopStrings

if TYPE_CHECKING:
    from crayon_runtime.backends.base import Adapter
    from crayon_runtime.bundle import Bundle
    from crayon_runtime.engine import Engine
    from crayon_runtime.examples import ExampleStates
    from crayon_runtime.generation import GenerateOptions
    from crayon_runtime.request import Prompt
    from crayon_runtime.routing.rules import Rules
    from crayon_runtime.routing.sent import SentLog


class Reply(Iterator[str], Protocol):
    """What a server answers, piece by piece; see `crayon_runtime.routing.server.Asking`."""

    finish_reason: str | None

    @property
    def tokens(self) -> int: ...

    @property
    def sent_bytes(self) -> int: ...

    def close(self) -> None: ...


class Server(Protocol):
    """What can be asked: a `crayon_runtime.routing.server.ServerLLM`, or something of your own."""

    @property
    def url(self) -> str: ...

    def request(self, query: str, *, max_tokens: int | None = None) -> bytes: ...

    def ask(self, query: str, *, max_tokens: int | None = None, cancel: threading.Event | None = None) -> Reply: ...


class Part(NamedTuple):
    """A piece of an answer's text while it comes."""

    text: str
    source: Route
    draft: bool
    """Whether it may still be dropped: it is shown to who wants to see the device at work. Everything that stays of it comes again, as a
    part that is no draft. These together are the answer; where their source changes from the server to the device, because the server
    broke off, the answer starts anew there."""


@dataclass(slots=True)
class Answer:
    """An answer, and where it comes from."""

    policy: str
    """The name of the policy that decided."""
    threshold: float
    text: str = ""
    route: Route = "device"
    """Who gave it."""
    reason: str = ""
    """Why, in a sentence."""
    fallback: bool = False
    """Whether the server should have given it, and could not."""
    score: float = math.nan
    """Higher: rather the device. NaN if there was no usable signal, or nothing was decided."""
    signals: dict[str, float] = field(default_factory=dict)
    """Those that the policy weighs, by name; empty if it did not come to that."""
    finish_reason: str | None = None
    """Of the answer that is given; as `Generation` has it, or as the server says it."""
    generation: Generation | None = None
    """The device's answer, whole or as far as it came; None if the device did not begin."""
    server_tokens: int = 0
    """That came from the server, also if its answer could not be used."""
    sent_bytes: int = 0
    """That left the device: of the bodies of requests."""
    seconds: dict[str, float] = field(default_factory=dict)
    """"device": prompt and tokens; "score": signals and decision; "server": from the request to the end; "total": all, with the time that
    the reader of the stream took."""


class AnswerStream(Iterator[Part]):
    """A running answer. Nothing is computed or sent until the first part is asked for. Closing it, or dropping it, ends it."""

    def __init__(self, parts: Generator[Part, None, None], answer: Answer) -> None:
        self._parts = parts
        self._answer = answer
        self._ended = False

    def __next__(self) -> Part:
        try:
            return next(self._parts)
        except BaseException:
            self._ended = True
            raise

    def close(self) -> None:
        """End here. (Another thread sets `cancel` instead.)"""
        self._parts.close()
        self._ended = True

    @property
    def answer(self) -> Answer:
        """The whole answer; InvalidInput before the stream has ended."""
        if not self._ended:
            raise InvalidInput("the stream has not ended", do="read all its parts, or close it, before its answer")
        return self._answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Known:
    """What there is to judge the answers of one adapter with."""

    reference: Reference
    calibration: Calibration | None
    policies: dict[str, Policy]
    """By name: calibrated, or made of the user's own examples; and those that need neither."""
    notes: tuple[str, ...]
    """What is ignored, and why."""

    def policy(self, wanted: str | Policy | None = None) -> Policy:
        """The policy of a name, or the best there is for None: `calibrated`, otherwise `confidence`.

        Raises:
            InvalidInput: there is no such policy, or the adapter lacks what it needs.
        """
        if wanted is None:
            wanted = "calibrated" if "calibrated" in self.policies else "confidence"
        if isinstance(wanted, str):
            if wanted not in WEIGHED:
                raise InvalidInput(
                    f"there is no policy {wanted!r}", where="policy", do=f"choose of {', '.join(WEIGHED)}"
                )
            if wanted not in self.policies:
                self.reference.check(WEIGHED[wanted])
                raise InvalidInput(
                    f"nobody knows the threshold of the policy {wanted!r} for this adapter",
                    where="policy",
                    do="find it with `crayon route calibrate`; customize on this device; or choose the policy 'confidence'",
                )
            wanted = self.policies[wanted]
        self.reference.check(wanted.weights)
        return wanted


class Router:
    """Decides for each answer of an engine who gives it. Any number of threads may use it.

    Args:
        engine: answers on the device.
        policy: see `crayon_runtime.routing.policies`; None: `calibrated` if there is a calibration or the user's own examples, otherwise
            `confidence`.
        server: what is asked; None: nothing ever leaves the device, and answers that should have say so.
        rules: what may leave the device, and how it is changed before; None: any query as it is.
        log: where what is sent is written down before; None: nowhere.
        folder: where the customized adapter is kept, with its examples and its calibration; None: `state_folder` of the engine's bundle.

    Raises:
        InvalidInput: there is no such policy, or the engine's present adapter lacks what it needs.
        AdapterError, IntegrityError, ManifestError: what is kept for this adapter does not fit, or is damaged.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        policy: str | Policy | None = None,
        server: Server | None = None,
        rules: Rules | None = None,
        log: SentLog | None = None,
        folder: Path | None = None,
    ) -> None:
        self.engine = engine
        self.server, self.rules, self.log = server, rules, log
        if folder is None and engine.bundle is not None:
            folder = state_folder(engine.bundle.path)
        self.folder = folder
        self._wanted = policy
        self._lock = threading.Lock()
        # An adapter may be large, and is not kept because it answered once.
        self._known: dict[int, tuple[Callable[[], Adapter | None], int, Known]] = {}
        self.policy  # noqa: B018 - says what is wrong with it now

    @property
    def policy(self) -> Policy:
        """What decides with the engine's present adapter."""
        return self.known(self.engine.present_adapter).policy(self._wanted)

    def known(self, adapter: Adapter | None) -> Known:
        """What there is for an adapter that the engine has read; read once for each, and again after `crayon route calibrate`."""
        calibrated = self._calibrated()
        with self._lock:
            found = self._known.get(id(adapter))
            if found is not None and found[0]() is adapter and found[1] == calibrated:
                return found[2]
            known = self._read(adapter)
            for key in [key for key, (kept, *_) in self._known.items() if kept() is None]:
                del self._known[key]
            self._known[id(adapter)] = ((lambda: None) if adapter is None else weakref.ref(adapter), calibrated, known)
            return known

    def answer(self, prompt: Prompt, *, query: str | None = None, **options: Unpack[GenerateOptions]) -> Answer:
        """Answer a prompt.

        Args:
            prompt: for the device, as for `Engine.generate`.
            query: what the server is asked, if it is; None: the prompt, if that is text.
            options: for the device. `max_new_tokens`, `stop`, `constraint` and `cancel` hold for the server's answer too.

        Raises:
            As `Engine.generate`, of the device; but a prompt that is too long for it goes to the server, and is refused only if that fails.
            Nothing of the server: that is a reason for the device's answer.
        """
        with self.stream(prompt, query=query, **options) as stream:
            for _ in stream:
                pass
        return stream.answer

    def stream(self, prompt: Prompt, *, query: str | None = None, **options: Unpack[GenerateOptions]) -> AnswerStream:
        """Answer a prompt piece by piece: as `answer`, whose result the stream has at its end."""
        engine = self.engine
        adapter = engine.find_adapter(options["adapter"]) if "adapter" in options else engine.present_adapter
        options["adapter"] = adapter
        known = self.known(adapter)
        policy = known.policy(self._wanted)
        if query is None and isinstance(prompt, str):
            query = prompt.strip()
        decided = None
        try:
            device = engine.stream(prompt, **options)
        except ContextOverflow as e:
            if self.server is None or policy.name == "never":
                raise
            device = Stream(_refused(e), Generation(prompt_tokens=0))
            decided = Decision("server", math.nan, policy.threshold, e.what)
        work = _Work(self, device, known.reference, policy, query, options, decided)
        return AnswerStream(work.parts(), work.answer)

    def _calibrated(self) -> int:
        """When it last was, in nanoseconds since 1970; 0: never."""
        try:
            return (self.folder / ROUTING).stat().st_mtime_ns if self.folder is not None else 0
        except OSError:
            return 0

    def _read(self, adapter: Adapter | None) -> Known:
        bundle = self.engine.bundle_of(adapter) if adapter is not None else None
        folder = self.folder
        own = bundle is not None and folder is not None and bundle.path == (folder / ADAPTER).resolve()
        return read_known(bundle, folder if own else None, self.engine.backend.tap_size)


def read_reference(adapter: Bundle | None, folder: Path | None, size: int) -> tuple[Reference, ExampleStates | None]:
    """Read what answers are compared with, and the examples in it.

    Args:
        adapter: what the engine answers with; None: the base.
        folder: where this adapter is kept with what it was made of; None: it was not made on this device.
        size: D, of the model's tapped state.

    Raises:
        InvalidInput, AdapterError, IntegrityError: what is there does not fit, or is damaged.
    """
    prototypes = read_prototypes(adapter, size) if adapter is not None else None
    examples = example_states(folder) if folder is not None else None
    reference = Reference.of(prototypes, examples)
    if len(reference.center) not in (0, size):
        raise InvalidInput(
            f"the examples' states are of {len(reference.center)}; this model's are of {size}",
            where=folder,
            do="customize the model again",
        )
    return reference, examples


def read_known(adapter: Bundle | None, folder: Path | None, size: int) -> Known:
    """Read all that there is to judge answers with: as `read_reference`, and the calibration.

    Raises:
        ManifestError, SchemaTooNew: the calibration is damaged, or of a newer version; and as `read_reference`.
    """
    reference, examples = read_reference(adapter, folder, size)
    calibration, notes = None, []
    if folder is not None:
        calibration = read_calibration(folder)
        if calibration is not None and calibration.adapter != adapter_sha256(folder / ADAPTER):
            calibration = None
            notes.append(
                f"{folder / ROUTING} was made with another adapter, and is ignored; `crayon route calibrate` makes it again"
            )
    policies = {name: make() for name, make in PLAIN.items()}
    if calibration is not None:
        policies |= {policy.name: policy for policy in calibration.policies}
    elif examples is not None:
        policies |= {policy.name: policy for policy in uncalibrated(reference, examples)}
    return Known(reference, calibration, policies, tuple(notes))


def _refused(error: ContextOverflow) -> Generator[Piece, None, None]:
    """What the device says to a prompt that is too long for it."""
    raise error
    yield  # a generator


class _Work:
    """One answer."""

    def __init__(
        self,
        router: Router,
        device: Stream,
        reference: Reference,
        policy: Policy,
        query: str | None,
        options: GenerateOptions,
        decided: Decision | None,
    ) -> None:
        self._decided = decided  # before anything was computed
        self.answer = Answer(policy=policy.name, threshold=policy.threshold)
        self._router, self._device = router, device
        self._reference, self._policy = reference, policy
        self._query = query
        self._options = options
        self._final: list[str] = []

    def parts(self) -> Generator[Part, None, None]:
        """The parts; fills in the answer."""
        answer, started = self.answer, perf_counter()
        try:
            yield from self._constant() if self._decided or not self._policy.weights else self._weighed()
        finally:
            self._device.close()
            generation = self._device.generation
            if generation.first_token_seconds:
                answer.generation = generation
                answer.seconds["device"] = generation.first_token_seconds + generation.decode_seconds
            if answer.route == "device":
                answer.finish_reason = generation.finish_reason
            answer.text = "".join(self._final)
            answer.seconds["total"] = perf_counter() - started

    def _constant(self) -> Generator[Part, None, None]:
        """A policy that needs no signals has decided already, and so has a prompt that is too long for the device."""
        decision = self._decided or self._policy.decide({})
        self._take(decision)
        if decision.route == "server" and (yield from self._server()):
            return
        for piece in self._device:
            if piece.text:
                yield self._part(piece.text)

    def _weighed(self) -> Generator[Part, None, None]:
        drafts: list[str] = []
        decided = False
        generation = self._device.so_far
        for piece in self._device:
            if piece.text and decided:
                yield self._part(piece.text)
            elif piece.text:
                drafts.append(piece.text)
                yield Part(piece.text, "device", draft=True)
            if not decided and generation.generated_tokens == self._policy.after:
                decided = True
                if (yield from self._decide(drafts)):
                    return
        if decided:
            return
        if generation.finish_reason == "cancelled":
            self.answer.reason = _CANCELLED
            if drafts:
                yield self._part("".join(drafts))
            return
        yield from self._decide(drafts)

    def _decide(self, drafts: list[str]) -> Generator[Part, None, bool]:
        """Decide with what the device has said so far, and ask the server if need be; whether it has answered."""
        started = perf_counter()
        computed = signals(self._device.so_far, self._reference, self._policy.weights)
        decision = self._policy.decide(computed)
        self.answer.seconds["score"] = perf_counter() - started
        self.answer.signals = computed
        self._take(decision)
        if decision.route == "server" and (yield from self._server()):
            return True
        if drafts:
            yield self._part("".join(drafts))
        return False

    def _take(self, decision: Decision) -> None:
        self.answer.score, self.answer.reason = decision.score, decision.reason

    def _part(self, text: str) -> Part:
        """A part of the device's answer that stays."""
        self._final.append(text)
        return Part(text, "device", draft=False)

    def _server(self) -> Generator[Part, None, bool]:
        """Ask the server; whether it has answered. Otherwise the answer is a fallback, and says why."""
        answer = self.answer
        answer.route = "server"  # if the reader stops in the middle, too
        why = yield from self._ask()
        if why is None:
            return True
        answer.route, answer.fallback = "device", True
        answer.reason = f"{answer.reason}, but {why}"
        self._final.clear()
        return False

    def _ask(self) -> Generator[Part, None, str | None]:
        """Ask the server; why it did not answer, None if it did."""
        server = self._router.server
        if server is None:
            return "there is no server to ask"
        if not self._query:
            return "there is no text to ask the server for"
        query = self._query
        if self._router.rules is not None:
            allowed = self._router.rules.outgoing(query)
            if allowed.query is None:
                return allowed.why or "the rules forbid it"
            query = allowed.query
        started = perf_counter()
        try:
            return (yield from self._exchange(server, query))
        except Exception as e:  # noqa: BLE001 - whatever is wrong with a server or the log, the device has an answer
            return _why(e)
        finally:
            self.answer.seconds["server"] = perf_counter() - started

    def _exchange(self, server: Server, query: str) -> Generator[Part, None, str | None]:
        options, log, started = self._options, self._router.log, perf_counter()
        limit = options.get("max_new_tokens")
        entry = log.sending(server.url, query, len(server.request(query, max_tokens=limit))) if log else None
        reply = server.ask(query, max_tokens=limit, cancel=options.get("cancel"))
        why: str | None = _CANCELLED  # if the reader leaves in the middle
        try:
            why = yield from self._read(reply)
        except Exception as e:  # noqa: BLE001 - as above
            why = _why(e)
        finally:
            with suppress(Exception):
                reply.close()
            self.answer.server_tokens, self.answer.sent_bytes = reply.tokens, reply.sent_bytes
            if log is not None and entry is not None:
                log.ended(entry, why or "answered", size=reply.sent_bytes, seconds=perf_counter() - started)
        return why

    def _read(self, reply: Reply) -> Generator[Part, None, str | None]:
        """Pass on what the server says; why it cannot be used, None if it can."""
        stop = self._options.get("stop", ())
        stops = StopStrings([stop] if isinstance(stop, str) else stop)
        constraint = self._options.get("constraint")
        held: list[str] = []  # what must have a form is shown when it is there and has it
        for piece in reply:
            text = stops.push(piece)
            if constraint is not None:
                held.append(text)
            elif text:
                yield self._said(text)
            if stops.found:
                break
        if reply.finish_reason == "cancelled" and not stops.found:
            return _CANCELLED
        rest = "".join(held) + stops.flush()
        if constraint is not None:
            rest = rest if constraint.meets(rest) else rest.strip()
            if not constraint.meets(rest):
                return "the server's answer has not the form that was asked for"
        if rest:
            yield self._said(rest)
        self.answer.finish_reason = "stop" if stops.found else reply.finish_reason or "stop"
        return None if "".join(self._final).strip() else "the server's answer is empty"

    def _said(self, text: str) -> Part:
        self._final.append(text)
        return Part(text, "server", draft=False)


_CANCELLED = "it was cancelled"


def _why(error: Exception) -> str:
    """What of an error a person is told: of one that is not ours, its message may be anything."""
    return error.what if isinstance(error, CrayonError) else f"asking the server failed with {type(error).__name__}"
