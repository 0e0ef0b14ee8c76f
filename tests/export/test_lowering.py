"""Judge: ExecuTorch's own exporter, when it does all of its work. What its shortcuts leave out must not be seen in any byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from crayon_export.executorch import making, templates
from crayon_export.executorch.quiet import quiet
from crayon_export.executorch.storage import PER_ROW
from crayon_export.executorch.template import SUFFIX, AdapterSpec, Template, TemplateSpec, read_template
from crayon_runtime.affine import Affine
from crayon_runtime.errors import BackendError
from tests.programs import TEMPLATES
from tests.support import ROOT, needs

# Widths of which no group divides one, and the tap in between.
SPEC = TemplateSpec(
    layers=2, hidden_size=64, heads=2, kv_heads=1, head_size=40, ffn_size=96, vocab_size=320, tied_embeddings=False, norm_eps=1e-5,
    weights=Affine(4, 32), context_length=128, kv_dtype="fp32", tap_layer=1, bos=1, eos=[2, 3], adapter=AdapterSpec(4, ["down_proj", "q_proj"]),
)  # fmt: skip


def slowly(spec: TemplateSpec, path: Path) -> Template:
    """A template without shortcuts, made in a process of its own."""
    script = (
        "import sys; from pathlib import Path; from crayon_export.executorch.template import *; import msgspec;"
        "from crayon_export.executorch.lowering import make_template;"
        "spec = msgspec.json.decode(sys.argv[1], type=TemplateSpec);"
        "write_template(Path(sys.argv[2]), make_template(spec, quick=False))"
    )
    command = [sys.executable, "-c", script, msgspec.json.encode(spec).decode(), str(path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return read_template(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        msgspec.structs.replace(
            SPEC, weights=PER_ROW, kv_dtype="int8", adapter=None, layers=1, layer_repeats=2, bos=None, tied_embeddings=True
        ),
        msgspec.structs.replace(SPEC, weights=None, adapter=None, layers=1, tap_layer=0),
    ],
    ids=["int4, slots", "int8, int8 cache, shared layers", "float32"],
)  # fmt: skip
def test_shortcuts_are_not_seen_in_any_byte(spec: TemplateSpec, tmp_path: Path) -> None:
    needs.module("executorch")
    making.make_in_process(spec, tmp_path / "quick")
    quick, slow = read_template(tmp_path / "quick"), slowly(spec, tmp_path / "slow")
    for name, program in slow.programs.items():
        assert quick.programs[name].code == program.code, name
    assert quick == slow
    assert (tmp_path / "quick").read_bytes() == (tmp_path / "slow").read_bytes()
    if spec.adapter:  # so that a template with slots serves who wants none
        making.make_in_process(spec.without_slots, tmp_path / "without")
        without = read_template(tmp_path / "without").programs
        assert without == {name: quick.programs[name] for name in ("model", "single")}


def test_what_ships() -> None:
    specs = {}
    for path in templates.SHIPPED.glob(f"*{SUFFIX}"):
        spec = read_template(path).spec
        assert path.name == f"{spec.key}{SUFFIX}"
        specs[spec.layers, spec.hidden_size] = spec
    assert specs.keys() == {(4, 96), (30, 576)}


def test_templates_of_tests_are_found_by_their_specifications() -> None:
    paths = list(TEMPLATES.glob(f"*{SUFFIX}"))
    assert paths
    for path in paths:
        assert path.name == f"{read_template(path).spec.key}{SUFFIX}", (
            "make them again: python -m tests.programs templates"
        )


@pytest.mark.slow
def test_what_ships_is_what_the_exporter_makes_now(tmp_path: Path) -> None:
    """Of the smallest one; `make templates` makes the others and those of the tests, which takes minutes."""
    needs.module("executorch")
    from crayon_export.plan import plan
    from crayon_server.models import load_nano

    shipped = templates.shipped(templates.spec_of(plan(load_nano(), backend="executorch")))
    assert shipped
    assert shipped.programs.keys() == {"model", "single", "adapter"}
    making.make_in_process(shipped.spec, tmp_path / "now")
    assert (tmp_path / "now").read_bytes() == (templates.SHIPPED / f"{shipped.spec.key}{SUFFIX}").read_bytes()


def test_stages_are_told_and_a_failure_is_an_error_of_ours(tmp_path: Path) -> None:
    needs.module("executorch")
    stages: list[str] = []
    impossible = msgspec.structs.replace(SPEC, heads=3, kv_heads=2, layers=1)
    with pytest.raises(BackendError, match="ExecuTorch's exporter failed: "):
        making.make_in_process(impossible, tmp_path / "x", stages.append)
    assert stages[:2] == ["loading ExecuTorch's exporter", "tracing the model"]
    assert list(tmp_path.iterdir()) == []


def test_an_exporter_with_other_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needs.module("executorch")
    with quiet():
        from crayon_export.executorch import quick
    known = dict.fromkeys(quick._WRITTEN_FOR, "0")
    monkeypatch.setattr(quick, "_WRITTEN_FOR", known)
    with (
        pytest.raises(BackendError, match="is not what this version of crayon-edge knows") as refused,
        quick.quick(lambda _: None),
    ):
        pass
    assert "--official" in str(refused.value.do)
