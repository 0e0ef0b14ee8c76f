"""Building pools: LoRAs that PEFT agrees with, blends that equal what was trained, and data that no pool can be made of."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from crayon_runtime.affinity import alpha as alpha_of
from crayon_runtime.errors import InvalidInput, OutputError
from crayon_runtime.pool import Pool
from crayon_server import models, training
from crayon_server.cli import pool as cli_pool
from crayon_server.data import phone_assistant as pa
from crayon_server.pool.blend import blend
from crayon_server.pool.build import Pair, Settings, build, locate, read_texts
from crayon_server.pool.joint import JointLoras
from tests.support import needs

torch = needs.module("torch")
transformers = needs.module("transformers")
peft = needs.module("peft")
safetensors = needs.module("safetensors.numpy")

NANO = models.load_nano()
SOURCES = pa.benchmark().train[:6]
TEXTS = [e for user in SOURCES for e in user.examples[:8]]
GROUPS = [user.name for user in SOURCES for _ in range(8)]
TINY = Settings(adapters=3, rank=2, steps=4, batch_size=8, threads=1)
ALPHA = [0.6, 0.3, 0.1]


def base():
    return models.load(NANO, torch.float32)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("pools") / "tiny"
    steps: list[int] = []
    pool = build(NANO, TEXTS, out, groups=GROUPS, settings=TINY, on_step=lambda step, _: steps.append(step))
    return SimpleNamespace(path=out, pool=pool, steps=steps)


@pytest.fixture(scope="module")
def ids():
    tokenizer = transformers.AutoTokenizer.from_pretrained(NANO)
    return training.collate([training.tokenize(tokenizer, e) for e in TEXTS[:4]], 0, 0.0).ids


@pytest.fixture(scope="module")
def joint(built):
    """The pool's LoRAs, attached to a base as they are in training: (alpha, ids) -> logits."""
    model, pool = base(), built.pool
    loras = JointLoras(model, 3, 2, scale=pool.manifest.scale, seed=0)
    with torch.no_grad():
        for module, (a, b) in loras.matrices.items():
            for n in range(3):
                a[n], b[n] = (torch.from_numpy(np.array(matrix)) for matrix in pool.lora(n)[module])

    def logits(alpha, ids):
        loras.alpha = None if alpha is None else torch.tensor([alpha] * len(ids), dtype=torch.float32)
        with torch.inference_mode():
            return model(input_ids=ids).logits

    return logits


def through_peft(folder, ids):
    with torch.inference_mode():
        return peft.PeftModel.from_pretrained(base(), folder).eval()(input_ids=ids).logits


# The pool


def test_a_pool_opens_and_says_how_it_was_built(built) -> None:
    pool = Pool.open(built.path, verify=True)
    assert built.steps == [1, 2, 3, 4]
    manifest = pool.manifest
    assert (manifest.adapters, manifest.rank, manifest.scale, manifest.dimensions) == (3, 2, 2.0, 5)
    assert manifest.grouped
    assert manifest.base_fingerprint == training.base_fingerprint(NANO)
    assert manifest.embedding.residual
    assert manifest.embedding.tap_layer == 4
    assert manifest.settings["recipe"] == "groups"
    assert manifest.settings["seed"] == 0
    assert len(manifest.targets) == 7 * 4
    assert [line["cluster"] for line in pool.typical()] == sorted([0, 1, 2] * 32)


def test_no_path_of_the_machine_is_written(built) -> None:
    assert (
        json.loads((built.path / "adapters/000/adapter_config.json").read_text())["base_model_name_or_path"] == "nano"
    )
    assert str(NANO.parent).encode() not in (built.path / "pool.json").read_bytes()


@pytest.mark.parametrize("n", range(3))
def test_peft_loads_each_lora(built, joint, ids, n: int) -> None:
    one_hot = [float(i == n) for i in range(3)]
    expected = through_peft(built.path / f"adapters/{n:03d}", ids)
    torch.testing.assert_close(joint(one_hot, ids), expected, atol=1e-4, rtol=1e-4)
    assert (expected - joint(None, ids)).abs().max() > 1e-2


def test_a_text_of_a_batch_has_its_own_alpha(ids) -> None:
    model = base()
    loras = JointLoras(model, 3, 2, scale=2.0, seed=0)
    with torch.no_grad():
        for _, b in loras.matrices.values():
            b.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        loras.alpha = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0.2, 0.3, 0.5], [0, 1, 0]])
        together = model(input_ids=ids).logits
        rows, loras.alpha = loras.alpha, loras.alpha[2:3]
        torch.testing.assert_close(model(input_ids=ids[2:3]).logits, together[2:3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[1], before[1])
    assert rows.shape == (4, 3)
    loras.remove()
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_a_build_is_the_same_again(built, tmp_path) -> None:
    again = build(NANO, TEXTS, tmp_path / "tiny", groups=GROUPS, settings=TINY)
    assert again.manifest.version == built.pool.manifest.version
    other = build(NANO, TEXTS, tmp_path / "other", groups=GROUPS, settings=dataclasses.replace(TINY, seed=1))
    assert other.manifest.version != built.pool.manifest.version


@pytest.mark.parametrize("recipe", ["paper", "residual"])
def test_recipes_without_groups(tmp_path, recipe) -> None:
    pool = build(NANO, TEXTS, tmp_path / "p", settings=dataclasses.replace(TINY, steps=1, recipe=recipe))
    assert not pool.manifest.grouped
    assert pool.manifest.embedding.residual == (recipe == "residual")
    assert pool.manifest.embedding.part == ("all" if recipe == "paper" else "answer")


def test_alpha_of_a_group_is_its_own(built) -> None:
    """Texts of a source are nearer to what the source was trained with than to uniform weights."""
    from crayon_server.pool import indicators

    tokenizer, model = transformers.AutoTokenizer.from_pretrained(NANO), base()
    tokens = [training.tokenize(tokenizer, e) for e in TEXTS]
    embedded = indicators.embed(model, tokens, 4, pad_id=0)
    manifest = built.pool.manifest
    alphas = np.stack(
        [
            alpha_of(built.pool.projection, manifest.weighting, embedded.prompt[i : i + 8], embedded.answer[i : i + 8])
            for i in range(0, len(TEXTS), 8)
        ]
    )
    np.testing.assert_allclose(alphas.sum(1), 1, atol=1e-5)
    assert set(alphas.argmax(1)) == {0, 1, 2}


# Blends


@pytest.mark.parametrize("alpha", [ALPHA, [0.0, 1.0, 0.0]])
def test_a_blended_adapter_answers_as_the_joint_model(built, joint, ids, tmp_path, alpha) -> None:
    blended = blend(built.pool, alpha, tmp_path / "alice")
    assert (blended.mode, blended.rank) == ("separate", 2)
    torch.testing.assert_close(through_peft(tmp_path / "alice", ids), joint(alpha, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode, rank", [("concat", None), ("svd", 3), ("svd", 6)])
def test_other_modes_are_what_they_say(built, tmp_path, mode, rank) -> None:
    blended = blend(built.pool, ALPHA, tmp_path / "alice", mode=mode, rank=rank)
    adapter = needs.module("crayon_export.lora").PeftAdapter.open(tmp_path / "alice")
    assert adapter.base_fingerprint == built.pool.manifest.base_fingerprint
    module = built.pool.manifest.targets[0]
    exact = sum(w * built.pool.lora(n)[module][1] @ built.pool.lora(n)[module][0] for n, w in enumerate(ALPHA))
    product = adapter.b(module) @ adapter.a(module)
    error = np.linalg.norm(product - exact) / np.linalg.norm(exact)
    assert adapter.scale(module) == built.pool.manifest.scale
    assert error < 1e-5 if rank != 3 else 0 < error < 1
    assert blended.error < 1e-5 or rank == 3


def test_alphas_that_cannot_be_blended(built, tmp_path) -> None:
    for alpha in ([0.5, 0.5], [float("nan"), 0, 0], [-1, 0, 0], "x"):
        with pytest.raises(InvalidInput):
            blend(built.pool, alpha, tmp_path / "alice")
    assert list(tmp_path.iterdir()) == []


# Data that no pool can be made of


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "no texts"),
        (TEXTS[:1], "1 texts are too few for 3 adapters"),
        (TEXTS[:2], "2 texts are too few"),
        (TEXTS[:1] * 6, "do not differ"),
        ([*TEXTS[:1], *TEXTS[1:2] * 5], "3 clusters of 2 different texts"),
        ([*TEXTS[:5], Pair("hello\n", "")], "completion is empty"),
    ],
)
def test_data_without_a_pool_in_it(tmp_path, texts, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        build(NANO, texts, tmp_path / "p", settings=TINY)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_do_not_fit(tmp_path) -> None:
    with pytest.raises(InvalidInput, match="no text has"):
        build(NANO, TEXTS, tmp_path / "p", settings=dataclasses.replace(TINY, recipe="groups"))
    with pytest.raises(InvalidInput, match="two groups"):
        build(NANO, TEXTS, tmp_path / "p", groups=["one"] * len(TEXTS), settings=TINY)
    with pytest.raises(InvalidInput, match="tap layer 9"):
        build(NANO, TEXTS, tmp_path / "p", settings=dataclasses.replace(TINY, tap_layer=9))
    assert list(tmp_path.iterdir()) == []


def test_a_pool_is_replaced_only_when_asked(built) -> None:
    with pytest.raises(OutputError, match="exists"):
        build(NANO, TEXTS, built.path, settings=TINY)


# Commands


def invoke(command, *arguments: object):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def write_lines(path, *, groups: bool = True):
    lines = [{"prompt": e.prompt, "completion": e.completion} for e in TEXTS]
    if groups:
        lines = [line | {"group": group} for line, group in zip(lines, GROUPS, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_build_and_blend_on_the_command_line(built, tmp_path) -> None:
    data = write_lines(tmp_path / "d.jsonl")
    options = ["--adapters", 3, "--rank", 2, "--steps", 4, "--batch-size", 8, "--threads", 1]
    result = invoke(
        cli_pool.pool, "build", "--model", NANO, "--data", data, "--out", tmp_path / "tiny", *options, "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["version"] == built.pool.manifest.version
    (tmp_path / "alpha.json").write_text(json.dumps(ALPHA))
    command = (tmp_path / "tiny", "--weights", tmp_path / "alpha.json", "--out", tmp_path / "alice", "--json")
    result = invoke(cli_pool.blend, *command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["mode"] == "separate"
    assert (tmp_path / "alice/adapter_config.json").is_file()


def test_a_build_with_every_option(tmp_path) -> None:
    rows = [{"question": e.prompt, "answer": e.completion} for e in [*TEXTS, Pair("buy eggs " * 40 + "\n", "x")]]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke(
        cli_pool.pool, "build", "--model", NANO, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "p",
        "--fields", "prompt=question,completion=answer", "--adapters", 3, "--rank", 2, "--steps", 3, "--batch-size", 8,
        "--recipe", "paper", "--weighting", "topk", "--top-k", 2, "--sample", 5, "--max-tokens", 64, "--threads", 1,
        "--gradient-accumulation", 2, "--gradient-checkpointing", "--work", tmp_path / "w", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "1 of 49 texts are longer than 64 tokens" in result.stderr
    assert "recipe paper (the paper's, PCA of each text's mean state): 48 texts, 3 clusters" in result.stderr
    pool = Pool.open(tmp_path / "p", verify=True)
    assert (pool.manifest.weighting.kind, pool.manifest.weighting.top_k) == ("topk", 2)
    settings = pool.manifest.settings
    assert (settings["texts"], settings["left_out"], settings["sample"], settings["pca"]) == (48, 1, 5, "exact")
    assert settings["versions"]["torch"] == torch.__version__.partition("+")[0]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "p/loss.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert settings["final_loss"] == pytest.approx(np.mean(losses))
    assert (tmp_path / "p/loss.svg").read_text().count("<svg") == 1
    assert {file.path for file in pool.manifest.files} >= {"loss.jsonl", "loss.svg"}
    assert (tmp_path / "w/texts.jsonl").is_file()


def test_nothing_stays_beside_a_pool_that_was_not_asked_for(tmp_path) -> None:
    """The work folder goes at the end, and where nothing was computed; it stays where something was."""
    data, out = write_lines(tmp_path / "d.jsonl"), tmp_path / "p"
    command = ("build", "--model", NANO, "--data", data, "--out", out, "--batch-size", 8, "--steps", 1, "--threads", 1)
    invoke(cli_pool.pool, *command[:4], tmp_path / "absent.jsonl", *command[5:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl"]
    for option in ("--gradient-accumulation", "--adapters"):
        assert isinstance(invoke(cli_pool.pool, *command, option, 49).exception, InvalidInput)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl"]
    data.write_text(data.read_text().splitlines(keepends=True)[0] * 48)
    result = invoke(cli_pool.pool, *command, "--no-groups")
    assert "do not differ" in str(result.exception)
    write_lines(data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "p.work"]
    assert invoke(cli_pool.pool, *command, "--adapters", 3).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "p"]


def test_a_large_build_takes_its_approximate_forms(monkeypatch, tmp_path) -> None:
    from crayon_server.pool import indicators

    monkeypatch.setattr(indicators, "LARGEST_PCA", 100)
    monkeypatch.setattr(indicators, "LARGEST_K_MEANS", 10)
    monkeypatch.setattr(indicators, "BLOCK", 24)
    settings = dataclasses.replace(TINY, steps=1, recipe="residual", dimensions=4)
    pool = build(NANO, TEXTS, tmp_path / "p", settings=settings, work=tmp_path / "work")
    assert pool.manifest.settings["pca"] == "in blocks"
    assert sum(pool.manifest.settings["sizes"]) == len(TEXTS)


def test_groups_are_used_where_every_line_has_one(tmp_path) -> None:
    _, groups = read_texts(write_lines(tmp_path / "with.jsonl"))
    assert groups == GROUPS
    without = write_lines(tmp_path / "without.jsonl", groups=False)
    texts, groups = read_texts(without)
    assert groups is None
    assert len(texts) == len(TEXTS)
    result = invoke(cli_pool.pool, "build", "--model", NANO, "--data", without, "--out", tmp_path / "p", "--groups")
    assert isinstance(result.exception, InvalidInput)


@pytest.mark.parametrize(
    "content", ["", "\n\n", "{", '{"prompt": "a"}', '{"prompt": 1, "completion": "b"}', "[]", "\xff"]
)
def test_lines_that_are_no_texts(tmp_path, content: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(InvalidInput):
        read_texts(tmp_path / "d.jsonl")
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_texts(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}', "[0.1]", '["x", 1, 2]'])
def test_weights_that_are_no_alpha(built, tmp_path, content: str) -> None:
    (tmp_path / "alpha.json").write_text(content)
    result = invoke(cli_pool.blend, built.path, "--weights", tmp_path / "alpha.json", "--out", tmp_path / "alice")
    assert isinstance(result.exception, InvalidInput)


def test_locating_repeats_itself() -> None:
    from crayon_server.pool.indicators import Embeddings

    rng = np.random.default_rng(0)
    embeddings = Embeddings(*(rng.standard_normal((48, 16)).astype(np.float32) for _ in range(3)))
    first, second = (locate(embeddings, GROUPS, TINY) for _ in range(2))
    np.testing.assert_array_equal(first.projection.indicators, second.projection.indicators)
