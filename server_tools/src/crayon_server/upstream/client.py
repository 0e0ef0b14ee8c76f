"""A server LLM for programs that have no event loop, with any number of threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, Self, TypeVar

from crayon_runtime.errors import ServerError
from crayon_server.upstream.endpoint import Endpoint

CONCURRENCY = 8
MAX_TOKENS = 256

T = TypeVar("T")


class Upstream:
    """A server LLM. Use it in a `with` block; any number of threads may ask.

    Args:
        url: its address, to which /v1/chat/completions is appended.
        concurrency: how many requests it gets at once; further ones wait.
        options: see `Endpoint`.

    Raises:
        InvalidInput: the address or the key cannot be used.
    """

    def __init__(self, url: str, *, concurrency: int = CONCURRENCY, **options: Any) -> None:
        self._endpoint = Endpoint(url, **options)
        self._places = threading.BoundedSemaphore(concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="crayon-upstream", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return self._endpoint.url

    def model(self) -> str:
        """The name of the model that answers.

        Raises:
            ServerError: no name was given, and the server LLM lists none.
        """
        return self._run(self._endpoint.model())

    def complete(self, prompt: str, max_tokens: int = MAX_TOKENS, temperature: float = 0.0) -> str:
        """The answer to one message of the user. It may be empty.

        Args:
            prompt: sent as it is, alone.
            max_tokens: the most of an answer.
            temperature: 0 is greedy.

        Raises:
            ServerError: there is none, after all retries.
        """
        with self._places:
            return self._run(self._endpoint.complete(prompt, max_tokens=max_tokens, temperature=temperature))

    def close(self) -> None:
        """Give up what is still being asked, and close the connections."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        running = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return running.result()
        except CancelledError:
            raise ServerError("the server LLM was given up", where=self.url) from None
        except BaseException:
            running.cancel()  # Ctrl-C
            raise

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._endpoint.aclose()
