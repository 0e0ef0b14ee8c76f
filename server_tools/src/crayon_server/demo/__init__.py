"""The demo: two users of the embedded model, each with a LoRA, on an int4 bundle that answers without torch.

Train a LoRA for each user -> export nano with both to int4 -> answer with base and LoRAs in a process of its own -> report.
Everything is judged on queries that no training saw, of validation users.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from crayon_runtime.errors import BackendError
from crayon_runtime.files import atomic_file
from crayon_server.data.phone_assistant import Example, User, benchmark, more_examples
from crayon_server.demo import device
from crayon_server.demo.device import BASE, Job, Measurements, Text
from crayon_server.evaluate.exact_match import Result, evaluate_float, judge

if TYPE_CHECKING:
    from collections.abc import Callable

PERSONAS = {"alice": "validation-35", "bruno": "validation-05"}
"""Both have a calendar; their conventions share neither style nor locale, nor what "half seven" means."""
SHARED_PROMPT = "schedule dinner with anna on monday at half seven in the evening\n"
TUNING_EXAMPLES, TUNING_STEPS, RANK = 320, 100, 4
GROUP_SIZE = 32


@dataclass(frozen=True)
class Persona:
    """Who a user of the demo is, and what was done for them."""

    name: str
    convention: str
    domains: tuple[str, ...]
    examples: tuple[tuple[str, str], ...]
    """A few of the tuning pairs, to show how this user wants calls."""
    training_seconds: float
    adapter_bytes: int
    """Of the adapter's folder inside the bundle."""


@dataclass(frozen=True)
class Score:
    """One model on one user's queries: shares from 0 to 1, log-loss in nats per token."""

    model: str
    user: str
    exact_match: float
    intent: float
    structure: float
    log_loss: float


@dataclass(frozen=True)
class Line:
    """A query, what is wanted, and what each model says."""

    user: str
    prompt: str
    wanted: str
    answers: dict[str, str]


@dataclass(frozen=True)
class DemoReport:
    """All that the report shows."""

    personas: list[Persona]
    tuning_examples: int
    queries: int
    """Both for each user."""
    int4: list[Score]
    float32: list[Score]
    lines: list[Line]
    shared_prompt: str
    device: dict[str, Any]
    """`Measurements` without the runs."""
    float_bytes: int
    bundle_bytes: int
    """Without the adapters."""
    weights_bytes: int
    mean_kl: float
    export_seconds: float
    seconds: float

    def score(self, model: str, user: str, *, quantized: bool = True) -> Score:
        scores = self.int4 if quantized else self.float32
        return next(s for s in scores if (s.model, s.user) == (model, user))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        """The result in a few lines."""
        lines = [f"{'exact match on queries of':<28}" + "".join(f"{p.name:>10}" for p in self.personas)]
        for model in (BASE, *(p.name for p in self.personas)):
            cells = "".join(f"{self.score(model, p.name).exact_match:>10.0%}" for p in self.personas)
            label = "base, int4" if model == BASE else f"with {model}'s LoRA, int4"
            lines.append(f"{label:<28}{cells}")
        d = self.device
        lines += [
            "",
            f"{d['base_tokens_per_second']:.0f} tokens/s ({d['adapter_tokens_per_second']:.0f} with a LoRA), "
            f"first token after {d['first_token_ms']:.1f} ms, swap in {d['swap_ms']:.2f} ms, "
            f"peak memory {d['peak_rss_bytes'] / 1e6:.0f} MB without torch",
            f"bundle {self.bundle_bytes / 1e6:.2f} MB, adapter {self.personas[0].adapter_bytes / 1e3:.0f} kB, "
            f"float model {self.float_bytes / 1e6:.2f} MB",
        ]
        return "\n".join(lines)


def run(out: Path, *, threads: int | None = None, say: Callable[[str], None] = lambda _: None) -> DemoReport:
    """Train, export, answer, and write report.html and report.json into `out`; what an earlier run left there is replaced.

    Args:
        threads: CPU threads; None: one to train (more get in each other's way at this size), and the backend's choice to answer.
        say: told what is being done.
    """
    from crayon_export import export
    from crayon_server.demo.page import render
    from crayon_server.models import load_nano
    from crayon_server.training import train_lora

    started = time.perf_counter()
    nano, bundle = load_nano(), out / "bundle"
    people = {u.name: u for u in benchmark().validation}
    users = {name: people[user] for name, user in PERSONAS.items()}
    training_seconds = {}
    for name, user in users.items():
        say(f"training a LoRA for {name}: {TUNING_EXAMPLES} examples, {TUNING_STEPS} steps")
        before = time.perf_counter()
        train_lora(
            nano,
            more_examples(user, TUNING_EXAMPLES),
            out / "lora" / name,
            rank=RANK,
            alpha=2 * RANK,
            steps=TUNING_STEPS,
            threads=threads or 1,
            replace=True,
        )
        training_seconds[name] = time.perf_counter() - before

    say("answering with the float model in transformers")
    float_scores = _score_float(nano, out / "lora", users)

    say("exporting nano with both LoRAs to int4")
    before = time.perf_counter()
    exported = export(
        nano,
        bundle,
        backend="onnx",
        quantize="int4",
        group_size=GROUP_SIZE,
        adapters=[out / "lora" / name for name in users],
        golden_texts=[(e.prompt, e.completion) for user in users.values() for e in user.examples[:2]],
        replace=True,
    )
    export_seconds = time.perf_counter() - before

    say("answering with the int4 bundle, in a process without torch")
    texts = {name: [Text(q.prompt, q.completion) for q in user.queries] for name, user in users.items()}
    measured = _run_device(Job(str(bundle.resolve()), threads, list(users), texts, SHARED_PROMPT))
    results = {(r.model, r.user): judge(r.answers, users[r.user].queries, r.log_loss) for r in measured.runs}

    adapter_bytes = {name: _folder_bytes(bundle / "adapters" / name) for name in users}
    device_facts = msgspec.to_builtins(measured)
    del device_facts["runs"]
    report = DemoReport(
        personas=[
            Persona(
                name, str(u.convention), u.domains, _pairs(u.examples[:3]), training_seconds[name], adapter_bytes[name]
            )
            for name, u in users.items()
        ],
        tuning_examples=TUNING_EXAMPLES,
        queries=len(next(iter(users.values())).queries),
        int4=_scores(results),
        float32=float_scores,
        lines=[_line(name, i, user, results) for name, user in users.items() for i in range(len(user.domains))],
        shared_prompt=SHARED_PROMPT.strip(),
        device=device_facts,
        float_bytes=(nano / "model.safetensors").stat().st_size,
        bundle_bytes=_folder_bytes(bundle) - sum(adapter_bytes.values()),
        weights_bytes=(bundle / "model.onnx.data").stat().st_size,
        mean_kl=exported.report.mean_kl,
        export_seconds=export_seconds,
        seconds=time.perf_counter() - started,
    )
    with atomic_file(out / "report.json") as file:
        file.write(json.dumps(report.to_dict(), indent=1, ensure_ascii=False).encode() + b"\n")
    with atomic_file(out / "report.html") as file:
        file.write(render(report).encode())
    return report


def _score_float(nano: Path, loras: Path, users: dict[str, User]) -> list[Score]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nano)
    results = {}
    for model_name in (BASE, *users):
        model = AutoModelForCausalLM.from_pretrained(nano, dtype=torch.float32)
        if model_name != BASE:
            model = PeftModel.from_pretrained(model, loras / model_name)
        model.eval()
        for name, user in users.items():
            results[model_name, name] = evaluate_float(model, tokenizer, user.queries)
    return _scores(results)


def _run_device(job: Job) -> Measurements:
    done = subprocess.run(
        [sys.executable, "-m", device.__name__], input=msgspec.json.encode(job), capture_output=True, check=False
    )
    if done.returncode:
        raise BackendError(
            f"the device process ended with exit code {done.returncode}:\n{done.stderr.decode(errors='replace').strip()}",
            where=job.bundle,
        )
    return msgspec.json.decode(done.stdout, type=Measurements)


def _scores(results: dict[tuple[str, str], Result]) -> list[Score]:
    return [
        Score(model, user, r.exact_match, r.intent, r.structure, r.log_loss) for (model, user), r in results.items()
    ]


def _line(name: str, i: int, user: User, results: dict[tuple[str, str], Result]) -> Line:
    """The i-th query of a user: the first three are of their three domains."""
    query = user.queries[i]
    answers = {model: result.answers[i] for (model, of), result in results.items() if of == name}
    return Line(name, query.prompt.strip(), query.completion, answers)


def _pairs(examples: tuple[Example, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((e.prompt.strip(), e.completion) for e in examples)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
