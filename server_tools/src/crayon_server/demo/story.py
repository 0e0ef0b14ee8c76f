"""The demo: ten examples change a device, and never leave it; what it cannot answer it asks a server LLM.

    export nano to int4 ──> build a pool ──> prototypes ──> serve it ──> three users customize over HTTP ──> before / after ──┐
                            (meanwhile, an oracle LoRA for each of the three, and a program of nano for ExecuTorch)            │
                                                         report <── they ask this and that, and some of it the server LLM <───┘

The service is a process of its own, and so is the device, which has no torch. Between the two stands a relay that writes down every byte.
Everything is judged on queries whose answers are in no text that the pool, the oracles or the customizations are made from.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import msgspec

from crayon_runtime.errors import OutputError
from crayon_runtime.files import atomic_directory
from crayon_runtime.pool import Pool
from crayon_runtime.routing import ServerLLM
from crayon_runtime.signing import KEYS, KeyStore, TrustedKeys
from crayon_server.data.phone_assistant import benchmark, write
from crayon_server.data.phone_assistant.world import translate
from crayon_server.demo import comparison, customized, device, hybrid, oracle, program
from crayon_server.demo.device import MODELS, Job, Measurements, Text
from crayon_server.demo.processes import running
from crayon_server.demo.report import (
    KIND,
    Comparison,
    DemoReport,
    InExecutorch,
    Line,
    Message,
    Person,
    PoolFacts,
    Routing,
    Score,
)
from crayon_server.demo.service import serving
from crayon_server.demo.wire import Exchange, Wire, split
from crayon_server.evaluate.exact_match import MAX_NEW_TOKENS, judge
from crayon_server.pool.build import Settings as PoolSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from crayon_export.exporter import Exported
    from crayon_server.data.phone_assistant import Benchmark, Convention

    Progress = Callable[..., AbstractContextManager[Callable[[int], None]]]

PERSONAS = {"alice": "validation-35", "clara": "validation-22", "bruno": "validation-05"}
"""Validation users with a calendar, so that all can be told the same. They were chosen for their conventions, before anything was
measured: one that is common among the users that the pool is trained on, one that is rare, and one that it never saw."""
SHARED_PROMPT = "schedule dinner with anna on monday at half seven in the evening\n"
SERVER = "nano-server"
STEPS, GROUP_SIZE = 150, 32
COUNT_SECONDS = 0.2
"""Between looks at how many bytes have left the device."""
REPORT, PAGE = "report.json", "report.html"


@dataclass(frozen=True)
class Settings:
    """How much the demo does; the defaults keep it within four minutes on two cores, two without the ExecuTorch export.

    Attributes:
        pool: of the pool's training.
        sources: training users whose texts the pool is built from.
        oracle_texts, oracle_steps: of each user's oracle LoRA, and of training all of them together.
        queries: of each user, to compare models by.
        mixed: queries of each user to the customized device with its server LLM, of each of `hybrid.PARTS`.
        threads: to answer; None: the backend's choice.
    """

    pool: PoolSettings = field(default_factory=lambda: PoolSettings(steps=STEPS, threads=1))
    sources: int = 192
    oracle_texts: int = 256
    oracle_steps: int = 100
    queries: int = 40
    mixed: tuple[int, int, int] = (20, 10, 10)
    threads: int | None = None

    @classmethod
    def with_threads(cls, threads: int | None) -> Settings:
        """The defaults with so many threads; None: one to train, as more get in each other's way at this size."""
        return cls(PoolSettings(steps=STEPS, threads=threads or 1), threads=threads)


def run(
    out: Path,
    settings: Settings | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda *_, **__: nullcontext(lambda _: None),
) -> DemoReport:
    """Tell the whole story into a folder, with report.html and report.json; the folder appears when it is finished.

    Args:
        out: the folder of an earlier demo is replaced.
        say: told what was done, and how long it took.
        progress: as `crayon_runtime.cli.common.progress`, for the long part.

    Raises:
        OutputError: there is something else at `out`.
        BackendError: one of the demo's processes failed.
    """
    _check_out(out)
    with atomic_directory(out, replace=True) as folder:
        from crayon_server.demo.page import render

        story = _Story(folder, settings or Settings(), say, progress)
        report = story.tell()
        content = json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n"
        (folder / REPORT).write_text(content, encoding="utf-8")
        (folder / PAGE).write_text(render(report, Pool.open(story.pool)), encoding="utf-8")
    return report


def _check_out(out: Path) -> None:
    """Only a demo is replaced, or an empty folder."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        kind = json.loads((out / REPORT).read_bytes()).get("kind")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind != KIND:
        raise OutputError(
            "there is something else than an earlier demo", where=out, do="choose another folder with --out"
        )


class _Story:
    """One telling: where things lie, who is in it, and what took how long."""

    def __init__(self, folder: Path, settings: Settings, say: Callable[[str], None], progress: Progress) -> None:
        self.folder, self.settings, self._say, self._progress = folder, settings, say, progress
        self.bundle = folder / "device/bundle"
        self.bundles = {"onnx": self.bundle, "executorch": folder / "device/bundle-executorch"}
        self.pool = folder / "server/pool"
        self.keys = folder / "server/keys"
        self.log = folder / "server/service.log"
        self.world: Benchmark = benchmark()
        people = {user.name: user for user in self.world.validation}
        self.users = {name: people[user] for name, user in PERSONAS.items()}
        self.sources = self.world.train[: settings.sources]
        self.mixed = {name: hybrid.mixed(user, self.settings.mixed) for name, user in self.users.items()}
        asked = {query.completion for user in self.users.values() for query in user.queries}
        asked |= {query.completion for queries in self.mixed.values() for _, query in queries}
        self.texts = [(u.name, e) for u in self.sources for e in u.examples if e.completion not in asked]
        self.golden_texts = [(e.prompt, e.completion) for user in self.users.values() for e in user.examples[:2]]
        self.stages: list[tuple[str, float]] = []

    def tell(self) -> DemoReport:
        started = time.perf_counter()
        self._say("two to four minutes on two cores")
        missing = comparison.missing()
        if missing:
            self._say(f"without a comparison of backends: {missing}")
        with self._oracle() as training, nullcontext() if missing else self._program() as exporting:
            exported = self._export()
            pool = self._with_prototypes(self._build())
            with self._stage("waited for the oracle LoRAs, which were trained meanwhile"):
                training.wait()
            if exporting:
                with self._stage("waited for the model's program for ExecuTorch, which was made meanwhile"):
                    exporting.wait()
        compared = None if missing else self._compare()
        measured, wires, by_server, again = self._serve(pool, in_executorch=not missing)
        if compared is not None:
            compared = replace(compared, customized=again)
        seconds = time.perf_counter() - started
        return self._report(exported, pool, measured, wires, by_server, compared, missing, seconds)

    @contextmanager
    def _stage(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.stages.append((what, seconds))
        self._say(f"{seconds:5.1f} s  {what}")

    def _export(self) -> Exported:
        with self._stage("exported nano to int4, for the device"):
            from crayon_export import export
            from crayon_server.models import load_nano

            return export(
                load_nano(),
                self.bundle,
                backend="onnx",
                quantize="int4",
                group_size=GROUP_SIZE,
                golden_texts=self.golden_texts,
            )

    def _build(self) -> Pool:
        settings = self.settings.pool
        what = f"built a pool of {settings.adapters} LoRAs from what {len(self.sources)} other users said"
        with self._stage(what), self._progress("building the pool", settings.steps, unit="steps") as on_step:
            from crayon_server.models import load_nano
            from crayon_server.pool.build import build

            return build(
                load_nano(),
                [example for _, example in self.texts],
                self.pool,
                groups=[user for user, _ in self.texts],
                settings=settings,
                on_step=lambda *_: on_step(1),
            )

    def _with_prototypes(self, pool: Pool) -> Pool:
        """The pool, with what the server LLM says to its typical inputs, embedded as the device embeds its answers."""
        from crayon_server import training
        from crayon_server.models import load_nano_server
        from crayon_server.pool import prototypes

        inputs = prototypes.typical_inputs(pool)
        prompts = sorted({text.prompt for text in inputs})
        what = f"asked the server LLM {len(prompts)} typical inputs, for prototypes"
        with (
            self._stage(what),
            training.threads(self.settings.pool.threads),
            self._progress("asking the server LLM", len(prompts), unit="inputs") as on_output,
        ):
            outputs = {}
            for prompt, output in prototypes.ask_model(load_nano_server(), prompts, max_tokens=MAX_NEW_TOKENS):
                outputs[prompt] = output
                on_output(1)
            with prototypes.open_engine(self.bundle, pool, self.settings.threads) as engine:
                embedder = prototypes.BundleEmbedder(engine)
                choices = {"max_new_tokens": MAX_NEW_TOKENS, "embedded_with": "the bundle"}
                return prototypes.add_prototypes(
                    pool, inputs, outputs, embedder, pool.path, model=SERVER, choices=choices, replace=True
                ).pool

    @contextmanager
    def _oracle(self) -> Iterator[subprocess.Popen[bytes]]:
        """Train the oracle LoRAs in a process of their own."""
        settings = self.settings
        job = oracle.Job(
            users={name: user.name for name, user in self.users.items()},
            texts=settings.oracle_texts,
            steps=settings.oracle_steps,
            threads=settings.pool.threads,
            out=str(self.folder / "oracle"),
        )
        with running(oracle.__name__, job) as process:
            yield process

    @contextmanager
    def _program(self) -> Iterator[subprocess.Popen[bytes]]:
        """Export nano for ExecuTorch in a process of its own; what it leaves when it is ended early is in the demo's folder."""
        job = program.Job(
            group_size=GROUP_SIZE,
            golden_texts=self.golden_texts,
            threads=self.settings.pool.threads,
            out=str(self.bundles["executorch"]),
        )
        with (
            tempfile.TemporaryDirectory(dir=self.folder) as scratch,
            running(program.__name__, job, TMPDIR=scratch) as process,
        ):
            yield process

    def _compare(self) -> Comparison:
        """Measure both backends."""
        texts = [(e.prompt, e.completion) for user in self.users.values() for e in user.examples]
        with self._stage("compared the two backends, without torch"):
            return comparison.compare(self.bundles, texts, threads=self.settings.threads, folder=self.folder)

    def _serve(
        self, pool: Pool, *, in_executorch: bool
    ) -> tuple[Measurements, dict[str, list[Exchange]], dict[str, str], list[InExecutorch]]:
        """Serve the pool and the server LLM, and let everybody customize and ask, each through a relay of their own.

        Args:
            in_executorch: let everybody customize once more, in ExecuTorch.

        Returns:
            What the device measured; what went over the network, of each user; what the server LLM says to each of the mixed queries;
            and what everybody's customized model says in ExecuTorch.
        """
        from crayon_server.models import load_nano_server

        store = KeyStore.create(self.keys)
        trusted = self.folder / "device" / KEYS
        TrustedKeys(store.keys).write(trusted)
        with ExitStack() as stack:
            with self._stage("started the service, with its server LLM"):
                cache = self.folder / "server/cache"
                service = stack.enter_context(
                    serving(pool.path, self.keys, self.log, upstream=load_nano_server(), cache=cache)
                )
            wires = {name: stack.enter_context(Wire(*service)) for name in self.users}
            measured = self._device(trusted, wires)
            again = self._in_executorch(trusted, "http://{}:{}".format(*service)) if in_executorch else []
            with self._stage("asked the server LLM what no device had asked it, for the curve"):
                by_server = self._by_server(measured, "http://{}:{}".format(*service))
            return measured, {name: wire.exchanges for name, wire in wires.items()}, by_server, again

    def _in_executorch(self, trusted: Path, url: str) -> list[InExecutorch]:
        """Customize for everybody with the program for ExecuTorch, and judge what it says."""
        people = {
            name: customized.Person(
                [Text(e.prompt, e.completion) for e in user.examples],
                [Text(q.prompt, q.completion) for q in user.queries[: self.settings.queries]],
            )
            for name, user in self.users.items()
        }
        job = customized.Job(
            str(self.bundles["executorch"]),
            str(trusted),
            str(self.folder / "device/customized-executorch"),
            url,
            self.settings.threads,
            people,
        )
        with self._stage("customized for the same users in ExecuTorch"), running(customized.__name__, job) as process:
            done = msgspec.json.decode(process.communicate()[0], type=list[customized.Customized])
        return [
            InExecutorch(
                one.name,
                one.installed,
                one.adapter_bytes,
                one.total_seconds,
                judge(one.answers, self.users[one.name].queries[: self.settings.queries], one.log_loss).exact_match,
                one.torch_loaded,
            )
            for one in done
        ]

    def _device(self, trusted: Path, wires: dict[str, Wire]) -> Measurements:
        people = {
            name: device.Person(
                wires[name].url,
                [Text(e.prompt, e.completion) for e in user.examples],
                [Text(q.prompt, q.completion) for q in user.queries[: self.settings.queries]],
                [query.prompt for _, query in self.mixed[name]],
                str(self.folder / "oracle" / name),
            )
            for name, user in self.users.items()
        }
        kept = str(self.folder / "device/customized")
        job = Job(str(self.bundle), str(trusted), kept, self.settings.threads, people, SHARED_PROMPT)
        what = "customized for three users over HTTP, and answered their queries, without torch"
        with (
            self._stage(what),
            self._progress("left the device, headers included", None) as on_bytes,
            running(device.__name__, job) as process,
        ):
            counted = 0
            while True:
                sent = sum(wire.bytes_up for wire in wires.values())
                on_bytes(sent - counted)
                counted = sent
                try:
                    said = process.communicate(timeout=COUNT_SECONDS)[0]
                    break
                except subprocess.TimeoutExpired:
                    continue
        return msgspec.json.decode(said, type=Measurements)

    def _by_server(self, measured: Measurements, url: str) -> dict[str, str]:
        """By prompt. What the devices were not told is asked here, and goes through no relay."""
        told: dict[str, str] = {}
        for name, queries in self.mixed.items():
            for (_, query), routed in zip(queries, measured.people[name].routed, strict=True):
                if routed.route == "server":
                    told[query.prompt] = routed.text
        with ServerLLM(url) as server:
            for query in (query for queries in self.mixed.values() for _, query in queries):
                if query.prompt not in told:
                    told[query.prompt] = "".join(server.ask(query.prompt.strip(), max_tokens=MAX_NEW_TOKENS))
        return told

    def _report(
        self,
        exported: Exported,
        pool: Pool,
        measured: Measurements,
        exchanges: dict[str, list[Exchange]],
        by_server: dict[str, str],
        compared: Comparison | None,
        missing: str | None,
        seconds: float,
    ) -> DemoReport:
        from crayon_server.models import load_nano

        manifest = pool.manifest
        facts = PoolFacts(
            adapters=manifest.adapters,
            rank=manifest.rank,
            steps=self.settings.pool.steps,
            users=len(self.sources),
            texts=len(self.texts),
            conventions=len({user.convention for user in self.sources}),
            bytes=_folder_bytes(pool.path),
            typical=_typical(pool),
        )
        device_facts = msgspec.to_builtins(measured)
        del device_facts["people"], device_facts["live"]
        messages = _messages(exchanges, self.log)
        people = [self._person(name, measured, messages[name], by_server) for name in self.users]
        return DemoReport(
            people=people,
            queries=len(next(iter(self.users.values())).queries[: self.settings.queries]),
            parameters=_parameters(load_nano()),
            float_bytes=(load_nano() / "model.safetensors").stat().st_size,
            bundle_bytes=_folder_bytes(self.bundle),
            weights_bytes=(self.bundle / "model.onnx.data").stat().st_size,
            mean_kl=exported.report.mean_kl,
            pool=facts,
            device=device_facts,
            routing=_routing(people, measured, manifest.prototypes.count if manifest.prototypes else 0),
            comparison=compared,
            not_compared=missing,
            stages=self.stages,
            seconds=seconds,
        )

    def _person(self, name: str, measured: Measurements, messages: list[Message], by_server: dict[str, str]) -> Person:
        user, customized, live = self.users[name], measured.people[name], measured.live
        queries = user.queries[: self.settings.queries]
        results = {
            model: judge(customized.runs[model].answers, queries, customized.runs[model].log_loss) for model in MODELS
        }
        answers = {model: result.answers for model, result in results.items()}
        return Person(
            name=name,
            user=user.name,
            convention=str(user.convention),
            sources=sum(source.convention == user.convention for source in self.sources),
            domains=user.domains,
            examples=tuple((e.prompt.strip(), e.completion) for e in user.examples),
            scores={model: Score(r.exact_match, r.intent, r.log_loss) for model, r in results.items()},
            alpha=customized.alpha,
            point=customized.point,
            installed=customized.installed,
            reason=customized.reason,
            examples_log_loss=customized.examples_log_loss,
            seconds=customized.seconds,
            total_seconds=customized.total_seconds,
            lines=tuple(
                Line(query.prompt.strip(), query.completion, answers["before"][i], answers["after"][i])
                for i, query in enumerate(queries[: len(user.domains)])  # the first of each domain
            ),
            shared=Line(SHARED_PROMPT.strip(), _wanted(user.convention), live[device.BASE], live[name]),
            asked=tuple(
                hybrid.asked(part, query, routed, by_server[query.prompt])
                for (part, query), routed in zip(self.mixed[name], customized.routed, strict=True)
            ),
            messages=tuple(messages),
        )


def _wanted(convention: Convention) -> str:
    """The right answer to `SHARED_PROMPT`."""
    locale = convention.locale
    half_seven = {"en": "7:30 PM", "va": "18:30", "bo": "19:30"}[locale]
    dinner, monday = translate("dinner", locale), translate("monday", locale)
    arguments = (("what", dinner), ("who", "anna"), ("day", monday), ("time", half_seven))
    return "".join(piece.text for piece in write("calendar.add", arguments, convention))


def _routing(people: list[Person], measured: Measurements, prototypes: int) -> Routing:
    from crayon_server.models import load_nano_server

    routed = [routed for customized in measured.people.values() for routed in customized.routed]
    scored = [answer.seconds for answer in routed if "score" in answer.seconds]
    waited = [answer.seconds["server"] for answer in routed if answer.route == "server"]
    return Routing(
        policy=", ".join(sorted({answer.policy for answer in routed})),
        server=SERVER,
        server_parameters=_parameters(load_nano_server()),
        prototypes=prototypes,
        curves=hybrid.curves([query for person in people for query in person.asked]),
        score_us=median(seconds["score"] for seconds in scored) * 1e6,
        score_share=median(s["score"] for s in scored) / median(s["device"] for s in scored),
        server_ms=median(waited) * 1e3 if waited else 0.0,
    )


def _messages(exchanges: dict[str, list[Exchange]], log: Path) -> dict[str, list[Message]]:
    """Of each user, with what the service's log says of it: one process asks, one request after the other."""
    service_ms = _service_ms(log)
    in_order = sorted(((name, e) for name, own in exchanges.items() for e in own), key=lambda item: item[1].started)
    messages: dict[str, list[Message]] = {name: [] for name in exchanges}
    for name, exchange in in_order:
        messages[name].append(_message(exchange, next(service_ms)))
    return messages


def _message(exchange: Exchange, service_ms: float) -> Message:
    request_head, request_body = split(exchange.request)
    response_head, response_body = split(exchange.response)
    return Message(
        request_head=request_head.decode("latin-1"),
        request_body=request_body.decode("utf-8", "replace"),
        request_bytes=(len(request_head), len(request_body)),
        response_head=response_head.decode("latin-1"),
        response_bytes=(len(response_head), len(response_body)),
        first_byte_ms=(exchange.answered - exchange.started) * 1e3,
        last_byte_ms=(exchange.ended - exchange.started) * 1e3,
        service_ms=service_ms,
    )


def _service_ms(log: Path) -> Iterator[float]:
    """Of every request, in the order in which the service answered them; zeros if its log has no more."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    return itertools.chain((float(json.loads(line)["ms"]) for line in lines), itertools.repeat(0.0))


def _typical(pool: Pool) -> list[str]:
    """The answer of each cluster's most typical text."""
    first: dict[int, str] = {}
    for text in pool.typical():
        first.setdefault(text["cluster"], text["completion"])
    return [first.get(n, "") for n in range(pool.manifest.adapters)]


def _parameters(model_dir: Path) -> int:
    """Of a checkpoint; tied weights count once."""
    from safetensors import safe_open

    with safe_open(model_dir / "model.safetensors", "numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
