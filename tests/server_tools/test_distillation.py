"""Distillation. Judges: torch's kl_div, and gradients of Hinton et al.'s limit of high temperatures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from crayon_runtime.errors import InvalidInput
from crayon_server import models, training
from tests.support import needs

torch = needs.module("torch")
transformers = needs.module("transformers")

from crayon_server.distillation import Teacher, divergence, load_teacher  # noqa: E402 - it needs torch

NANO = models.load_nano()


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(NANO)


def logits(*shape: int, seed: int) -> torch.Tensor:
    return 4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_divergence_is_torch_s_with_its_gradient(temperature: float) -> None:
    ours, theirs = (logits(2, 5, 11, seed=1).requires_grad_() for _ in range(2))
    taught = logits(2, 5, 11, seed=2)
    found = divergence(ours, taught, temperature)
    log_student, log_teacher = (torch.log_softmax(each / temperature, -1) for each in (theirs, taught))
    judge = torch.nn.functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found, temperature**2 * judge)
    found.sum().backward()
    (temperature**2 * judge).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_at_a_high_temperature_the_gradient_is_the_difference_of_logits() -> None:
    """Hinton et al., equation 4: for logits of zero mean, (z - v) / N, where T^2 undoes the 1 / T^2."""
    student, taught = (each - each.mean(-1, keepdim=True) for each in (logits(1, 7, seed=3), logits(1, 7, seed=4)))
    student.requires_grad_()
    divergence(student, taught, 1e3).sum().backward()
    torch.testing.assert_close(student.grad, (student.detach() - taught) / 7, atol=2e-2, rtol=2e-2)


def test_the_loss_is_a_mix(tokenizer) -> None:
    student, teacher = models.initialize("nano", 1), models.load(NANO)
    batch = training.collate([training.Tokens([1, 5, 9, 7, 2], [True] * 5)], 0, 0.0)
    labels = training.token_losses(student, batch)
    judge = torch.nn.CrossEntropyLoss(reduction="none")(student(batch.ids).logits[0, :-1], batch.ids[0, 1:])
    torch.testing.assert_close(labels[0], judge)
    kl = divergence(student(batch.ids).logits[:, :-1], teacher(batch.ids).logits[:, :-1], 2.0)
    for weight in (0.0, 0.3, 1.0):
        found = Teacher(teacher, weight, 2.0).loss(student, batch)
        torch.testing.assert_close(found, (1 - weight) * labels + weight * kl)
    assert Teacher(student, 1.0).loss(student, batch).abs().max() < 1e-5  # it has nothing to learn from itself


def test_a_teacher_is_frozen_and_gets_no_gradient(tokenizer) -> None:
    place = training.accelerator()
    teacher = load_teacher(NANO, tokenizer, 640, 512, place, weight=0.5, temperature=1.0)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    batches = iter([[training.Tokens([1, 5, 9, 7, 2], [True] * 5)]] * 3)
    student = models.initialize("nano", 1)
    training.train(student, batches, training.Options(3, 1e-2, threads=1), pad_id=0, loss_of=teacher.loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())


def test_other_vocabularies_are_refused(tokenizer, tmp_path: Path) -> None:
    def load(folder: Path, vocab_size: int = 640, length: int = 512, weight: float = 0.5) -> None:
        load_teacher(folder, tokenizer, vocab_size, length, training.accelerator(), weight=weight, temperature=1.0)

    with pytest.raises(InvalidInput, match="the teacher has 640 tokens, the student 700"):
        load(NANO, vocab_size=700)
    with pytest.raises(InvalidInput, match="context of 512 tokens is shorter than the texts' 1024"):
        load(NANO, length=1024)
    with pytest.raises(InvalidInput, match="weight 2"):
        load(NANO, weight=2)
    with pytest.raises(InvalidInput, match="teacher cannot be loaded"):
        load(tmp_path)
    shutil.copytree(NANO, tmp_path / "other")
    document = json.loads((NANO / "tokenizer.json").read_text())
    swapped = {300: 301, 301: 300}
    document["model"]["vocab"] = {t: swapped.get(i, i) for t, i in document["model"]["vocab"].items()}
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InvalidInput, match=r"token 300 is '.+' for the teacher, '.+' for the student"):
        load(tmp_path / "other")
