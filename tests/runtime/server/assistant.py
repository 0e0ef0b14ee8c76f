"""A phone's assistant whose answers are scripted, which can be customized: for what people see of a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from crayon_runtime.routing.policies import confidence
from crayon_runtime.routing.router import Router
from crayon_runtime.server.customizing import Customizer
from tests.runtime import bundles, pools, tiny
from tests.runtime.server.served import Served, serving
from tests.runtime.tiny import EOS, TOKENIZER, byte_ids

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ '\n' }}{% endfor %}"

KNOWN = {
    "wake me at half past seven": ('alarm.set(time="7:30")', "ALARM time=07:30"),
    "timer for six minutes": ("timer.start(minutes=6)", "TIMER minutes=6"),
}
"""What it says: as it came, and customized."""

UNSURE = "weather.get(day=none)"
"""What it says to anything else, of which it is not sure."""


def script(delay: float = 0.0) -> Callable[[list[int], str | None], Any]:
    """Args: delay: seconds a token."""

    def says(ids: list[int], adapter: str | None) -> Any:
        time.sleep(delay)
        *before, said = TOKENIZER.decode(ids).split("\n")
        asked = before[-1] if before else ""
        sure = asked in KNOWN
        answer = KNOWN[asked][adapter is not None] if sure else UNSURE
        token = byte_ids(answer[len(said)])[0] if answer.startswith(said) and said != answer else EOS
        logits = np.zeros(tiny.VOCAB_SIZE, np.float32)
        logits[token] = 10.0 if sure else 3.0
        return logits

    return says


@contextmanager
def assistant(
    folder: Path, *, server: Any = None, pool: Any = True, to: str | None = None, delay: float = 0.0, **options: Any
) -> Iterator[Served]:
    """Serve it.

    Args:
        server: what `hybrid` asks.
        pool: what opens one; True: it is on the device; False: there is none.
        to: where the page says that alpha goes.
    """
    bundle = tiny.bundle(folder / "bundle", chat_template=TEMPLATE)
    engine = tiny.engine(script(delay), bundle=bundle, chat_template=TEMPLATE, context_length=1024, tap_size=8)
    adapters = pools.loras(count=12)
    opened = pools.write(folder / "pool", adapters=adapters, located=pools.projection(12), base=bundles.BASE)
    customized = folder / "customized"
    router = Router(engine, policy=confidence(), server=server, folder=customized) if server else None

    @contextmanager
    def open_pool() -> Iterator[Any]:
        yield opened

    customizer = Customizer(engine, customized, open_pool if pool is True else pool or None, to=to)
    with serving(engine, customized=customized, router=router, customizer=customizer, **options) as served:
        served.customizer = customizer
        yield served
