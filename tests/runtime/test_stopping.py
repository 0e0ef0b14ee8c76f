"""Stop strings: where the text is cut does not depend on how it arrives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crayon_runtime.stopping import StopStrings


def said(stops: list[str], *pieces: str) -> tuple[list[str], str | None]:
    filter_ = StopStrings(stops)
    shown = []
    for piece in pieces:
        shown.append(filter_.push(piece))
        if filter_.found:
            return shown, filter_.found
    return [*shown, filter_.flush()], None


def test_it_is_found_across_pieces_and_not_shown() -> None:
    assert said(["STOP"], "go S", "TO", "P on") == (["go ", "", ""], "STOP")


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    assert said(["STOP"], "SSTO", "x", "ST") == (["S", "STOx", "", "ST"], None)
    assert said(["\n\n"], "a\n", "b\n", "\n") == (["a", "\nb", ""], "\n\n")


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert said([], "a", "b") == (["a", "b", ""], None)


@pytest.mark.parametrize(
    "stops, text, shown, found",
    [
        (["abc", "b"], "xabc", "xa", "b"),
        (["bc", "abc"], "xabc", "x", "abc"),
        (["ab", "abc"], "xabc", "x", "ab"),
        (["aab"], "aaab", "a", "aab"),
        (["é", "日本"], "日é", "日", "é"),
        (["x"], "x", "", "x"),
    ],
)
def test_the_first_character_that_completes_one_decides(stops: list[str], text: str, shown: str, found: str) -> None:
    for pieces in ([text], list(text)):
        got, stop = said(stops, *pieces)
        assert ("".join(got), stop) == (shown, found)


TEXT = st.text("ab", max_size=12)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.lists(TEXT, max_size=6))
def test_pieces_make_no_difference(stops: list[str], pieces: list[str]) -> None:
    whole, found = said(stops, *"".join(pieces))
    got, stop = said(stops, *pieces)
    assert ("".join(got), stop) == ("".join(whole), found)
    text = "".join(got)
    assert not any(s in text for s in stops)
    assert found is None or "".join(pieces).startswith(text + found)
