"""Builds that are killed, and builds by several processes: what comes out is what one undisturbed process makes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from crayon_runtime.errors import IntegrityError, InvalidInput
from crayon_server import models, training
from crayon_server.checkpoints import Checkpoints
from crayon_server.data import phone_assistant as pa
from crayon_server.pool import embeddings
from crayon_server.pool.build import Settings, build
from tests.support import ROOT, needs

torch = needs.module("torch")
np = needs.module("numpy")
load_file = needs.module("safetensors.numpy").load_file

NANO = models.load_nano()
SOURCES = pa.benchmark().train[:6]
TEXTS = [e for user in SOURCES for e in user.examples[:8]]
GROUPS = [user.name for user in SOURCES for _ in range(8)]
TINY = Settings(adapters=3, rank=2, steps=6, batch_size=8, threads=1)

BUILD = """
    import os, signal, sys
    from pathlib import Path
    from crayon_server.pool import embeddings
    from crayon_server.pool.build import build
    from tests.server_tools.test_checkpoints import GROUPS, NANO, TEXTS, TINY

    def kill(after):
        def done(count, _loss=None):
            global left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        global left
        left = after
        return done

    folder, phase, after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    embeddings.PIECE = 16
    killing = {phase: kill(after)} if after else {}
    build(NANO, TEXTS, folder / "pool", groups=GROUPS, settings=TINY, work=folder / "work", checkpoint_every=2, **killing)
"""


def program(code: str, *arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = Path(str(arguments[0])) / "program.py"
    script.write_text(textwrap.dedent(code))
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> SimpleNamespace:
    """The pool of one process that nobody killed, and its losses."""
    embeddings.PIECE, piece = 16, embeddings.PIECE
    out = tmp_path_factory.mktemp("whole") / "pool"
    losses: list[float] = []
    pool = build(NANO, TEXTS, out, groups=GROUPS, settings=TINY, on_step=lambda _, loss: losses.append(loss))
    embeddings.PIECE = piece
    return SimpleNamespace(pool=pool, losses=losses)


def hashes(pool, kind: str) -> dict[str, str]:
    return {file.path: file.sha256 for file in pool.manifest.files if kind in file.path}


def distance(pair, expected) -> float:
    """Relative, and of whole matrices: Adam makes a step of full size of a gradient that is nothing but rounding."""
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(pair, expected, strict=True))


@pytest.mark.slow
def test_a_build_that_is_killed_again_and_again_ends_as_one_that_is_not(whole, tmp_path, monkeypatch) -> None:
    """Twice while it embeds and trains; the third goes on from the second's checkpoint, and all bits are the same."""
    monkeypatch.setattr(embeddings, "PIECE", 16)
    for phase, after in (("on_texts", 2), ("on_step", 5)):
        done = program(BUILD, tmp_path, phase, after)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "pool").exists()
    counts: list[int] = []
    steps: list[float] = []
    pool = build(
        NANO, TEXTS, tmp_path / "pool", groups=GROUPS, settings=TINY, work=tmp_path / "work", checkpoint_every=2,
        on_texts=counts.append, on_step=lambda _, loss: steps.append(loss),
    )  # fmt: skip
    assert counts == [48]  # nothing was embedded again
    assert steps == whole.losses
    assert hashes(pool, "adapters") == hashes(whole.pool, "adapters")
    assert hashes(pool, "loss.svg") == hashes(whole.pool, "loss.svg") != {}


def test_embedding_goes_on_after_the_last_piece(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(embeddings, "PIECE", 16)

    class Stop(Exception):
        pass

    def stop(_: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        build(NANO, TEXTS, tmp_path / "p", settings=TINY, work=tmp_path / "work", on_texts=stop)
    counts: list[int] = []
    settings = dataclasses.replace(TINY, steps=1)
    build(NANO, TEXTS, tmp_path / "p", settings=settings, work=tmp_path / "work", on_texts=counts.append)
    assert counts == [16, 16, 16]
    counts.clear()
    build(NANO, TEXTS[:40], tmp_path / "q", settings=settings, work=tmp_path / "work", on_texts=counts.append)
    assert counts == [16, 16, 8]  # other texts are embedded from the beginning


PROCESSES = """
    import sys
    import dataclasses
    import numpy as np, torch
    from pathlib import Path
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from transformers import AutoTokenizer
    from crayon_server import models, training
    from crayon_server.pool import data, embeddings
    from crayon_server.pool.build import build
    from crayon_server.pool.joint import JointLoras
    from tests.server_tools.test_checkpoints import ALPHAS, NANO, OPTIONS, PAPER, TEXTS

    folder = Path(sys.argv[1])
    place = training.accelerator()
    assert place.num_processes == 2
    settings = dataclasses.replace(PAPER, gradient_accumulation=2)
    build(NANO, TEXTS, folder / "pool", settings=settings, work=folder / "work", place=place)

    # accelerate configures FSDP for GPUs only; the sharding itself runs on CPUs too
    place.state.distributed_type = DistributedType.FSDP
    place.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, cpu_ram_efficient_loading=False,
        auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    model = models.load(NANO, torch.float32)
    size = sum(p.numel() for p in model.parameters())
    model = training.put(model, place)
    assert sum(p.to_local().numel() for p in model.parameters()) < 0.51 * size
    corpus = data.Corpus(AutoTokenizer.from_pretrained(NANO), TEXTS[:33], 512)
    embedded = embeddings.embed(embeddings.with_model(model, corpus, 4, pad_id=0), corpus, place)
    loras = JointLoras(model, 3, 2, scale=2.0, seed=0)
    losses = loras.train(corpus, lambda batch, _: ALPHAS[batch], OPTIONS, batch_size=8, pad_id=0, place=place)
    if place.is_main_process:
        matrices = {f"{n}{i}": p.detach().numpy() for n, pair in loras.matrices.items() for i, p in enumerate(pair)}
        np.savez(folder / "sharded.npz", losses=losses, answer=embedded.answer, **matrices)
"""
PAPER = dataclasses.replace(TINY, recipe="paper")
"""Of so few texts a task residual is little but rounding."""
ALPHAS = np.random.default_rng(0).dirichlet([1] * 3, len(TEXTS)).astype(np.float32)
OPTIONS = training.Options(4, 8e-3, gradient_checkpointing=True, threads=1)


@pytest.mark.slow
def test_two_processes_and_a_sharded_base_give_the_result_of_one(tmp_path) -> None:
    from transformers import AutoTokenizer

    from crayon_runtime.pool import Pool
    from crayon_server.pool import data, indicators
    from crayon_server.pool.joint import JointLoras

    of_one: list[float] = []
    one = build(NANO, TEXTS, tmp_path / "one", settings=PAPER, on_step=lambda _, loss: of_one.append(loss))
    done = program(PROCESSES, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    pool = Pool.open(tmp_path / "pool", verify=True)
    assert pool.manifest.settings["processes"] == 2
    for n in range(3):
        for module, pair in one.lora(n).items():
            assert distance(pool.lora(n)[module], pair) < 1e-4
    losses = [float(line.split(b":")[-1].rstrip(b"}\n")) for line in (tmp_path / "pool/loss.jsonl").open("rb")]
    np.testing.assert_allclose(losses, of_one, atol=1e-6)

    model = models.load(NANO, torch.float32)
    corpus = data.Corpus(AutoTokenizer.from_pretrained(NANO), TEXTS[:33], 512)
    answer = indicators.embed(model, corpus, 4, pad_id=0).answer
    loras = JointLoras(model, 3, 2, scale=2.0, seed=0)
    options = dataclasses.replace(OPTIONS, gradient_checkpointing=False)
    losses = loras.train(corpus, lambda batch, _: ALPHAS[batch], options, batch_size=8, pad_id=0)
    sharded = np.load(tmp_path / "sharded.npz")
    np.testing.assert_allclose(sharded["losses"], losses, atol=1e-6)
    np.testing.assert_allclose(sharded["answer"], answer, atol=1e-5)
    for name, pair in loras.matrices.items():
        assert distance([sharded[f"{name}{i}"] for i in range(2)], [p.detach().numpy() for p in pair]) < 1e-4


def test_a_batch_in_parts_is_the_batch(whole, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(embeddings, "PIECE", 16)
    settings = dataclasses.replace(TINY, gradient_accumulation=3, gradient_checkpointing=True)
    pool = build(NANO, TEXTS, tmp_path / "p", groups=GROUPS, settings=settings)
    for module, pair in whole.pool.lora(1).items():
        assert distance(pool.lora(1)[module], pair) < 1e-4
    too_many = dataclasses.replace(TINY, gradient_accumulation=9)
    with pytest.raises(InvalidInput, match="9 parts"):
        build(NANO, TEXTS, tmp_path / "q", groups=GROUPS, settings=too_many)


def test_bfloat16_learns_about_the_same(whole, tmp_path) -> None:
    losses: list[float] = []
    settings = dataclasses.replace(TINY, mixed_precision="bf16")
    pool = build(NANO, TEXTS, tmp_path / "p", groups=GROUPS, settings=settings, on_step=lambda _, x: losses.append(x))
    assert losses[0] != whole.losses[0]
    np.testing.assert_allclose(losses[:3], whole.losses[:3], rtol=0.05)
    assert pool.lora(0)[pool.manifest.targets[0]][0].dtype == np.float32
    assert pool.manifest.settings["mixed_precision"] == "bf16"


def test_a_checkpoint_holds_dropout_s_random_numbers_too(tmp_path) -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        configuration = models.config("nano")
        configuration.update(
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "head_dim": 16,
                "attention_dropout": 0.5,
            }
        )
        return needs.module("transformers").LlamaForCausalLM(configuration)

    def run(folder: Path, kill_at: int = 0) -> dict[str, torch.Tensor]:
        def on_step(step: int, _: float) -> None:
            if step == kill_at:
                raise KeyboardInterrupt

        one = model()
        texts = [training.Tokens([1, *range(i, i + 9), 2], [False] * 4 + [True] * 7) for i in range(5, 25)]
        options = training.Options(7, 1e-2, threads=1)
        batches = training.epochs(texts, 6, 0)
        training.train(one, batches, options, pad_id=0, checkpoints=Checkpoints(folder, 2), on_step=on_step)
        return one.state_dict()

    torch.manual_seed(5)
    expected = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        torch.manual_seed(5)
        run(tmp_path / "killed", kill_at=5)
    resumed = run(tmp_path / "killed")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_checkpoint_that_is_damaged(tmp_path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    place = training.accelerator()

    def load() -> list[float]:
        return Checkpoints(tmp_path / "c").load([parameter], torch.optim.AdamW([parameter]), place)

    assert load() == []
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    Checkpoints(tmp_path / "c").save([parameter], optimizer, [0.1], place)
    assert load() == [0.1]
    tensors = tmp_path / "c/state.safetensors"
    for content in (tensors.read_bytes()[:-3], b""):
        tensors.write_bytes(content)
        with pytest.raises(IntegrityError, match="checkpoint cannot be used"):
            load()


def test_processes_that_do_not_know_each_other(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidInput, match="know nothing of each other"):
        training.accelerator()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises((InvalidInput, ValueError)):
        training.accelerator()
