"""Blending a pool at LLaMA-7B's shapes: time, memory, size and error."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checkpoints import sparse_checkpoint
from benchmarks.service import serving
from benchmarks.table import Row
from crayon_export import export
from crayon_export.estimate import estimate
from crayon_export.lora import PeftAdapter
from crayon_export.onnx.adapter import onnx_tensors
from crayon_runtime import Engine
from crayon_runtime.affinity import Projection, Weighting
from crayon_runtime.bundle import Bundle, write_adapter
from crayon_runtime.examples import score
from crayon_runtime.manifest import AdapterDtype
from crayon_runtime.pool import MANIFEST, Embedding, Pool, PoolManifest, write_pool
from crayon_server.data.phone_assistant import benchmark
from crayon_server.models import load_nano
from crayon_server.training import train_lora

LAYERS, HIDDEN, FFN = 32, 4096, 11008
ADAPTERS, RANK = 8, 8
BASE = "7b" * 32
ALPHA = [0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05]
DTYPES: tuple[AdapterDtype, ...] = ("fp32", "fp16", "int8")

_BLEND = """
import json, sys, threading, time
from crayon_runtime.pool import Pool, write_adapter_bundle

def anonymous():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

place, out, mode, rank, dtype, alpha, repetitions = json.loads(sys.argv[1])
pool = Pool.open(place)
threading.Thread(target=watch).start()
seconds = []
for _ in range(repetitions + 1):
    started = time.perf_counter()
    bundle = write_adapter_bundle(
        pool.blend(alpha, mode, rank), out, name="a", base_fingerprint=pool.manifest.base_fingerprint, dtype=dtype, replace=True
    )
    seconds.append(time.perf_counter() - started)
done.set()
print(json.dumps({"seconds": sorted(seconds[1:])[repetitions // 2], "anonymous": peak, "bytes": bundle.size}))
"""


def run(work: Path) -> Iterator[Row]:
    pool = pool_7b(work)
    yield from _blending(pool, work)
    yield from _sizes(pool, work)
    yield from _service(pool)
    yield from _errors(work)


def _blending(pool: Path, work: Path) -> Iterator[Row]:
    half = _blend(pool, work)
    yield Row(
        "LLaMA-7B shapes, N = 8, r = 8, float16, all linears: blend, to a bundle on the disk",
        "<= 1 s, <= 300 MB anonymous",
        f"{half['seconds']:.2f} s, {half['anonymous'] / 1e6:.0f} MB",
        half["seconds"] <= 1 and half["anonymous"] <= 300e6,
    )
    for name, mode, rank, dtype in (
        ("the same to int8", "separate", None, "int8"),
        ("concat, rank 64", "concat", None, "fp16"),
        ("svd to rank 8", "svd", RANK, "fp16"),
    ):
        done = _blend(pool, work, mode=mode, rank=rank, dtype=dtype, repetitions=3)
        yield Row(
            name, "", f"{done['seconds']:.2f} s, {done['anonymous'] / 1e6:.0f} MB, writes {done['bytes'] / 1e6:.0f} MB"
        )


def _blend(
    pool: Path,
    work: Path,
    *,
    mode: str = "separate",
    rank: int | None = None,
    dtype: str = "fp16",
    repetitions: int = 7,
) -> dict[str, Any]:
    """In a process of its own: the median time, the peak of anonymous memory, and the size."""
    arguments = json.dumps([str(pool), str(work / "blended"), mode, rank, dtype, ALPHA, repetitions])
    environment = os.environ | {
        "OPENBLAS_NUM_THREADS": "1"
    }  # as workers have it; matrices of 64 x 64 are no work for two
    done = subprocess.run(
        [sys.executable, "-c", _BLEND, arguments], check=True, stdout=subprocess.PIPE, env=environment
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _sizes(pool: Path, work: Path) -> Iterator[Row]:
    base = estimate(sparse_checkpoint(work, "llama-7b")).disk
    for dtype, reach in (("fp16", 0.011), ("int8", 0.0055)):
        nbytes = _blend(pool, work, dtype=dtype, repetitions=1)["bytes"]
        yield Row(
            f"adapter in {dtype} against the int4 base of {base / 1e9:.2f} GB",
            f"<= {reach:.2%}",
            f"{nbytes / 1e6:.1f} MB, {nbytes / base:.2%}",
            nbytes <= reach * base,
        )


def _service(pool: Path) -> Iterator[Row]:
    manifest = Pool.open(pool).manifest
    asked: dict[str, Any] = {"base_fingerprint": manifest.base_fingerprint, "pool_version": manifest.version}
    body = json.dumps(asked | {"alpha": ALPHA})
    yield Row("body sent up", "<= 1 KB", f"{len(body)} bytes", len(body) <= 1000)
    with serving(pool) as server:
        address = server.address
        new, whole = [], []
        for n in range(5):
            first, all_of_it = _ask(address, json.dumps(asked | {"alpha": [*ALPHA[:-1], n / 100]}))
            new.append(first)
            whole.append(all_of_it)
        _ask(address, body)
        cached = [_ask(address, body)[0] for _ in range(30)]
    yield Row(
        "crayon serve, loopback, a new alpha: first byte, last byte",
        "",
        f"{np.median(new):.2f} s, {np.median(whole):.2f} s",
    )
    milliseconds = 1e3 * float(np.median(cached))
    yield Row(
        "an alpha that was asked for before: first byte", "<= 20 ms", f"{milliseconds:.1f} ms", milliseconds <= 20
    )


def _ask(address: str, body: str) -> tuple[float, float]:
    """Seconds to the first byte of the answer, and to its last."""
    client = http.client.HTTPConnection(address, timeout=60)
    started = time.perf_counter()
    client.request("POST", "/v1/customizations", body)
    response = client.getresponse()
    response.read(1)
    first = time.perf_counter() - started
    response.read()
    client.close()
    return first, time.perf_counter() - started


def _errors(work: Path) -> Iterator[Row]:
    """What fewer bits cost: a trained LoRA on nano in int4, scored on the queries of its user."""
    user = benchmark().validation[0]
    folder = work / "nano-lora"
    if not folder.exists():
        train_lora(load_nano(), user.examples, folder, steps=40, threads=1)
    bundle = export(load_nano(), work / "nano.bundle", replace=True).bundle
    tensors = onnx_tensors(PeftAdapter.open(folder))
    exact = {name: compute().astype(np.float64) for name, (_, compute) in tensors.items()}
    queries = [(example.prompt, example.completion) for example in user.queries]
    with Engine.load(bundle.path, threads=1) as engine:
        base = score(engine, queries)
        scores = {}
        for dtype in DTYPES:
            written = write_adapter(
                work / f"nano-{dtype}", tensors, name="a", base_fingerprint=bundle.model.base_fingerprint, dtype=dtype, replace=True
            )  # fmt: skip
            scores[dtype] = score(engine, queries, engine.read_adapter(written)), _distance(written, exact, engine)
    right = scores["fp32"][0]
    moved = np.linalg.norm(right.first_logits - base.first_logits)
    yield Row(
        "nano, one LoRA in fp32: log-loss of its user's queries", "", f"{base.log_loss:.4f} -> {right.log_loss:.4f}"
    )
    for dtype in DTYPES[1:]:
        found, error = scores[dtype]
        logits = np.linalg.norm(found.first_logits - right.first_logits) / moved
        yield Row(
            f"the same in {dtype}: error of B A (Frobenius), of the change of the logits, log-loss",
            "",
            f"{error:.2%}, {logits:.2%}, {found.log_loss:.4f}",
        )


def _distance(bundle: Bundle, exact: dict[str, np.ndarray], engine: Engine) -> float:
    """|B A - what it should be| / |what it should be|, over all modules."""
    found = {name: value.numpy().astype(np.float64) for name, value in engine.read_adapter(bundle).tensors.items()}
    wrong = right = 0.0
    for a in (name for name in exact if ".lora_A." in name):
        b = a.replace(".lora_A.", ".lora_B.")
        product = exact[a] @ exact[b]
        wrong += float(np.square(found[a] @ found[b] - product).sum())
        right += float(np.square(product).sum())
    return float(np.sqrt(wrong / right))


def pool_7b(work: Path) -> Path:
    """A pool of random float16 LoRAs on every linear layer of LLaMA-7B: 8 files of 40 MB. Kept in `work`."""
    out = work / "llama-7b.pool"
    if (out / MANIFEST).is_file():
        return out
    rng = np.random.default_rng(0)
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    shapes = {}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.self_attn.{name}": (HIDDEN, HIDDEN) for name in attention}
        shapes |= {f"model.layers.{layer}.mlp.{name}": (HIDDEN, FFN) for name in mlp[:2]}
        shapes[f"model.layers.{layer}.mlp.{mlp[2]}"] = (FFN, HIDDEN)

    # Drawn once and shifted: drawing all of it takes longer than everything that is measured here.
    drawn = rng.standard_normal(1 << 22).astype(np.float32)

    def random(gain: float, *shape: int) -> np.ndarray:
        start = int(rng.integers(len(drawn) - FFN * RANK))
        return (drawn[start : start + shape[0] * shape[1]] * gain).astype(np.float16).reshape(shape)

    def adapter() -> dict[str, tuple[np.ndarray, np.ndarray]]:
        # A as PEFT draws it, B of the size that training leaves.
        return {m: (random(i**-0.5 / 3**0.5, RANK, i), random(2e-3, o, RANK)) for m, (i, o) in shapes.items()}

    indicators = np.eye(ADAPTERS, 16, dtype=np.float32)
    projection = Projection(np.zeros(HIDDEN, np.float32), np.zeros((HIDDEN, 16), np.float32), indicators)
    manifest = PoolManifest(
        schema_version="1.0",
        name="llama-7b",
        base_fingerprint=BASE,
        adapters=ADAPTERS,
        rank=RANK,
        scale=2.0,
        targets=list(shapes),
        embedding=Embedding(LAYERS, "answer", residual=False),
        dimensions=16,
        weighting=Weighting(),
        blend="separate",
        grouped=False,
        settings={},
    )
    write_pool(out, manifest, projection, ((None, adapter()) for _ in range(ADAPTERS)))
    return out
