"""The embedded models: their shapes, the folder that is shipped, and what it is worth."""

from __future__ import annotations

import json

import pytest

from crayon_runtime.errors import InvalidInput, OutputError
from crayon_server import models
from crayon_server.data import phone_assistant as pa
from crayon_server.evaluate import exact_match
from crayon_server.evaluate.float_model import FloatModel
from tests.support import needs

torch = needs.module("torch")
transformers = needs.module("transformers")

NANO = models.load_nano()
FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def nano():
    model = models.load(NANO, torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(NANO)


@pytest.mark.parametrize("name, low, high", [("nano", 450_000, 600_000), ("nano-server", 1_500_000, 2_500_000)])
def test_shapes(name: str, low: int, high: int) -> None:
    model = models.initialize(name)
    c = model.config
    assert low < sum(p.numel() for p in model.parameters()) < high
    assert c.head_dim % 16 == 0
    assert c.num_key_value_heads < c.num_attention_heads
    assert c.tie_word_embeddings
    assert c.max_position_embeddings == 512
    assert c.rms_norm_eps == 1e-5
    assert c.hidden_act == "silu"


def test_unknown_architecture() -> None:
    with pytest.raises(InvalidInput, match="pico"):
        models.config("pico")


def test_the_shipped_folder() -> None:
    assert sorted(path.name for path in NANO.iterdir()) == FILES
    assert sum(path.stat().st_size for path in NANO.iterdir()) < 3_000_000
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in NANO.iterdir())
    assert json.loads((NANO / "config.json").read_text())["model_type"] == "mobilellm"


def test_the_shipped_shape_is_that_of_the_architecture(nano) -> None:
    wanted = {name: tensor.shape for name, tensor in models.initialize("nano").state_dict().items()}
    assert {name: tensor.shape for name, tensor in nano[0].state_dict().items()} == wanted


@pytest.mark.parametrize("pretrained", [False, True])
def test_create(tmp_path, pretrained: bool) -> None:
    models.create("nano", tmp_path / "m", pretrained=pretrained)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == FILES
    same = (tmp_path / "m/model.safetensors").read_bytes() == (NANO / "model.safetensors").read_bytes()
    assert same == pretrained
    assert (tmp_path / "m/tokenizer.json").read_bytes() == (NANO / "tokenizer.json").read_bytes()
    with pytest.raises(OutputError):
        models.create("nano", tmp_path / "m")


def test_an_architecture_that_nobody_knows(tmp_path) -> None:
    with pytest.raises(InvalidInput, match="nano-server"):
        models.create("nano-client", tmp_path / "m", pretrained=True)
    assert list(tmp_path.iterdir()) == []


def test_the_server_model_knows_more_than_the_device_and_the_user_as_little(tmp_path) -> None:
    """Two queries of each validation user: the right call nearly always, also in domains of its own; the user's convention rarely."""
    models.create("nano-server", tmp_path / "m", pretrained=True)
    model = FloatModel(tmp_path / "m")
    for part in ("queries", "out_of_task", "server_only"):
        queries = [query for user in pa.benchmark().validation for query in getattr(user, part)[:2]]
        answers = model.generate(model.tokenize(queries), exact_match.MAX_NEW_TOKENS)
        judged = list(zip(answers, queries, strict=True))
        assert sum(pa.useful(answer, query) for answer, query in judged) >= 0.95 * len(queries)
        assert sum(answer == query.completion for answer, query in judged) <= 0.25 * len(queries)


def test_the_base_knows_what_is_wanted_but_not_how(nano) -> None:
    """Two queries of each validation user: the right function nearly always, the user's convention rarely."""
    queries = [q for user in pa.benchmark().validation for q in user.queries[:2]]
    result = exact_match.evaluate_float(*nano, queries)
    assert result.intent >= 0.97
    assert result.exact_match <= 0.25
    assert result.log_loss <= 0.18


def test_shown_the_convention_it_follows(nano) -> None:
    """Four exchanges before the query: the convention is clear, and most calls are right."""
    model, tokenizer = nano
    right = 0
    users = pa.benchmark().validation[::3]
    for user in users:
        messages = []
        for e in user.examples[:4]:
            messages += [{"role": "user", "content": e.prompt}, {"role": "assistant", "content": e.completion}]
        messages.append({"role": "user", "content": user.queries[0].prompt})
        ids = torch.tensor([tokenizer.apply_chat_template(messages)["input_ids"]])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=72)
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        right += pa.score(answer, user.queries[0]).structure
    assert right >= len(users) // 2
