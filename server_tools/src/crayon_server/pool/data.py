"""Texts to train on, from wherever they are, one at a time.

    D.jsonl, D.parquet          files here, or at any URL that fsspec opens (s3://, gs://, hf://, https://); * and ** match several
    FOLDER                      what `datasets` has saved to disk
    OWNER/NAME, OWNER/NAME:SPLIT    a dataset of the Hugging Face Hub, streamed; its split "train" if none is said

A text has a prompt and a completion. It may have a group, which says what it belongs together with: a user, a source, a task. Texts have
groups if every one of them names one. Plain text, to pre-train on, comes from the same places in a field "text", or from .txt files,
where blank lines end a text.
"""

from __future__ import annotations

import codecs
import copy
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from crayon_runtime.errors import InvalidInput
from crayon_runtime.files import atomic_file
from crayon_server import training
from crayon_server.sliced import Sliced
from crayon_server.training import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from crayon_server.training import Text

FIELDS = ("prompt", "completion", "group")
PLAIN = ("text",)
_FILE = re.compile(r"\.(jsonl|ndjson|json|parquet|txt)(\.(gz|bz2|xz|zst))?$")
_TXT = re.compile(r"\.txt(\.(gz|bz2|xz|zst))?$")
LONGEST = 1 << 20
"""Characters of a text in a .txt file; a longer one is cut, so that a file without blank lines needs no memory."""
_ON_THE_HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<split>[\w.-]+))?")


class Pair(NamedTuple):
    """A text to train on."""

    prompt: str
    completion: str


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """A text as it is read."""

    prompt: str
    completion: str
    group: str | int | None = None


def read_texts(
    source: str | os.PathLike[str], fields: Mapping[str, str] | None = None
) -> tuple[list[Pair], list[str] | None]:
    """All texts, in memory, and the group of each; None unless every text names one.

    Args:
        source: see the module.
        fields: what prompt, completion and group are called in it, where they are called otherwise.

    Raises:
        InvalidInput: the source cannot be read, holds no texts, or holds something that is none; the file and the line are named.
    """
    lines = list(stream(source, fields))
    if not lines:
        raise InvalidInput("there are no texts", where=source)
    return [Pair(line.prompt, line.completion) for line in lines], _groups(line.group for line in lines)


def stream(source: str | os.PathLike[str], fields: Mapping[str, str] | None = None) -> Iterator[Line]:
    """The texts one after the other; arguments and errors as `read_texts`."""
    for value in _values(os.fspath(source), _renamed(fields or {})):
        yield Line(value.prompt, value.completion, value.group)


def stream_plain(source: str | os.PathLike[str], field: str = "text") -> Iterator[str]:
    """Plain texts one after the other.

    Args:
        source: see the module.
        field: what the text is called in it, where it has fields.

    Raises:
        InvalidInput: as `read_texts`.
    """
    renamed = msgspec.defstruct("Plain", [("text", str, msgspec.field(name=field))])
    for value in _values(os.fspath(source), renamed):
        yield value.text


def is_plain(source: str) -> bool:
    """Whether it is a .txt file, or its first text has the field "text"."""
    if _TXT.search(source):
        return True
    try:
        next(stream_plain(source), None)
    except InvalidInput:  # which reading it as prompts and completions will raise again, if it is of neither kind
        return False
    return True


def parse_fields(text: str, known: Sequence[str] = FIELDS) -> dict[str, str]:
    """ "prompt=question,completion=answer" -> {"prompt": "question", "completion": "answer"}.

    Raises:
        InvalidInput: it is not such a list.
    """
    fields = dict(part.partition("=")[::2] for part in text.split(","))
    if not all(fields.values()) or not fields.keys() <= set(known):
        raise InvalidInput(
            f"{text!r} does not say what fields are called", where="fields", do="write prompt=NAME,completion=NAME"
        )
    return fields


def _values(place: str, renamed: type[msgspec.Struct]) -> Iterator[Any]:
    """What a source holds, as structs of one type."""
    if Path(place).is_dir():
        yield from _saved(Path(place), renamed)
    elif (hub := _ON_THE_HUB.fullmatch(place)) and not _FILE.search(place) and not Path(place).exists():
        yield from _on_the_hub(hub["name"], hub["split"] or "train", renamed)
    else:
        yield from _files(place, renamed)


def _renamed(fields: Mapping[str, str]) -> type[msgspec.Struct]:
    """`Line` with other names in the source."""
    types = zip(FIELDS, (str, str, str | int | None), (msgspec.NODEFAULT, msgspec.NODEFAULT, None), strict=True)
    return msgspec.defstruct(
        "Line", [(name, kind, msgspec.field(default=default, name=fields.get(name))) for name, kind, default in types]
    )


# Where they are


def _files(place: str, renamed: type[msgspec.Struct]) -> Iterator[Any]:
    import fsspec

    try:
        files = fsspec.open_files(place, "rb", compression="infer")
        if not files:
            raise FileNotFoundError(2, "no file matches")
        for file in files:
            name = place if len(files) == 1 else file.path
            with file as opened:
                if _TXT.search(file.path) and "text" in renamed.__struct_fields__:
                    yield from map(renamed, _paragraphs(opened, name))
                else:
                    parquet = re.search(r"\.parquet$", file.path)
                    yield from (_parquet if parquet else _json_lines)(opened, name, renamed)
    except (OSError, ImportError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e) or type(e).__name__
        raise InvalidInput(f"the data cannot be read: {reason}", where=place, do="check the path") from e


def _paragraphs(file: Any, name: str) -> Iterator[str]:
    """What lies between blank lines, without the last line break."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines: list[str] = []
    size, number, more = 0, 1, True
    while more:
        line = file.readline(LONGEST)
        more = bool(line)
        try:
            text = decoder.decode(line, not more).replace("\r\n", "\n")
        except UnicodeDecodeError as e:
            raise InvalidInput(f"not UTF-8: {e}", where=f"{name}, line {number}") from None
        number += line.endswith(b"\n")
        if lines and (not text.strip() or size + len(text) > LONGEST):
            yield "".join(lines).rstrip("\n")
            lines, size = [], 0
        if text.strip():
            lines.append(text)
            size += len(text)
    if lines:
        yield "".join(lines).rstrip("\n")


def _json_lines(file: Any, name: str, renamed: type[msgspec.Struct]) -> Iterator[Any]:
    decoder = msgspec.json.Decoder(renamed)
    for number, line in enumerate(file, 1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if text.strip():
            try:
                value: Any = decoder.decode(text)
            except (ValueError, RecursionError) as e:  # msgspec's, and those of text that is not UTF-8
                raise InvalidInput(f"not a text to train on: {e}", where=f"{name}, line {number}") from None
            yield value


def _parquet(file: Any, name: str, renamed: type[msgspec.Struct]) -> Iterator[Any]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    wanted = {field.encode_name for field in msgspec.structs.fields(renamed)}
    try:
        opened = ParquetFile(file)
        columns = [column for column in opened.schema_arrow.names if column in wanted]
        batches = (batch.to_pylist() for batch in opened.iter_batches(1024, columns=columns))
        yield from _rows((row for batch in batches for row in batch), name, renamed)
    except ArrowException as e:
        raise InvalidInput(f"not Parquet: {e}", where=name) from None


def _rows(rows: Iterable[Any], name: str, renamed: type[msgspec.Struct]) -> Iterator[Any]:
    for number, row in enumerate(rows, 1):
        try:
            value: Any = msgspec.convert(row, renamed)
        except msgspec.ValidationError as e:
            raise InvalidInput(f"not a text to train on: {e}", where=f"{name}, row {number}") from None
        yield value


def _saved(folder: Path, renamed: type[msgspec.Struct]) -> Iterator[Any]:
    from datasets import load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError) as e:
        raise InvalidInput(
            f"this folder is not a saved dataset: {e}", where=folder, do="name a file in it, or files with *"
        ) from None
    yield from _rows(saved["train"] if isinstance(saved, dict) and "train" in saved else saved, str(folder), renamed)


def _on_the_hub(name: str, split: str, renamed: type[msgspec.Struct]) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError) as e:
        raise InvalidInput(
            f"there is no such file here, and no such dataset on the Hub: {e}",
            where=f"{name}:{split}",
            do="check the name",
        ) from e
    yield from _rows(rows, f"{name}:{split}", renamed)


# In files


class Texts(Sliced[Pair]):
    """Texts that stay in a file of JSON lines; 8 bytes of each are in memory.

    Attributes:
        groups: of each text; None unless every one names one.
    """

    def __init__(self, path: Path) -> None:
        self._begins, self._decoder, self._file = array("q"), msgspec.json.Decoder(Line), path.open("rb")

        def groups() -> Iterator[str | int | None]:
            begin = 0
            with path.open("rb") as file:
                for line in file:
                    self._begins.append(begin)
                    begin += len(line)
                    yield self._decoder.decode(line).group

        self.groups = _groups(groups())

    @staticmethod
    def write(source: str | os.PathLike[str], path: Path, fields: Mapping[str, str] | None = None) -> None:
        """Copy the texts of a source into a file; arguments and errors as `read_texts`.

        Raises:
            OutputError: the file cannot be written.
        """
        encoder = msgspec.json.Encoder()
        with atomic_file(path) as file:
            if not sum(bool(file.write(encoder.encode(line) + b"\n")) for line in stream(source, fields)):
                raise InvalidInput("there are no texts", where=source)

    def __len__(self) -> int:
        return len(self._begins)

    def select(self, kept: Iterable[int]) -> Texts:
        """Some of them; without groups."""
        some = copy.copy(self)
        some._begins, some.groups = array("q", (self._begins[i] for i in kept)), None
        return some

    def _at(self, i: int) -> Pair:
        self._file.seek(self._begins[i])
        line = self._decoder.decode(self._file.readline())
        return Pair(line.prompt, line.completion)


def _groups(groups: Iterable[str | int | None]) -> list[str] | None:
    """Equal names are one object, so that a million of them take 8 MB."""
    names: dict[str, str] = {}
    listed: list[str] = []
    every = True
    for group in groups:
        if group is None or not every:
            every = False
        else:
            listed.append(names.setdefault(str(group), str(group)))
    return listed if every else None


# As tokens


class Corpus(Sliced[Tokens]):
    """Tokenized texts, in 4 bytes a token.

    Args:
        limit: texts of more tokens are left out.

    Attributes:
        kept: the indices of the texts that are in it.
        left_out: how many are not.
        digest: SHA-256 over the tokens, in hex.

    Raises:
        InvalidInput: there are no texts, or none is short enough.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Iterable[Text], limit: int) -> None:
        import hashlib

        digest = hashlib.sha256()
        self._ids, self._ends, self._begins, self.kept = array("i"), array("q", [0]), array("i"), array("q")
        shortest = None
        self.left_out = 0
        for i, text in enumerate(texts):
            tokens = training.tokenize(tokenizer, text)
            shortest = min(len(tokens.ids), shortest or len(tokens.ids))
            if len(tokens.ids) <= limit:
                self.kept.append(i)
                self._ids.extend(tokens.ids)
                self._ends.append(len(self._ids))
                self._begins.append(tokens.in_completion.index(True))
            else:
                self.left_out += 1
        if shortest is None:
            raise InvalidInput("there are no texts", where="texts")
        if not self.kept:
            raise InvalidInput(
                f"every text has more than {limit} tokens; the shortest has {shortest}",
                do="shorten them, or split them",
            )
        for column in (self._ids, self._ends, self._begins):
            digest.update(column.tobytes())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._begins)

    def _at(self, i: int) -> Tokens:
        ids = self._ids[self._ends[i] : self._ends[i + 1]].tolist()
        return Tokens(ids, [j >= self._begins[i] for j in range(len(ids))])

    def lengths(self, i: int) -> tuple[int, int]:
        """Tokens of the prompt (bos included) and of the answer (end of sequence excluded)."""
        begin = self._begins[i]
        return begin, self._ends[i + 1] - self._ends[i] - 1 - begin
