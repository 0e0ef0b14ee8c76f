"""The Kotlin engine on a JVM against the Python engine, with one version of onnxruntime: decode, memory left to the garbage collector, golden cases."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Self

from benchmarks.bundles import tinyllama
from benchmarks.measure import rate, speed_ratio
from benchmarks.table import Row
from crayon_export import export
from crayon_runtime import Engine
from crayon_runtime.golden import replay
from crayon_server.models import load_nano
from tests.support import ROOT, needs

THREADS, TOKENS = 2, 24
LOADS, ROUNDS = 4, 12
"""Where the weights of a session lie in memory makes it faster or slower, so both engines are loaded anew, in turns."""

PROMPTS = (
    "set an alarm for half past seven\n", "remind me to water the plants\n", "what is the weather in Oslo\n", "play some jazz\n", "a",
    "how far is it to the station\n", "naïve café, 日本\n", "write to Ann that I am late\n", "1 + 1 =", "once upon a time",
)  # fmt: skip

HARNESS = ROOT / "android_harness"


def run(work: Path, bundle: Path | None = None) -> Iterator[Row]:
    """Args: bundle: in the place of TinyLlama-1.1B's shapes, to try it."""
    classpath = _built()
    large = bundle or tinyllama(work)
    loads, left = [], []
    for load in range(LOADS):
        makers = [_python, lambda *job: _kotlin(classpath, *job)][:: 1 if load % 2 else -1]
        engines = {engine.name: engine for engine in (make(large, THREADS) for make in makers)}
        with engines["Python"] as python, engines["Kotlin"] as kotlin:
            versions = {engine.name: engine.ask("version") for engine in (python, kotlin)}
            if len(set(versions.values())) != 1:
                raise SystemExit(
                    f"these are not one version of onnxruntime: {versions}; name its folder in CRAYON_ORT_OLDEST"
                )
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(1 + ROUNDS):
                for name, engine in engines.items():
                    seconds[name].append(engine.ask(f"decode {TOKENS}"))
            loads.append({name: each[1:] for name, each in seconds.items()})
            left.append(kotlin.ask("allocated"))
    ratios = [speed_ratio(seconds, "Kotlin", "Python") for seconds in loads]
    ratio = geometric_mean(ratios)
    speeds = [rate([s for seconds in loads for s in seconds[name]], TOKENS - 1) for name in ("Kotlin", "Python")]
    yield Row(
        f"Kotlin engine on the JVM against the Python engine, onnxruntime {versions['Kotlin']}, TinyLlama-1.1B shapes, decode",
        ">= 0.95",
        f"{ratio:.3f} ({min(ratios):.2f} to {max(ratios):.2f}; {speeds[0]:.1f} and {speeds[1]:.1f} tok/s)",
        ratio >= 0.95,
    )
    yield Row("what a decoded token allocates in Kotlin, TinyLlama-1.1B shapes", "", f"{min(left)} bytes")
    yield from _golden(classpath, work)


def _golden(classpath: str, work: Path) -> Iterator[Row]:
    """Every golden case of a model with adapters in both, and the answers to more prompts, greedy and sampled."""
    from tests.export.models import tiny_adapter

    nano = load_nano()
    adapters = [tiny_adapter(nano, work / "kotlin-adapters" / name, seed=i) for i, name in enumerate(("alice", "bob"))]
    bundle = export(nano, work / "kotlin-nano.bundle", adapters=adapters, replace=True).bundle.path
    with _python(bundle, 1) as python, _kotlin(classpath, bundle, 1) as kotlin:
        said = {engine.name: engine.ask("golden") for engine in (python, kotlin)}
        request = "answers " + json.dumps(PROMPTS)
        answers, others = python.ask(request), kotlin.ask(request)
    cases = {name: f"{result['cases'] - len(result['failed'])} of {result['cases']}" for name, result in said.items()}
    pairs = [(a, b) for one, other in zip(answers, others, strict=True) for a, b in zip(one, other, strict=True)]
    differing = sum(a != b for a, b in pairs)
    yield Row(
        "golden cases that pass, in Kotlin and in Python, with and without adapters",
        "all",
        f"{cases['Kotlin']} and {cases['Python']}",
        not any(result["failed"] for result in said.values())
        and said["Kotlin"]["cases"] == said["Python"]["cases"] > 0,
    )
    yield Row(
        f"token ids of {len(answers)} answers, greedy and sampled, with and without adapters",
        "0 differ",
        f"{differing} of {len(pairs)} differ",
        differing == 0,
    )


def _built() -> str:
    """The class path of the Kotlin library and its tests."""
    maven = needs.maven()
    build = [str(maven), "--batch-mode", "--quiet", "--no-transfer-progress", "-pl", "core", "-DskipTests", "package"]
    subprocess.run(build, cwd=HARNESS, check=True, stdout=sys.stderr)
    return (HARNESS / "core/target/classpath").read_text()


class _Asked:
    """An engine in a process of its own, which answers one line of JSON to each line."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | environment, cwd=ROOT, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the {self.name} engine died: code {self._process.wait()}")
        return json.loads(answer)


def _python(bundle: Path, threads: int) -> _Asked:
    path = os.pathsep.join([str(needs.ort_oldest()), *sys.path])
    return _Asked(
        "Python", [sys.executable, "-m", "benchmarks.kotlin", str(bundle), str(threads)], {"PYTHONPATH": path}
    )


def _kotlin(classpath: str, bundle: Path, threads: int) -> _Asked:
    return _Asked("Kotlin", ["java", "-cp", classpath, "crayon.runtime.AskedKt", str(bundle), str(threads)], {})


def _answer(engine: Engine, line: str) -> Any:
    """What android_harness/core/src/test/kotlin/crayon/runtime/Asked.kt answers too."""
    command, _, rest = line.strip().partition(" ")
    if command == "version":
        return importlib.metadata.version("onnxruntime")
    if command == "decode":
        return engine.generate([1], max_new_tokens=int(rest), ignore_eos=True).decode_seconds
    assert engine.bundle is not None
    if command == "golden":
        results = replay(engine.bundle, backend="onnx", threads=1)
        return {"cases": len(results), "failed": [result.name for result in results if not result.passed]}
    answers = []
    for adapter in (None, *engine.bundle.adapter_names):
        engine.set_adapter(adapter)
        for prompt in json.loads(rest):
            for temperature in (0.0, 0.8):
                answer = engine.generate(prompt, max_new_tokens=24, seed=7, ignore_eos=True, temperature=temperature)
                answers.append(answer.token_ids)
    return answers


if __name__ == "__main__":  # BUNDLE THREADS: answer the lines on stdin
    with Engine.load(sys.argv[1], backend="onnx", threads=int(sys.argv[2])) as asked:
        for said in sys.stdin:
            print(json.dumps(_answer(asked, said)), flush=True)
