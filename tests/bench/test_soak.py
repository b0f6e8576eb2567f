"""The judgements of `make soak`: that it can fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from bench.processes import Process
from bench.sim_tokens import Drawn, sim_tokens
from bench.soak import Asked, Report
from bench.soak_cases import Case, Fate, cases
from bench.soak_load import Status, Tally, _held
from bench.soak_watch import MEMORY_BYTES, Growth, Sample, Watch, growths, more_files, size_of
from bench.witness import Witness
from carousel.v1 import control_pb2
from carousel.v1 import generation_pb2 as pb

VOCABULARY = 4096
CALM_FROM = 1_000_000
LENGTH, DEADLINE, CANCELLED = pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_DEADLINE, pb.FINISH_REASON_CANCELLED


def case_of(fate: Fate, has_window: bool) -> Case:
    found = cases(0, range(2000), VOCABULARY)
    return next(case for case in found if (case.fate, case.has_window) == (fate, has_window) and len(case.expected) == 1)


def witness_of(tokens: list[int], reason: pb.FinishReason.ValueType | None = LENGTH) -> Witness:
    witness = Witness()
    witness.take(pb.GenerateResponse(delta=pb.Delta(token_ids=tokens)))
    if reason is not None:
        witness.take(pb.GenerateResponse(finished=pb.Finished(reason=reason)))
        witness.take(pb.GenerateResponse(summary=pb.Summary()))
    return witness


def judged(case: Case, witness: Witness, status: Status = grpc.StatusCode.OK, calm_from: int = CALM_FROM) -> Tally:
    tally = Tally()
    tally.judge(case, witness, status, calm_from)
    assert tally.ended.total() == 1
    return tally


def test_requests_depend_on_the_seed_and_their_number_alone() -> None:
    whole = {case.number: case for case in cases(3, range(600), VOCABULARY)}
    assert list(cases(3, range(300, 310), VOCABULARY)) == [whole[number] for number in range(300, 310)]
    assert whole[5] != next(cases(4, range(5, 6), VOCABULARY))
    assert {case.fate for case in whole.values()} == set(Fate)
    assert {case.by_many for case in whole.values()} == {case.has_window for case in whole.values()} == {True, False}
    assert all(len(case.expected) == case.request.sampling.num_outputs for case in whole.values())


def test_tokens_computed_together_are_those_computed_alone() -> None:
    outputs = [Drawn([9, 8, 7], 2**64 - 1, 5), Drawn([9, 8, 7], 2**64 - 1, 3, 1), Drawn([6], 0, 1)]
    together = sim_tokens(outputs, VOCABULARY)
    assert together == [sim_tokens([output], VOCABULARY)[0] for output in outputs]
    assert [len(tokens) for tokens in together] == [5, 3, 1] and together[0][:3] != together[1]
    longer = [9, 8, 7, together[0][0]]
    assert sim_tokens([Drawn(longer, 2**64 - 1, 4)], VOCABULARY)[0] != together[0][1:]  # the prompt is not the output


@pytest.mark.parametrize("fate", [Fate.WHOLE, Fate.SLOW, Fate.BROKEN])
def test_a_whole_request_is_what_it_should_be(fate: Fate) -> None:
    case = case_of(fate, True)
    tally = judged(case, witness_of(case.expected[0]))
    assert tally.ended == {"whole": 1} and not tally.violations and not tally.flaws


@pytest.mark.parametrize("has_window", [True, False])
def test_a_wrong_token_is_a_violation(has_window: bool) -> None:
    case = case_of(Fate.WHOLE, has_window)
    tokens = [*case.expected[0][:-1], (case.expected[0][-1] + 1) % VOCABULARY]
    tally = judged(case, witness_of(tokens))
    assert tally.flaws.wrong == tally.num_violations == 1


def test_a_lost_token_is_a_violation() -> None:
    case = case_of(Fate.WHOLE, True)
    tally = judged(case, witness_of(case.expected[0][:-1]))
    assert tally.flaws.lost == tally.num_violations == 1


@pytest.mark.parametrize("status", ["cut", "UNAVAILABLE: nobody answers", grpc.StatusCode.NOT_FOUND, grpc.StatusCode.CANCELLED])
def test_a_request_with_a_window_must_not_end_early(status: Status) -> None:
    case = case_of(Fate.WHOLE, True)
    assert judged(case, witness_of(case.expected[0][:1], None), status).num_violations == 1


def test_a_request_without_a_window_may_be_cut_while_something_is_killed() -> None:
    case = case_of(Fate.WHOLE, False)
    cut = witness_of(case.expected[0][:1], None)
    assert judged(case, cut, "cut").ended == {"cut": 1}
    assert judged(case, cut, "cut", calm_from=case.number).num_violations == 1


def test_only_who_asked_for_it_is_cancelled_or_late() -> None:
    for fate, status, reason in (
        (Fate.CANCELLED, grpc.StatusCode.CANCELLED, CANCELLED),
        (Fate.LATE, grpc.StatusCode.DEADLINE_EXCEEDED, DEADLINE),
    ):
        for number in (grpc.StatusCode.OK, status):
            mine, other = case_of(fate, True), case_of(Fate.WHOLE, True)
            assert judged(mine, witness_of(mine.expected[0][:1], reason), number).ended == {str(fate): 1}
            assert judged(other, witness_of(other.expected[0][:1], reason), number).num_violations == 1


def test_many_violations_are_counted_and_some_are_told() -> None:
    tally = Tally()
    for number in range(100):
        tally.violated(str(number))
    assert tally.num_violations == 100 and tally.violations[0] == "0" and len(tally.violations) < 100


@pytest.mark.parametrize(
    "held",
    [{"running_requests": 1}, {"waiting_requests": 1}, {"held_blocks": 1}, {"retiring_blocks": 1}, {"free_blocks": 5}],
)
def test_what_is_held_by_nobody_is_seen(held: dict[str, int]) -> None:
    at_rest = {"total_blocks": 10, "free_blocks": 6, "cached_blocks": 4}
    assert not _held(control_pb2.GetLoadResponse(**at_rest))
    assert _held(control_pb2.GetLoadResponse(**at_rest | held))


# ------------------------------------------------------------------------------------------------------------ processes

WORKER = Process(17, 100, "worker")


def watched(memory: list[int], files: list[int]) -> list[Growth]:
    samples = [Sample(float(i), bytes_, many) for i, (bytes_, many) in enumerate(zip(memory, files, strict=True))]
    return list(growths(Watch({WORKER: samples}), calm_from_s=3.0))


def test_growth_is_that_of_the_calm_time() -> None:
    first, last = 50 << 20, 60 << 20
    [growth] = watched([1, 1, 1, first, 2, 2, 2, 2, last], [5] * 9)
    assert growth == Growth("worker", (first, last), (5, 5)) and not growth.too_much


def test_a_process_that_began_later_or_ended_sooner_says_nothing() -> None:
    assert not watched([1, 1, 1, 1], [5] * 4)
    late = Watch({WORKER: [Sample(float(i), 1, 1) for i in range(5, 20)]})
    assert not list(growths(late, calm_from_s=3.0))


def test_memory_and_descriptors_that_grow_are_seen() -> None:
    steady = Growth("core", (100 << 20, 100 << 20), (20, 20))
    assert not steady.too_much
    assert "memory" in replace(steady, resident_bytes=(100 << 20, (106 << 20) + MEMORY_BYTES)).too_much
    assert "descriptors" in replace(steady, files=(20, 29)).too_much


def test_descriptors_of_idle_processes_are_compared_by_role() -> None:
    assert not more_files({"core": 20, "frontend": 30}, {"core": 24, "frontend": 12})
    assert more_files({"core": 20}, {"core": 25})


def test_the_size_of_a_folder_that_is_not_there_is_0(tmp_path: Path) -> None:
    assert size_of(tmp_path / "none") == 0
    (tmp_path / "one").write_bytes(b"123")
    assert size_of(tmp_path) == 3


def test_a_report_holds_when_nothing_is_wrong() -> None:
    report = Report(Asked(1, 0, 1.0, 1, 1, 0, 1.0, 1))
    assert report.holds
    report.wrongs.append("something")
    assert not report.holds
