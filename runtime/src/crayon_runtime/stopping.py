"""Stop strings in streamed text: found across pieces, never shown, and nothing held back that cannot become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Holds back the end of the text while it may still become a stop string.

    Where the text is cut does not depend on how it comes in pieces: it stops at the first character that completes a stop string,
    and of several that it completes the longest counts.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, piece: str) -> str:
        """Append a piece; return what can be shown. Once `found` is set, that is all there is."""
        if not self._strings:
            return piece
        text = self._held + piece
        hits = [(start + len(s), start, s) for s in self._strings if (start := text.find(s)) >= 0]
        if hits:
            _, start, self.found = min(hits)
            self._held = ""
            return text[:start]
        held = self._longest_beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """The length of the longest end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._strings)) - 1)
        return next(
            (n for n in range(longest, 0, -1) if any(s.startswith(text[len(text) - n :]) for s in self._strings)), 0
        )
