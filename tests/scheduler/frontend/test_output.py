"""Stop strings: whatever the tokens and however they arrive, the stream is that of a twin that looks at the whole text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.frontend.output import Output, Piece, StoppableOutput
from scheduler.frontend.stop_strings import StopStrings

ALPHABET = "abé"  # few letters, so that matches overlap
STRINGS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=4)
# Per token: (text of tokens before that became certain with it, its own text).
STEPS = st.lists(st.tuples(st.text(ALPHABET, max_size=2), st.text(ALPHABET, max_size=4)), max_size=12)
TAILS = st.text(ALPHABET, max_size=3)


class Scripted:
    """A detokenizer that gives token i the i-th step."""

    def __init__(self, steps: list[tuple[str, str]], tail: str = "") -> None:
        self.steps = steps
        self.tail = tail

    def step(self, token: int) -> tuple[str, str]:
        return self.steps[token]

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join([text for token in tokens for text in self.step(token)])

    def flush(self) -> str:
        return self.tail


def first_match(text: str, strings: list[str]) -> tuple[str, int] | None:
    """The slow twin: (stop string, end) of the match that ends first; of those the longest."""
    for end in range(1, len(text) + 1):
        found = [string for string in strings if text[:end].endswith(string)]
        if found:
            return max(found, key=len), end
    return None


@settings(max_examples=300, deadline=None)
@given(strings=STRINGS, pieces=st.lists(st.text(ALPHABET, max_size=5), max_size=12))
def test_the_first_match_is_found_however_the_text_is_cut(strings: list[str], pieces: list[str]) -> None:
    matcher, done = StopStrings(strings), 0
    expected = first_match("".join(pieces), strings)
    for piece in pieces:
        found = matcher.feed(piece)
        if found is not None:
            assert expected == (found[0], done + found[1])
            return
        done += len(piece)
        text = "".join(pieces)[:done]
        held = max((n for n in range(done + 1) for string in strings if string[:n] == text[done - n :]), default=0)
        assert matcher.num_held == held
    assert expected is None


@settings(max_examples=100, deadline=None)
@given(strings=STRINGS, before=st.text(ALPHABET, max_size=8), text=st.text(ALPHABET, max_size=12))
def test_another_matcher_of_the_same_strings_begins_anew(strings: list[str], before: str, text: str) -> None:
    used = StopStrings(strings)
    used.feed(before)
    held = used.num_held
    assert used.another().feed(text) == StopStrings(strings).feed(text)
    assert used.num_held == held, "the first goes on where it was"


@dataclass
class Twin:
    """What the whole stream must be, from the whole text."""

    text: str
    tokens: list[int]
    stop: str


def twin(strings: list[str], steps: list[tuple[str, str]], tail: str, include_stop: bool) -> Twin:
    """Token by token: its share of the text is its own text and what came late for it."""
    shares = [""] * len(steps)
    orphan = ""  # late text before any token
    for i, (late, own) in enumerate(steps):
        if i:
            shares[i - 1] += late
        else:
            orphan = late
        shares[i] += own
    if shares:
        shares[-1] += tail
    else:
        orphan += tail
    whole = orphan + "".join(shares)
    match = first_match(whole, strings)
    if match is None:
        return Twin(whole, list(range(len(steps))), "")
    stop, end = match
    kept = whole[: end if include_stop else end - len(stop)]
    position, num_tokens = len(orphan), 0
    for i, share in enumerate(shares):
        if share and position < len(kept):
            num_tokens = i + 1
        position += len(share)
    return Twin(kept, list(range(num_tokens)), stop)


@settings(max_examples=400, deadline=None)
@given(
    strings=STRINGS,
    steps=STEPS,
    tail=TAILS,
    include_stop=st.booleans(),
    takes=st.lists(st.booleans(), min_size=13, max_size=13),
)
def test_stop_strings_cut_text_and_tokens_as_the_whole_text_says(
    strings: list[str], steps: list[tuple[str, str]], tail: str, include_stop: bool, takes: list[bool]
) -> None:
    output = StoppableOutput(Scripted(steps, tail), StopStrings(strings), include_stop)
    pieces: list[Piece] = []
    for token, take in zip(range(len(steps)), takes, strict=False):
        output.push(token)
        if take:
            pieces += [piece] if (piece := output.take()) else []
            assert_prefix_is_certain(pieces, strings, steps[: token + 1])
    output.finish()
    pieces += [piece] if (piece := output.take()) else []
    expected = twin(strings, steps, tail, include_stop)
    assert "".join(piece.text for piece in pieces) == expected.text
    assert [token for piece in pieces for token in piece.tokens] == expected.tokens
    assert output.stop_string == expected.stop
    assert_offsets(pieces)


def assert_prefix_is_certain(pieces: list[Piece], strings: list[str], steps: list[tuple[str, str]]) -> None:
    """What went out so far is part of the text, and all of it but what may still become a stop string."""
    whole = "".join(late + own for late, own in steps)
    sent = "".join(piece.text for piece in pieces)
    assert whole.startswith(sent)
    if first_match(whole, strings) is None:
        longest = max(len(string) for string in strings)
        assert len(whole) - len(sent) < longest


def assert_offsets(pieces: list[Piece]) -> None:
    tokens = text = 0
    for piece in pieces:
        assert (piece.token_offset, piece.text_offset) == (tokens, text)
        tokens += len(piece.tokens)
        text += len(piece.text.encode())


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, tail=TAILS, takes=st.lists(st.booleans(), min_size=13, max_size=13))
def test_without_stop_strings_every_token_goes_out_at_once(steps: list[tuple[str, str]], tail: str, takes: list[bool]) -> None:
    output = Output(Scripted(steps, tail))
    pieces: list[Piece] = []
    for token, take in zip(range(len(steps)), takes, strict=False):
        output.push(token)
        if take:
            pieces += [piece] if (piece := output.take()) else []
            assert sum(len(piece.tokens) for piece in pieces) == token + 1
    output.finish()
    pieces += [piece] if (piece := output.take()) else []
    assert "".join(piece.text for piece in pieces) == "".join(late + own for late, own in steps) + tail
    assert_offsets(pieces)


def run(strings: list[str], texts: list[str], include_stop: bool = False) -> tuple[list[int], str, str]:
    output = StoppableOutput(Scripted([("", text) for text in texts]), StopStrings(strings), include_stop)
    for token in range(len(texts)):
        output.push(token)
    output.finish()
    piece = output.take()
    return (piece.tokens, piece.text, output.stop_string) if piece else ([], "", output.stop_string)


@pytest.mark.parametrize(
    ("strings", "texts", "include_stop", "expected"),
    [
        (["STOP"], ["one ", "two STO", "P three"], False, ([0, 1], "one two ", "STOP")),
        (["STOP"], ["one ", "two STO", "P three"], True, ([0, 1, 2], "one two STOP", "STOP")),
        (["STOP"], ["one ", "ST", "OP"], False, ([0], "one ", "STOP")),
        (["STOP"], ["STOP", "x"], False, ([], "", "STOP")),
        (["STOP"], ["ST", "O", "Q"], False, ([0, 1, 2], "STOQ", "")),
        (["abcd", "bc"], ["abcd"], False, ([0], "a", "bc")),
        (["b", "ab"], ["xab"], False, ([0], "x", "ab")),
        (["\n\n"], ["a\n", "", "\nb"], False, ([0], "a", "\n\n")),
        (["x"], ["a", "", ""], False, ([0, 1, 2], "a", "")),
    ],
)
def test_examples(strings: list[str], texts: list[str], include_stop: bool, expected: tuple[list[int], str, str]) -> None:
    assert run(strings, texts, include_stop) == expected


def test_tokens_count_until_the_one_that_completed_the_stop_string() -> None:
    output = StoppableOutput(Scripted([("", "a"), ("", "ST"), ("", "OP"), ("", "b")]), StopStrings(["STOP"]), False)
    for token in range(4):
        output.push(token)
    assert output.num_tokens == 3


def test_no_text_is_made_when_nobody_wants_it() -> None:
    output = Output(None)
    output.push(5)
    output.finish()
    assert output.take() == Piece(0, 0, [5], "")
    assert output.take() is None
