"""crayon run, chat."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crayon_runtime.cli.common import PATH, Command, backend_option, json_option, note, print_json
from crayon_runtime.cli.hybrid import Hybrid, answer_facts, hybrid_options, route_text
from crayon_runtime.cli.hybrid import show as show_answer
from crayon_runtime.cli.serving import Serving, serve_options
from crayon_runtime.errors import CrayonError, InvalidInput

if TYPE_CHECKING:
    from crayon_runtime.constraint import Constraint
    from crayon_runtime.engine import Engine
    from crayon_runtime.generation import Generation
    from crayon_runtime.routing import Answer, Router

INTERRUPTED = 130

HELP = """\
/adapter         list the adapters
/adapter NAME    answer with this adapter from now on: one inside the bundle, or a path; "none" is the base model
/reset           forget the conversation
/help            this list
/exit            leave; Ctrl-D does the same, and Ctrl-C stops an answer"""


def engine_options(command: Command) -> Command:
    """What to load, and how to sample: the options that `run` and `chat` share."""
    options = [
        click.option("--adapter", help="Answer with this adapter: the name of one inside the bundle, or a path."),
        backend_option,
        click.option(
            "--threads", type=click.IntRange(min=1), help="Cores to compute on.  [default: all physical ones]"
        ),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
        click.option(
            "--top-k", metavar="K", type=int, default=0, show_default=True, help="Only the K likeliest tokens; 0: all."
        ),
        click.option(
            "--top-p",
            metavar="P",
            type=float,
            default=1.0,
            show_default=True,
            help="Only the likeliest tokens that together have probability P.",
        ),
        click.option(
            "--min-p",
            metavar="P",
            type=float,
            default=0.0,
            show_default=True,
            help="Only tokens P times as likely as the likeliest.",
        ),
        click.option(
            "--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1: fewer repetitions."
        ),
        click.option("--seed", type=int, help="The same seed gives the same answer."),
        click.option("--stop", multiple=True, help="End the answer before this text. May be repeated."),
        click.option("--max-new-tokens", type=int, default=256, show_default=True),
        click.option(
            "--overflow",
            type=click.Choice(["error", "slide"]),
            default="error",
            show_default=True,
            help="When the context is full: end there, or forget the older half.",
        ),
        click.option("--json-schema", metavar="FILE", type=PATH, help="Answer with JSON of this schema."),
        click.option("--grammar", metavar="FILE", type=PATH, help="Answer in this grammar, in Lark's form or in GBNF."),
        click.option("--regex", metavar="TEXT", help="Answer with what this regular expression matches."),
    ]
    for option in reversed(options):
        command = option(command)
    return hybrid_options(command)


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("prompt", required=False)
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the model's chat template.")
@serve_options
@engine_options
@json_option
def run(
    bundle: Path,
    prompt: str | None,
    raw: bool,
    adapter: str | None,
    backend: str,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer one prompt, or serve.

    PROMPT is the user's turn in the model's chat template, or what the model continues if it has none; "-" reads it from stdin, as
    UTF-8. The answer goes to stdout while it is made, a line about its speed to stderr.

    With --server, --policy or --threshold the device judges its own answer, and has the server LLM answer what it should not: see `crayon
    route`. A customized model then answers with its own adapter, unless --adapter says otherwise ("none" is the base model).

    With --serve, OpenAI's clients find an API at http://HOST:PORT/v1, and people a page at http://HOST:PORT. The sampling options are the
    defaults of their requests; what answers must be holds for all of them. To listen beyond this machine needs --api-key-file.
    """
    serving, hybrid = Serving.take(options), Hybrid.take(options)
    options["constraint"] = _constraint(options)
    if serving is not None:
        if prompt is not None or raw or as_json:
            raise click.UsageError("--serve takes no PROMPT, --raw or --json")
        judged = adapter if hybrid else None
        backend = serving.backend(backend, bundle, hybrid)
        with _load(bundle, backend, threads, judged, hybrid) as engine, _routing(engine, bundle, hybrid) as router:
            serving.run(engine, bundle, adapter, options, hybrid, router)
        return
    if prompt is None:
        raise click.UsageError("give a PROMPT, or --serve HOST:PORT")
    text = _stdin() if prompt == "-" else prompt
    with _load(bundle, backend, threads, adapter, hybrid) as engine, _routing(engine, bundle, hybrid) as router:
        chat = engine.tokenizer.has_chat_template and text and not raw
        ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": text}]) if chat else text
        if router is None:
            generation = _answer(engine, ids, options, show=not as_json)
            facts, cancelled = _facts(generation), generation.finish_reason == "cancelled"
        else:
            answer, cancelled = _routed(router, ids, text, options, show=not as_json)
            facts = answer_facts(answer, _facts)
        if as_json:
            print_json({**facts, "adapter": engine.adapter, "backend": engine.backend.name})
    if cancelled:
        click.get_current_context().exit(INTERRUPTED)


@click.command()
@click.argument("bundle", type=PATH)
@engine_options
def chat(bundle: Path, adapter: str | None, backend: str, threads: int | None, **options: Any) -> None:
    """Talk to a model.

    What was said stays in the KV cache, so only the new turn is computed. /help lists the commands.

    With --server, --policy or --threshold the device has the server LLM answer what it should not; what was typed is sent, and nothing that
    was said before.
    """
    hybrid = Hybrid.take(options)
    options["constraint"] = _constraint(options)
    with (
        _load(bundle, backend, threads, adapter, hybrid) as engine,
        _routing(engine, bundle, hybrid) as router,
        engine.session() as session,
    ):
        note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        if not engine.tokenizer.has_chat_template:
            note("this bundle has no chat template: each line is a prompt of its own, and is completed as it is")
        messages: list[dict[str, str]] = []
        for line in _lines():
            try:
                if line.startswith("/"):
                    if not _command(engine, line, messages):
                        break
                else:
                    _turn(engine, router, line, messages, {**options, "session": session})
            except CrayonError as e:
                note(str(e))


def _turn(
    engine: Engine, router: Router | None, line: str, messages: list[dict[str, str]], options: dict[str, Any]
) -> None:
    """Answer one line; both join the conversation when the answer is there."""
    template = engine.tokenizer.has_chat_template
    question = {"role": "user", "content": line}
    prompt = engine.tokenizer.apply_chat_template([*messages, question]) if template else line
    if router is None:
        text = _answer(engine, prompt, options, show=True).text
    else:
        text = _routed(router, prompt, line, options, show=True)[0].text
    if template:
        messages += [question, {"role": "assistant", "content": text}]


def _command(engine: Engine, line: str, messages: list[dict[str, str]]) -> bool:
    """Obey a line that starts with a slash; False: leave."""
    verb, _, argument = line.partition(" ")
    argument = argument.strip()
    if verb == "/exit":
        return False
    if verb == "/reset":
        messages.clear()
        note("the conversation is forgotten")
    elif verb == "/adapter":
        if argument:
            engine.set_adapter(None if argument == "none" else argument)
        names = engine.bundle.adapter_names if engine.bundle else []
        note(f"adapter: {engine.adapter or 'none'}; in the bundle: {', '.join(names) or 'none'}")
    elif verb == "/help":
        note(HELP)
    else:
        note(f"there is no command {verb}\n{HELP}")
    return True


def _constraint(options: dict[str, Any]) -> Constraint | None:
    """Take the options that say what an answer must be, of which there may be one, out of all options."""
    given = {name: options.pop(name) for name in ("json_schema", "grammar", "regex")}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    if len(given) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"{names} exclude each other")
    from crayon_runtime.constraint import Constraint

    [(name, value)] = given.items()
    if name == "regex":
        return Constraint.regex(value)
    text = _file(value)
    try:
        if name == "json_schema":
            return Constraint.json_schema(text)
        return Constraint.gbnf(text) if re.search(r"^\s*root\s*::=", text, re.M) else Constraint.lark(text)
    except InvalidInput as e:
        raise InvalidInput(e.what, where=value, do=e.do) from None


def _load(bundle: Path, backend: str, threads: int | None, adapter: str | None, hybrid: Hybrid | None = None) -> Engine:
    """The engine with an adapter; where answers are judged, that is the customized one if nothing else was said."""
    from crayon_runtime.engine import Engine

    if adapter is None and hybrid is not None:
        from crayon_runtime.customized import ADAPTER, state_folder

        customized = state_folder(bundle) / ADAPTER
        adapter = str(customized) if customized.is_dir() else None
    return Engine.load(bundle, backend=backend, threads=threads, adapter=None if adapter == "none" else adapter)


@contextmanager
def _routing(engine: Engine, bundle: Path, hybrid: Hybrid | None) -> Iterator[Router | None]:
    """What decides who answers, if anything was said of that."""
    if hybrid is None:
        yield None
        return
    with hybrid.router(engine, bundle) as router:
        engine.router = router
        yield router


def _answer(engine: Engine, prompt: str | Sequence[int], options: dict[str, Any], *, show: bool) -> Generation:
    """Stream an answer to stdout, and its speed to stderr. Ctrl-C ends it early."""
    with _ctrl_c() as cancel, engine.stream(prompt, **options, cancel=cancel) as stream:
        for piece in stream:
            if show and piece.text:
                click.echo(piece.text, nl=False)
                sys.stdout.flush()
    if show:
        click.echo()
    note(_speed(stream.generation))
    return stream.generation


def _routed(
    router: Router, prompt: str | Sequence[int], query: str, options: dict[str, Any], *, show: bool
) -> tuple[Answer, bool]:
    """As `_answer`, from the device or the server; and whether Ctrl-C ended it."""
    live = show and sys.stdout.isatty()
    with _ctrl_c() as cancel, router.stream(prompt, query=query.strip(), **options, cancel=cancel) as stream:
        if show:
            show_answer(stream, live=live)
        else:
            for _ in stream:
                pass
    answer = stream.answer
    note(route_text(answer))
    if answer.generation is not None:
        unused = "the device's own, which was not used: " if answer.route == "server" else ""
        note(unused + _speed(answer.generation))
    return answer, cancel.is_set()


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets; a second Ctrl-C interrupts as ever."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def press(*_: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """The lines that a person types, without the empty ones, until end of file."""
    typed = sys.stdin.isatty()
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401, gives input() editing and a history
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            note("\n/exit or Ctrl-D leaves")
            continue
        except UnicodeDecodeError as e:
            note(f"not UTF-8: {e}")
            continue
        if line:
            yield line


def _stdin() -> str:
    data = sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        raise InvalidInput(
            f"not UTF-8: byte {e.start} is 0x{data[e.start]:02X}", where="stdin", do="convert the text to UTF-8 first"
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


def _file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise InvalidInput(f"cannot be read: {e.strerror or e}", where=path) from None
    except UnicodeDecodeError as e:
        raise InvalidInput(
            f"not UTF-8: byte {e.start} is 0x{e.object[e.start]:02X}", where=path, do="convert the text to UTF-8 first"
        ) from None


def _speed(g: Generation) -> str:
    end = f"stopped at {g.stop!r}" if g.stop else g.finish_reason
    reused = f", {g.reused_tokens} of them in the cache" if g.reused_tokens else ""
    return (
        f"prompt: {g.prompt_tokens} tokens{reused}, {g.prompt_tokens_per_second:.1f} tokens/s; "
        f"first token after {g.first_token_seconds * 1000:.0f} ms; "
        f"answer: {g.generated_tokens} tokens, {g.decode_tokens_per_second:.1f} tokens/s, {end}"
    )


def _facts(g: Generation) -> dict[str, Any]:
    return {
        "text": g.text,
        "token_ids": g.token_ids,
        "log_probabilities": g.log_probabilities,
        "finish_reason": g.finish_reason,
        "stop": g.stop,
        "prompt_tokens": g.prompt_tokens,
        "reused_tokens": g.reused_tokens,
        "generated_tokens": g.generated_tokens,
        "prompt_seconds": g.prompt_seconds,
        "first_token_seconds": g.first_token_seconds,
        "decode_seconds": g.decode_seconds,
        "prompt_tokens_per_second": g.prompt_tokens_per_second,
        "decode_tokens_per_second": g.decode_tokens_per_second,
    }
