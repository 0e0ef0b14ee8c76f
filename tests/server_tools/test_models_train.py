"""Training models on one's own texts: what is learnt, resumed after a kill, refused, and kept when something fails.

Judges: a loop of plain torch and transformers, and runs that nobody killed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from crayon_runtime.errors import InvalidInput, OutputError
from crayon_server import models, training
from crayon_server.cli import model as cli_model
from crayon_server.data import phone_assistant as pa
from tests.server_tools.test_checkpoints import program
from tests.support import needs

torch = needs.module("torch")
transformers = needs.module("transformers")

from crayon_server.checkpoints import Checkpoints  # noqa: E402 - it needs torch
from crayon_server.models.mobilellm import MobileLLMConfig, MobileLLMForCausalLM  # noqa: E402
from crayon_server.models.train import Settings, train  # noqa: E402

NANO = models.load_nano()
TEXTS = [f"{e.prompt.strip()}\n{e.completion}" for user in pa.benchmark().train[:6] for e in user.examples[:8]]
RECORDS = [{"prompt": e.prompt, "completion": e.completion} for e in pa.benchmark().train[0].examples]
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "vocab_size": 640, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
SETTINGS = Settings(
    context_length=32, steps=8, batch_size=4, learning_rate=1e-2, held_out=0.1, validate_every=3, threads=1
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of two blocks that share their layers, with nano's tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("texts")
    torch.manual_seed(0)
    models.save_weights(MobileLLMForCausalLM(MobileLLMConfig(**TINY, layer_repeats=2)), folder / "start")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(NANO / name, folder / "start" / name)
    (folder / "texts.txt").write_text("\n\n".join(TEXTS))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"passage": text}) + "\n" for text in TEXTS))
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]


def run(folder: Path, tmp_path: Path, settings: Settings = SETTINGS, name: str = "out", **options: Any) -> Path:
    out = tmp_path / name
    options = {"work": tmp_path / f"{name}.work", "checkpoint_every": 2} | options
    train(folder / "start", [str(folder / "texts.txt")], out, settings=settings, **options)
    return out


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """The result of a run that nobody killed."""
    return run(folder, tmp_path_factory.mktemp("whole"))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return needs.module("safetensors.torch").load_file(out / "model.safetensors")


# What is computed


def test_it_is_adamw_in_a_loop_of_torch(folder, whole) -> None:
    """Cross-entropy by transformers, schedule by transformers, clipping and AdamW by torch, over the same batches."""
    tokenizer = models.load_tokenizer(folder / "start")
    model = models.load(folder / "start").train()
    rows, held = [], []
    for i, text in enumerate(TEXTS):
        drawn = hashlib.sha256(f"0 {i}".encode()).digest()[:8]
        part = held if int.from_bytes(drawn, "big") / 2**64 < 0.1 else rows
        part.extend([*tokenizer(text)["input_ids"], 2])
    sequences = [rows[i : i + 32] for i in range(0, len(rows) - 1, 31)]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0}], lr=1e-2, betas=(0.9, 0.95)
    )
    schedule = transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer, num_warmup_steps=1, num_training_steps=8, min_lr_rate=0.1
    )
    batches = training.epochs(sequences, 4, 0)
    for line in log(whole):
        batch = next(batches)
        longest = max(map(len, batch))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])
        labels = torch.tensor([[*row, *[-100] * (longest - len(row))] for row in batch])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert line["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"])
        assert line["loss"] == pytest.approx(loss.item(), abs=2e-5)
        assert line["tokens"] == sum(map(len, batch))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    trained = models.load(whole)
    for (name, ours), theirs in zip(trained.named_parameters(), model.parameters(), strict=True):
        assert torch.dist(ours, theirs) < 1e-4 * theirs.norm(), name
    with torch.no_grad():
        pieces = [held[i : i + 32] for i in range(0, len(held) - 1, 31)]
        sums = [(trained(torch.tensor([p]), labels=torch.tensor([p])).loss.item(), len(p) - 1) for p in pieces]
    assert log(whole)[-1]["validation_loss"] == pytest.approx(
        sum(a * n for a, n in sums) / sum(n for _, n in sums), abs=1e-5
    )


def test_what_is_written(whole) -> None:
    names = ["config.json", "generation_config.json", "loss.jsonl", "loss.svg", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in whole.iterdir()) == [*names, "tokenizer_config.json", "training.json"]
    assert models.load(whole).config.layer_repeats == 2
    said = json.loads((whole / "training.json").read_text())
    lines = log(whole)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6, 8]
    assert (said["steps"], said["tokens"]) == (8, sum(line["tokens"] for line in lines))
    assert said["parameters"] == models.load(whole).num_parameters()
    assert 0 < said["mfu"] < 1
    assert said["tokens_per_second"] > 0
    assert said["validation_loss"] == lines[-1]["validation_loss"]
    assert "<svg" in (whole / "loss.svg").read_text()


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_rate_is_transformers(warmup: int) -> None:
    options = training.Options(40, 1.0, warmup=warmup, final_rate=0.1, cosine_after_warmup=True)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    judge = transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer, num_warmup_steps=warmup, num_training_steps=40, min_lr_rate=0.1
    )
    for step in range(40):
        assert training.rate(step, options) == pytest.approx(judge.get_last_lr()[0])
        optimizer.step()
        judge.step()


def test_fields_and_sources_of_other_kinds_are_the_same_texts(folder, whole, tmp_path) -> None:
    train(
        folder / "start", [str(folder / "texts.jsonl")], tmp_path / "m", work=tmp_path / "w", settings=SETTINGS,
        fields={"text": "passage"},
    )  # fmt: skip
    assert [line["loss"] for line in log(tmp_path / "m")] == [line["loss"] for line in log(whole)]


def test_records_are_fine_tuned_on_their_completions(folder, tmp_path) -> None:
    settings = Settings(steps=30, batch_size=8, learning_rate=1e-2, held_out=0.0, threads=1)
    trained = train(
        folder / "start", [str(folder / "records.jsonl")], tmp_path / "m", work=tmp_path / "w", settings=settings
    )
    lines = log(tmp_path / "m")
    assert lines[-1]["loss"] < lines[0]["loss"] - 2
    assert (trained.sequences, trained.held_out, trained.validation_loss) == (len(RECORDS), 0, None)
    tokenizer, start = models.load_tokenizer(NANO), models.load(folder / "start")
    losses = []
    for i in next(training.epochs(range(len(RECORDS)), 8, 0)):
        prompt = tokenizer(RECORDS[i]["prompt"])["input_ids"]
        ids = torch.tensor([[*tokenizer(RECORDS[i]["prompt"] + RECORDS[i]["completion"])["input_ids"], 2]])
        losses += training.token_losses(start, training.Batch(ids, ids))[0, len(prompt) - 1 :].tolist()
    assert lines[0]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_text_is_held_out_whatever_else_there_is(folder, whole, tmp_path) -> None:
    """Other seeds hold out others, and nothing is trained on that is held out."""
    said = json.loads((whole / "training.json").read_text())
    assert said["held_out"] > 0
    none = train(
        folder / "start", [str(folder / "texts.txt")], tmp_path / "m", work=tmp_path / "w",
        settings=Settings(context_length=32, steps=1, batch_size=4, held_out=0.0, threads=1),
    )  # fmt: skip
    assert said["sequences"] + said["held_out"] - none.sequences in (0, 1)


def test_bfloat16_and_parts_learn_about_the_same(folder, whole, tmp_path) -> None:
    losses = [line["loss"] for line in log(whole)]
    for name, change, tolerance in (
        ("parts", {"gradient_accumulation": 3, "gradient_checkpointing": True}, 1e-5),
        ("bf16", {"mixed_precision": "bf16"}, 0.05),
    ):
        out = run(folder, tmp_path, Settings(**{**vars(SETTINGS), **change}), name)
        found = [line["loss"] for line in log(out)]
        assert found == pytest.approx(losses, rel=tolerance)
        assert weights(out)["model.norm.weight"].dtype == torch.float32


# A run that is killed

KILLED = """
    import os, signal, sys
    from pathlib import Path
    from tests.server_tools.test_models_train import SETTINGS, run

    place, folder, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

    def on_step(step, loss):
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    run(folder, place, on_step=on_step)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(folder, whole, tmp_path) -> None:
    """After step 3, between two checkpoints, and after step 6, on one: all losses and all bits are the same."""
    for last in (3, 6):
        done = program(KILLED, tmp_path, folder, last)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    told: list[tuple[int, float]] = []
    out = run(folder, tmp_path, on_step=lambda step, loss: told.append((step, loss)))
    for field in ("step", "loss", "learning_rate", "tokens", "validation_loss"):
        assert [line.get(field) for line in log(out)] == [line.get(field) for line in log(whole)], field
    assert told == [(line["step"], line["loss"]) for line in log(whole)]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (out / "loss.svg").read_bytes() == (whole / "loss.svg").read_bytes()


def test_other_settings_do_not_find_an_old_checkpoint(folder, whole, tmp_path) -> None:
    run(folder, tmp_path)
    again = run(folder, tmp_path, Settings(**{**vars(SETTINGS), "learning_rate": 1e-3}), replace=True)
    assert log(again)[0]["loss"] == log(whole)[0]["loss"]
    assert log(again)[-1]["loss"] != log(whole)[-1]["loss"]


SHARDED = """
    import sys
    from pathlib import Path
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from crayon_server import training
    from tests.server_tools.test_models_train import run

    out, folder = Path(sys.argv[1]), Path(sys.argv[2])
    place = training.accelerator()
    assert place.num_processes == 2
    run(folder, out, name="two", place=place)
    # accelerate configures FSDP for GPUs only; the sharding itself runs on CPUs too
    place.state.distributed_type = DistributedType.FSDP
    place.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, cpu_ram_efficient_loading=False, auto_wrap_policy="transformer_based_wrap",
    )
    class Stop(Exception): pass
    def stop(step, loss):
        if step == 5:
            raise Stop
    try:
        run(folder, out, name="sharded", place=place, on_step=stop)
    except Stop:
        pass
    run(folder, out, name="sharded", place=place, teacher=None)  # goes on from step 4
"""


@pytest.mark.slow
def test_two_processes_and_a_sharded_model_learn_what_one_does(folder, whole, tmp_path) -> None:
    done = program(SHARDED, tmp_path, folder, processes=2)
    assert done.returncode == 0, done.stderr
    for name in ("two", "sharded"):
        found, expected = log(tmp_path / name), log(whole)
        for field in ("loss", "validation_loss"):
            assert [line.get(field) or 0 for line in found] == pytest.approx(
                [line.get(field) or 0 for line in expected], abs=1e-4
            ), name
        for tensor, judge in zip(weights(tmp_path / name).values(), weights(whole).values(), strict=True):
            assert torch.dist(tensor, judge) < 1e-2 * judge.norm(), name
        assert json.loads((tmp_path / name / "training.json").read_text())["processes"] == 2


# Bad input


def test_what_cannot_be_trained_is_refused_and_leaves_nothing(folder, tmp_path) -> None:
    def refused(start: object, data: bytes | None, match: str, **options: Any) -> None:
        (tmp_path / "d.txt").write_bytes(data or b"some text")
        with pytest.raises(InvalidInput, match=match) as e:
            train(start, [str(tmp_path / "d.txt")], tmp_path / "out", work=tmp_path / "w", **options)
        assert not (tmp_path / "out").exists()
        if data is not None:
            assert str(e.value.where).startswith(str(tmp_path / "d.txt"))

    start = folder / "start"
    refused("mobilellm-7b", None, "no architecture and no folder 'mobilellm-7b'")
    refused("mobilellm-125m", None, "has no tokenizer")
    refused(tmp_path, None, "no model with a tokenizer")
    refused(start, b"\n", "no texts")
    refused(start, b"one\ntwo\xff\n", "not UTF-8")
    refused(start, b"truncated \xc3", "not UTF-8")
    refused(start, None, "has a tokenizer of its own", tokenizer=NANO)
    refused(start, None, "no share", settings=Settings(held_out=1.0))
    refused(start, None, "cannot be split into 9 parts", settings=Settings(batch_size=4, gradient_accumulation=9))
    with pytest.raises(OutputError, match="exists"):
        train(start, ["x"], folder, work=tmp_path / "w")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(folder, tmp_path, monkeypatch) -> None:
    checkpoint: list[bytes] = []
    real = training.token_losses
    steps = iter(range(100))

    def losses(model: torch.nn.Module, batch: training.Batch) -> torch.Tensor:
        broken = model.training and next(steps) == 5
        if broken:
            checkpoint.extend(path.read_bytes() for path in sorted(tmp_path.glob("out.work/training-*/checkpoint/*")))
        return real(model, batch) * (float("nan") if broken else 1.0)

    monkeypatch.setattr(training, "token_losses", losses)
    with pytest.raises(InvalidInput, match="the loss of step 6 is not finite") as e:
        run(folder, tmp_path)
    assert "the last checkpoint is kept" in str(e.value)
    assert "lower learning rate" in str(e.value)
    kept = sorted(tmp_path.glob("out.work/training-*/checkpoint/*"))
    assert [path.read_bytes() for path in kept] == checkpoint != []
    assert Checkpoints(kept[0].parent).steps() == 4
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_is_not_finite_changes_no_weight(folder) -> None:
    model = models.load(folder / "start")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss_of(model: torch.nn.Module, batch: training.Batch) -> torch.Tensor:
        losses = training.token_losses(model, batch)
        return losses + (losses - losses.detach()).sqrt()  # the derivative at 0 is not finite

    batches = iter([[training.Tokens([1, 5, 9, 2], [True] * 4)]])
    with pytest.raises(InvalidInput, match="the gradient of step 1 is not finite"):
        training.train(model, batches, training.Options(1, 1e-2, threads=1), pad_id=0, loss_of=loss_of)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_on_a_full_disk_leaves_the_last_one(tmp_path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    large = torch.nn.Parameter(torch.ones(100_000))
    place = training.accelerator()
    with needs.tmpfs(1 << 20) as disk:
        checkpoints = Checkpoints(disk / "c")
        for parameters, losses in (([parameter], [0.5]), ([large], [0.5, 0.4])):
            optimizer = torch.optim.AdamW(parameters)
            parameters[0].sum().backward()
            optimizer.step()
            if losses == [0.5]:
                checkpoints.save(parameters, optimizer, losses, place)
            else:
                with pytest.raises(OutputError, match=r"(?i)space|full"):
                    checkpoints.save(parameters, optimizer, losses, place)
        assert checkpoints.steps() == 1
        assert sorted(path.name for path in disk.iterdir()) == ["c"]
        assert Checkpoints(disk / "c").load([parameter], torch.optim.AdamW([parameter]), place) == [0.5]


# The command


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli_model.model, ["train", *map(str, arguments)])


def test_the_command(folder, whole, tmp_path) -> None:
    done = invoke(
        folder / "start", "--data", folder / "texts.txt", "--out", tmp_path / "m", "--context-length", 32, "--steps", 8,
        "--batch-size", 4, "--learning-rate", 0.01, "--held-out", 0.1, "--validate-every", 3, "--threads", 1, "--json",
    )  # fmt: skip
    assert done.exception is None, done.output
    said = json.loads(done.stdout)
    assert said["loss"] == json.loads((whole / "training.json").read_text())["loss"]
    assert said["model"] == str(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]  # the work folder is gone


def test_the_command_trains_a_new_model_and_a_student(folder, tmp_path) -> None:
    for i, options in enumerate([[], ["--teacher", NANO, "--distill-weight", 0.5, "--temperature", 2]]):
        done = invoke(
            "nano", "--data", folder / "records.jsonl", "--out", tmp_path / str(i), "--steps", 2, "--batch-size", 4,
            "--threads", 1, *options,
        )  # fmt: skip
        assert done.exception is None, done.output
        assert done.stdout.strip() == str(tmp_path / str(i))
    first, second = (log(tmp_path / name)[0]["loss"] for name in "01")
    assert first != second
    assert json.loads((tmp_path / "0/config.json").read_text())["model_type"] == "mobilellm"


def test_options_that_are_for_texts_of_one_s_own(tmp_path) -> None:
    done = invoke("nano", "--out", tmp_path / "m", "--teacher", NANO, "--warmup", 3)
    assert isinstance(done.exception, InvalidInput)
    assert "--teacher, --warmup: only with texts of your own" in str(done.exception)
    assert "--data" in str(invoke("mobilellm-125m", "--out", tmp_path / "m").exception)
