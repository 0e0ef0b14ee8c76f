"""Pools of LoRAs that were trained elsewhere: brought to one form without changing what they compute, and grown one by one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from crayon_runtime.affinity import Weighting, alpha
from crayon_runtime.errors import (
    AdapterError,
    CheckpointError,
    CrayonError,
    InvalidInput,
    OutputError,
    UnsupportedModel,
)
from crayon_runtime.pool import Pool, write_adapter_bundle
from crayon_server import models, training
from crayon_server.cli import pool as cli_pool
from crayon_server.data import phone_assistant as pa
from crayon_server.pool import indicators
from crayon_server.pool.blend import blend
from crayon_server.pool.build import Pair
from crayon_server.pool.imported import Source, add_lora, import_pool
from tests.support import needs

torch = needs.module("torch")
transformers = needs.module("transformers")
peft = needs.module("peft")

NANO = models.load_nano()
SEEN = pa.benchmark().seen[:4]
ALL = [
    [Pair(e.prompt, e.completion) for u in pa.benchmark().train if u.convention == c for e in u.examples] for c in SEEN
]
TEXTS = [texts[:: len(texts) // 40][:40] for texts in ALL]
"""Of four conventions. The first three are in the pool that most tests use; the fourth comes later."""
KINDS = [
    {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    {"r": 3, "lora_alpha": 24, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["down_proj", "up_proj"],
        "rank_pattern": {"layers.1.mlp.down_proj": 5},
        "alpha_pattern": {"up_proj": 7},
    },
    {"r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]},
]


def base():
    return models.load(NANO, torch.float32)


def write_lora(path: Path, seed: int, dtype=torch.float32, model=None, **config: object) -> Path:
    """As PEFT saves it: random, and large enough that its logits differ from the base's."""
    torch.manual_seed(seed)
    made = peft.get_peft_model(
        model or base(),
        peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config),
        autocast_adapter_dtype=False,
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.2)
            if "lora_" in name:
                parameter.data = parameter.to(dtype)
    made.save_pretrained(path, save_embedding_layers=False)
    return path


def write_texts(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"prompt": t.prompt, "completion": t.completion}) + "\n" for t in texts))
    return path


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> SimpleNamespace:
    """Four LoRAs, a pool of the first three, and that pool with the fourth."""
    folder = tmp_path_factory.mktemp("shelf")
    loras = [write_lora(folder / f"lora-{n}", n, **kind) for n, kind in enumerate(KINDS)]
    sources = [Source(lora, texts) for lora, texts in zip(loras, TEXTS, strict=True)]
    pool = import_pool(NANO, sources[:3], folder / "pool", threads=1)
    grown = add_lora(pool, NANO, sources[3], folder / "grown", threads=1)
    return SimpleNamespace(folder=folder, loras=loras, sources=sources, pool=pool, grown=grown)


@pytest.fixture(scope="module")
def ids():
    tokenizer = transformers.AutoTokenizer.from_pretrained(NANO)
    return training.collate([training.tokenize(tokenizer, texts[0]) for texts in TEXTS], 0, 0.0).ids


def logits(adapter: Path | None, ids):
    model = base() if adapter is None else peft.PeftModel.from_pretrained(base(), adapter).eval()
    with torch.inference_mode():
        return model(input_ids=ids).logits


def by_hand(pool: Pool, alphas, ids):
    """The base with sum_n alpha_n s B_n A_n added to its weights."""
    model = base()
    linears = dict(model.named_modules())
    with torch.no_grad():
        for n, weight in enumerate(alphas):
            for module, (a, b) in pool.lora(n).items():
                delta = b.astype(np.float64) @ a.astype(np.float64) * pool.manifest.scale * weight
                linears[module].weight += torch.from_numpy(delta).float()
    with torch.inference_mode():
        return model(input_ids=ids).logits


# Import


def test_an_imported_pool_says_what_it_is(shelf) -> None:
    manifest = Pool.open(shelf.pool.path, verify=True).manifest
    assert (manifest.adapters, manifest.rank, manifest.scale) == (3, 5, 1.0)
    assert (manifest.blend, manifest.weighting) == ("svd", Weighting("softmax", 0.2))
    assert manifest.base_fingerprint == training.base_fingerprint(NANO)
    assert manifest.settings["recipe"] == "imported"
    assert manifest.settings["sizes"] == [40, 40, 40]
    assert [lora["name"] for lora in manifest.settings["loras"]] == ["lora-0", "lora-1", "lora-2"]
    assert manifest.settings["told_apart"] > 0.6
    assert [text["cluster"] for text in shelf.pool.typical()] == sorted([0, 1, 2] * 32)
    assert not any(str(shelf.folder).encode() in path.read_bytes() for path in shelf.pool.path.rglob("*.json"))


@pytest.mark.parametrize("n", range(4))
def test_each_lora_answers_as_it_did(shelf, ids, n: int) -> None:
    """Whatever its rank, scale and targets were: PEFT on the original, PEFT on the pool's folder, and weights merged by hand."""
    pool = shelf.grown
    original, ours = logits(shelf.loras[n], ids), logits(pool.path / f"adapters/{n:03d}", ids)
    torch.testing.assert_close(ours, original, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_hand(pool, np.eye(4)[n], ids), original, atol=1e-4, rtol=1e-4)
    assert (original - logits(None, ids)).abs().max() > 0.1


def test_a_blend_is_the_sum_of_the_products(shelf, ids, tmp_path) -> None:
    alphas = [0.5, 0.0, 0.25, 0.25]
    blended = blend(shelf.grown, alphas, tmp_path / "alice", mode="concat")
    assert blended.rank == 3 * shelf.grown.manifest.rank
    torch.testing.assert_close(logits(tmp_path / "alice", ids), by_hand(shelf.grown, alphas, ids), atol=1e-4, rtol=1e-4)


def test_a_blend_is_of_the_rank_of_one_lora_unless_told_otherwise(shelf) -> None:
    blended = shelf.grown.blend([0.5, 0.0, 0.25, 0.25])
    assert (blended.mode, blended.rank) == ("svd", shelf.grown.manifest.rank)
    assert 0 < blended.error < 1
    assert shelf.grown.blend([0, 0, 1, 0]).error < 1e-5  # one LoRA needs no more than its own rank


def test_what_is_already_of_one_form_stays_to_the_bit(shelf, tmp_path) -> None:
    loras = [
        write_lora(tmp_path / f"{n}", n, torch.float16, r=2, lora_alpha=6, target_modules=["q_proj"]) for n in range(2)
    ]
    pool = import_pool(
        NANO, [Source(lora, texts) for lora, texts in zip(loras, TEXTS, strict=False)], tmp_path / "pool"
    )
    assert (pool.manifest.rank, pool.manifest.scale) == (2, 3.0)
    stored = needs.module("safetensors.numpy").load_file(loras[1] / "adapter_model.safetensors")
    for module, (a, b) in pool.lora(1).items():
        assert a.dtype == b.dtype == np.float16
        np.testing.assert_array_equal(a, stored[f"base_model.model.{module}.lora_A.weight"])
        np.testing.assert_array_equal(b, stored[f"base_model.model.{module}.lora_B.weight"])


def test_alpha_finds_the_lora_whose_texts_they_are(shelf) -> None:
    """Of other texts than those that the pool was made with, ten at a time; the fourth LoRA was added."""
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(NANO), base()
    manifest, rng = shelf.grown.manifest, np.random.default_rng(0)
    found = []
    for n, texts in enumerate(ALL):
        others = [text for text in texts if text not in TEXTS[n]]
        for _ in range(8):
            tokens = [training.tokenize(tokenizer, others[i]) for i in rng.choice(len(others), 10, replace=False)]
            embedded = indicators.embed(model, tokens, 4, pad_id=0)
            weights = alpha(shelf.grown.projection, manifest.weighting, embedded.prompt, embedded.answer)
            found.append(weights.argmax() == n)
    assert np.mean(found) > 0.85


def test_many_texts_of_one_lora_do_not_move_the_others(tmp_path) -> None:
    """With the mean of all texts as the origin, who brings most of them would lie there, in no direction."""
    from crayon_server.pool.imported import _locate

    rng = np.random.default_rng(0)

    def around(point, count):
        return indicators.Embeddings(
            *((point + 0.1 * rng.standard_normal((count, 6))).astype(np.float32) for _ in range(3))
        )

    points = np.eye(6)[:3]
    projection = _locate([around(points[0], 4000), around(points[1], 10), around(points[2], 10)], "paper", 4)
    for n, point in enumerate(points):
        assert projection.cosines(point.astype(np.float32)).argmax() == n
        assert projection.cosines(point.astype(np.float32)).max() > 0.9


@pytest.mark.parametrize("recipe, part, residual", [("groups", "answer", True), ("paper", "all", False)])
def test_other_projections(shelf, tmp_path, recipe, part, residual) -> None:
    pool = import_pool(NANO, shelf.sources[:3], tmp_path / "pool", recipe=recipe, threads=1)
    assert pool.manifest.settings["projection"] == recipe
    assert (pool.manifest.embedding.part, pool.manifest.embedding.residual) == (part, residual)


# Adding


def test_adding_leaves_the_others_as_they_are(shelf) -> None:
    old, new = shelf.pool, Pool.open(shelf.grown.path, verify=True)
    for n in range(3):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            path = f"adapters/{n:03d}/{name}"
            assert (old.path / path).read_bytes() == (new.path / path).read_bytes()
    np.testing.assert_array_equal(new.projection.indicators[:3], old.projection.indicators)
    for field in ("mean", "projection", "prompt_mean", "answer_mean", "ridge"):
        np.testing.assert_array_equal(getattr(new.projection, field), getattr(old.projection, field))
    assert new.typical()[: len(old.typical())] == old.typical()
    assert [text["cluster"] for text in new.typical()] == sorted([0, 1, 2, 3] * 32)


def test_a_grown_pool_is_a_newer_one(shelf) -> None:
    old, new = shelf.pool.manifest, shelf.grown.manifest
    assert new.version != old.version
    assert new.serial > old.serial
    assert new.name == old.name
    assert (new.adapters, new.settings["sizes"]) == (4, [40, 40, 40, 40])
    (added,) = new.settings["added"]
    assert (added["name"], added["adapter"], added["texts"]) == ("lora-3", 3, 40)
    assert 0 <= added["nearest"]["adapter"] < 3
    assert -1 <= added["nearest"]["cosine"] < 0.999


def test_alpha_of_the_smaller_pool_is_refused_by_the_grown_one(shelf) -> None:
    with pytest.raises(InvalidInput, match="4 adapters"):
        shelf.grown.blend([0.5, 0.5, 0.0])
    with pytest.raises(InvalidInput, match="3 adapters"):
        shelf.pool.blend([0.5, 0.5, 0.0, 0.0])


def test_a_pool_is_replaced_in_its_place(shelf, tmp_path) -> None:
    shutil.copytree(shelf.pool.path, tmp_path / "pool")
    pool = Pool.open(tmp_path / "pool", verify=True)
    with pytest.raises(OutputError, match="exists"):
        add_lora(pool, NANO, shelf.sources[3], pool.path)
    grown = add_lora(pool, NANO, shelf.sources[3], pool.path, threads=1, replace=True)
    assert Pool.open(tmp_path / "pool").manifest.version == grown.manifest.version == shelf.grown.manifest.version
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]


def test_a_pool_that_cannot_grow_stays_as_it_is(shelf, tmp_path) -> None:
    shutil.copytree(shelf.pool.path, tmp_path / "pool")
    pool = Pool.open(tmp_path / "pool")
    wide = write_lora(tmp_path / "wide", 9, r=6, lora_alpha=6, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="rank 6; the pool's LoRAs have 5"):
        add_lora(pool, NANO, Source(wide, TEXTS[3]), pool.path, replace=True)
    assert Pool.open(tmp_path / "pool", verify=True).manifest == shelf.pool.manifest


def test_a_module_that_the_pool_does_not_adapt(shelf, tmp_path) -> None:
    loras = [write_lora(tmp_path / f"{n}", n, r=2, lora_alpha=6, target_modules=["q_proj"]) for n in range(2)]
    pool = import_pool(
        NANO, [Source(lora, texts) for lora, texts in zip(loras, TEXTS, strict=False)], tmp_path / "pool"
    )
    other = write_lora(tmp_path / "other", 3, r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    with pytest.raises(AdapterError, match=r"adapts model.layers.0.self_attn.v_proj, which the pool's LoRAs do not"):
        add_lora(pool, NANO, Source(other, TEXTS[2]), tmp_path / "grown")


def test_a_lora_can_be_added_to_a_pool_that_was_built(shelf, ids, tmp_path) -> None:
    from crayon_server.pool.build import Settings, build

    settings = Settings(adapters=2, rank=3, steps=2, batch_size=8, threads=1)
    built = build(NANO, [*TEXTS[0][:16], *TEXTS[1][:16]], tmp_path / "built", settings=settings)
    grown = add_lora(built, NANO, shelf.sources[1], tmp_path / "grown", threads=1)
    assert grown.manifest.blend == "separate"
    assert grown.manifest.settings["recipe"] == "residual"
    assert sum(grown.manifest.settings["sizes"]) == 32 + 40
    others = {
        file.path: file.sha256 for file in built.manifest.files if not file.path.endswith("projection.safetensors")
    }
    assert others.pop("typical.jsonl")
    assert others.items() <= {file.path: file.sha256 for file in grown.manifest.files}.items()
    torch.testing.assert_close(
        logits(grown.path / "adapters/002", ids), logits(shelf.loras[1], ids), atol=1e-4, rtol=1e-4
    )
    # One weight of 1 has no cross terms, so that "separate" is this LoRA too.
    blend(grown, [0, 0, 1], tmp_path / "alice")
    torch.testing.assert_close(logits(tmp_path / "alice", ids), logits(shelf.loras[1], ids), atol=1e-4, rtol=1e-4)


def test_a_blend_names_the_grown_pool(shelf, tmp_path) -> None:
    grown = shelf.grown
    bundle = write_adapter_bundle(
        grown.blend([0, 0, 0, 1]), tmp_path / "alice", name="alice", base_fingerprint=grown.manifest.base_fingerprint,
        pool=grown.manifest.origin,
    )  # fmt: skip
    assert bundle.as_adapter.pool.version == grown.manifest.version
    assert bundle.as_adapter.pool.serial == grown.manifest.serial


# What no pool can be made of


def test_a_pool_of_one(shelf, tmp_path) -> None:
    for count in (0, 1):
        with pytest.raises(InvalidInput, match=f"made of {count} LoRA"):
            import_pool(NANO, shelf.sources[:count], tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_one_lora_twice(shelf, tmp_path) -> None:
    shutil.copytree(shelf.loras[0], tmp_path / "copy")
    with pytest.raises(InvalidInput, match="the same LoRA as"):
        import_pool(NANO, [shelf.sources[0], Source(tmp_path / "copy", TEXTS[1])], tmp_path / "p")
    with pytest.raises(InvalidInput, match="it is LoRA 3 of the pool already"):
        add_lora(shelf.grown, NANO, shelf.sources[3], tmp_path / "p", threads=1)
    assert not (tmp_path / "p").exists()


def test_one_data_set_twice(shelf, tmp_path) -> None:
    twice = [Source(lora, TEXTS[0]) for lora in shelf.loras[:2]]
    for recipe in ("residual", "groups", "paper"):
        with pytest.raises(InvalidInput, match="lie amid|lie where"):
            import_pool(NANO, twice, tmp_path / "p", recipe=recipe, threads=1)
    lora = write_lora(tmp_path / "lora", 8, r=2, lora_alpha=2, target_modules=["q_proj"])
    with pytest.raises(InvalidInput, match="lie where those of LoRA 1 of the pool do"):
        add_lora(shelf.pool, NANO, Source(lora, TEXTS[1]), tmp_path / "p", threads=1)


def test_texts_that_are_none(shelf, tmp_path) -> None:
    for texts, message in (([], "no texts"), ([Pair("a\n", "b"), Pair("a\n", "")], "completion is empty")):
        sources = [shelf.sources[0], Source(shelf.loras[1], texts)]
        with pytest.raises(InvalidInput, match=message):
            import_pool(NANO, sources, tmp_path / "p")
        with pytest.raises(InvalidInput, match=message):
            add_lora(shelf.pool, NANO, Source(shelf.loras[3], texts), tmp_path / "p")
    with pytest.raises(InvalidInput, match="do not differ|lie where|lie amid"):
        import_pool(NANO, [Source(lora, [Pair("a\n", "b")]) for lora in shelf.loras[:2]], tmp_path / "p", threads=1)
    assert list(tmp_path.iterdir()) == []


def test_loras_of_another_base(shelf, tmp_path) -> None:
    config = transformers.AutoConfig.from_pretrained(NANO)
    config.num_hidden_layers += 1
    deeper = write_lora(
        tmp_path / "deeper",
        0,
        model=transformers.AutoModelForCausalLM.from_config(config),
        r=2,
        target_modules=["q_proj"],
    )
    with pytest.raises(AdapterError, match=r"model.layers.4.self_attn.q_proj, which is not a linear layer"):
        import_pool(NANO, [shelf.sources[0], Source(deeper, TEXTS[1])], tmp_path / "p")
    save, load = needs.module("safetensors.numpy").save_file, needs.module("safetensors.numpy").load_file
    shutil.copytree(shelf.loras[1], tmp_path / "told")
    weights = tmp_path / "told/adapter_model.safetensors"
    save(load(weights), weights, metadata={"base_fingerprint": "0" * 64})
    for run in (
        lambda: import_pool(NANO, [shelf.sources[0], Source(tmp_path / "told", TEXTS[1])], tmp_path / "p"),
        lambda: add_lora(shelf.pool, NANO, Source(tmp_path / "told", TEXTS[3]), tmp_path / "p"),
    ):
        with pytest.raises(AdapterError, match="trained on another base"):
            run()


def test_a_pool_of_another_base(shelf, tmp_path) -> None:
    model = base()
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="is for another base"):
        add_lora(shelf.pool, tmp_path / "other", shelf.sources[3], tmp_path / "p")


def test_adapters_that_are_no_plain_lora(shelf, tmp_path) -> None:
    dora = write_lora(tmp_path / "dora", 0, r=2, target_modules=["q_proj"], use_dora=True)
    head = write_lora(tmp_path / "head", 0, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    for folder in (dora, head):
        with pytest.raises(UnsupportedModel):
            import_pool(NANO, [shelf.sources[0], Source(folder, TEXTS[1])], tmp_path / "p")


def test_numbers_that_are_none(shelf, tmp_path) -> None:
    save, load = needs.module("safetensors.numpy").save_file, needs.module("safetensors.numpy").load_file
    for value, error in ((np.nan, CheckpointError), (3e38, AdapterError)):  # the second overflows at another scale
        folder = tmp_path / str(value)
        shutil.copytree(shelf.loras[1], folder)
        tensors = load(folder / "adapter_model.safetensors")
        next(t for name, t in tensors.items() if "lora_B" in name)[0] = value
        save(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(error):
            import_pool(NANO, [shelf.sources[0], Source(folder, TEXTS[1])], tmp_path / "p", threads=1)
        with pytest.raises(error):
            add_lora(shelf.pool, NANO, Source(folder, TEXTS[3]), tmp_path / "p", threads=1)
    assert not (tmp_path / "p").exists()


def test_more_neighbours_than_loras(shelf, tmp_path) -> None:
    with pytest.raises(InvalidInput, match="the 4 nearest of 3"):
        import_pool(NANO, shelf.sources[:3], tmp_path / "p", weighting=Weighting("topk", top_k=4))


def test_a_full_disk_leaves_the_old_pool(shelf) -> None:
    with needs.tmpfs(shelf.pool.manifest.files[0].size + 600_000) as disk:
        shutil.copytree(shelf.pool.path, disk / "pool")
        pool = Pool.open(disk / "pool")
        with pytest.raises(OutputError, match="full"):
            add_lora(pool, NANO, shelf.sources[3], pool.path, threads=1, replace=True)
        assert Pool.open(disk / "pool", verify=True).manifest == shelf.pool.manifest
        assert [path.name for path in disk.iterdir()] == ["pool"]


# Commands


def invoke(*arguments: object):
    return CliRunner().invoke(cli_pool.pool, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("data: of several")
    return [write_texts(folder / f"{n}:texts=, 1.jsonl", texts) for n, texts in enumerate(TEXTS)]


def test_import_add_and_inspect_on_the_command_line(shelf, data, tmp_path) -> None:
    """Paths with colons, commas and spaces are nothing special."""
    loras = [part for n in range(3) for part in ("--lora", shelf.loras[n], data[n])]
    result = invoke("import", "--model", NANO, *loras, "--out", tmp_path / "pool", "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["version"] == shelf.pool.manifest.version
    one_more = ("--lora", shelf.loras[3], data[3])
    result = invoke("add", tmp_path / "pool", "--model", NANO, *one_more, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["version"] == shelf.grown.manifest.version
    result = invoke("inspect", tmp_path / "pool")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "pool.html").is_file()


def test_a_grown_pool_beside_the_old_one(shelf, data, tmp_path) -> None:
    arguments = (
        "add",
        shelf.pool.path,
        "--model",
        NANO,
        "--lora",
        shelf.loras[3],
        data[3],
        "--out",
        tmp_path / "grown",
    )
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "LoRA 3; its texts lie nearest to those of LoRA" in result.stdout
    assert isinstance(invoke(*arguments).exception, OutputError)
    assert invoke(*arguments, "--force").exit_code == 0


def test_pairs_that_are_none(shelf, data, tmp_path) -> None:
    def imported(*pairs: object) -> BaseException | None:
        return invoke("import", "--model", NANO, *pairs, "--out", tmp_path / "p").exception

    good = ("--lora", shelf.loras[0], data[0])
    swapped = imported(*good, "--lora", data[1], shelf.loras[1])
    assert isinstance(swapped, InvalidInput)
    assert "first" in str(swapped.do)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    for pair in (
        (shelf.loras[1], empty),
        (shelf.loras[1], tmp_path / "absent.jsonl"),
        (shelf.loras[1], shelf.loras[1]),
        (shelf.loras[1], shelf.loras[1] / "adapter_model.safetensors"),
        (tmp_path / "absent", data[1]),
        (tmp_path, data[1]),
        (NANO, data[1]),
        (shelf.pool.path, data[1]),
    ):
        assert isinstance(imported(*good, "--lora", *pair), CrayonError), pair
    assert invoke("import", "--model", NANO, "--lora", shelf.loras[0], "--out", tmp_path / "p").exit_code == 2
    assert invoke("import", "--model", NANO, "--out", tmp_path / "p").exit_code == 2
    assert isinstance(
        invoke(
            "import", "--model", shelf.pool.path, *good, "--lora", shelf.loras[1], data[1], "--out", tmp_path / "p"
        ).exception,
        CrayonError,
    )
    assert not (tmp_path / "p").exists()


def test_pools_that_cannot_grow(shelf, data, tmp_path) -> None:
    one = ("--model", NANO, "--lora", shelf.loras[3], data[3])
    for folder in (tmp_path / "absent", tmp_path, NANO, data[0]):
        assert isinstance(invoke("add", folder, *one).exception, CrayonError)
    two = invoke("add", shelf.pool.path, *one, "--lora", shelf.loras[2], data[2])
    assert isinstance(two.exception, InvalidInput)
    assert "one after the other" in str(two.exception.do)
    damaged = tmp_path / "damaged"
    shutil.copytree(shelf.pool.path, damaged)
    weights = damaged / "adapters/001/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    before = sorted(damaged.rglob("*"))
    refused = invoke("add", damaged, *one).exception
    assert "is damaged" in str(refused)
    assert sorted(damaged.rglob("*")) == before


@pytest.mark.parametrize("name", ["a pool", "-", "ünder", "x" * 200])
def test_names_that_no_pool_can_have(shelf, data, tmp_path, name: str) -> None:
    pairs = [part for n in range(2) for part in ("--lora", shelf.loras[n], data[n])]
    refused = invoke("import", "--model", NANO, *pairs, "--out", tmp_path / name).exception
    assert isinstance(refused, InvalidInput)
    assert "cannot be called" in str(refused)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "alpha, options, message",
    [
        ("[NaN, 0, 0, 0]", (), "weight 0 is nan"),
        ("[1e400, 0, 0, 0]", (), "weight 0 is inf"),
        ("[-0.1, 0, 0, 1]", (), "weight 0 is -0.1"),
        ("[1, 0, 0]", (), "4 adapters"),
        ("[[1, 0, 0, 0]]", (), "4 adapters"),
        ('{"alpha": [1, 0, 0, 0]}', (), "not a list of numbers|4 adapters"),
        ("[1, 0, 0, 0]", ("--mode", "concat", "--rank", 3), "a rank is for svd"),
        ("[1, 0, 0, 0]", ("--mode", "svd", "--rank", 99), "from 1 to 5"),
        ("[" * 100_000, (), "not JSON"),
        ("\ufeff[1, 0, 0, 0]\x00", (), "not JSON"),
    ],
)
def test_blends_that_are_none(shelf, tmp_path, alpha: str, options: tuple[object, ...], message: str) -> None:
    (tmp_path / "alpha.json").write_text(alpha)
    arguments = (shelf.grown.path, "--weights", tmp_path / "alpha.json", "--out", tmp_path / "alice", *options)
    refused = CliRunner().invoke(cli_pool.blend, [str(argument) for argument in arguments]).exception
    assert isinstance(refused, InvalidInput), refused
    assert re.search(message, str(refused))
    assert not (tmp_path / "alice").exists()


def test_a_blend_replaces_nothing_unless_told(shelf, tmp_path) -> None:
    (tmp_path / "alpha.json").write_text("[0, 0, 0, 0.5]")

    def blended(pool: Path, *options: str):
        arguments = (pool, "--weights", tmp_path / "alpha.json", "--out", tmp_path / "alice", *options)
        return CliRunner().invoke(cli_pool.blend, [str(argument) for argument in arguments])

    assert blended(shelf.grown.path).exit_code == 0
    assert isinstance(blended(shelf.grown.path).exception, OutputError)
    assert blended(shelf.grown.path, "--force").exit_code == 0
    assert isinstance(blended(tmp_path / "absent", "--force").exception, CrayonError)
    assert isinstance(blended(shelf.loras[0], "--force").exception, CrayonError)
    assert (tmp_path / "alice/adapter_config.json").is_file()
