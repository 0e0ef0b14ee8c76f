"""The models of a server: the base, and each adapter under its own name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from crayon_runtime.bundle import Bundle
from crayon_runtime.customize import ADAPTER, NAME
from crayon_runtime.errors import AdapterError, BundleError, InvalidInput
from crayon_runtime.server.errors import Refused

if TYPE_CHECKING:
    from crayon_runtime.backends.base import Adapter
    from crayon_runtime.engine import Engine
    from crayon_runtime.generation import AdapterLike


HYBRID = "hybrid"
"""The model whose answers come from the device or from the server LLM."""


class Models:
    """Names, and what answers to them. Any number of threads may ask.

    Args:
        adapter: one more, wherever it came from; "none" is none, and that `HYBRID` answers with the base on the device.
        hybrid: there is a server LLM to ask.
        customized: the folder where `crayon customize` keeps its adapter. It is looked at for each request, so that a new one answers from
            then on.
    """

    def __init__(
        self, engine: Engine, customized: Path, adapter: AdapterLike | None = None, *, hybrid: bool = False
    ) -> None:
        if engine.bundle is None:
            raise InvalidInput("an engine without a bundle cannot be served", do="make it with Engine.load")
        self._engine = engine
        self._bundle = engine.bundle
        self._customized = customized / ADAPTER
        self._prefers_base = adapter == "none"
        self._given = engine.find_adapter(None if adapter == "none" else adapter)
        self.hybrid = hybrid
        self.base = engine.bundle.model.name

    @property
    def fingerprint(self) -> str:
        """What tells this base model from others."""
        return self._bundle.model.base_fingerprint[:16]

    @property
    def created(self) -> int:
        """Seconds since 1970: when the bundle came here."""
        return int((self._bundle.path / "manifest.json").stat().st_mtime)

    def names(self) -> list[str]:
        """The base first, then `HYBRID`. Where two adapters have one name, the first of: given at the start, customized, in the bundle."""
        return list(dict.fromkeys(self._names()))

    def adapter(self, name: str) -> Adapter | None:
        """What answers to a name; None: the base.

        Raises:
            Refused: nothing does, or the adapter cannot be used.
        """
        if name == self.base:
            return None
        if self.hybrid and name == HYBRID:
            raise Refused(400, f"{HYBRID!r} answers chats; choose another model for this", param="model")
        if self._given and name == self._given.name:
            return self._given
        if name not in self.names():
            raise self.unknown(name)
        try:
            return self._engine.find_adapter(self._open(name))
        except (AdapterError, BundleError) as e:
            message = f"the adapter {name!r} cannot be used: {e.what}"
            raise Refused(404, message, param="model", code="model_not_found") from e

    def preferred(self) -> Adapter | None:
        """What the device answers with as `HYBRID`: the adapter that was given at the start, or else the customized one, or else the base.

        Raises:
            Refused: the customized one cannot be used.
        """
        if self._given:
            return self._given
        return self.adapter(NAME) if self._customized.is_dir() and not self._prefers_base else None

    def unknown(self, name: str) -> Refused:
        """What is said of a name that nothing answers to."""
        there = ", ".join(map(repr, self.names()))
        return Refused(404, f"there is no model {name!r}; there are {there}", param="model", code="model_not_found")

    def _names(self) -> Iterator[str]:
        yield self.base
        if self.hybrid:
            yield HYBRID
        if self._given:
            yield self._given.name
        if self._customized.is_dir():
            yield NAME
        yield from self._bundle.adapter_names

    def _open(self, name: str) -> Bundle:
        if name == NAME and self._customized.is_dir():
            with suppress(BundleError):  # it may be replaced in this very moment
                return Bundle.open(self._customized)
            return Bundle.open(self._customized)
        return self._bundle.adapter(name)
