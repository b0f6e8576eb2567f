"""A recording of a simulated run, simulated again: with the same policy and the same costs it must come out the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import shadow, workloads
from bench.cost_models import Line
from bench.figures import Slo
from bench.jobs import Job, Part
from bench.runs import Run
from bench.scenario import Scenario, run
from bench.shadow import Shadow, ShadowError
from bench.simulator import Setup, Simulation
from scheduler.core import Core, CoreConfig
from scheduler.recorder import Recorded, RecordingFile
from tests.helpers.fake_worker import worker_facts

MS = 1_000_000
FACTS = worker_facts(num_blocks=2000, block_size=16, max_model_len=6000, max_batch_rows=12, max_step_tokens=256)
COSTS = Line(2e6, 20e3, 50e3, 40.0, {})


def record(path: Path, jobs: Iterator[Job], *, shares: bool = False, policy: str = "continuous", before: bytes = b"") -> Run:
    """What `carousel serve --record` would have written, had the time been virtual."""
    config = CoreConfig(policy=policy, max_batch_rows=12, max_step_tokens=256, max_queue_requests=20)
    file = RecordingFile(path, replace(config, max_unread_tokens=1 << 30))
    setup = Setup(FACTS, COSTS, config)
    simulation = Simulation(setup, jobs, shares_prefixes=shares, core_of=lambda config: Recorded(Core(config), file))  # type: ignore[arg-type,return-value]
    done = simulation.run()
    file.close()
    return done


def again(found: Shadow, policy: str = "continuous") -> Run:
    setup = Setup(found.facts, found.costs, replace(found.config, policy=policy))
    return run(Scenario(found, 0.0, 0, 0, setup, Slo())).run


def same(one: Run, other: Run) -> None:
    """But for a nanosecond in a step that rounding may take."""
    for name in ("prompt_tokens", "output_tokens", "cached_tokens", "preemptions", "priority"):
        assert getattr(one.requests, name).tolist() == getattr(other.requests, name).tolist(), name
    start = one.requests.arrival_ns[0] - other.requests.arrival_ns[0]
    for name in ("first_ns", "queued_ns"):
        assert getattr(one.requests, name) == pytest.approx(getattr(other.requests, name), abs=50_000), name
    assert one.requests.end_ns - start == pytest.approx(other.requests.end_ns, abs=50_000)
    assert one.steps.tokens.tolist() == other.steps.tokens.tolist()
    assert one.steps.pairs.tolist() == other.steps.pairs.tolist()
    assert one.counters == other.counters


def test_a_recording_gives_back_the_run_and_simulates_to_the_same(tmp_path: Path) -> None:
    jobs = workloads.by_name("anyscale-latency").jobs(12.0, 60, 0)
    done = record(tmp_path / "day.rec", jobs)
    found = shadow.read(tmp_path / "day.rec")
    assert (found.name, found.notes, len(found.requests)) == ("day.rec", (), 60)
    same(done, found.run)
    assert found.run.steps.end_ns.tolist() == done.steps.end_ns.tolist(), "recorded times are exact"
    assert found.run.gap_ns.tolist() == done.gap_ns.tolist() and found.run.gap_counts.tolist() == done.gap_counts.tolist()
    same(done, again(found))


def test_the_costs_are_found_out(tmp_path: Path) -> None:
    record(tmp_path / "day.rec", workloads.by_name("anyscale-latency").jobs(12.0, 40, 0))
    costs = shadow.read(tmp_path / "day.rec").costs
    assert (costs.base, costs.per_token, costs.per_row, costs.per_pair) == pytest.approx((2e6, 20e3, 50e3, 40.0), rel=1e-3)
    assert costs.about["median_error"] < 1e-6


def test_conversations_hit_their_own_replies_again(tmp_path: Path) -> None:
    done = record(tmp_path / "chat.rec", workloads.by_name("conversations").jobs(4.0, 40, 0), shares=True)
    found = shadow.read(tmp_path / "chat.rec")
    assert found.shares_prefixes and done.requests.cached_tokens.sum() > 10_000
    same(done, again(found))


def test_another_policy_answers_the_same_requests(tmp_path: Path) -> None:
    done = record(tmp_path / "day.rec", workloads.by_name("anyscale-latency").jobs(12.0, 20, 0))
    static = again(shadow.read(tmp_path / "day.rec"), "static")
    assert static.requests.output_tokens.tolist() == done.requests.output_tokens.tolist()
    assert static.requests.first_ns.mean() > 2 * done.requests.first_ns.mean()


def jobs_of_all_kinds() -> list[Job]:
    part = (Part(1, 40),)
    return [
        Job(0, part, 100, cancel_ns=30 * MS),
        Job(1 * MS, part, 30, num_outputs=3, tenant="a", priority=3),
        Job(2 * MS, part, 500, deadline_ns=80 * MS),
        Job(3 * MS, (Part(2, 7000),), 5),
        Job(4 * MS, part, 20, max_tokens=200),
        *(Job(5 * MS, part, 9) for _ in range(40)),
    ]


def test_cancels_deadlines_refusals_and_several_outputs_come_again(tmp_path: Path) -> None:
    done = record(tmp_path / "day.rec", iter(jobs_of_all_kinds()))
    found = shadow.read(tmp_path / "day.rec")
    assert done.requests.reason.count("refused") > 1 and done.requests.reason[0] == "cancelled"
    assert found.run.requests.reason == done.requests.reason and found.run.refused == {"recorded": done.counters["refused"]}
    second = again(found)
    assert second.requests.reason[:5] == ["cancelled", "length", "length", "length", "deadline"]
    assert second.requests.reason[5] == "refused" and second.requests.output_tokens[6] == 20
    assert second.requests.output_tokens.tolist() == done.requests.output_tokens.tolist()
    assert found.requests[1].tenant == "a" and found.requests[1].priority == 3


def test_a_rate_stretches_the_times(tmp_path: Path) -> None:
    record(tmp_path / "day.rec", workloads.by_name("anyscale-latency").jobs(12.0, 30, 0))
    found = shadow.read(tmp_path / "day.rec")
    slow = [job.arrival_ns for job in found.jobs(found.own_rate / 2, 0, 0)]
    assert slow == pytest.approx([2 * job.arrival_ns for job in found.requests], abs=2)
    assert len(list(found.jobs(0.0, 7, 0))) == 7


def test_requests_that_warm_up_can_be_left_out(tmp_path: Path) -> None:
    late = [Job(10_000 * MS, (Part(3, 50),), 9), Job(10_001 * MS, (Part(4, 50),), 9)]
    done = record(tmp_path / "day.rec", iter([Job(0, (Part(1, 20),), 5), Job(5 * MS, (Part(2, 20),), 5), *late]))
    warm = shadow.without_first(shadow.read(tmp_path / "day.rec"), 2)
    assert [job.arrival_ns for job in warm.requests] == [0, 1 * MS]
    assert warm.run.requests.end_ns.tolist() == done.requests.end_ns[2:].tolist()
    assert (warm.run.steps.end_ns > 10_000 * MS).all() and len(warm.run.steps.end_ns) < len(done.steps.end_ns)


def test_a_cut_recording_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "day.rec"
    record(path, workloads.by_name("anyscale-latency").jobs(12.0, 60, 0))
    whole = len(shadow.read(path).run.steps.rows)
    path.write_bytes(path.read_bytes()[:-2000])
    found = shadow.read(path)
    assert 0 < len(found.run.steps.rows) < whole
    assert "cut off at byte" in found.notes[0] and "had not ended" in found.notes[1]
    assert not found.run.complete and np.isin("", found.run.requests.reason)
    assert all(reason in ("length", "cancelled") for reason in again(found).requests.reason)


def test_what_is_no_recording_of_any_use_is_told(tmp_path: Path) -> None:
    with pytest.raises(ShadowError, match="No such file"):
        shadow.read(tmp_path / "none.rec")
    (tmp_path / "text.rec").write_text("hello")
    with pytest.raises(ShadowError, match="is not a recording"):
        shadow.read(tmp_path / "text.rec")
    record(tmp_path / "empty.rec", iter(()))
    with pytest.raises(ShadowError, match="holds no request that was computed"):
        shadow.read(tmp_path / "empty.rec")
