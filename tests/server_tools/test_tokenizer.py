"""nano's tokenizer: any text comes back, prompts and completions meet cleanly, chat and plain prompts are the same ids."""

from __future__ import annotations

import itertools
import json

import pytest

from crayon_runtime.manifest import Tokenizer as Info
from crayon_runtime.tokenizer import Tokenizer
from crayon_server.data import phone_assistant as pa
from crayon_server.models import load_nano
from crayon_server.models import tokenizer as nano_tokenizer
from tests.support import needs

transformers = needs.module("transformers")
hypothesis = needs.module("hypothesis")
st = needs.module("hypothesis.strategies")

NANO = load_nano()
EXAMPLES = list(itertools.islice(pa.stream("tests", domains=(*pa.DOMAINS, *pa.SERVER_ONLY)), 2000))


@pytest.fixture(scope="module")
def library():
    return needs.module("tokenizers").Tokenizer.from_file(str(NANO / "tokenizer.json"))


@pytest.fixture(scope="module")
def pretrained():
    return transformers.AutoTokenizer.from_pretrained(NANO)


@pytest.fixture(scope="module")
def runtime():
    template = json.loads((NANO / "tokenizer_config.json").read_text())["chat_template"]
    info = Info(file="tokenizer.json", vocab_size=640, add_bos=True, bos=1, eos=[2], pad=0, chat_template=template)
    return Tokenizer(info, NANO / "tokenizer.json")


def test_the_shipped_tokenizer_is_the_one_that_is_learnt(library) -> None:
    assert json.loads(library.to_str()) == json.loads(nano_tokenizer.learn().to_str())


def test_vocabulary(library) -> None:
    assert library.get_vocab_size() == nano_tokenizer.VOCAB_SIZE == 640
    assert [library.id_to_token(i) for i in range(3)] == ["<pad>", "<s>", "</s>"]
    assert [library.id_to_token(3 + byte) for byte in range(256)] == [f"<0x{byte:02X}>" for byte in range(256)]


def test_no_token_crosses_from_one_class_of_characters_to_another(library) -> None:
    for i in range(259, 640):
        token = library.id_to_token(i)
        classes = {
            "newline" if c == "\n" else "digit" if c.isdecimal() else "word" if c.isalpha() or c == "_" else "other"
            for c in token
        }
        assert len(classes) == 1, token


def test_texts_of_the_benchmark_are_short(library) -> None:
    lengths = sorted(len(library.encode(e.text).ids) + 1 for e in EXAMPLES)
    assert lengths[len(lengths) // 2] <= 40
    assert lengths[int(0.95 * len(lengths))] <= 64
    assert lengths[-1] <= 80


@hypothesis.given(st.text())
@hypothesis.example("wake me")
@hypothesis.example("  two  spaces\n\nlines\ttabs ")
@hypothesis.example("Zażółć 🙂🇳🇴 e\u0301 \u2581 <0x41> \x00 ½ 北京")
def test_any_text_comes_back(library, runtime, text: str) -> None:
    ids = runtime.encode(text)
    assert ids[0] == 1
    assert runtime.decode(ids) == text.replace("\u2581", " ")
    library.encode_special_tokens = True
    assert library.encode(text).ids == ids
    assert library.decode(ids) == text.replace("\u2581", " ")


@hypothesis.given(st.text(), st.text())
def test_prompt_and_completion_are_tokenized_as_one_text(runtime, prompt: str, completion: str) -> None:
    whole = runtime.encode(f"{prompt}\n{completion}")
    assert runtime.encode(f"{prompt}\n") + runtime.encode(completion, add_bos=False) == whole


def test_transformers_and_the_runtime_agree(pretrained, runtime) -> None:
    for e in EXAMPLES[:200]:
        assert pretrained(e.text)["input_ids"] == runtime.encode(e.text)
        assert pretrained.decode(runtime.encode(e.text), skip_special_tokens=True) == e.text
    assert [pretrained.pad_token_id, pretrained.bos_token_id, pretrained.eos_token_id] == [0, 1, 2]


def test_control_tokens_in_a_text_are_text(runtime) -> None:
    ids = runtime.encode("say </s> <pad>")
    assert ids.count(2) == ids.count(0) == 0
    assert runtime.decode(ids) == "say </s> <pad>"


@pytest.mark.parametrize("content", ["wake me at six am", "wake me at six am\n", " wake me at six am "])
def test_chat_and_plain_prompts_are_the_same_ids(pretrained, runtime, content: str) -> None:
    plain = runtime.encode("wake me at six am\n")
    message = [{"role": "user", "content": content}]
    assert runtime.apply_chat_template(message) == plain
    assert pretrained.apply_chat_template(message, add_generation_prompt=True)["input_ids"] == plain


def test_a_conversation_is_one_exchange_after_the_other(pretrained, runtime) -> None:
    messages = [
        {"role": "user", "content": "buy six eggs"},
        {"role": "assistant", "content": "shop.add(item=eggs, qty=6)"},
        {"role": "user", "content": "buy two eggs"},
    ]
    expected = [*runtime.encode("buy six eggs\nshop.add(item=eggs, qty=6)"), 2, *runtime.encode("buy two eggs\n")]
    assert runtime.apply_chat_template(messages) == expected
    assert pretrained.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == expected


def test_onnxruntime_genai_reads_prompts_alike(tmp_path, runtime) -> None:
    genai = needs.module("onnxruntime_genai")
    needs.module("crayon_export").export(NANO, tmp_path / "bundle", backend="onnx", quantize="none")
    foreign = genai.Tokenizer(genai.Model(str(tmp_path / "bundle")))
    for e in EXAMPLES[:300]:
        assert foreign.encode(e.prompt).tolist() == runtime.encode(e.prompt, add_bos=False)
        assert foreign.decode(runtime.encode(e.text)) == e.text
    chat = foreign.apply_chat_template(
        json.dumps([{"role": "user", "content": "buy two eggs"}]), add_generation_prompt=True
    )
    assert foreign.encode(chat).tolist() == runtime.encode("buy two eggs\n")
