"""Texts from files, URLs, Parquet and saved datasets are the same texts; what is none is named with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from crayon_runtime.errors import InvalidInput
from crayon_server import models, training
from crayon_server.pool import data
from crayon_server.pool.data import (
    Corpus,
    Line,
    Pair,
    Texts,
    is_plain,
    parse_fields,
    read_texts,
    stream,
    stream_plain,
)
from tests.support import needs

fsspec = needs.module("fsspec")
pyarrow = needs.module("pyarrow")
parquet = needs.module("pyarrow.parquet")
transformers = needs.module("transformers")

ROWS = [{"prompt": f"say {i}\n", "completion": f"été {i}", "group": f"g{i % 2}"} for i in range(7)]
PAIRS = [Pair(row["prompt"], row["completion"]) for row in ROWS]
GROUPS = [row["group"] for row in ROWS]
RENAMED = {"prompt": "question", "completion": "answer", "group": "user"}
OTHERWISE = [{RENAMED[name]: value for name, value in row.items()} for row in ROWS]


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict[str, str]], path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture
def sources(tmp_path) -> dict[str, str]:
    """The same texts in many places."""
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(ROWS).replace(b"\n", b"\r\n"))
    (tmp_path / "no_suffix").write_bytes(b"\n" + lines(ROWS))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
    table(ROWS, tmp_path / "d.parquet")
    for i, part in enumerate((ROWS[:3], ROWS[3:])):
        (tmp_path / f"part-{i}.jsonl").write_bytes(lines(part))
    dataset = needs.module("datasets").Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved")
    needs.module("datasets").DatasetDict(train=dataset).save_to_disk(tmp_path / "splits")
    with fsspec.open("memory://bucket/d.jsonl", "wb") as file:
        file.write(lines(ROWS))
    with fsspec.open("memory://bucket/d.parquet", "wb") as file:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    names = ("d.jsonl", "no_suffix", "d.jsonl.gz", "d.parquet", "part-*.jsonl", "saved", "splits")
    urls = ("memory://bucket/d.jsonl", "memory://bucket/d.parquet", f"file://{tmp_path}/d.parquet")
    return {name: str(tmp_path / name) for name in names} | {url: url for url in urls}


def test_every_place_gives_the_same_texts(sources, tmp_path) -> None:
    for name, source in sources.items():
        assert read_texts(source) == (PAIRS, GROUPS), name
        Texts.write(source, tmp_path / "copy")
        copied = Texts(tmp_path / "copy")
        assert list(copied) == PAIRS, name
        assert copied.groups == GROUPS


def test_fields_of_other_names(tmp_path) -> None:
    (tmp_path / "d.jsonl").write_bytes(lines(OTHERWISE))
    table([row | {"more": "x"} for row in OTHERWISE], tmp_path / "d.parquet")
    fields = parse_fields("prompt=question,completion=answer,group=user")
    assert fields == RENAMED
    for name in ("d.jsonl", "d.parquet"):
        assert read_texts(tmp_path / name, fields) == (PAIRS, GROUPS)
        with pytest.raises(InvalidInput, match="missing required field"):
            read_texts(tmp_path / name)
    for wrong in ("", "prompt", "prompt=", "prompts=x"):
        with pytest.raises(InvalidInput):
            parse_fields(wrong)


def test_a_file_is_read_as_it_is_needed(tmp_path) -> None:
    (tmp_path / "d.jsonl").write_bytes(lines(ROWS) + b"not json")
    source = stream(tmp_path / "d.jsonl")
    assert next(source) == Line(**ROWS[0])
    with pytest.raises(InvalidInput) as error:
        list(source)
    assert error.value.where == f"{tmp_path}/d.jsonl, line 8"


@pytest.mark.parametrize(
    "name, rows",
    [("d.jsonl", [{"prompt": "a", "completion": 1}]), ("d.parquet", [{"prompt": "a", "completion": None}]),
     ("d.parquet", [{"prompt": "a"}]), ("d.jsonl", [{"prompt": "a", "completion": "b", "group": [1]}])],
)  # fmt: skip
def test_rows_that_are_no_texts(tmp_path, name: str, rows) -> None:
    good: list[dict[str, str]] = [] if rows[0].keys() == {"prompt"} else [{"prompt": "a", "completion": "b"}]
    (tmp_path / name).write_bytes(lines(good + rows))
    if name.endswith("parquet"):
        table(good + rows, tmp_path / name)
    with pytest.raises(InvalidInput) as error:
        list(stream(tmp_path / name))
    assert error.value.where is not None
    assert error.value.where.endswith(f", {'row' if 'parquet' in name else 'line'} {len(good) + 1}")


def test_places_with_no_texts(tmp_path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    for place in (
        tmp_path / "absent.jsonl", tmp_path / "*.json", tmp_path / "folder", tmp_path / "d.parquet", "no-such://x/d.jsonl",
        "memory://bucket/absent.jsonl", tmp_path / "empty.jsonl",
    ):  # fmt: skip
        with pytest.raises(InvalidInput):
            read_texts(place)
    with pytest.raises(InvalidInput, match="no texts"):
        Texts.write(tmp_path / "empty.jsonl", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_name_on_the_hub_is_streamed(monkeypatch) -> None:
    datasets = needs.module("datasets")
    asked = []

    def load_dataset(name: str, **options: object) -> list[dict[str, str]]:
        asked.append((name, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_texts("owner/name") == (PAIRS, GROUPS)
    assert read_texts("owner/name:validation") == (PAIRS, GROUPS)
    assert asked == [("owner/name", {"split": s, "streaming": True}) for s in ("train", "validation")]

    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("not on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(InvalidInput, match="no such dataset"):
        read_texts("owner/name")


def test_groups_are_known_only_where_every_text_names_one(tmp_path) -> None:
    (tmp_path / "d.jsonl").write_bytes(lines([{**ROWS[0], "group": 3}, {"prompt": "a", "completion": "b"}]))
    Texts.write(tmp_path / "d.jsonl", tmp_path / "copy")
    assert read_texts(tmp_path / "d.jsonl")[1] is Texts(tmp_path / "copy").groups is None


def test_texts_in_a_file_are_a_sequence(tmp_path) -> None:
    (tmp_path / "d.jsonl").write_bytes(lines(ROWS))
    texts = Texts(tmp_path / "d.jsonl")
    assert (texts[-1], texts[2:4], len(texts)) == (PAIRS[-1], PAIRS[2:4], 7)
    assert list(texts.select([5, 0])) == [PAIRS[5], PAIRS[0]]
    with pytest.raises(IndexError):
        texts[7]


def test_a_corpus_holds_what_tokenize_gives() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.load_nano())
    expected = [training.tokenize(tokenizer, pair) for pair in PAIRS]
    corpus = Corpus(tokenizer, PAIRS, 512)
    assert list(corpus) == expected
    assert corpus[1:3] == expected[1:3]
    assert sum(corpus.lengths(0)) == len(expected[0].ids) - 1
    longest = max(len(tokens.ids) for tokens in expected)
    longer = [*PAIRS, Pair("say it again and again\n" * 9, "x")]
    cut = Corpus(tokenizer, longer, longest)
    assert (cut.digest, list(cut.kept)) == (corpus.digest, list(range(7)))
    assert Corpus(tokenizer, PAIRS[::-1], 512).digest != corpus.digest
    with pytest.raises(InvalidInput, match="every text has more than 3 tokens"):
        Corpus(tokenizer, PAIRS, 3)
    with pytest.raises(InvalidInput, match="no texts"):
        Corpus(tokenizer, [], 3)


# Plain texts

PLAIN = [f"été {i}\nand a second line" for i in range(7)]


def test_plain_texts_are_the_same_from_every_place(tmp_path) -> None:
    rows = [{"passage": text, "id": i} for i, text in enumerate(PLAIN)]
    joined = "\n\n".join(PLAIN).encode()
    (tmp_path / "d.txt").write_bytes(joined)
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf\r\n" + joined.replace(b"\n", b"\r\n") + b"\r\n \r\n")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"\n\n" + joined))
    (tmp_path / "d.jsonl").write_bytes(lines(rows))
    table(rows, tmp_path / "d.parquet")
    needs.module("datasets").Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path in tmp_path.iterdir():
        assert list(stream_plain(path, "passage")) == PLAIN, path


def test_a_text_of_many_characters_is_cut_and_nothing_of_it_is_lost(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(data, "LONGEST", 7)
    text = "äöü€😀" * 20 + "\n" + "b" * 30
    (tmp_path / "d.txt").write_text(text)
    pieces = list(stream_plain(tmp_path / "d.txt"))
    assert "".join(pieces) == text.replace("\n", "") or "".join(pieces) == text
    assert max(map(len, pieces)) <= 7


@pytest.mark.parametrize("content, line", [(b"one\n\ntwo\xff\n", 3), (b"one\ncut \xe2\x82", 2)])
def test_what_is_not_utf_8_is_named_with_its_line(tmp_path, content: bytes, line: int) -> None:
    (tmp_path / "d.txt").write_bytes(content)
    with pytest.raises(InvalidInput, match="not UTF-8") as e:
        list(stream_plain(tmp_path / "d.txt"))
    assert e.value.where == f"{tmp_path}/d.txt, line {line}"


def test_what_is_plain(tmp_path) -> None:
    (tmp_path / "plain.jsonl").write_bytes(lines([{"text": "a"}]))
    (tmp_path / "records.jsonl").write_bytes(lines(ROWS))
    assert is_plain("anything.txt.gz")
    assert is_plain(str(tmp_path / "plain.jsonl"))
    assert not is_plain(str(tmp_path / "records.jsonl"))
    assert not is_plain(str(tmp_path / "absent.jsonl"))
