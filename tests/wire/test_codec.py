"""Messages to frames and back: the recorded bytes, every value, no copy, and few bytes where it counts."""

from __future__ import annotations

import enum
import types
import typing

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.samples import GOLDEN, MESSAGE_TYPES, SAMPLES, recorded
from wire import Message, PlanHeader, ResultHeader, StepPlan, StepResult, decode, encode
from wire.messages import WITH_ARRAYS, Header

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def assert_same(one: Message, other: Message) -> None:
    assert type(one) is type(other)
    if isinstance(one, Header):
        assert one == other
        return
    assert one.header == other.header  # type: ignore[union-attr]
    for name, dtype in one.ARRAYS:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert np.array_equal(mine, theirs) and mine.dtype == theirs.dtype == np.dtype(dtype), name


def values_of(kind: typing.Any) -> st.SearchStrategy[typing.Any]:
    """Any value of a type that stands in a header."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if inner[-1] is Ellipsis:
            return st.lists(values_of(inner[0]), max_size=3).map(tuple)
        return st.tuples(*map(values_of, inner))
    if typing.get_origin(kind) is dict:
        return st.dictionaries(*map(values_of, typing.get_args(kind)), max_size=3)
    if isinstance(kind, types.UnionType):
        return st.one_of(*map(values_of, typing.get_args(kind)))
    if kind is types.NoneType:
        return st.none()
    if issubclass(kind, Header):
        return st.tuples(*(values_of(field.type) for field in msgspec.structs.fields(kind))).map(lambda args: kind(*args))
    if issubclass(kind, enum.Enum):
        return st.sampled_from(list(kind))
    integers = st.integers(-(2**63), 2**64 - 1)
    floats = st.floats(allow_nan=False)
    return {int: integers, float: floats, str: st.text(), bytes: st.binary(), bool: st.booleans()}[kind]


def arrays_of(dtype: str) -> st.SearchStrategy[np.ndarray]:
    if np.dtype(dtype).kind == "f":
        return st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(lambda numbers: np.array(numbers, dtype))
    info = np.iinfo(dtype)
    return st.lists(st.integers(info.min, info.max), max_size=5).map(lambda numbers: np.array(numbers, dtype))


def messages_of(kind: type[typing.Any]) -> st.SearchStrategy[Message]:
    if issubclass(kind, Header):
        return values_of(kind)
    arrays = {name: arrays_of(dtype) for name, dtype in kind.ARRAYS}
    return st.builds(kind, values_of(kind.HEADER), **arrays)


def test_there_is_a_sample_of_every_message() -> None:
    assert [type(sample) for sample in SAMPLES] == list(MESSAGE_TYPES)


def test_every_message_with_arrays_can_be_decoded_to_its_own_type() -> None:
    assert set(WITH_ARRAYS.values()) == {kind for kind in MESSAGE_TYPES if not issubclass(kind, Header)}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_a_sample_gives_the_recorded_bytes_and_they_give_the_sample(sample: Message) -> None:
    line = next(line for line in GOLDEN.read_text().splitlines() if line.split()[0] == type(sample).__name__)
    assert recorded(sample) == line, "if the change is allowed: `python -m tests.wire.samples`, then look at the diff"
    assert_same(decode([bytes.fromhex(frame) for frame in line.split()[1:]]), sample)


@pytest.mark.parametrize("kind", MESSAGE_TYPES, ids=lambda kind: kind.__name__)
def test_any_message_comes_back_as_it_was(kind: type[typing.Any]) -> None:
    @quick
    @given(message=messages_of(kind))
    def comes_back(message: Message) -> None:
        assert_same(decode(encode(message)), message)
        assert_same(decode([memoryview(frame) for frame in encode(message)]), message)

    comes_back()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_decoded_arrays_are_aligned_read_only_views_of_the_frame(sample: Message) -> None:
    if isinstance(sample, Header):
        return
    frames = encode(sample)
    message = decode(frames)
    payload = np.frombuffer(frames[1], np.uint8)
    for name, _ in sample.ARRAYS:
        array = getattr(message, name)
        assert len(array) and array.flags.aligned and not array.flags.writeable, name
        assert np.shares_memory(array, payload), name


def test_arrays_are_encoded_as_they_are_declared_whatever_they_were() -> None:
    message = StepResult(ResultHeader(0, 1, 2, 3), tokens=np.array([1, 2, 3, 4])[::2], slots=np.array([7, 8]))  # type: ignore[arg-type]
    decoded = decode(encode(message))
    assert isinstance(decoded, StepResult)
    assert decoded.tokens.tolist() == [1, 3] and decoded.tokens.dtype == np.dtype("<i4")
    assert decoded.slots.tolist() == [7, 8] and decoded.slots.dtype == np.dtype("<u2")


@pytest.mark.parametrize(
    "kind", [kind for kind in MESSAGE_TYPES if not issubclass(kind, Header)], ids=lambda kind: kind.__name__
)
def test_wider_arrays_stand_before_narrower_ones(kind: type[typing.Any]) -> None:
    widths = [np.dtype(dtype).itemsize for _, dtype in kind.ARRAYS]
    assert widths == sorted(widths, reverse=True), "so that each stays aligned"
    assert all(dtype.startswith("<") or dtype == "|u1" for _, dtype in kind.ARRAYS), "little-endian on every machine"


def test_steady_state_is_at_most_eight_bytes_per_row() -> None:
    rows = 1024
    slots = np.arange(rows, dtype=np.uint16)
    plan = StepPlan(PlanHeader(0, 1, 10**6), slots=slots, num_tokens=np.ones(rows, np.int32))
    plan.grow_slots, plan.grow_blocks = slots[::16], np.arange(rows // 16, dtype=np.int32)
    result = StepResult(ResultHeader(0, 1, 10**6, 10**9), tokens=np.zeros(rows, np.int32), slots=slots)
    assert sum(map(len, encode(plan))) <= 8 * rows
    assert sum(map(len, encode(result))) <= 8 * rows
