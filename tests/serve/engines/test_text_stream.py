"""Tokens become text in pieces, and the pieces are the text."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engines.text import StopStrings, TextStream, Thoughts

BROKEN = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def pieces(items: Any, cuts: list[int]) -> list[Any]:
    """`items` cut at the given places."""
    edges = sorted({0, len(items), *(cut % (len(items) + 1) for cut in cuts)})
    return [items[start:end] for start, end in itertools.pairwise(edges)]


@pytest.mark.parametrize("text", ["naïve café", "👩‍👩‍👧 and 🇩🇪", "日本語", " leading and trailing ", "a\n\nb", ""])
def test_characters_that_span_tokens_come_whole(tokenizer: Any, text: str) -> None:
    stream = TextStream(tokenizer, ())
    shown = [stream.push([id]) for id in ids(tokenizer, text)]
    assert "".join(shown) + stream.finish() == text
    assert not any(BROKEN in piece for piece in shown)


def test_text_is_not_held_back_for_longer_than_a_character(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ())
    assert [stream.push([id]) for id in ids(tokenizer, "aéb")] == ["a", "", "é", "b"]


def test_a_broken_last_character_is_dropped(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ())
    shown = "".join(stream.push([id]) for id in ids(tokenizer, "ab👩")[:-1])
    assert shown + stream.finish() == "ab"
    whole = TextStream(tokenizer, ())
    assert whole.push(ids(tokenizer, "ab👩")[:-1]) + whole.finish() == "ab"


def test_spaces_that_belong_to_a_token_survive() -> None:
    """SentencePiece-style tokens carry their space in front, and decoding drops that of the first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0, "▁one": 1, "▁two": 2, "▁three": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=words), ())
    assert [stream.push([id]) for id in (1, 2, 3)] == ["one", " two", " three"]


def test_special_tokens_are_no_text(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ())
    assert stream.push([*ids(tokenizer, "a"), 1, 0, *ids(tokenizer, "b")]) == "ab"


@given(
    text=st.text(st.characters(exclude_characters=BROKEN, exclude_categories=["Cs"])), cuts=st.lists(st.integers(0, 99))
)
def test_however_the_tokens_come_the_text_is_the_same(tokenizer: Any, text: str, cuts: list[int]) -> None:
    stream = TextStream(tokenizer, ())
    shown = [stream.push(piece) for piece in pieces(ids(tokenizer, text), cuts)]
    assert "".join(shown) + stream.finish() == text


@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [
        (["END"], "one END two", "one "),
        (["END"], "one EN", "one EN"),
        (["END"], "ENEND", "EN"),
        (["b", "abc"], "xabc", "xa"),
        (["abcd", "bc"], "xabcd", "xa"),
        (["é"], "café", "caf"),
        (["\n"], "a\nb", "a"),
        (["aab"], "aaab", "a"),
    ],
)
def test_text_ends_before_the_stop_string_that_is_complete_first(
    tokenizer: Any, stop: list[str], text: str, shown: str
) -> None:
    stream = TextStream(tokenizer, stop)
    got = "".join(stream.push([id]) for id in ids(tokenizer, text))
    assert got + stream.finish() == shown
    assert stream.stopped == (shown != text)


def test_a_possible_begin_of_a_stop_string_is_held_back() -> None:
    stop = StopStrings(["END"])
    assert [stop.push(text) for text in ("a", "E", "N", "x", "EN", "D", "more")] == ["a", "", "", "ENx", "", "", ""]
    assert stop.found


_TEXT = st.text("ab", max_size=12)


@given(text=_TEXT, stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), cuts=st.lists(st.integers(0, 12)))
def test_stopping_does_not_depend_on_how_the_text_is_cut(text: str, stop: list[str], cuts: list[int]) -> None:
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(each) for each in stop)]
    if ends:
        longest = max(len(each) for each in stop if text[: ends[0]].endswith(each))
        expected = text[: ends[0] - longest]
    else:
        expected = text
    stops = StopStrings(stop)
    got = "".join(stops.push(piece) for piece in pieces(text, cuts))
    assert got + stops.finish() == expected
    assert stops.found == bool(ends)


@pytest.mark.parametrize(
    ("begun", "text", "thought", "said"),
    [
        (False, "<think>\nI add.\n</think>\n\nFour.", "I add.", "Four."),
        (False, "  <think>I add.</think>Four.", "I add.", "Four."),
        (False, "<think>\n\n</think>\n\nFour.", "", "Four."),
        (False, "<think>\nI  add\n\nand", "I  add\n\nand", ""),
        (True, "\nI add.\n</think>\n\nFour.\n", "I add.", "Four.\n"),
        (True, "I add.", "I add.", ""),
        (False, "<thin ice", "", "<thin ice"),
        (False, "<thin", "", "<thin"),
        (False, " Four <think>5</think>", "", " Four <think>5</think>"),
        (False, "<think>a </thin b</think>c</think>", "a </thin b", "c</think>"),
        (None, "<think>5</think> is a mark", "", "<think>5</think> is a mark"),
        (False, "", "", ""),
    ],
)
@given(cuts=st.lists(st.integers(0, 60), max_size=8))
def test_a_thought_is_told_from_the_answer_however_it_comes(
    begun: bool | None, text: str, thought: str, said: str, cuts: list[int]
) -> None:
    thoughts = Thoughts(begun=begun)
    found = [thoughts.push(piece, last=False) for piece in pieces(text, cuts)] + [thoughts.push("", last=True)]
    assert ("".join(one for one, _ in found), "".join(other for _, other in found)) == (thought, said)


def test_a_thought_is_not_held_back_for_longer_than_a_mark_may_be() -> None:
    thoughts = Thoughts(begun=False)
    found = [thoughts.push(piece, last=False) for piece in ("<think>", "I add", " two", "</", "think>", "Four", ".")]
    assert found == [("", ""), ("I add", ""), (" two", ""), ("", ""), ("", ""), ("", "Four"), ("", ".")]
