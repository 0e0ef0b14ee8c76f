"""Two real processes: a device with a pool, and the server LLM that it asks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crayon_runtime.bundle import Bundle
from crayon_runtime.engine import Engine
from tests.runtime import pools
from tests.support import needs

httpx = needs.module("httpx")
openai = needs.module("openai")
needs.module("fastapi")
needs.module("uvicorn")

from crayon_runtime.routing import SentLog, sent_log_path  # noqa: E402

PROGRAM = "import sys; from crayon_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
SHAPES = {
    f"model.layers.{layer}.{name}": shape
    for layer in (0, 1)
    for name, shape in {"self_attn.q_proj": (64, 64), "mlp.down_proj": (96, 64)}.items()
}


@contextmanager
def process(bundle: Path, *more: str) -> Iterator[str]:
    """`crayon run BUNDLE --serve`; yields its address, and ends it."""
    command = [sys.executable, "-c", PROGRAM, "run", str(bundle), "--serve", "127.0.0.1:0", "--threads", "1", *more]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert started.stderr is not None
    try:
        yield started.stderr.readline().strip().rpartition(" at ")[2]
    finally:
        started.send_signal(signal.SIGTERM)
        said = started.communicate(timeout=20)[1]
    assert "Traceback" not in said
    assert started.returncode == 0


def printable(text: str) -> str:
    """As a device takes it from a server: without control characters. This model says many."""
    return "".join(c for c in text if c in "\t\n" or not (ord(c) < 32 or 127 <= ord(c) < 160)).strip()


@pytest.fixture(scope="module")
def device(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of its own, as what is kept of it stands beside it; and a pool."""
    folder = tmp_path_factory.mktemp("device")
    shutil.copytree(real, folder / "bundle")
    base = Bundle.open(real).model.base_fingerprint
    pools.write(
        folder / "pool", adapters=pools.loras(shapes=SHAPES, gain=0.7), located=pools.projection(3, 64), base=base
    )
    return folder


@pytest.mark.slow
def test_a_device_and_the_server_that_it_asks(device: Path, real: Path) -> None:
    bundle = device / "bundle"
    asked: list[Any] = [{"role": "user", "content": "Set an alarm"}]
    with Engine.load(real, threads=1) as engine:
        alone = engine.generate("Set an alarm", max_new_tokens=8).text
        long = printable(engine.generate("Set an alarm", max_new_tokens=24).text)
    with process(real, "--max-new-tokens", "24") as upstream:
        options = ("--server", upstream, "--server-model", Bundle.open(real).model.name, "--pool", str(device / "pool"))
        with (
            process(bundle, *options, "--policy", "always", "--max-new-tokens", "8") as url,
            openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client,
        ):
            base, *others = (model.id for model in client.models.list())
            assert others == ["hybrid", "alice"]
            ask = client.chat.completions.create
            assert ask(model=base, messages=asked).choices[0].message.content == alone
            hybrid = ask(model="hybrid", messages=asked, max_tokens=24)
            assert (hybrid.choices[0].message.content.strip(), hybrid.crayon["route"]) == (long, "server")
            chunks = list(ask(model="hybrid", messages=asked, max_tokens=24, stream=True))
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).strip() == long
            page = httpx.get(url.removesuffix("/v1"))
            assert page.headers["content-type"].startswith("text/html")
            status = httpx.get(f"{url}/customization").json()
            assert (status["possible"], status["customized"], status["to"]) == (True, False, None)
            examples = {"examples": [{"prompt": "Set an alarm", "completion": " now"}]}
            assert len(httpx.post(f"{url}/customization/preview", json=examples, timeout=30).json()["body"]) > 100
        sent = SentLog(sent_log_path(bundle)).read()
        assert [(entry.query, entry.outcome) for entry in sent] == [("Set an alarm", "answered")] * 2
    with (
        process(bundle, *options, "--policy", "always", "--max-new-tokens", "8") as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client,
    ):
        down = client.chat.completions.create(model="hybrid", messages=asked)
        assert down.choices[0].message.content == alone
        assert (down.crayon["route"], down.crayon["fallback"]) == ("device", True)
        assert "cannot be reached" in down.crayon["reason"]
