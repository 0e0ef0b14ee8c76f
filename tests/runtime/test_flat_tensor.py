"""Judge: the serializer that ExecuTorch's exporter writes .ptd files with."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import NamedTuple

import pytest

from crayon_runtime.backends.flat_tensor import BY_HASH, FLOAT32, INT8, Entry, FlatTensorWriter, Layout
from tests.support import needs


class Weight(NamedTuple):
    name: str
    content: bytes
    layout: Layout | None = None


def _hashed(content: bytes, prefix: str = "") -> Weight:
    return Weight(prefix + hashlib.sha256(content).hexdigest(), content)


def _official(weights: list[Weight]) -> bytes:
    serialize = needs.module("executorch.extension.flat_tensor.serialize.serialize")
    store_module = needs.module("executorch.exir._serialize._named_data_store")
    payload = needs.module("executorch.exir._serialize.data_serializer").DataPayload
    tensor_layout = needs.module("executorch.exir.tensor_layout").TensorLayout
    scalar_type = needs.module("executorch.exir.scalar_type").ScalarType
    store = store_module.NamedDataStore()
    for name, content, layout in weights:
        theirs = layout and tensor_layout(
            scalar_type(layout.scalar_type), list(layout.sizes), list(range(len(layout.sizes)))
        )
        store.add_named_data(name, content, alignment=16, external_tag="model", tensor_layout=theirs)
    stored = store.get_named_data_store_output()
    return bytes(serialize.FlatTensorSerializer().serialize(payload(stored.buffers, stored.external_data["model"])))


def _ours(weights: list[Weight], path: Path, rng: random.Random) -> bytes:
    """Written in another order than the file's, in pieces."""
    entries = [
        Entry(w.name.replace(hashlib.sha256(w.content).hexdigest(), BY_HASH), len(w.content), w.layout) for w in weights
    ]
    with path.open("w+b") as file:
        writer = FlatTensorWriter(file, entries)
        pieces = [
            (i, w.content[at : at + 1000]) for i, w in enumerate(weights) for at in range(0, len(w.content), 1000)
        ]
        order = list(range(len(weights)))
        rng.shuffle(order)
        for i in order:
            for index, piece in pieces:
                if index == i:
                    writer.write(i, piece)
        assert writer.finish() == [w.name for w in weights]
    return path.read_bytes()


def _some(rng: random.Random, count: int) -> list[Weight]:
    """Weights of all kinds and sizes; a third of them hold what others hold, some under the same name."""
    known = [rng.randbytes(rng.choice([1, 2, 5, 64, 127, 128, 129, 1000, 5000])) for _ in range(1 + count // 2)]
    weights = []
    for i in range(count):
        content = rng.choice(known) if rng.random() < 0.5 else rng.randbytes(rng.choice([1, 7, 256, 3000]))
        shape = rng.choice([(len(content),), (1, len(content)), (len(content), 1, 1)])
        named = Weight(f"layers.{'x' * rng.randrange(9)}{i}.weight", content, Layout(INT8, shape))
        weights.append(rng.choice([_hashed(content), _hashed(content, "scale_"), named]))
    return weights


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 40, 200])
def test_the_file_is_that_of_the_official_serializer(count: int, tmp_path: Path) -> None:
    for seed in range(3):
        rng = random.Random(seed)
        weights = _some(rng, count)
        assert _ours(weights, tmp_path / f"{seed}.ptd", rng) == _official(weights)


@pytest.mark.parametrize(
    "weights",
    [
        [_hashed(bytes(300)), _hashed(bytes(300)), _hashed(bytes(300), "scale_"), _hashed(b"x" * 77)],
        [Weight("a", bytes(8), Layout(FLOAT32, (2,))), Weight("b", bytes(8), Layout(FLOAT32, (1, 2)))],
        [Weight("freqs", b"abcd" * 64, Layout(FLOAT32, (8, 8))), _hashed(b"abcd" * 64)],
        [Weight("bytes", b"1234", Layout(0, (4,))), _hashed(b"12345")],
        [_hashed(bytes(9_000_000) + b"1"), _hashed(bytes(9_000_000) + b"1", "scale_"), _hashed(b"2" * 9_000_001)],
    ],
    ids=["zeros", "two shapes", "one content with a shape and without", "bytes", "large"],
)
def test_equal_weights_are_stored_once(weights: list[Weight], tmp_path: Path) -> None:
    assert _ours(weights, tmp_path / "model.ptd", random.Random(0)) == _official(weights)


def test_one_name_for_two_contents_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "model.ptd").open("w+b") as file:
        writer = FlatTensorWriter(file, [Entry("norm", 4, Layout(FLOAT32, (1,)))] * 2)
        writer.write(0, b"1234")
        writer.write(1, b"1235")
        with pytest.raises(ValueError, match="two weights are called norm"):
            writer.finish()


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "model.ptd").open("w+b") as file:
        writer = FlatTensorWriter(file, [Entry(BY_HASH, 4)])
        writer.write(0, b"123")
        with pytest.raises(ValueError, match="has 3 of its 4 bytes"):
            writer.finish()
        with pytest.raises(ValueError, match="more than its 4 bytes"):
            writer.write(0, b"45")
