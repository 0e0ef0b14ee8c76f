"""What a refused request is answered with: OpenAI's error object."""

from __future__ import annotations

from typing import Any

from crayon_runtime.errors import AdapterError, ContextOverflow, CrayonError, InvalidInput

BUSY_SECONDS = 1
"""After which a client that found the server busy may ask again."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        message: for people.
        param: the field of the request that is at fault.
        code: for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.content: dict[str, Any] = {
            "error": {
                "message": message,
                "type": _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
                "param": param,
                "code": code,
            }
        }
        self.headers: dict[str, str] = {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        if code == "busy":
            self.headers["Retry-After"] = str(BUSY_SECONDS)


class Gone(Exception):
    """The client went away; there is nobody to answer."""


def refusal(error: Exception) -> Refused:
    """How an error is told to a client: its own mistakes in full, of all others only that they happened."""
    match error:
        case Refused():
            return error
        case InvalidInput() | AdapterError():
            code = "context_length_exceeded" if isinstance(error, ContextOverflow) else None
            message = f"{error.what}; {error.do}" if error.do else error.what
            return Refused(400, message, param=error.where, code=code)
        case CrayonError():
            return Refused(500, "the model failed; the server's log says more")
    return Refused(500, "the server failed; its log says more")
