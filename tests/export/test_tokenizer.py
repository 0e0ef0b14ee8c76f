"""Judges: sentencepiece for ids, transformers for reading what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from crayon_export.tokenizer import convert
from crayon_runtime.errors import CheckpointError
from crayon_runtime.manifest import Tokenizer as Info
from crayon_runtime.tokenizer import Tokenizer
from tests.export.models import tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_tokenizer(tmp_path / "model")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def put(folder: Path, name: str, **fields: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(fields))


def library() -> tokenizers.Tokenizer:
    """A byte-level BPE in the manner of LLaMA 3, which puts bos before every sequence."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>", "<|eot|>", "<|pad|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["some text to learn from"], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return made


@pytest.fixture
def ready_made(tmp_path: Path) -> Path:
    """A folder with a tokenizer.json."""
    put(tmp_path / "ready", "tokenizer_config.json", bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>")
    library().save(str(tmp_path / "ready/tokenizer.json"))
    return tmp_path / "ready"


def test_a_sentencepiece_model_in_the_runtime(folder: Path, out: Path) -> None:
    info = convert(folder, out, model_vocab_size=320)

    assert info == Info(file="tokenizer.json", vocab_size=320, add_bos=True, bos=1, eos=[2])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    runtime = Tokenizer(info, out / "tokenizer.json")
    for text in ("Once upon a time", "  two  spaces ", "Grüße 漢字 🎉\n", "<s></s>", "a"):
        assert runtime.encode(text) == [1, *processor.encode(text)]
        assert runtime.decode(processor.encode(text)) == processor.decode(processor.encode(text)) == text


def test_what_is_written_is_what_transformers_reads(folder: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    put(folder, "tokenizer_config.json", chat_template="{{ bos_token }}{{ messages[0].content }}")
    convert(folder, out, model_vocab_size=320)

    read = AutoTokenizer.from_pretrained(out)

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert read("Once upon  a time").input_ids == [1, *processor.encode("Once upon  a time")]
    assert (read.bos_token_id, read.eos_token_id) == (1, 2)
    message = [{"role": "user", "content": "Hi"}]
    assert read.apply_chat_template(message, tokenize=False) == "<s>Hi"


def test_a_file_instead_of_a_folder(folder: Path, ready_made: Path, out: Path) -> None:
    assert convert(folder / "tokenizer.model", out, model_vocab_size=320).bos == 1
    assert convert(ready_made / "tokenizer.json", out, model_vocab_size=300).bos == 0


def test_a_tokenizer_json_is_taken_as_it_is(ready_made: Path, out: Path) -> None:
    info = convert(ready_made, out, model_vocab_size=512)

    assert (out / "tokenizer.json").read_bytes() == (ready_made / "tokenizer.json").read_bytes()
    assert info.vocab_size == library().get_vocab_size()
    assert (info.add_bos, info.bos, info.eos, info.pad) == (True, 0, [1], 3)


def test_a_tokenizer_json_goes_before_a_sentencepiece_model(folder: Path, out: Path) -> None:
    library().save(str(folder / "tokenizer.json"))
    convert(folder, out, model_vocab_size=512)
    assert "<|begin|>" in (out / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    "tokenizer, generation, config, eos",
    [
        ({}, {}, {}, [1]),
        ({}, {"eos_token_id": 2}, {}, [2, 1]),
        ({}, {"eos_token_id": [1, 2]}, {"eos_token_id": 3}, [1, 2]),
        ({}, {}, {"eos_token_id": 2}, [2, 1]),
        ({"eos_token": "<|eot|>"}, {"eos_token_id": [1, 2]}, {}, [1, 2]),
        ({"eos_token": {"content": "<|eot|>", "special": True}}, {}, {"eos_token_id": 1}, [1, 2]),
        ({"eos_token": None}, {}, {"eos_token_id": -1}, []),
        ({"eos_token": None}, {"eos_token_id": None}, {"eos_token_id": 1}, []),
    ],
)
def test_what_ends_an_answer(
    ready_made: Path,
    out: Path,
    tokenizer: dict[str, Any],
    generation: dict[str, Any],
    config: dict[str, Any],
    eos: list[int],
) -> None:
    put(ready_made, "tokenizer_config.json", **{"bos_token": "<|begin|>", "eos_token": "<|end|>", **tokenizer})
    put(ready_made, "generation_config.json", **generation)
    put(ready_made, "config.json", **config)
    assert convert(ready_made, out, model_vocab_size=512).eos == eos


@pytest.mark.parametrize(
    "settings, add_bos",
    [
        ({}, True),  # as its post-processor does
        ({"add_bos_token": False}, False),
        ({"add_bos_token": None}, True),
        ({"bos_token": None}, False),
    ],
)
def test_whether_sequences_start_with_bos(ready_made: Path, out: Path, settings: dict[str, Any], add_bos: bool) -> None:
    put(ready_made, "tokenizer_config.json", **{"bos_token": "<|begin|>", "eos_token": "<|end|>", **settings})
    assert convert(ready_made, out, model_vocab_size=512).add_bos is add_bos


def test_without_a_post_processor_llama_tokenizers_start_with_bos(ready_made: Path, out: Path) -> None:
    bare = library()
    bare.post_processor = tokenizers.processors.ByteLevel()
    bare.save(str(ready_made / "tokenizer.json"))
    assert convert(ready_made, out, model_vocab_size=512).add_bos is False
    put(ready_made, "tokenizer_config.json", bos_token="<|begin|>", tokenizer_class="LlamaTokenizer")
    assert convert(ready_made, out, model_vocab_size=512).add_bos is True


@pytest.mark.parametrize(
    "config, file, expected",
    [
        (None, None, None),
        ("A", None, "A"),
        ("A", "B", "B"),
        (None, "B", "B"),
        ([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}], None, "D"),
        ([{"name": "tool_use", "template": "T"}], None, None),
    ],
)
def test_chat_templates(folder: Path, out: Path, config: Any, file: str | None, expected: str | None) -> None:
    put(folder, "tokenizer_config.json", chat_template=config)
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    assert convert(folder, out, model_vocab_size=320).chat_template == expected
    assert json.loads((out / "tokenizer_config.json").read_text()).get("chat_template") == expected


def test_a_chat_template_that_is_not_valid(folder: Path, out: Path) -> None:
    put(folder, "tokenizer_config.json", chat_template="{% for %}")
    with pytest.raises(CheckpointError, match="the chat template is not valid"):
        convert(folder, out, model_vocab_size=320)


@pytest.mark.parametrize(
    "name, fields",
    [
        ("added_tokens.json", {"<|im_start|>": 320, "<|im_end|>": 321}),
        (
            "tokenizer_config.json",
            {
                "added_tokens_decoder": {
                    "1": {"content": "<s>", "special": True},
                    "321": {"content": "<|im_end|>", "special": True},
                    "320": {"content": "<|im_start|>", "special": True},
                },
                "eos_token": "<|im_end|>",
            },
        ),
    ],
)
def test_tokens_added_to_a_sentencepiece_model(folder: Path, out: Path, name: str, fields: dict[str, Any]) -> None:
    put(folder, name, **fields)
    info = convert(folder, out, model_vocab_size=384)

    assert info.vocab_size == 322
    runtime = Tokenizer(info, out / "tokenizer.json")
    assert runtime.encode("<|im_end|>", add_bos=False, parse_special=True) == [321]
    assert 321 not in runtime.encode("<|im_end|>")
    assert info.eos == ([321] if "eos_token" in fields else [2])


def test_added_tokens_must_continue_the_vocabulary(folder: Path, out: Path) -> None:
    put(folder, "added_tokens.json", **{"<|im_start|>": 322})
    with pytest.raises(CheckpointError, match="do not continue from 320"):
        convert(folder, out, model_vocab_size=384)
    put(folder, "added_tokens.json", **{"<|im_start|>": "many"})
    with pytest.raises(CheckpointError, match="added tokens are malformed"):
        convert(folder, out, model_vocab_size=384)


def test_more_tokens_than_the_model_has(folder: Path, ready_made: Path, out: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has the token '.' with id 319; the model's vocabulary ends at 318"):
        convert(folder, out, model_vocab_size=319)
    with pytest.raises(CheckpointError, match="the model's vocabulary ends at 99"):
        convert(ready_made, out, model_vocab_size=100)
    assert convert(folder, out, model_vocab_size=32000).vocab_size == 320


def test_control_tokens_that_do_not_exist(ready_made: Path, out: Path) -> None:
    put(ready_made, "generation_config.json", eos_token_id=[1, 9999])
    with pytest.raises(CheckpointError, match="the control token 9999 is not one of the model's 512"):
        convert(ready_made, out, model_vocab_size=512)
    put(ready_made, "tokenizer_config.json", bos_token="<|nowhere|>")
    with pytest.raises(CheckpointError, match=r"its control token '<\|nowhere\|>' is not in the vocabulary"):
        convert(ready_made, out, model_vocab_size=512)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        b'{"model": {"type": "Evil"}}',
    ],
)
def test_a_tokenizer_json_that_is_none(tmp_path: Path, out: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        convert(tmp_path, out, model_vocab_size=512)
    assert not list(out.iterdir())


def test_no_tokenizer(tmp_path: Path, out: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has neither tokenizer\.json nor tokenizer\.model"):
        convert(tmp_path, out, model_vocab_size=512)
