"""The process that makes a template; torch's memory is gone when it ends.

`python -m crayon_export.executorch.making FILE` reads a `TemplateSpec` as JSON from its first line of input and writes the template. A
line of output says what comes next. It ends early when its input does: whoever asked is gone.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from crayon_export.executorch.quiet import quiet
from crayon_export.executorch.template import EXECUTORCH, TemplateSpec, write_template
from crayon_runtime.errors import BackendError, CrayonError, MissingExtra, OutputError

_FAILED = "failed: "


def check_version() -> None:
    """Raises: MissingExtra, BackendError: ExecuTorch's exporter is not installed, or is another version than templates are made with."""
    for name in ("executorch", "torch"):
        try:
            installed = version(name)
        except PackageNotFoundError:
            raise MissingExtra("pte", "making a template for ExecuTorch") from None
        if name == "executorch" and installed.partition("+")[0] != EXECUTORCH:
            raise BackendError(
                f"ExecuTorch {installed} is installed; templates are made with {EXECUTORCH}",
                do=f"pip install executorch=={EXECUTORCH}, or use --official, which takes what is installed",
            )


def make_in_process(spec: TemplateSpec, path: Path, on_stage: Callable[[str], None] = lambda _: None) -> None:
    """Have a template made and written.

    Args:
        on_stage: told what comes next.

    Raises:
        MissingExtra, BackendError: ExecuTorch's exporter is not installed, is another version, or fails.
        OutputError: it cannot be written.
    """
    check_version()
    with tempfile.TemporaryFile() as said:
        # Nothing in it computes with more than one core, and threads that spin take it from others.
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdin
        assert process.stdout
        failure = ""
        try:
            process.stdin.write(msgspec.json.encode(spec) + b"\n")
            process.stdin.flush()
            for line in process.stdout:
                text = line.decode(errors="replace").strip()
                if text.startswith(_FAILED):
                    failure = text.removeprefix(_FAILED)
                else:
                    on_stage(text)
            process.wait()
        except BrokenPipeError:  # it died before it read
            process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        if process.returncode == 0:
            return
        if failure:
            kind, _, what = failure.partition(": ")
            raise (OutputError if kind == "OutputError" else BackendError)(
                what, where=path if kind == "OutputError" else None
            )
        said.seek(0)
        last = said.read()[-500:].decode(errors="replace").strip()
        killed = f"it was ended by signal {-process.returncode}" if process.returncode < 0 else last
        raise BackendError(
            f"ExecuTorch's exporter failed: {killed}",
            do="see docs/troubleshooting.md: it needs some gigabytes of memory; --backend onnx does without it",
        )


def main() -> None:
    said = os.fdopen(os.dup(1), "w", buffering=1)
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=TemplateSpec)
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        said.write("loading ExecuTorch's exporter\n")
        with quiet():
            from crayon_export.executorch.lowering import make_template

            gc.freeze()  # what is imported stays; it need not be looked through again and again
            template = make_template(spec, lambda text: print(text, file=said))
        write_template(Path(sys.argv[1]), template)
    except CrayonError as e:
        what = f"{e.what}; {e.do}" if e.do and not isinstance(e, OutputError) else e.what
        print(f"{_FAILED}{type(e).__name__}: {what}".replace("\n", " "), file=said)
        raise SystemExit(1) from e
    except Exception as e:  # of torch, torchao and executorch, which have no common one
        what = f"ExecuTorch's exporter failed: {type(e).__name__}: {str(e)[:500]}".replace("\n", " ")
        print(f"{_FAILED}BackendError: {what}", file=said)
        raise


def _end_with_input() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock the interpreter wants when it ends
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
