from __future__ import annotations

import pytest

from bench.witness import Flaws, Witness, first_difference
from carousel.v1 import generation_pb2 as pb

EXPECTED = [11, 12, 13, 14]


def delta(offset: int, *tokens: int, output_index: int = 0, text: str = "", text_offset: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        delta=pb.Delta(output_index=output_index, token_offset=offset, token_ids=tokens, text=text, text_offset=text_offset)
    )


def finished(reason: pb.FinishReason.ValueType = pb.FINISH_REASON_LENGTH, output_index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.Finished(output_index=output_index, reason=reason))


SUMMARY = pb.GenerateResponse(summary=pb.Summary())


def seen(*events: pb.GenerateResponse) -> Flaws:
    witness = Witness()
    for event in events:
        witness.take(event)
    return witness.flaws([EXPECTED])


def test_a_whole_output_has_no_flaw() -> None:
    assert not seen(delta(0, 11, 12), delta(2, 13, 14), finished(), SUMMARY)


@pytest.mark.parametrize(
    ("what", "events"),
    [
        ("a gap", [delta(0, 11), delta(2, 13, 14), finished()]),
        ("an end that is missing", [delta(0, 11, 12, 13), finished()]),
        ("a beginning that is missing", [delta(1, 12, 13, 14), finished()]),
    ],
)
def test_a_lost_token_is_seen(what: str, events: list[pb.GenerateResponse]) -> None:
    assert seen(*events) == Flaws(lost=1), what


def test_nothing_at_all_is_all_lost() -> None:
    assert seen(finished(), SUMMARY) == Flaws(lost=4)


@pytest.mark.parametrize("again", [delta(1, 12), delta(1, 12, 13), delta(0, 11)])
def test_a_token_that_comes_twice_is_seen(again: pb.GenerateResponse) -> None:
    flaws = seen(delta(0, 11, 12), again, delta(3, 14) if len(again.delta.token_ids) == 2 else delta(2, 13, 14), finished())
    assert flaws == Flaws(doubled=1)


def test_a_token_that_comes_twice_under_a_new_number_is_seen() -> None:
    flaws = seen(delta(0, 11, 12), delta(2, 12, 13, 14), finished())
    assert flaws.wrong == 3 and flaws  # two are others, and one is too many


def test_a_wrong_token_is_seen() -> None:
    assert seen(delta(0, 11, 12), delta(2, 99, 14), finished()) == Flaws(wrong=1)


def test_tokens_past_the_end_are_seen() -> None:
    assert seen(delta(0, 11, 12, 13, 14, 15), finished()) == Flaws(wrong=1)


def test_a_stream_that_was_cut_may_be_short_and_not_wrong() -> None:
    assert not seen(delta(0, 11, 12))
    assert not seen(delta(0, 11, 12), finished(pb.FINISH_REASON_CANCELLED))
    assert seen(delta(0, 11, 21), finished(pb.FINISH_REASON_CANCELLED)) == Flaws(wrong=1)


def test_text_goes_on_where_it_ended_in_bytes() -> None:
    first = delta(0, 11, text="é", text_offset=0)
    assert not seen(first, delta(1, 12, 13, 14, text="b", text_offset=2), finished())
    assert seen(first, delta(1, 12, 13, 14, text="b", text_offset=1), finished()) == Flaws(text=1)


def test_a_resumed_stream_brings_exactly_the_rest() -> None:
    witness = Witness(2)
    for event in (delta(0, 11, 12, text="ab"), delta(0, 11, output_index=1), finished(output_index=1), SUMMARY):
        witness.take(event)
    rest = witness.rest("r")
    assert [(one.output_index, one.token_offset, one.text_offset) for one in rest.outputs] == [(0, 2, 2), (1, 1, 0)]
    witness.resumed()
    assert not witness.has_summary and witness.reasons == {None}
    for event in (delta(2, 13, 14), finished(), finished(output_index=1), SUMMARY):
        witness.take(event)
    assert witness.is_whole and witness.num_tokens == 5
    assert not witness.flaws([EXPECTED, [11]])
    witness.take(delta(0, 11, 12))
    assert witness.flaws([EXPECTED, [11]]) == Flaws(doubled=2)


def test_flaws_add_up() -> None:
    total = Flaws(lost=1)
    total += Flaws(lost=1, doubled=2, wrong=3, text=4)
    assert total == Flaws(2, 2, 3, 4)


def test_where_two_outputs_part() -> None:
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) is None
