"""The page that people talk to the model with: one file, which asks nobody but the server that it came from."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

from fastapi.responses import Response


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page, and the headers that hold a browser to it: what is written in the file may run, and nothing else."""
    text = resources.files("crayon_runtime.server").joinpath("page.html").read_text(encoding="utf-8")
    style, script = (_hash(re.search(f"<{tag}>(.*?)</{tag}>", text, re.S)) for tag in ("style", "script"))
    policy = {
        "default-src": "'none'",
        "script-src": script,
        "style-src": style,
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
    return text.encode(), headers


def page_response() -> Response:
    """To who asks for it."""
    content, headers = page()
    return Response(content, headers=headers, media_type="text/html")


def _hash(found: re.Match[str] | None) -> str:
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
