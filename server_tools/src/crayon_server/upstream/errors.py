"""What goes wrong with a server LLM."""

from __future__ import annotations

from typing import Literal

from crayon_runtime.errors import ServerError

Kind = Literal["refused", "busy", "late", "broken"]

MODEL_NOT_FOUND = "model_not_found"

_KINDS: dict[int, Kind] = {502: "broken", 503: "busy", 504: "late"}


class UpstreamError(ServerError):
    """The server LLM did not answer, or refuses.

    Args:
        what: in our words.
        said: what the server LLM said about it, which may hold what a user wrote: nothing for a log.
        status: what a service that asked for somebody else answers them: 502 if the server LLM is broken, 503 if it is busy, 504 if it is
            late, and its own status if it does not like the request.
        param, code: of OpenAI's error object, where it sent one.
        wait: seconds after which it wants to be asked again.
        again: whether the same request may be answered the next time.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str,
        do: str | None = None,
        said: str = "",
        status: int = 502,
        param: str | None = None,
        code: str | None = None,
        wait: float | None = None,
        again: bool = False,
    ) -> None:
        super().__init__(f"{what}: {said}" if said else what, where=where, do=do)
        self.problem = what
        self.status, self.param, self.code = status, param, code
        self.wait, self.again = wait, again

    @property
    def kind(self) -> Kind:
        return _KINDS.get(self.status, "refused")


def broken(what: str, where: str) -> UpstreamError:
    """It answered with something that is no answer."""
    return UpstreamError(f"the server LLM sent {what}", where=where, do="check that its address is OpenAI-compatible")


def cut(where: str) -> UpstreamError:
    """The connection ended before the answer did."""
    return UpstreamError("the server LLM cut its answer off", where=where, do="try again", again=True)


def too_much(largest: int, where: str) -> UpstreamError:
    return UpstreamError(
        f"the server LLM sends more than {largest} bytes", where=where, do="do not use it; it is broken or hostile"
    )


def late(what: str, where: str, *, again: bool = False) -> UpstreamError:
    return UpstreamError(f"the server LLM {what}", where=where, do="try again later", status=504, again=again)
