"""Judge: ExecuTorch's own exporter, which makes the same model's programs and data of the weights themselves."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from crayon_export.adapters import convert_adapter
from crayon_export.executorch.filled import Filling, SingleFile, checked, entries
from crayon_export.executorch.template import Program, Run, Slot, Template
from crayon_export.executorch.templates import list_templates, read_template
from crayon_export.exporter import export
from crayon_export.rounding import nearest
from crayon_export.tensorfile import read_safetensors
from crayon_runtime import Engine, backends, golden
from crayon_runtime.affine import Affine
from crayon_runtime.bundle import Bundle
from crayon_runtime.errors import CheckpointError, OutputError, TemplateError
from crayon_runtime.manifest import LINEARS, AdapterSlots, ExecutorchVariant
from crayon_server.models import load_nano
from tests import programs
from tests.support import needs

IDS = np.array([1, 17, 300, 44, 5, 9, 200])


def executorch(bundle: Bundle) -> ExecutorchVariant:
    variant = bundle.model.variants.executorch
    assert isinstance(variant, ExecutorchVariant)
    return variant


def logits(base: Bundle, adapter: Bundle | None) -> np.ndarray:
    needs.native()
    backend = backends.load(base, "executorch", threads=1)
    cache = backend.new_cache(backend.read_adapter(adapter) if adapter else None)
    found = [cache.prefill(IDS).logits.copy(), cache.decode(7).logits.copy()]
    cache.close()
    backend.close()
    return np.array(found)


# Against the official exporter


@pytest.mark.slow
def test_program_and_data_are_those_of_the_official_exporter() -> None:
    ours, theirs = programs.made().bundle, programs.exported_officially()
    assert ours.model.base_fingerprint == theirs.model.base_fingerprint
    for name in ("model.ptd", "model.pte"):
        assert ours.read(name) == theirs.read(name), name


@pytest.mark.slow
def test_an_adapter_of_the_slots_rank_is_that_of_the_official_exporter(tmp_path: Path) -> None:
    carla = programs.whole_adapter(programs.made().model, tmp_path)
    ours, theirs = (
        convert_adapter(carla, programs.made().bundle, tmp_path / "out"),
        programs.exported_officially().adapter("carla"),
    )
    for name in ("adapter.ptd", "adapter.pte"):
        assert ours.read(name) == theirs.read(name), name


@pytest.mark.slow
def test_an_adapter_that_is_padded_computes_what_it_computes_without() -> None:
    """alice has rank 8 in q_proj and 4 elsewhere; the official program holds her as she is."""
    ours, theirs = programs.exported(), programs.exported_officially()
    assert len(ours.adapter("alice").read("adapter.ptd")) > len(theirs.adapter("alice").read("adapter.ptd"))
    np.testing.assert_array_equal(logits(ours, ours.adapter("alice")), logits(theirs, theirs.adapter("alice")))


@pytest.mark.slow
def test_a_single_file_is_that_of_the_official_exporter() -> None:
    ours, theirs = programs.exported_as_a_single_file(), programs.exported_officially_as_a_single_file()
    assert ours.read("model.pte") == theirs.read("model.pte")
    assert executorch(ours).data == executorch(theirs).data == []


# A single file


def test_a_single_file_answers_as_its_golden_cases_say() -> None:
    needs.native()
    bundle = programs.exported_as_a_single_file()
    assert executorch(bundle).slots is None
    assert [merged.name for merged in bundle.model.merged] == ["alice"]
    results = golden.replay(bundle, backend="executorch")
    assert results
    assert all(r.passed for r in results)
    with Engine.load(bundle, backend="executorch", threads=1) as engine:
        assert engine.generate(IDS.tolist(), max_new_tokens=5, ignore_eos=True).generated_tokens == 5


def test_textllmrunner_answers_from_a_single_file() -> None:
    """In a process of its own: it cannot be unloaded."""
    needs.module("executorch")
    script = Path(__file__).with_name("official_runtimes.py")
    work = [sys.executable, script, programs.exported_as_a_single_file().path]
    done = subprocess.run(work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = msgspec.json.decode(done.stdout.splitlines()[-1])
    assert said["runner"].strip() == said["runtime"].strip() != ""
    assert said["largest_difference"] == 0


def test_the_manifest_says_what_slots_there_are() -> None:
    alone = programs.exported_int8()
    assert alone.model.adapter_slots == AdapterSlots(list(LINEARS), 16)
    slots = executorch(alone).slots
    assert slots is not None
    assert (slots.rank, slots.dtype, slots.layers) == (16, "int8", 2)
    assert [(t.name, t.in_features, t.out_features) for t in slots.targets] == [
        ("q_proj", 64, 80), ("k_proj", 64, 40), ("v_proj", 64, 40), ("o_proj", 80, 64),
        ("gate_proj", 64, 160), ("up_proj", 64, 160), ("down_proj", 160, 64),
    ]  # fmt: skip
    both = programs.made().bundle
    assert both.model.adapter_slots == AdapterSlots(list(LINEARS), None), "the graph takes any rank"
    assert programs.exported_as_a_single_file().model.adapter_slots is None


# Without torch


def test_filling_a_template_takes_neither_torch_nor_executorch(tmp_path: Path) -> None:
    made = programs.made()
    program = """
        import sys
        sys.modules |= dict.fromkeys(("torch", "executorch", "torchao"))  # importing one fails
        from crayon_export.exporter import export
        export(sys.argv[1], sys.argv[2], backend="executorch", group_size=64, context_length=4096, adapters=sys.argv[3:])
    """
    work = [str(made.model), str(tmp_path / "bundle"), *map(str, made.adapters)]
    _run(program, *work)
    for name in ("model.ptd", "model.pte", "adapter-slots.pte", "adapters/bruno/adapter.ptd"):
        assert Bundle.open(tmp_path / "bundle").read(name) == made.bundle.read(name), name


def _run(program: str, *work: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *work], check=True, text=True, env=environment(), **options
    )


def environment() -> dict[str, str]:
    """With the templates of the shared bundles in the user's cache."""
    return {**os.environ, "XDG_CACHE_HOME": str(programs.cache_home())}


@pytest.fixture
def templates(monkeypatch: pytest.MonkeyPatch) -> Template:
    """That of the shared bundles; exports in this process find it too."""
    programs.made()
    monkeypatch.setenv("XDG_CACHE_HOME", str(programs.cache_home()))
    wanted = [
        f.path for f in list_templates() if f.spec and f.spec.adapter and f.spec.context_length == programs.CONTEXT
    ]
    return read_template(wanted[0])


# What is not as it should be


def test_a_template_for_other_shapes_is_not_filled(templates: Template, tmp_path: Path) -> None:
    with (tmp_path / "model.ptd").open("x+b") as file, ThreadPoolExecutor(1) as pool:
        storage = Filling(templates, file, with_slots=True, single_file=False, pool=pool).storage
        with pytest.raises(TemplateError, match=r"are int4 \[160, 32\]; the template is for int4 \[160, 64\]"):
            storage.linear("model.layers.0.mlp.up_proj", 160, 32, nearest)
        with pytest.raises(TemplateError, match="no place for the codes of model.layers.2.mlp.up_proj.weight"):
            storage.linear("model.layers.2.mlp.up_proj", 160, 64, nearest)
        with pytest.raises(TemplateError, match="the values of model.norm.weight are fp32"):
            storage.vector("model.norm.weight", np.ones(65, np.float32))


def test_a_weight_that_never_came_is_missed(templates: Template, tmp_path: Path) -> None:
    for single_file in (False, True):
        with (tmp_path / f"{single_file}").open("x+b") as file, ThreadPoolExecutor(1) as pool:
            filling = Filling(templates, file, with_slots=True, single_file=single_file, pool=pool)
            with pytest.raises(ValueError, match="0 of its"):
                filling.storage.finish()


def test_a_program_that_wants_more_than_its_slots_is_refused(templates: Template) -> None:
    program = templates.programs["model"]
    names = {slot.name: hashlib.sha256(slot.name.encode()).hexdigest() for slot in program.slots if not slot.layout}
    names = {old: f"scale_{new}" if old.startswith("scale_") else new for old, new in names.items()}
    assert checked(program.code, names) != program.code
    left_out = next(iter(names))
    with pytest.raises(TemplateError, match=f"wants 1 weights that it has no slots for, as {left_out}"):
        checked(program.code, {old: new for old, new in names.items() if old != left_out})


def test_a_single_file_is_code_and_slots_at_their_places(tmp_path: Path) -> None:
    slots = [
        Slot("", "b", "values", "fp32", [2], 1, offset=16),
        Slot("0" * 64, "a", "codes", "int4", [2, 4], 1, offset=4),
    ]
    program = Program(b"codeMOREend", slots, 30, [Run(0, 4), Run(8, 4), Run(24, 3)])
    with (tmp_path / "model.pte").open("x+b") as file:
        weights = SingleFile(file, program)
        weights.write(1, memoryview(b"ab"))
        weights.write(0, memoryview(b"12345678"))
        weights.write(1, memoryview(b"cd"))
        with pytest.raises(ValueError, match="more than its 4"):
            weights.write(1, memoryview(b"e"))
        assert weights.finish()[1] == hashlib.sha256(b"abcd").hexdigest()
        weights.write_code({})
    assert (tmp_path / "model.pte").read_bytes() == b"codeabcdMORE\0\0\0\x0012345678end\0\0\0"


def test_entries_are_named_as_the_program_wants_them(templates: Template) -> None:
    named = {entry.name for entry in entries(templates.programs["model"].slots)}
    assert {"{sha256}", "scale_{sha256}", "transformer.norm.weight", "transformer.tok_embeddings.scales"} <= named


# Faults


def test_a_damaged_checkpoint_leaves_nothing(templates: Template, tmp_path: Path) -> None:
    made = programs.made()
    broken = tmp_path / "model"
    broken.mkdir()
    for file in made.model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = read_safetensors(made.model / "model.safetensors").tensors
    content = bytearray((broken / "model.safetensors").read_bytes())
    at = content.find(weights["lm_head.weight"].read()[300].tobytes())
    content[at : at + 4] = np.float32(np.nan).tobytes()
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="lm_head"):
        export(
            broken,
            tmp_path / "out/bundle",
            backend="executorch",
            group_size=64,
            context_length=programs.CONTEXT,
            adapters=made.adapters,
        )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("options", [{}, {"single_file": True}])
def test_a_full_disk_leaves_nothing(templates: Template, options: dict[str, Any]) -> None:
    with needs.tmpfs(1 << 20) as disk:
        with pytest.raises(OutputError, match="full"):
            export(
                programs.made().model, disk / "bundle", backend="executorch", group_size=64,
                context_length=programs.CONTEXT, **(options or {"slot_rank": 8}),
            )  # fmt: skip
        assert [path.name for path in disk.iterdir()] == []


def test_killed_while_the_weights_are_written(tmp_path: Path) -> None:
    """The writer of a model's data dies half-way; what it left is removed by the next one, and never was at the target."""
    made = programs.made()
    program = """
        import os, sys
        from crayon_export.executorch import filled
        from crayon_export.exporter import export
        written = filled.FilledProgram.linear
        def die(self, module, *shape):
            if module == "model.layers.1.mlp.up_proj":
                os.kill(os.getpid(), 9)
            return written(self, module, *shape)
        filled.FilledProgram.linear = die
        export(sys.argv[1], sys.argv[2], backend="executorch", group_size=64, context_length=4096, slot_rank=8)
    """
    work = [sys.executable, "-c", textwrap.dedent(program), str(made.model), str(tmp_path / "bundle")]
    died = subprocess.run(work, env=environment(), check=False)
    assert died.returncode == -signal.SIGKILL
    assert not (tmp_path / "bundle").exists()
    (left,) = tmp_path.iterdir()
    assert (left / "model.ptd").stat().st_size > 0
    _run(
        """
        import sys
        from crayon_export.exporter import export
        export(sys.argv[1], sys.argv[2], backend="executorch", group_size=64, context_length=4096, slot_rank=8)
        """,
        str(made.model),
        str(tmp_path / "bundle"),
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "bundle"]
    assert Bundle.open(tmp_path / "bundle", verify=True).read("model.ptd") == made.bundle.read("model.ptd")


@pytest.mark.parametrize("rounding", ["mse", "gptq"])
def test_codes_that_are_found_otherwise_are_computed_with(rounding: str, tmp_path: Path) -> None:
    needs.native()
    texts = tmp_path / "texts.txt"
    texts.write_text("set an alarm for half past seven\nplay some jazz\n" * 60)
    calibration = texts if rounding == "gptq" else None
    done = export(load_nano(), tmp_path / "bundle", backend="executorch", rounding=rounding, calibration=calibration)
    assert all(result.passed for result in golden.replay(done.bundle, backend="executorch"))
    errors = {t.name: t.output_error for t in done.report.tensors}
    assert errors["lm_head.weight"] is None
    assert (errors["model.layers.0.mlp.up_proj.weight"] is not None) == (rounding == "gptq")


def test_a_tied_head_and_the_embedding_are_stored_once(tmp_path: Path) -> None:
    """With the template that comes with the package: `nano` is tied."""
    needs.native()
    bundle = export(load_nano(), tmp_path / "bundle", backend="executorch").bundle
    data, architecture = bundle.read("model.ptd"), bundle.model.architecture
    weights = read_safetensors(load_nano() / "model.safetensors").tensors["model.embed_tokens.weight"].read()
    codes, _ = Affine(8, 0).quantize(weights)
    assert architecture.tied_embeddings
    assert data.count(codes.tobytes()) == 1
    name = hashlib.sha256(codes.tobytes()).hexdigest().encode()
    assert data.count(name) == 1, "the head's name"
    assert name in bundle.read("model.pte")
    assert data.count(b"transformer.tok_embeddings.weight") == 1
    assert all(result.passed for result in golden.replay(bundle, backend="executorch"))
