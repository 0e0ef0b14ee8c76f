"""Where templates are found: in the package, in the user's cache, or made."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from crayon_export import tokenizer as source_tokenizer
from crayon_export.executorch.making import make_in_process
from crayon_export.executorch.storage import weights_form
from crayon_export.executorch.template import SUFFIX, Template, TemplateSpec, read_template, write_template
from crayon_export.plan import ExportPlan, plan
from crayon_runtime.affine import Affine
from crayon_runtime.errors import CrayonError, InvalidInput, OutputError, TemplateError
from crayon_runtime.manifest import Tokenizer

SHIPPED = Path(str(files("crayon_export.executorch"))) / "shipped"
"""The folder of the templates that come with the package."""


class Found(NamedTuple):
    """A template on this computer."""

    path: Path
    shipped: bool
    nbytes: int
    spec: TemplateSpec | None
    """None: it cannot be used."""
    problem: str | None
    """Why not."""

    @property
    def key(self) -> str:
        return self.path.name.removesuffix(SUFFIX)

    def to_dict(self) -> dict[str, Any]:
        spec = None if self.spec is None else msgspec.to_builtins(self.spec)
        where = {"path": str(self.path), "shipped": self.shipped, "bytes": self.nbytes}
        return {"key": self.key, **where, "spec": spec, "problem": self.problem}

    def to_text(self) -> str:
        """A line or two."""
        s = self.spec
        if s is None:
            return f"{self.key}\n  cannot be used: {self.problem}"
        weights = _described(s.weights)
        layers = f"{s.layers} layers" if s.layer_repeats == 1 else f"{s.layers} layers, each {s.layer_repeats} times,"
        slots = f"adapters of rank {s.adapter.rank}" if s.adapter else "no adapters"
        return (
            f"{self.key}\n  {layers} of {s.hidden_size}, vocabulary {s.vocab_size}, {weights}, context {s.context_length}, "
            f"{slots}; {self.nbytes / 1e3:.0f} kB{', comes with the package' if self.shipped else ''}"
        )


def _described(weights: Affine | None) -> str:
    if weights is None:
        return "fp32"
    return f"{weights.name} in groups of {weights.group_size}" if weights.group_size else f"{weights.name} by row"


def cache_folder() -> Path:
    """The folder of the templates that were made or imported here."""
    from platformdirs import user_cache_path

    return user_cache_path("crayon", appauthor=False).absolute() / "templates"


def template_for(spec: TemplateSpec, on_stage: Callable[[str], None] = lambda _: None) -> Template:
    """The template of a specification. Where none is found that is whole, it is made, which takes minutes, and kept in the cache.

    Several processes that want the same one wait for the first of them.

    Args:
        on_stage: told what comes next.

    Raises:
        MissingExtra, BackendError: it has to be made, and ExecuTorch's exporter is not installed, is another version, or fails.
        OutputError: the cache cannot be written.
    """
    if (found := _found(spec)) is not None:
        return found
    path = cache_folder() / f"{spec.key}{SUFFIX}"
    with _alone(path, on_stage):
        if (found := _found(spec)) is not None:
            return found
        make_in_process(spec, path, on_stage)
        return read_template(path)


def list_templates() -> list[Found]:
    """All templates on this computer, usable or not, those of the package first."""
    found = []
    for folder, shipped in ((SHIPPED, True), (cache_folder(), False)):
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            spec, problem = None, None
            try:
                spec = read_template(path).spec
            except (CrayonError, OSError) as e:
                problem = getattr(e, "what", str(e))
            found.append(Found(path, shipped, path.stat().st_size, spec, problem))
    return found


def export_template(
    source: str, file: Path, *, on_stage: Callable[[str], None] = lambda _: None, **options: Any
) -> TemplateSpec:
    """Write a template to a file.

    Args:
        source: the key of a template that is here, or the beginning of it; or a model, a folder or a Hub id.
        file: or a folder, where it is called by its key.
        options: for a model, those of `plan`.

    Raises:
        As `template_for`, `find_template` and `plan`.
    """
    if re.fullmatch(r"[0-9a-f]{4,32}(-[\w+-]*)?", source) and not Path(source).exists():
        template = find_template(source)
    else:
        template = template_for(spec_of(plan(source, backend="executorch", **options)), on_stage)
    write_template(file / f"{template.spec.key}{SUFFIX}" if file.is_dir() else file, template)
    return template.spec


def spec_of(p: ExportPlan, tokenizer: Tokenizer | None = None) -> TemplateSpec:
    """What an export needs.

    Args:
        tokenizer: the model's; None: it is read.
    """
    if tokenizer is None:
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer = source_tokenizer.convert(p.tokenizer, Path(scratch), model_vocab_size=p.architecture.vocab_size)
    return TemplateSpec.of(
        p.architecture,
        tokenizer,
        weights=weights_form(p.blockwise),
        context_length=p.context_length,
        kv_dtype=p.kv_dtype,
        tap_layer=p.tap_layer,
        adapter=p.program_slots,
    )


def find_template(key: str) -> Template:
    """A template by its key, or the beginning of it.

    Raises:
        InvalidInput: there is none, or more than one.
        TemplateError: it is damaged.
    """
    matching = {found.key: found for found in list_templates() if key and found.key.startswith(key)}
    if len(matching) != 1:
        what = (
            f"{len(matching)} templates have keys that begin with {key!r}"
            if matching
            else f"there is no template {key!r}"
        )
        raise InvalidInput(what, do="`crayon template list` shows the keys")
    return read_template(next(iter(matching.values())).path)


def import_template(path: Path) -> TemplateSpec:
    """Put a template from elsewhere into the cache.

    Raises:
        TemplateError: it is damaged, no template, or for another version.
        OutputError: the cache cannot be written.
    """
    try:
        template = read_template(path)
    except OSError as e:
        raise InvalidInput(f"the template cannot be read: {e.strerror or e}", where=path) from e
    write_template(cache_folder() / f"{template.spec.key}{SUFFIX}", template)
    return template.spec


def shipped(spec: TemplateSpec) -> Template | None:
    """The template that comes with the package."""
    return _in(SHIPPED, spec)


def _found(spec: TemplateSpec) -> Template | None:
    return shipped(spec) or _in(cache_folder(), spec)


def _in(folder: Path, spec: TemplateSpec) -> Template | None:
    """One that is in a folder, and whole. One with slots does where none are wanted: its other programs are the same."""
    paths = [folder / f"{spec.key}{SUFFIX}"]
    if spec.adapter is None:
        paths += sorted(folder.glob(f"{spec.key}-*{SUFFIX}"))
    for path in paths:
        with suppress(TemplateError, OSError):  # it is made again, and written over
            template = read_template(path)
            if spec in (template.spec, template.spec.without_slots):
                return template
    return None


@contextmanager
def _alone(path: Path, on_stage: Callable[[str], None]) -> Iterator[None]:
    """Within, nobody else makes the template of this path; where the file system knows no locks, somebody might."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.parent / f".{path.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise OutputError(
            f"templates cannot be kept: {e.strerror or e}",
            where=path.parent,
            do="let XDG_CACHE_HOME name a folder that can be written",
        ) from e
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_stage("waiting for another process that makes the same template")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        with suppress(OSError):
            os.close(lock)
