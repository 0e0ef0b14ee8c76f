"""A model's tokenizer as a bundle carries it: one tokenizer.json, the ids of its control tokens, its chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crayon_export import jsonfile, sentencepiece_bpe
from crayon_export.sentencepiece_bpe import SpecialIds, added_token
from crayon_runtime.chat_template import ChatTemplate
from crayon_runtime.errors import BundleError, CheckpointError
from crayon_runtime.manifest import Tokenizer


def convert(source: str | Path, out: Path, *, model_vocab_size: int) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json into a folder, and return what a manifest says about them.

    A tokenizer.json is taken as it is; otherwise a sentencepiece tokenizer.model is converted. Which tokens end an answer is
    read from generation_config.json, config.json and tokenizer_config.json; the chat template from chat_template.jinja or
    tokenizer_config.json. A tokenizer may have fewer tokens than the model, which pads its embedding, but not more.

    Args:
        source: a model's folder, or one of the two files, with the others beside it.
        out: an existing folder.
        model_vocab_size: rows of the model's embedding.

    Raises:
        CheckpointError: there is no tokenizer, it is damaged, or has tokens that the model does not.
        UnsupportedModel: a sentencepiece model of another type than BPE, or one that cannot be converted exactly.
        MissingExtra: the packages that read a sentencepiece model are not installed.
    """
    file = _find(Path(source))
    settings = _Settings(file.parent)
    document, special = _read(file, settings)
    library = _load(document, file)
    vocabulary: dict[str, int] = library.get_vocab(with_added_tokens=True)
    _check_size(vocabulary, model_vocab_size, file)

    bos = settings.token("bos", vocabulary, special.bos)
    eos = settings.answer_ends(vocabulary, special.eos)
    pad = settings.token("pad", vocabulary, special.pad)
    for id_ in [bos, pad, *eos]:
        if id_ is not None and id_ >= model_vocab_size:
            raise CheckpointError(
                f"the control token {id_} is not one of the model's {model_vocab_size}", where=file.parent
            )
    add_bos = bos is not None and settings.adds_bos(_starts_with(library, bos), converted=file.suffix == ".model")
    template = settings.chat_template()
    if file.suffix == ".model" and add_bos and bos is not None:
        text = library.id_to_token(bos)
        document = json.dumps({**json.loads(document), "post_processor": _begin_with(text, bos)}, ensure_ascii=False)

    (out / "tokenizer.json").write_text(document, encoding="utf-8")
    names = {"bos_token": bos, "eos_token": eos[0] if eos else None, "pad_token": pad}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        **{name: library.id_to_token(id_) for name, id_ in names.items() if id_ is not None},
        **({"chat_template": template} if template is not None else {}),
    }
    (out / "tokenizer_config.json").write_text(
        json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return Tokenizer(
        file="tokenizer.json",
        vocab_size=max(vocabulary.values()) + 1,
        add_bos=add_bos,
        bos=bos,
        eos=eos,
        pad=pad,
        chat_template=template,
    )


class _Settings:
    """What the JSON files beside a tokenizer say about it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer = self._optional("tokenizer_config.json")
        self._model = {**self._optional("config.json"), **self._optional("generation_config.json")}

    def token(self, role: str, vocabulary: dict[str, int], default: int | None) -> int | None:
        """The id of a control token: as tokenizer_config.json names it, else as the tokenizer or the model's config has it."""
        key = f"{role}_token"
        if key in self._tokenizer:
            return self._named(self._tokenizer[key], vocabulary)
        return default if default is not None else next(iter(self._ids(f"{key}_id")), None)

    def answer_ends(self, vocabulary: dict[str, int], default: int | None) -> list[int]:
        """Every token that ends an answer: the model's own, and what its tokenizer calls eos."""
        own = self.token("eos", vocabulary, default)
        return list(dict.fromkeys([*self._ids("eos_token_id"), *([] if own is None else [own])]))

    def adds_bos(self, observed: bool, *, converted: bool) -> bool:
        """Whether sequences start with bos: as configured; else as LLaMA's slow tokenizers do, or as observed."""
        explicit = self._tokenizer.get("add_bos_token")
        if isinstance(explicit, bool):
            return explicit
        return converted or observed or str(self._tokenizer.get("tokenizer_class")).startswith("Llama")

    def chat_template(self) -> str | None:
        file = self._folder / "chat_template.jinja"
        template = file.read_text(encoding="utf-8") if file.exists() else self._tokenizer.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if not isinstance(template, str):
            return None
        try:
            ChatTemplate(template, {})
        except BundleError as e:
            raise CheckpointError(e.what, where=self._folder, do="correct or remove it") from None
        return template

    def added_tokens(self, first_id: int) -> list[dict[str, Any]]:
        """Tokens that were added to a sentencepiece model, whose own ids end before `first_id`."""
        listed = self._tokenizer.get("added_tokens_decoder") or {
            id_: {"content": content, "special": True} for content, id_ in self._optional("added_tokens.json").items()
        }
        try:
            entries = {int(id_): (str(e["content"]), bool(e.get("special"))) for id_, e in listed.items()}
        except (TypeError, ValueError, KeyError, AttributeError):
            raise CheckpointError("its added tokens are malformed", where=self._folder) from None
        kept = [(i, *entries[i]) for i in sorted(entries) if i >= first_id]
        added = [added_token(i, content, special=special, normalized=False) for i, content, special in kept]
        if [entry["id"] for entry in added] != list(range(first_id, first_id + len(added))):
            raise CheckpointError(f"the ids of the added tokens do not continue from {first_id}", where=self._folder)
        return added

    def _ids(self, field: str) -> list[int]:
        """Token ids from a field that may be absent, null, a number or a list; old configs write -1 for none."""
        value = self._model.get(field)
        ids = value if isinstance(value, list) else [value]
        return [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]

    def _named(self, token: Any, vocabulary: dict[str, int]) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        if content is None:
            return None
        if not isinstance(content, str) or content not in vocabulary:
            raise CheckpointError(
                f"its control token {content!r:.80} is not in the vocabulary",
                where=self._folder / "tokenizer_config.json",
            )
        return vocabulary[content]

    def _optional(self, name: str) -> dict[str, Any]:
        return jsonfile.read(self._folder / name) if (self._folder / name).exists() else {}


def _find(source: Path) -> Path:
    if source.is_file():
        return source
    for name in ("tokenizer.json", "tokenizer.model"):
        if (source / name).is_file():
            return source / name
    raise CheckpointError(
        "it has neither tokenizer.json nor tokenizer.model",
        where=source,
        do="copy the model's tokenizer into its folder, or name it with --tokenizer",
    )


def _read(file: Path, settings: _Settings) -> tuple[str, SpecialIds]:
    """A tokenizer.json, and the control tokens that a sentencepiece model names itself."""
    if file.suffix != ".model":
        try:
            return file.read_text(encoding="utf-8"), SpecialIds(None, None, None)
        except (OSError, UnicodeDecodeError) as e:
            raise CheckpointError(f"cannot read it: {e}", where=file) from None
    document, special = sentencepiece_bpe.convert(file)
    document["added_tokens"] += settings.added_tokens(len(document["model"]["vocab"]))
    return json.dumps(document, ensure_ascii=False), special


def _load(document: str, file: Path) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(document)
    except Exception as e:  # noqa: BLE001 - the library raises plain Exception
        raise CheckpointError(f"not a tokenizer.json: {e}", where=file, do="download it again") from None


def _check_size(vocabulary: dict[str, int], model_vocab_size: int, file: Path) -> None:
    if not vocabulary:
        raise CheckpointError("the tokenizer has no tokens", where=file)
    token, largest = max(vocabulary.items(), key=lambda entry: entry[1])
    if largest >= model_vocab_size:
        raise CheckpointError(
            f"the tokenizer has the token {token!r:.80} with id {largest}; the model's vocabulary ends at {model_vocab_size - 1}",
            where=file,
            do="use the tokenizer that the model was trained with, or resize the model's embedding",
        )


def _starts_with(library: Any, bos: int) -> bool:
    return bool(library.encode("a", add_special_tokens=True).ids[:1] == [bos])


def _begin_with(text: str, bos: int) -> dict[str, Any]:
    """The post-processor that puts bos before a sequence, for readers of tokenizer.json other than this project."""
    token = {"SpecialToken": {"id": text, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [token, {"Sequence": {"id": "A", "type_id": 0}}, token, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}},
    }
