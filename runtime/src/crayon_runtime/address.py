"""The address and the key of a server, checked before anything is sent there."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from crayon_runtime.errors import InvalidInput


def checked_url(url: str, *, plain_http: bool, exposed: str) -> tuple[str, bool]:
    """The address without its last slash, and whether it is plain http to this machine.

    Args:
        plain_http: allow http to other machines.
        exposed: what everybody on the way could read: the error where that is not allowed.

    Raises:
        InvalidInput: it is no address of a server, carries a user, a query or a fragment, or is http to another machine.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as e:
        raise InvalidInput(f"this is not an address: {e}", where=url) from None
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise InvalidInput("this is not the address of a service", where=url, do="give one like https://host:8000")
    if parts.username is not None or parts.query or parts.fragment:
        raise InvalidInput(
            "the address has a user, a query or a fragment", where=parts.hostname, do="give a key in a file of its own"
        )
    direct = parts.scheme == "http" and _is_loopback(host)
    if parts.scheme == "http" and not direct and not plain_http:
        raise InvalidInput(
            exposed,
            where=url,
            do="use https, or allow http with --plain-http where the network is your own",
        )
    return url.rstrip("/"), direct


def checked_key(key: str | None) -> str | None:
    """The key as it is. Raises InvalidInput: it cannot be a header."""
    if key is not None and (not key.isascii() or not key.isprintable() or not key.strip()):
        raise InvalidInput("the API key must be one line of ASCII", where="api key")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
