"""Whose turn it is: one answer at a time, in the order in which requests came, and none for a client that went away.

Answers      who is here: one is answered, some wait, all others are told to come back
Running      one request: it is prepared, waits for its turn, and is computed in a thread of its own; while it waits for something else
             than the model it may step aside
Sessions     the KV caches that are kept, and which of them a prompt continues
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from crayon_runtime.server.errors import Gone, Refused
from crayon_runtime.session import common_prefix

if TYPE_CHECKING:
    from crayon_runtime.backends.base import Adapter
    from crayon_runtime.engine import Engine
    from crayon_runtime.session import Session

Work = Callable[["Running"], Iterator[Any]]
"""What is done when its turn comes, in a thread; what it yields or raises goes to the reader."""

DELIVERY_SECONDS = 0.005
"""For so long computing stands back until the first piece is sent, where it would take the last core for the second one."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Sessions:
    """The KV caches that are kept for conversations. For who has the turn.

    Args:
        limit: how many; each is memory for a whole context.
    """

    def __init__(self, engine: Engine, limit: int) -> None:
        self._engine = engine
        self._limit = limit
        self._sessions: list[tuple[Session, Adapter | None]] = []  # the one used last is last

    @property
    def spare(self) -> bool:
        """Whether there is one for another answer, even if one is not finished."""
        return len(self._sessions) < self._limit or not all(session.busy for session, _ in self._sessions)

    def pick(self, ids: list[int], adapter: Adapter | None) -> Session:
        """Where to compute a prompt.

        It is the session that has most in common with it, if that is worth more than what the session would lose; else a new one, or the
        one that was not used for the longest time. Never one with an unfinished answer: there must be a spare one.
        """
        wanted = np.array(ids)
        best, gain = None, 0
        for i, (session, computed_with) in enumerate(self._sessions):
            if computed_with is adapter and not session.busy:
                common = common_prefix(np.array(session.tokens, np.int64), wanted)
                if common > gain and common >= session.length - common:
                    best, gain = i, common
        if best is None and len(self._sessions) < self._limit:
            session = self._engine.session()
        else:
            if best is None:
                best = next(i for i, (session, _) in enumerate(self._sessions) if not session.busy)
            session, _ = self._sessions.pop(best)
        self._sessions.append((session, adapter))
        return session


class Answers:
    """The requests that are here.

    Args:
        waiting: how many may wait for their turn.
        conversations: how many KV caches are kept.
    """

    def __init__(self, engine: Engine, *, waiting: int, conversations: int) -> None:
        self.sessions = Sessions(engine, conversations)
        self.turn = asyncio.Semaphore(1)
        self._limit = 1 + waiting
        self.computing = ThreadPoolExecutor(self._limit, "crayon-compute")
        self._running: set[Running] = set()
        self._stopped = False

    @property
    def present(self) -> int:
        """How many requests are answered or wait."""
        return len(self._running)

    @asynccontextmanager
    async def answer(self, work: Work, receive: Receive) -> AsyncIterator[Running]:
        """Answer one request, and end its work at the end of the block, whether or not it was finished.

        Args:
            receive: tells when the client goes away.

        Raises:
            Refused: too many are waiting.
        """
        if self._stopped:
            raise _stopping()
        if len(self._running) >= self._limit:
            raise Refused(503, f"busy: {self._limit} requests are here already; try again later", code="busy")
        running = Running(self, work)
        self._running.add(running)
        watch = asyncio.create_task(_watch(receive, running))
        try:
            yield running
        finally:
            watch.cancel()
            running.end(Gone())

    def leave(self, running: Running) -> None:
        """Free its slot."""
        self._running.discard(running)

    def stop(self) -> None:
        """End everything that runs or waits, and take nothing more. In the event loop's thread."""
        self._stopped = True
        for running in self._running:
            running.end(_stopping())

    def close(self) -> None:
        """Wait for the threads; not in that of the event loop, which they may need."""
        self.computing.shutdown(cancel_futures=True)


class Running(AsyncIterator[Any]):
    """One request, from its arrival to the last thing that its work yields: for its reader an iterator, for its work `sessions`, `cancel`,
    and `step_aside`.

    The work does not wait for its reader: a client that reads slowly holds up nobody, and what it has not read is at most one answer.
    """

    def __init__(self, answers: Answers, work: Work) -> None:
        self.sessions = answers.sessions
        self.cancel = threading.Event()
        """Ends the work early."""
        self._answers = answers
        self._loop = asyncio.get_running_loop()
        self._has_turn = False
        self._returning: asyncio.Task[None] | None = None
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._error: Exception | None = None
        self._computing = False
        self._read = 0
        self._delivered = threading.Event()
        self.task = asyncio.create_task(self._run(work))
        self.task.add_done_callback(self._finish)  # also of a task that was cancelled before it began

    async def __anext__(self) -> Any:
        self._read += 1
        if self._read == 2:
            self._delivered.set()
        item = await self._items.get()
        if isinstance(item, _End):
            raise item.error or StopAsyncIteration
        return item

    def at_hand(self) -> Iterator[Any]:
        """What has come in the meantime, without waiting for more."""
        while not self._items.empty():
            item = self._items.get_nowait()
            if isinstance(item, _End):
                self._items.put_nowait(item)
                return
            yield item

    def end(self, why: Exception) -> None:
        """End it before its next backend call, or at once if it has not had its turn."""
        if not self.task.done() and self._error is None:
            self._error = why
            self.cancel.set()
            if self._returning is not None:
                self._returning.cancel()
            if not self._computing:
                self.task.cancel()

    def step_aside(self) -> bool:
        """For the work: give the turn to the next one, as something else than the model is waited for; whether that is possible."""
        if not self._has_turn or not self.sessions.spare:
            return False
        self._has_turn = False
        self._loop.call_soon_threadsafe(self._answers.turn.release)
        return True

    def step_back(self) -> None:
        """For the work that stepped aside: wait for another turn. Without one if it was ended, as then it must not compute any more."""
        asyncio.run_coroutine_threadsafe(self._take_turn(), self._loop).result()

    async def _take_turn(self) -> None:
        if self._error is None:
            self._returning = asyncio.current_task()
            try:
                await self._answers.turn.acquire()
                self._has_turn = True
            except asyncio.CancelledError:
                pass
            finally:
                self._returning = None

    async def _run(self, work: Work) -> None:
        try:
            await self._answers.turn.acquire()
            self._has_turn = self._computing = True
            try:
                await self._loop.run_in_executor(self._answers.computing, self._compute, work)
            finally:
                if self._has_turn:
                    self._answers.turn.release()
        except asyncio.CancelledError:
            self.cancel.set()
            raise

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._answers.leave(self)
        error = Gone() if task.cancelled() else task.exception()
        self._items.put_nowait(_End(self._error or error))

    def _compute(self, work: Work) -> None:
        first = True
        for item in work(self):
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
            if first:
                self._delivered.wait(DELIVERY_SECONDS)
            first = False


class _End:
    """The last item."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


async def _watch(receive: Receive, running: Running) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    running.end(Gone())


def _stopping() -> Refused:
    return Refused(503, "the server is shutting down", code="stopping")
