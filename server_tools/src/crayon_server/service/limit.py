"""How often one client may ask, with `limits`."""

from __future__ import annotations

import ipaddress
import math
import time

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from crayon_runtime.errors import InvalidInput


class RateLimit:
    """Counts requests by address, in memory, for the last window of time.

    Args:
        rate: as "60/minute".

    Raises:
        InvalidInput: it is no rate.
    """

    def __init__(self, rate: str) -> None:
        try:
            self._rate: RateLimitItem = parse(rate)
        except ValueError:
            raise InvalidInput(f"{rate!r} is no rate", where="--rate-limit", do="give one as 60/minute") from None
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def wait(self, address: str | None) -> int:
        """Count a request.

        Args:
            address: of the client; those without one (a Unix socket) count as one.

        Returns:
            0, or the seconds after which to ask again.
        """
        client = _client(address)
        if self._limiter.hit(self._rate, client):
            return 0
        reset = self._limiter.get_window_stats(self._rate, client).reset_time
        return max(1, math.ceil(reset - time.time()))


def _client(address: str | None) -> str:
    """One client has one IPv4 address, or 2^64 of IPv6."""
    try:
        known = ipaddress.ip_address(address or "")
    except ValueError:
        return "-"
    return str(ipaddress.ip_network((known, 64), strict=False)) if known.version == 6 else str(known)
