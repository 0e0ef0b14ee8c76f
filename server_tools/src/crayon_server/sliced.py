"""Sequences whose items are read or made when they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

T = TypeVar("T", covariant=True)


class Sliced(Sequence[T]):
    """A sequence of which a slice is a list; a subclass has a length, and `_at`."""

    @abstractmethod
    def _at(self, i: int) -> T:
        """One item; `i` is not negative, and below the length."""

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> list[T]: ...
    def __getitem__(self, i: int | slice) -> T | list[T]:
        places = range(len(self))[i]
        return self._at(places) if isinstance(places, int) else [self._at(j) for j in places]
