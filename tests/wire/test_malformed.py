"""Whatever arrives, decoding gives a message or a WireError: no other exception, and nothing half read."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.samples import MESSAGE_TYPES, SAMPLES
from wire import WIRE_VERSION, Message, StepResult, WireError, decode, encode
from wire.messages import Header

VERSION = bytes([WIRE_VERSION])
RESULT = next(sample for sample in SAMPLES if isinstance(sample, StepResult))


def head(header: object, lengths: object) -> bytes:
    return VERSION + msgspec.msgpack.encode((header, lengths))


def test_no_frames_and_empty_frames() -> None:
    for frames in ([], [b""], [b"", b""], [VERSION]):
        with pytest.raises(WireError, match="empty message"):
            decode(frames)


@pytest.mark.parametrize("version", [0, 1, WIRE_VERSION + 1, 255])
def test_another_version_is_named(version: int) -> None:
    for sample in SAMPLES:
        frames = encode(sample)
        frames[0] = bytes([version]) + frames[0][1:]
        with pytest.raises(WireError, match=f"wire version {version}, this process speaks {WIRE_VERSION}"):
            decode(frames)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_every_truncation_is_an_error(sample: Message) -> None:
    frames = encode(sample)
    for number, frame in enumerate(frames):
        for length in range(len(frame)):
            cut = [*frames[:number], frame[:length], *frames[number + 1 :]]
            with pytest.raises(WireError):
                decode(cut)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_more_bytes_or_frames_than_announced_are_an_error(sample: Message) -> None:
    frames = encode(sample)
    for wrong in ([*frames, b""], [*frames, b"xxxx"], [frames[0] + b"\x00", *frames[1:]], [*frames[:-1], frames[-1] + b"\x00"]):
        with pytest.raises(WireError):
            decode(wrong)


def test_a_missing_payload_is_an_error() -> None:
    with pytest.raises(WireError, match="StepResult: 1 frames"):
        decode(encode(RESULT)[:1])


@pytest.mark.parametrize(
    "lengths",
    [
        (),
        (2,),
        (2, 2, 0),
        (-1, 8),
        (5, -4),
        (2**63 - 1, 2),
        (2**64 - 1, 2),
        (2, 3),
        (3, 2),
        (0, 0),
        (2.0, 2),
        ("2", 2),
        (None, 2),
        (True, 2),
        ((2,), 2),
        None,
        12,
    ],
)
def test_lengths_that_do_not_fit_are_an_error(lengths: object) -> None:
    payload = encode(RESULT)[1]
    assert isinstance(decode([head(RESULT.header, (2, 2)), payload]), StepResult)
    with pytest.raises(WireError):
        decode([head(RESULT.header, lengths), payload])


def test_a_header_only_message_with_lengths_is_an_error() -> None:
    welcome = next(sample for sample in SAMPLES if type(sample).__name__ == "Welcome")
    with pytest.raises(WireError, match="carries no arrays"):
        decode([head(welcome, (0,))])


@pytest.mark.parametrize(
    "header",
    [
        None,
        7,
        "welcome",
        [],
        ["nobody", 1, 2],
        ["welcome"],
        ["welcome", 1],
        ["welcome", "1", 2],
        ["welcome", 1.5, 2],
        ["welcome", 1, None],
        ["cancel_reply", 1, "perhaps"],
        ["watch_steps", 1],
        ["sampling", 1],
        {"type": "welcome", "group": 1, "epoch": 2},
        [["welcome", 1, 2]],
        ["cancel", 1, b"bytes"],
    ],
)
def test_a_header_of_wrong_type_or_shape_is_an_error(header: object) -> None:
    with pytest.raises(WireError, match="malformed header"):
        decode([head(header, ())])


def test_text_that_is_not_utf_8_is_an_error() -> None:
    frame = encode(next(sample for sample in SAMPLES if type(sample).__name__ == "CancelQuery"))[0]
    with pytest.raises(WireError):
        decode([frame.replace("ü".encode(), b"\xff\xff")])


def test_nesting_without_end_is_an_error() -> None:
    with pytest.raises(WireError):
        decode([VERSION + b"\x91" * 100_000])
    with pytest.raises(WireError):
        decode([VERSION + b"\x92" * 100_000 + b"\x01" * 100_001])


def test_a_collection_that_claims_four_billion_entries_is_an_error() -> None:
    for claim in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"):
        with pytest.raises(WireError):
            decode([VERSION + b"\x92" + claim])


def test_the_message_of_an_error_does_not_repeat_what_was_sent() -> None:
    with pytest.raises(WireError) as caught:
        decode([head(["cancel", 1, 2], ()), b"secret"])
    assert "secret" not in str(caught.value) and len(str(caught.value)) < 300


quick = settings(max_examples=400, deadline=None, derandomize=True, database=None)
mutations = st.lists(
    st.tuples(st.sampled_from(["flip", "insert", "delete", "swap"]), st.integers(0, 10**6), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


def mutated(frame: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    spoilt = bytearray(frame)
    for how, where, value in changes:
        at = where % (len(spoilt) + 1)
        if how == "insert":
            spoilt.insert(at, value)
        elif at < len(spoilt):
            if how == "flip":
                spoilt[at] = value
            elif how == "delete":
                del spoilt[at]
            else:
                spoilt[at], spoilt[0] = spoilt[0], spoilt[at]
    return bytes(spoilt)


def survives(frames: list[bytes]) -> None:
    try:
        message = decode(frames)
    except WireError:
        return
    assert isinstance(message, MESSAGE_TYPES)
    if not isinstance(message, Header):
        assert all(getattr(message, name).dtype == dtype for name, dtype in message.ARRAYS)
    encode(message)


def mutated_frames_survive(sample: Message, changes: list[tuple[str, int, int]], which: int) -> None:
    frames = encode(sample)
    number = min(which, len(frames) - 1)
    frames[number] = mutated(frames[number], changes)
    survives(frames)


any_mutation = given(sample=st.sampled_from(SAMPLES), changes=mutations, which=st.integers(0, 1))
test_mutated_frames_are_a_message_or_a_wire_error = quick(any_mutation(mutated_frames_survive))
test_mutated_frames_for_long = pytest.mark.slow(
    settings(max_examples=20_000, deadline=None, database=None, print_blob=True)(any_mutation(mutated_frames_survive))
)


@quick
@given(frames=st.lists(st.binary(max_size=40), max_size=3), versioned=st.booleans())
def test_noise_is_a_message_or_a_wire_error(frames: list[bytes], versioned: bool) -> None:
    survives([VERSION + frames[0], *frames[1:]] if versioned and frames else frames)
