"""Templates as files: what is read is what was written; anything else is refused, and made again where it is in the cache."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from crayon_export import cli
from crayon_export.executorch import making, templates
from crayon_export.executorch.storage import PER_ROW
from crayon_export.executorch.template import (
    EXECUTORCH,
    SUFFIX,
    AdapterSpec,
    Program,
    Run,
    Slot,
    Template,
    TemplateSpec,
    read_template,
    write_template,
)
from crayon_runtime.affine import Affine
from crayon_runtime.errors import BackendError, InvalidInput, MissingExtra, OutputError, TemplateError
from crayon_runtime.manifest import LINEARS
from tests.support import ROOT, needs

SPEC = TemplateSpec(
    layers=1, hidden_size=64, heads=2, kv_heads=1, head_size=32, ffn_size=96, vocab_size=320, tied_embeddings=False, norm_eps=1e-5,
    weights=Affine(4, 32), context_length=128, kv_dtype="fp32", tap_layer=1, bos=1, eos=[2],
)  # fmt: skip
WITH_SLOTS = msgspec.structs.replace(SPEC, adapter=AdapterSpec(8, ["q_proj", "v_proj"]))


def small(spec: TemplateSpec = SPEC, *, code: bytes = b"program" * 9) -> Template:
    """A template as the format has it; no exporter made it."""
    slot = Slot("a" * 64, "lm_head.weight", "codes", "int4", [320, 64], 16)
    single = Program(code, [msgspec.structs.replace(slot, offset=4096)], 1 << 15, [Run(0, len(code))])
    programs: dict[Any, Program] = {"model": Program(code, [slot], len(code), [Run(0, len(code))]), "single": single}
    if spec.adapter:
        programs["adapter"] = programs["model"]
    return Template(spec, programs)


@pytest.fixture(name="cache", autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(templates, "SHIPPED", tmp_path / "shipped")
    return templates.cache_folder()


# The file


def test_what_is_read_is_what_was_written_always_in_the_same_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write_template(one, small())
    write_template(other, small())
    assert read_template(one) == small()
    assert one.read_bytes() == other.read_bytes()


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "template"
    write_template(path, small())
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x41]) + whole[i + 1 :])
        with suppress(TemplateError):
            assert read_template(path) == small()  # a date or the like, which nobody reads
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(TemplateError):
            read_template(path)


def _rewritten(path: Path, **members: bytes | None) -> None:
    """Change members of a template, with right checksums of the zip."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents |= {name.replace("__", "."): content for name, content in members.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            if content is not None:
                archive.writestr(name, content)


@pytest.mark.parametrize(
    "members, says",
    [
        ({"model": b"another" * 9}, "is not what was written"),
        ({"model": b"longer" * 99}, "has 594 bytes"),
        ({"model": None}, "holds other files"),
        ({"more": b"x"}, "holds other files"),
        ({"index__json": None}, "no 'index.json'"),
        ({"index__json": b"{"}, "cannot be read"),
        ({"index__json": b"[]"}, "cannot be read"),
    ],
)
def test_members_that_do_not_belong_are_refused(tmp_path: Path, members: dict[str, bytes | None], says: str) -> None:
    path = tmp_path / "template"
    write_template(path, small())
    _rewritten(path, **members)
    with pytest.raises(TemplateError, match=says):
        read_template(path)


def test_an_index_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "template"
    write_template(path, small())
    with zipfile.ZipFile(path) as archive:
        index = json.loads(archive.read("index.json"))
    index["programs"]["model"]["slots"][0]["tensor"] = "model.norm.weight"
    _rewritten(path, index__json=json.dumps(index).encode())
    with pytest.raises(TemplateError, match="index is not what was written"):
        read_template(path)


@pytest.mark.parametrize(
    "changed, says",
    [({"executorch": "1.4.1"}, "made for ExecuTorch 1.4.1; this package needs"), ({"format": 99}, "has format 99")],
)
def test_other_versions_are_refused_before_anything_else(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    path = tmp_path / "template"
    path.write_bytes(b"")
    index = {"format": 1, "spec": {"executorch": EXECUTORCH}, "unknown": []}
    (index if "format" in changed else index["spec"]).update(changed)  # type: ignore[attr-defined]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("index.json", json.dumps(index))
    with pytest.raises(TemplateError, match=says) as refused:
        read_template(path)
    assert "make it again" in str(refused.value.do)


def test_no_template_at_all(tmp_path: Path) -> None:
    path = tmp_path / "template"
    for content in (b"", b"PK", b"\x00" * 4096, b'{"format": 1}'):
        path.write_bytes(content)
        with pytest.raises(TemplateError, match="damaged, or is none"):
            read_template(path)


# Keys


def test_everything_that_shapes_a_program_is_in_the_key() -> None:
    keys = {SPEC.key, WITH_SLOTS.key}
    changes: list[dict[str, Any]] = [
        {"layers": 2}, {"layer_repeats": 2}, {"hidden_size": 96}, {"heads": 4}, {"kv_heads": 2}, {"head_size": 16}, {"ffn_size": 64},
        {"vocab_size": 321}, {"tied_embeddings": True}, {"norm_eps": 1e-6}, {"weights": Affine(4, 64)}, {"weights": PER_ROW}, {"weights": None},
        {"context_length": 64}, {"kv_dtype": "int8"}, {"tap_layer": 0}, {"bos": None}, {"eos": [2, 3]}, {"executorch": "1.4.1"},
        {"adapter": AdapterSpec(4, ["q_proj", "v_proj"])}, {"adapter": AdapterSpec(8, ["q_proj"])},
    ]  # fmt: skip
    assert {name for change in changes for name in change} == set(TemplateSpec.__struct_fields__)
    keys |= {msgspec.structs.replace(SPEC, **change).key for change in changes}
    assert len(keys) == 2 + len(changes)


# The cache


@pytest.fixture(name="made")
def _made(monkeypatch: pytest.MonkeyPatch) -> list[TemplateSpec]:
    """What was made, by a process that is quick."""
    asked: list[TemplateSpec] = []

    def make(spec: TemplateSpec, path: Path, on_stage: object) -> None:
        asked.append(spec)
        write_template(path, small(spec))

    monkeypatch.setattr(templates, "make_in_process", make)
    return asked


def test_a_template_is_made_once(made: list[TemplateSpec]) -> None:
    assert [templates.template_for(SPEC) for _ in range(2)] == [small()] * 2
    assert made == [SPEC]


def test_one_with_slots_does_where_none_are_wanted(made: list[TemplateSpec]) -> None:
    templates.template_for(WITH_SLOTS)
    assert templates.template_for(SPEC) == small(WITH_SLOTS)
    assert made == [WITH_SLOTS]


def test_what_is_damaged_in_the_cache_is_made_again(cache: Path, made: list[TemplateSpec]) -> None:
    templates.template_for(SPEC)
    path = cache / f"{SPEC.key}{SUFFIX}"
    for content in (b"", path.read_bytes()[:-1], b"PK"):
        path.write_bytes(content)
        assert templates.template_for(SPEC) == small()
    write_template(path, small(WITH_SLOTS))  # under another's name
    path.rename(cache / f"{msgspec.structs.replace(SPEC, layers=3).key}{SUFFIX}")
    assert templates.template_for(msgspec.structs.replace(SPEC, layers=3)).spec.layers == 3
    assert len(made) == 5


def test_those_of_the_package_go_first(made: list[TemplateSpec]) -> None:
    write_template(templates.SHIPPED / f"{SPEC.key}{SUFFIX}", small(code=b"shipped"))
    assert templates.template_for(SPEC) == small(code=b"shipped")
    assert not made


def test_who_comes_second_waits_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, stages = [], []
    started, go_on = threading.Event(), threading.Event()

    def make(spec: TemplateSpec, path: Path, on_stage: object) -> None:
        asked.append(spec)
        started.set()
        assert go_on.wait(10)
        write_template(path, small(spec))

    def second(text: str) -> None:
        stages.append(text)
        go_on.set()

    monkeypatch.setattr(templates, "make_in_process", make)
    first = threading.Thread(target=templates.template_for, args=(SPEC,))
    first.start()
    assert started.wait(10)
    assert templates.template_for(SPEC, second) == small()
    first.join()
    assert asked == [SPEC]
    assert stages == ["waiting for another process that makes the same template"]


def test_a_cache_that_cannot_be_written(cache: Path, made: list[TemplateSpec]) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"")
    with pytest.raises(OutputError, match="templates cannot be kept"):
        templates.template_for(SPEC)


def test_a_full_disk(cache: Path) -> None:
    """By the limit of a process for the size of its files: as with a full disk, a write fails half-way."""
    script = f"""
import resource, signal
from pathlib import Path
from crayon_runtime.errors import OutputError
from crayon_export.executorch.template import write_template
from tests.export.test_template import small
import os
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
template = small(code=os.urandom(100_000))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    write_template(Path({str(cache / "x")!r}), template)
except OutputError as e:
    print(e.what)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "file this large" in done.stdout
    assert list(cache.iterdir()) == []


def test_a_writer_that_is_killed_leaves_nothing_that_is_believed(cache: Path) -> None:
    script = f"""
import os, signal, zipfile
from pathlib import Path
from crayon_export.executorch import template
from tests.export.test_template import small
write = zipfile.ZipFile.writestr
def killed(self, info, content, **kwargs):
    write(self, info, content, **kwargs)
    if getattr(info, "filename", "") == "model":
        self.fp.flush()
        os.kill(os.getpid(), signal.SIGKILL)
zipfile.ZipFile.writestr = killed
template.write_template(Path({str(cache / f"{SPEC.key}{SUFFIX}")!r}), small())
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert templates.list_templates() == []
    (left,) = cache.iterdir()
    write_template(cache / f"{SPEC.key}{SUFFIX}", small())
    assert not left.exists()


# The process that makes them


def _process(script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let another script be what makes templates."""
    (tmp_path / "maker.py").write_text(script)
    run = subprocess.Popen

    def popen(command: list[str], **kwargs: Any) -> Any:
        return run([sys.executable, str(tmp_path / "maker.py"), *command[3:]], **kwargs)

    monkeypatch.setattr(making, "check_version", lambda: None)
    monkeypatch.setattr(making.subprocess, "Popen", popen)


@pytest.mark.parametrize(
    "script, says",
    [
        ("import os; os.abort()", "ended by signal 6"),
        ("raise SystemExit('no such module')", "no such module"),
        ("print('tracing'); print('failed: BackendError: it has no such pass'); raise SystemExit(1)", "no such pass"),
    ],
)
def test_a_process_that_fails_says_why(
    script: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    _process(script, monkeypatch, tmp_path)
    with pytest.raises(BackendError, match=says):
        templates.template_for(SPEC)
    assert [path.name for path in cache.iterdir()] == [f".{SPEC.key}{SUFFIX}.lock"]


def test_it_ends_when_whoever_asked_is_gone(tmp_path: Path) -> None:
    """The real process, which is busy importing when its input ends."""
    command = [sys.executable, "-m", "crayon_export.executorch.making", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    process.stdin.write(msgspec.json.encode(SPEC) + b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"loading ExecuTorch's exporter\n"
    started = time.monotonic()
    process.stdin.close()
    assert process.wait(60) == 1
    assert time.monotonic() - started < 30
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_another_version_of_executorch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "version", lambda name: "1.4.1")
    with pytest.raises(BackendError, match=f"ExecuTorch 1.4.1 is installed; templates are made with {EXECUTORCH}") as e:
        templates.template_for(SPEC)
    assert "--official" in str(e.value.do)


def test_the_version_is_the_one_that_is_pinned() -> None:
    needs.module("executorch")
    assert f'"executorch=={EXECUTORCH}"' in (ROOT / "pyproject.toml").read_text()
    making.check_version()


def test_without_executorch_a_template_that_is_here_is_enough(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(making, "version", missing)
    write_template(cache / f"{SPEC.key}{SUFFIX}", small())
    assert templates.template_for(SPEC) == small()
    with pytest.raises(MissingExtra, match="'pte'"):
        templates.template_for(WITH_SLOTS)


# The command line


def _crayon(*arguments: object) -> Any:
    done = CliRunner().invoke(cli.template, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_a_template_travels(cache: Path, tmp_path: Path) -> None:
    write_template(cache / f"{WITH_SLOTS.key}{SUFFIX}", small(WITH_SLOTS))
    (listed,) = _crayon("list")["templates"]
    assert listed["key"] == WITH_SLOTS.key
    assert listed["spec"]["adapter"] == {"rank": 8, "targets": ["q_proj", "v_proj"]}
    assert _crayon("export", WITH_SLOTS.key[:6], tmp_path / "file") == {
        "file": str(tmp_path / "file"),
        "key": WITH_SLOTS.key,
    }
    (cache / f"{WITH_SLOTS.key}{SUFFIX}").unlink()
    assert _crayon("list")["templates"] == []
    assert _crayon("import", tmp_path / "file")["key"] == WITH_SLOTS.key
    assert templates.template_for(WITH_SLOTS) == small(WITH_SLOTS)


def test_a_list_names_what_cannot_be_used(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / f"{SPEC.key}{SUFFIX}").write_bytes(b"damaged")
    (listed,) = _crayon("list")["templates"]
    assert listed["spec"] is None
    assert "damaged" in listed["problem"]
    assert "cannot be used" in CliRunner().invoke(cli.template, ["list"]).output


def test_what_is_not_a_template_is_not_imported(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "file").write_bytes(b"PK")
    with pytest.raises(TemplateError):
        templates.import_template(tmp_path / "file")
    with pytest.raises(InvalidInput, match="No such file"):
        templates.import_template(tmp_path / "none")
    assert not cache.exists()


def test_a_key_that_means_nothing(cache: Path) -> None:
    with pytest.raises(InvalidInput, match="no template 'abcdef'"):
        templates.export_template("abcdef", cache / "x")


def test_a_model_is_asked_for_what_its_exports_need(cache: Path, made: list[TemplateSpec], tmp_path: Path) -> None:
    from tests.export.models import tiny_adapter, tiny_llama, tiny_tokenizer

    model = tiny_tokenizer(tiny_llama(tmp_path / "model"))
    adapter = tiny_adapter(model, tmp_path / "adapter")
    options = ["--group-size", "64", "--context-length", "128", "--kv-dtype", "int8", "--tap-layer", "1"]
    key = _crayon("export", model, tmp_path / "one", *options, "--adapter", adapter)["key"]
    _crayon("export", model, tmp_path / "other", *options, "--slot-rank", "3", "--slot-target", "q_proj")
    _crayon("export", model, tmp_path, "--quantize", "none", "--no-adapter-slots")
    _crayon("export", model, tmp_path, "--quantize", "int8")
    one, other, plain, by_row = made
    assert (one.weights, one.context_length, one.kv_dtype, one.tap_layer, one.eos) == (
        Affine(4, 64),
        128,
        "int8",
        1,
        [2],
    )
    assert one.adapter == AdapterSpec(4, sorted(LINEARS))
    assert key == one.key
    assert other == msgspec.structs.replace(one, adapter=AdapterSpec(3, ["q_proj"]))
    assert (plain.weights, plain.adapter) == (None, None)
    assert by_row.weights == PER_ROW
    assert read_template(tmp_path / f"{plain.key}{SUFFIX}").spec == plain
