from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crayon_runtime import events
from crayon_runtime.events import EventReader, EventTooLarge

STREAM = b': a comment\r\ndata: {"a":\r\ndata: 1}\r\n\r\nevent: x\nid: 3\ndata:{"b": 2}\n\n\n\nretry: 5\n\rdata\r\rdata:  c\n\ndata: cut'
DATA = [b'{"a": 1}', b'{"b": 2}', b"", b" c"]


def read(*chunks: bytes) -> list[bytes]:
    reader = EventReader()
    return [data for chunk in chunks for data in reader.feed(chunk)]


@given(st.lists(st.integers(0, len(STREAM))))
def test_events_are_found_wherever_the_stream_is_cut_into_chunks(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    assert read(*(STREAM[a:b] for a, b in itertools.pairwise(places))) == DATA


def test_every_byte_alone() -> None:
    assert read(*(bytes([byte]) for byte in STREAM)) == DATA


def test_an_event_is_there_as_soon_as_its_empty_line_is() -> None:
    reader = EventReader()
    assert reader.feed(b"data: 1\n") == []
    assert reader.feed(b"\n") == [b"1"]
    assert reader.feed(b"data: 2\r\n\r") == []
    assert reader.feed(b"\n") == [b"2"]


@pytest.mark.parametrize("flood", [b"x" * 100, b"data: x\n" * 20, b"data\n" * 200, b": comment" * 20])
def test_what_is_kept_is_bounded(flood: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LARGEST_EVENT", 64)
    with pytest.raises(EventTooLarge):
        read(*(flood[i : i + 10] for i in range(0, len(flood), 10)))


def test_a_stream_of_small_events_is_not_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LARGEST_EVENT", 64)
    assert len(read(*[b": ping\n\ndata: 1\n\n"] * 100)) == 100
