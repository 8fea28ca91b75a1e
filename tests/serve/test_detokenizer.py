"""Incremental detokenization and stop strings: the pieces join to the text, however it is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qserve.serve.detokenizer import Detokenizer, StopStrings


def decode_bytes(token_ids: Sequence[int]) -> str:
    """One token a byte: the hardest case for characters of several bytes."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def pieces(text: bytes, prompt: bytes = b"") -> list[str]:
    detokenizer = Detokenizer(decode_bytes, list(prompt))
    return [*(detokenizer.add(byte) for byte in text), detokenizer.flush()]


def test_a_character_comes_once_with_its_last_byte() -> None:
    assert pieces("a你🙂".encode()) == ["a", "", "", "你", "", "", "", "🙂", ""]


@given(st.text())
def test_pieces_of_any_text_join_to_the_text_without_a_replacement_character(text: str) -> None:
    found = pieces(text.encode())
    assert "".join(found) == text.rstrip("\ufffd")
    assert all("\ufffd" not in piece for piece in found) or "\ufffd" in text


def test_a_character_that_stays_incomplete_is_dropped() -> None:
    assert "".join(pieces("né".encode()[:-1])) == "n"


def test_bytes_that_no_continuation_repairs_are_replaced() -> None:
    assert "".join(pieces(b"a\x80b")) == "a\ufffdb"


def test_endless_garbage_is_given_out_instead_of_held_for_ever() -> None:
    found = pieces(b"\x80" * 40 + b"end")
    assert "".join(found).endswith("end")
    assert any("\ufffd" in piece for piece in found[:30])


@given(st.binary(max_size=60))
def test_any_bytes_are_accepted(data: bytes) -> None:
    joined = "".join(pieces(data))
    valid = data.decode("utf-8", errors="ignore")
    assert [c for c in joined if c != "\ufffd"] == [c for c in valid if c != "\ufffd"]


def test_a_character_begun_in_the_prompt_is_completed() -> None:
    assert "".join(pieces("é!".encode()[1:], prompt=b"caf\xc3")) == "é!"


def test_the_prompt_gives_the_first_piece_its_space() -> None:
    words = {0: "▁The", 1: "▁sky"}

    def decode(token_ids: Sequence[int]) -> str:  # as SentencePiece: the first space is stripped
        return "".join(words[token] for token in token_ids).replace("▁", " ").removeprefix(" ")

    assert Detokenizer(decode, [0]).add(1) == " sky"
    assert Detokenizer(decode).add(1) == "sky"


def test_tokens_without_text_cost_nothing_and_lose_no_context() -> None:
    longest = 0

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return "".join("x" for token in token_ids if token)

    detokenizer = Detokenizer(decode, [1])
    assert [detokenizer.add(0) for _ in range(1000)] == [""] * 1000
    assert detokenizer.add(1) == "x"
    assert longest < 10


def stopped(parts: Sequence[str], stops: Sequence[str], include: bool = False) -> str:
    """The text given out for these parts, and the stop in brackets."""
    strings = StopStrings(stops, include)
    text = "".join(strings.feed(part) for part in parts)
    return text + (strings.flush() if strings.matched is None else f"[{strings.matched}]")


@pytest.mark.parametrize(
    ("parts", "stops", "expected"),
    [
        (["one two"], ["two"], "one [two]"),
        (["on", "e t", "wo three"], ["two"], "one [two]"),
        (["one t", "en"], ["two"], "one ten"),
        (["aab"], ["ab"], "a[ab]"),
        (["abcd"], ["abcd", "b"], "a[b]"),
        (["xabc"], ["bc", "abc"], "x[abc]"),
        (["", "\n", "\nmore"], ["\n\n"], "[\n\n]"),
        (["no stop"], [], "no stop"),
        (["he", "🙂", "x"], ["🙂x"], "he[🙂x]"),
    ],
)
def test_text_ends_before_the_stop_string(
    parts: list[str], stops: list[str], expected: str
) -> None:
    assert stopped(parts, stops) == expected


def test_the_stop_string_stays_when_it_is_included() -> None:
    assert stopped(["one t", "wo three"], ["two"], include=True) == "one two[two]"


def test_only_what_may_become_a_stop_string_is_held() -> None:
    strings = StopStrings(["</s>"])
    assert [strings.feed(part) for part in ("a<", "b</", "s", ">")] == ["a", "<b", "", ""]
    assert strings.matched == "</s>"


def test_nothing_comes_after_a_stop_string() -> None:
    strings = StopStrings(["x"])
    assert [strings.feed("ax"), strings.feed("b"), strings.flush()] == ["a", "", ""]


def test_stop_strings_before_the_minimum_do_not_count() -> None:
    strings = StopStrings(["x"])
    assert strings.feed("axb", check=False) == "axb"
    assert strings.matched is None


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(0, 30)),
    st.booleans(),
)
def test_the_result_does_not_depend_on_where_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    assert stopped(parts, stops, include) == stopped(list(text), stops, include)
    assert stopped(parts, stops, include) == stopped([text], stops, include)
