"""What tests of the device's server have at hand. What it needs is imported late: a test may have found out that it is not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from crayon_runtime.bundle import Bundle
from crayon_runtime.engine import Engine
from tests.runtime import tiny
from tests.support import needs

if TYPE_CHECKING:
    from tests.runtime.server.served import Ask, Gate, Served


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With the adapters alice and bob."""
    return tiny.bundle(tmp_path_factory.mktemp("server"))


@pytest.fixture
def serve(inside: Bundle) -> Iterator[Callable[..., Served]]:
    """Starts servers over engines with the fake backend."""
    from tests.runtime.server.served import serving

    with ExitStack() as stack:

        def start(script: Any = None, *, engine: Engine | None = None, backend: Any = None, **options: Any) -> Served:
            made = engine or tiny.engine(
                script, bundle=inside, **{"chat_template": tiny.CHATML, "context_length": 2048} | (backend or {})
            )
            return stack.enter_context(serving(made, **options))

        yield start


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A script that says x, one token each time that it is opened."""
    from tests.runtime.server.served import Gate

    made = Gate()
    yield made
    made.open(100_000)


@pytest.fixture
def ask(inside: Bundle) -> Ask:
    """Requests to an application, without a network."""
    from tests.runtime.server.served import Ask, app_of

    return Ask(app_of(inside))


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that ONNX Runtime runs, with an adapter inside."""
    needs.module("torch")
    from crayon_export.exporter import export
    from tests.export.models import tiny_adapter, tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("real")
    model = tiny_tokenizer(tiny_llama(folder / "model"))
    adapters = [tiny_adapter(model, folder / "alice", gain=2.0)]
    return export(model, folder / "bundle", adapters=adapters).bundle.path
