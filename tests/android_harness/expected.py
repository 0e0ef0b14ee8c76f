"""What the Python runtime says, written down for the Kotlin one to say the same: bundles that the exporter made, and `expected.json`."""

from __future__ import annotations

import json
import shutil
import stat
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from crayon_export.exporter import export
from crayon_export.tokenizer import convert
from crayon_runtime import Engine
from crayon_runtime.affinity import Projection, Weighting, alpha
from crayon_runtime.backends.base import Backend
from crayon_runtime.backends.fake import FakeBackend
from crayon_runtime.bundle import Bundle, install, pack
from crayon_runtime.bundle.adapter import write_adapter
from crayon_runtime.manifest import AdapterDtype
from crayon_runtime.manifest import Tokenizer as Info
from crayon_runtime.routing.calibration import uncalibrated
from crayon_runtime.routing.policies import confidence, paper
from crayon_runtime.routing.signals import SIGNALS, Reference, States, signals
from crayon_runtime.sampling import Sampler, SamplingOptions
from crayon_runtime.signing import KeyStore, sign
from crayon_runtime.tokenizer import Tokenizer
from tests.android_harness.templates import chats, tokenized
from tests.export.models import tiny_adapter, tiny_llama, tiny_tokenizer
from tests.runtime import bundles, pools, tiny
from tests.runtime.routing import hybrid
from tests.support import ROOT

HARNESS = ROOT / "android_harness"
NANO = ROOT / "server_tools/src/crayon_server/models/nano"

TEXTS = (
    "",
    " ",
    "a",
    "set an alarm for 7:30\n",
    "  two  spaces, three   and a trailing one ",
    "\n\ttabs\t\tand\r\nlines\n\n",
    "naïve café, cafe\u0301, Ελληνικά, русский, עברית, हिन्दी, ไทย",
    "漢字とかな 한국어 𠮷",
    "👩‍👩‍👧 🇩🇪 🏳️‍🌈",
    "<s></s><unk><0x0A>[INST] </s> <pad> <bos><eos>",
    "\u2581already\u2581\u2581there\u2581",
    "\x00\x7f\ufeff\ufffd\U0010ffff\x85\xa0\u2003",
    "def f(x):\n    return {'a': x[0] ** 2}  # 3.14e-10\n",
    "aaaaaaaaaaaaaaa" + " " * 37 + "=" * 40,
    "I'll, we've, you're, they'd, it's; I'M",
    "the alarm a b ab abc stop </s the the",
    "1234567890 12 3 ٣٤ ½",
)

GPT4_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Of LLaMA 3's tokenizer.json."""

OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 1.5},
)


def write(out: Path, stories: Path | None) -> Path:
    """Make everything in a folder.

    Args:
        stories: the folder of stories260K; None: it is left out.
    """
    models = {"nano": _nano(out)}
    if stories is not None:
        models["stories"] = _exported(stories, out / "stories", kv_dtype="fp16", quantize="int8")
    _other_forms(out, models["nano"])
    _sized(out)
    expected = {
        "tokenizers": [*_tokenizers(out, models), *_made_tokenizers(out / "tokenizers")],
        "models": [_model(name, bundle) for name, bundle in models.items()],
        "sampling": list(_sampling()),
        "fake": _fake(),
        "chats": list(chats()),
        "chat_ids": [_chat_ids(name, library(), out) for name, library in CHATTING.items()],
        "alpha": list(_alphas()),
        "routing": list(_routing()),
    }
    (out / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
    return out


def _nano(out: Path) -> Bundle:
    bundle = _exported(NANO, out / "nano")
    store = KeyStore.create(out / "store")
    signed = install(bundle.path, out / "signed")
    sign(signed, store.signing_key())
    other = KeyStore.create(out / "other")
    shutil.copy(out / "store/keys.json", out / "keys.json")
    other.revoke(other.signing_key().id)
    shutil.copy(out / "other/keys.json", out / "revoked.json")
    pack(bundle.path, out / "nano.crayon")
    pack(signed.path, out / "signed.crayon")
    _damaged_archives(out)
    return bundle


def _damaged_archives(out: Path) -> None:
    """What `crayon pack` never writes."""
    with zipfile.ZipFile(out / "nano.crayon") as whole:
        files = {info.filename: whole.read(info) for info in whole.infolist()}
    last = list(files)[-1]
    for name in ("compressed", "twice", "linked", "outside"):
        with zipfile.ZipFile(out / f"{name}.crayon", "w") as archive, warnings.catch_warnings(action="ignore"):
            for path, content in files.items():
                info = zipfile.ZipInfo(path)
                info.external_attr = (stat.S_IFLNK if name == "linked" and path == last else stat.S_IFREG) << 16
                archive.writestr(
                    info, content, zipfile.ZIP_DEFLATED if name == "compressed" and path == last else zipfile.ZIP_STORED
                )
            if name == "twice":
                archive.writestr(last, files[last])
            if name == "outside":
                archive.writestr("../evil", "x")


def _exported(model: Path, out: Path, **options: Any) -> Bundle:
    adapters = [
        tiny_adapter(model, out.with_name(f"{out.name}-{name}") / name, seed=seed, gain=0.5)
        for seed, name in enumerate(("alice", "bob"), 1)
    ]
    return export(model, out, adapters=adapters, **options).bundle


def _other_forms(out: Path, nano: Bundle) -> None:
    """Bundles that must be refused, and adapters in every dtype."""
    a = nano.model.architecture
    shapes = {"model.layers.0.self_attn.q_proj": (a.hidden_size, a.heads * a.head_size)}
    lora = pools.loras(1, 3, shapes, gain=0.5)[0]["model.layers.0.self_attn.q_proj"]
    matrices = {"A": lora[0].T, "B": lora[1].T}
    tensors = {
        f"model.layers.0.self_attn.q_proj.lora_{side}.weight": (m.shape, lambda m=m: np.ascontiguousarray(m))
        for side, m in matrices.items()
    }
    dtypes: tuple[AdapterDtype, ...] = ("fp32", "fp16", "int8")
    for dtype in dtypes:
        write_adapter(out / dtype, tensors, name=dtype, base_fingerprint=nano.model.base_fingerprint, dtype=dtype)  # type: ignore[arg-type]
    bundles.write_adapter(out / "foreign")
    bundles.write_model(out / "fields")
    bundles.edit_manifest(out / "fields", lambda m: m.update(new_field={"a": 1}, schema_version="1.9"))


def _sized(out: Path) -> None:
    """One model with two vocabularies and two contexts, for what grows with them."""
    for name, vocabulary, context in (("small", 320, 128), ("wide", 20_000, 128), ("long", 320, 1024)):
        model = tiny_tokenizer(tiny_llama(out / f"{name}-model", vocab_size=vocabulary, max_position_embeddings=1024))
        export(model, out / name, context_length=context)


def _tokenizers(out: Path, models: dict[str, Bundle]) -> Iterator[dict[str, Any]]:
    for name, bundle in models.items():
        info = bundle.model.tokenizer
        yield _tokenizer(name, info, Path(shutil.copy(bundle.file(info.file), out / f"{name}.tokenizer.json")), out)


def _made_tokenizers(out: Path) -> Iterator[dict[str, Any]]:
    """Of every kind that a bundle may hold: converted from sentencepiece with its options, byte-level with its splits, and tiny ones."""
    out.mkdir()
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "no-prefix": {"add_dummy_prefix": False},
        "trimmed": {"remove_extra_whitespaces": True},
        "symbols": {"user_defined_symbols": ["[INST]", "<tool>"]},
        "no-bytes": {"byte_fallback": False, "character_coverage": 0.98, "vocab_size": 100},
    }
    for name, options in kinds.items():
        folder = tiny_tokenizer(out / f"sp-{name}", **options)
        converted = out / name
        converted.mkdir()
        info = convert(folder, converted, model_vocab_size=1000)
        yield _tokenizer(name, info, converted / "tokenizer.json", out.parent)
    libraries = {
        "fallback": tiny.byte_fallback_library(),
        "bytes": tiny.byte_level_library(),
        "gpt2": _gpt2(),
        "llama3": _llama3(),
    }
    for name, library in libraries.items():
        path = out / f"{name}.json"
        library.save(str(path))
        yield _tokenizer(
            name, Info(path.name, library.get_vocab_size(), add_bos=True, bos=1, eos=[2]), path, out.parent
        )


def _gpt2() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([*TEXTS] * 4, trainer)
    library.add_tokens([AddedToken("alarm", single_word=True), AddedToken("stop", lstrip=True, rstrip=True)])
    return library


def _llama3() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(GPT4_SPLIT), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([*TEXTS] * 4, trainer)
    return library


def _tokenizer(name: str, info: Info, path: Path, root: Path) -> dict[str, Any]:
    tokenizer = Tokenizer(info, path)
    rng = np.random.default_rng(3)
    runs = [rng.integers(0, info.vocab_size, 12).tolist() for _ in range(40)]
    return {
        "name": name,
        "file": str(path.relative_to(root)),
        "info": msgspec.to_builtins(info),
        "texts": [
            {
                "text": text,
                "ids": tokenizer.encode(text),
                "special": tokenizer.encode(text, add_bos=False, parse_special=True),
            }
            for text in TEXTS
        ],
        "runs": [
            {"ids": run, "text": tokenizer.decode(run), "special": tokenizer.decode(run, skip_special=False)}
            for run in runs
        ],
    }


def _model(name: str, bundle: Bundle) -> dict[str, Any]:
    prompt = "remind me to water the plants at 7:30\n"
    with Engine.load(bundle, backend="onnx") as engine:
        answers = []
        for adapter in (None, *bundle.adapter_names):
            engine.set_adapter(adapter)
            answers += [_answer(engine, prompt, adapter, options) for options in OPTIONS]
        engine.set_adapter(None)
        pairs = [("set an alarm\n", "alarm.set()"), ("what is the time\n", "clock()")]
        parts: dict[str, Any] = {part: engine.embed(pairs, part=part).tolist() for part in ("all", "prompt", "answer")}  # type: ignore[arg-type]
        others = (
            {
                dtype: _logits(engine, prompt, Bundle.open(bundle.path.parent / dtype))
                for dtype in ("fp32", "fp16", "int8")
            }
            if name == "nano"
            else {}
        )
        return {
            "name": name,
            "prompt": prompt,
            "answers": answers,
            "logits": {str(adapter): _logits(engine, prompt, adapter) for adapter in (None, *bundle.adapter_names)}
            | others,
            "pairs": pairs,
            "parts": parts,
        }


def _answer(engine: Engine, prompt: str, adapter: str | None, options: dict[str, Any]) -> dict[str, Any]:
    answer = engine.generate(prompt, max_new_tokens=24, seed=7, ignore_eos=True, **options)
    assert answer.prompt_tap is not None
    assert answer.answer_tap is not None
    return {
        "adapter": adapter,
        "options": options,
        "ids": answer.token_ids,
        "text": answer.text,
        "log_probabilities": answer.log_probabilities,
        "prompt_tap": answer.prompt_tap.tolist(),
        "answer_tap": answer.answer_tap.tolist(),
    }


def _logits(engine: Engine, prompt: str, adapter: Any) -> list[float]:
    backend: Backend = engine.backend
    cache = backend.new_cache(engine.find_adapter(adapter))
    try:
        step = cache.prefill(np.array(engine.tokenizer.encode(prompt), np.int64))
        logits: list[float] = step.logits.tolist()
        return logits
    finally:
        cache.close()


CHATTING = {"chat-fallback": tiny.byte_fallback_library, "chat-bytes": tiny.byte_level_library}


def _chat_ids(name: str, library: Any, out: Path) -> dict[str, Any]:
    path = out / f"{name}.json"
    library.save(str(path))
    return {"file": path.name} | tokenized(tiny.tokenizer(library, chat_template=tiny.CHATML))


def _sampling() -> Iterator[dict[str, Any]]:
    """Logits with ties, and the tokens that a sampler takes of them, one answer for each seed."""
    rng = np.random.default_rng(5)
    rows = (rng.standard_normal((12, 300)) * 3).round(1).astype(np.float32)
    rows[3, :200] = -np.inf
    rows[4] = 0
    for seed, options in enumerate(
        [
            *OPTIONS,
            {"temperature": 2.0, "top_k": 299},
            {"temperature": 1.0, "top_p": 0.0},
            {"temperature": 1.0, "min_p": 1.0},
        ]
    ):
        sampler = Sampler(SamplingOptions(seed=seed, **options), rows.shape[1])
        sampler.observe(np.array([1, 2, 3, 299]))
        tokens, likely, top = [], [], []
        for row in rows:
            tokens.append(sampler.sample(row))
            likely.append(sampler.log_probability)
            top.append([token for token, _ in sampler.most_likely(row, 5)])
        yield {
            "seed": seed,
            "options": options,
            "rows": _finite(rows),
            "tokens": tokens,
            "log_probabilities": likely,
            "top": top,
        }


def _finite(rows: Any) -> list[list[float]]:
    """JSON has no infinity."""
    return np.where(np.isfinite(rows), rows, -3e38).tolist()  # type: ignore[no-any-return]


def _fake() -> dict[str, Any]:
    ids = [5, 6, 7, 511, 0]
    backend = FakeBackend()
    step = backend.new_cache().prefill(np.array(ids, np.int64))
    return {
        "ids": ids,
        "logits": step.logits.tolist(),
        "tap_sum": step.tap_sum.tolist(),
        "hidden": backend.hidden(ids, "bob").tolist(),
    }


def _alphas() -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(9)
    for residual in (False, True):
        located = pools.projection(5, d=8, k=4, residual=residual)
        prompts, answers = (rng.standard_normal((3, 8)).astype(np.float32) for _ in range(2))
        for weighting in (
            Weighting(),
            Weighting("relu"),
            Weighting("topk", top_k=2),
            Weighting("raw"),
            Weighting(temperature=0.01),
        ):
            yield {
                "projection": _arrays(located),
                "weighting": msgspec.to_builtins(weighting),
                "prompts": prompts.tolist(),
                "answers": answers.tolist(),
                "alpha": alpha(located, weighting, prompts, answers).tolist(),
            }


def _routing() -> Iterator[dict[str, Any]]:
    """Signals, policies that are made of examples, and what they decide."""
    size = 6
    for with_prototypes, count in ((True, 10), (True, 0), (False, 10), (False, 1)):
        prototypes = hybrid.prototypes(9, size) if with_prototypes else None
        examples = hybrid.examples(count, size) if count else None
        reference = Reference.of(prototypes, examples)
        policies = [
            confidence(),
            *(uncalibrated(reference, examples) if examples else []),
            *([paper(0.7)] if prototypes else []),
        ]
        said = [
            States(*hybrid.random(2, size, seed=seed), [-0.1 * seed, -0.01, -1.5])  # type: ignore[misc]
            for seed in range(4)
        ]
        names = [name for name in SIGNALS if name in reference.names]
        yield {
            "prototypes": prototypes and {"states": prototypes.states.tolist(), "mean": prototypes.mean.tolist()},
            "examples": examples and {name: array.tolist() for name, array in vars(examples).items()},
            "said": [
                {"prompt": s.prompt_tap.tolist(), "answer": s.answer_tap.tolist(), "likely": s.log_probabilities}
                for s in said
            ],  # type: ignore[union-attr]
            "signals": [signals(s, reference, names) for s in said],
            "policies": [msgspec.to_builtins(policy) for policy in policies],
            "decisions": [[policy.decide(signals(s, reference, names)).route for policy in policies] for s in said],
        }


def _arrays(located: Projection) -> dict[str, Any]:
    return {name: array.tolist() for name, array in vars(located).items() if array is not None}
