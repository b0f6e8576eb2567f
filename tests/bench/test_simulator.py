"""The simulator runs the real core: small runs come out to the nanosecond, and as the local loop of the other tests plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from bench import workloads
from bench.cost_models import Line, StepWork
from bench.jobs import INTERACTIVE, Job, Part
from bench.simulator import Setup, Simulation
from bench.targets import possible_hits
from bench.virtual_worker import VirtualWorker
from scheduler.core import CoreConfig
from scheduler.core.request import State
from tests.helpers.fake_worker import worker_facts
from tests.helpers.local_loop import LocalLoop
from wire import AddHeader, AddRequest, SamplingSpec, StepFailed, StepPlan, StepResult, WorkerFacts, encode

MS = 1_000_000
POLICIES = ("continuous", "prefill_first", "static")
FACTS = worker_facts(num_blocks=64, block_size=4, max_model_len=200, max_batch_rows=8, max_step_tokens=32)


@dataclass(frozen=True)
class Fixed:
    """Every step takes the same time."""

    ns: int = MS

    def step_ns(self, work: StepWork) -> int:
        return self.ns

    def describe(self) -> dict[str, Any]:
        return {}


def setup(facts: WorkerFacts = FACTS, costs: Any = Fixed(), workers: int = 1, hop_ns: int = 0, **core: Any) -> Setup:
    sizes = {"max_batch_rows": facts.max_batch_rows, "max_step_tokens": facts.max_step_tokens, "target_itl_ns": 0}
    return Setup(facts, costs, CoreConfig(**(sizes | core)), workers, hop_ns)


def job(arrival_ms: float, prompt: int, output: int, **options: Any) -> Job:
    return Job(round(arrival_ms * MS), (Part(1 + round(arrival_ms * 1000), prompt),), output, **options)


def drawn(count: int, seed: int = 0, gap_ms: float = 2.0) -> list[Job]:
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(gap_ms, count))
    return [job(at, int(random.integers(1, 60)), int(random.integers(1, 20))) for at in arrivals.tolist()]


def simulation(jobs: Sequence[Job], shares: bool = False, **options: Any) -> Simulation:
    return Simulation(setup(**options), iter(jobs), shares_prefixes=shares)


# --------------------------------------------------------------------------------------------------------------- exact


def test_a_request_alone_takes_a_step_a_token() -> None:
    made = simulation([job(5, prompt=10, output=3)])
    done = made.run()
    requests, steps = done.requests, done.steps
    assert (requests.arrival_ns[0], requests.first_ns[0], requests.end_ns[0]) == (5 * MS, 1 * MS, 8 * MS)
    assert requests.reason == ["length"] and requests.output_tokens[0] == 3
    assert steps.begin_ns.tolist() == [5 * MS, 6 * MS, 7 * MS] and steps.end_ns.tolist() == [6 * MS, 7 * MS, 8 * MS]
    assert steps.tokens.tolist() == [10, 1, 1] and steps.sampled.tolist() == [1, 1, 1]
    assert (done.gap_ns.tolist(), done.gap_counts.tolist()) == ([1 * MS], [2])
    assert done.complete and done.refused == {}


def test_a_long_prompt_is_computed_in_chunks_that_sample_once() -> None:
    done = simulation([job(0, prompt=70, output=2)]).run()
    assert done.steps.tokens.tolist() == [32, 32, 6, 1] and done.steps.sampled.tolist() == [0, 0, 1, 1]
    assert done.requests.first_ns[0] == 3 * MS
    assert done.steps.pairs.tolist() == [sum(range(1, 33)), sum(range(33, 65)), sum(range(65, 71)), 0]
    assert done.steps.context.tolist() == [0, 0, 0, 71]


def test_a_plan_made_while_two_are_in_flight_waits_for_the_first() -> None:
    """The second request comes when two plans are made already: it joins the third step."""
    done = simulation([job(0, 4, 6), job(0.5, 4, 2)]).run()
    assert done.steps.rows.tolist() == [1, 1, 2, 2, 1, 1]
    assert done.requests.first_ns[1] == 2.5 * MS, "planned at 1 ms, begun at 2, done at 3"


def test_the_hop_is_paid_where_nothing_hides_it() -> None:
    alone = simulation([job(0, 4, 3)], hop_ns=MS // 10).run()
    assert alone.requests.first_ns[0] == 1.2 * MS
    assert alone.steps.begin_ns.tolist() == [100_000, 1_100_000, 2_100_000], "the worker has the next plan already"


def test_continuous_lets_the_second_in_and_static_does_not() -> None:
    jobs = [job(0, 4, 10), job(0.5, 4, 2)]
    new, old = (simulation(jobs, policy=policy).run() for policy in ("continuous", "static"))
    assert new.requests.end_ns.tolist() == [10 * MS, 4 * MS]
    assert old.requests.end_ns.tolist() == [10 * MS, 12 * MS]


def test_a_static_batch_pads_until_its_last_has_ended() -> None:
    done = simulation([job(0, 4, 2), job(0, 4, 6)], policy="static").run()
    assert done.steps.padding.sum() > 0 and done.requests.end_ns.tolist() == [2 * MS, 6 * MS]


# ------------------------------------------------------------------------------------------------- as the local loop


class Adapter:
    """The virtual worker as the local loop's executor."""

    def __init__(self, facts: WorkerFacts, costs: Any) -> None:
        self.facts, self._costs = facts, costs

    def reset(self) -> None:
        self._worker = VirtualWorker(self.facts, self._costs)

    def submit(self, plan: StepPlan, deliver: Callable[[StepResult | StepFailed], None]) -> None:
        deliver(self._worker.run(plan)[1])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_it_plans_what_the_local_loop_plans(policy: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    jobs = [job(0, int(random.integers(1, 90)), int(random.integers(1, 40))) for _ in range(40)]
    costs = Line(200_000.0, 5_000.0, 1_000.0, 30.0, {})
    made = simulation(jobs, costs=costs, policy=policy, target_itl_ns=400_000)
    made.plans = plans = []
    made.run()
    loop = LocalLoop(Adapter(FACTS, costs), setup(policy=policy, target_itl_ns=400_000).core)
    for entry in jobs:
        loop.add([0] * entry.prompt_tokens, entry.output_tokens)
    loop.run()
    assert [encode(plan) for _, plan in plans] == [encode(plan) for plan in loop.plans]


# ---------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_every_request_gets_all_its_tokens_and_time_never_goes_back(policy: str, seed: int) -> None:
    jobs = drawn(120, seed)
    made = simulation(jobs, costs=Line(300_000.0, 4_000.0, 0.0, 20.0, {}), policy=policy)
    made.tokens = tokens = []
    done = made.run()
    requests, steps = done.requests, done.steps
    assert requests.reason == ["length"] * len(jobs)
    assert requests.output_tokens.tolist() == [entry.output_tokens for entry in jobs]
    assert (requests.end_ns >= requests.arrival_ns + requests.first_ns).all()
    assert (np.diff([now for now, _ in tokens]) >= 0).all()
    assert (steps.begin_ns[1:] >= steps.end_ns[:-1]).all(), "one worker computes one step at a time"
    assert done.gap_counts.sum() + len(jobs) == requests.output_tokens.sum() == done.counters["output_tokens"]
    assert int(steps.sampled.sum()) == requests.output_tokens.sum()
    assert (steps.used_tokens <= steps.held_blocks * FACTS.block_size).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_input_gives_the_same_run(policy: str) -> None:
    def once() -> list[list[int]]:
        done = simulation(drawn(60), policy=policy).run()
        return [done.requests.end_ns.tolist(), done.steps.end_ns.tolist(), done.gap_counts.tolist()]

    assert once() == once()


def test_what_the_worker_reckons_is_what_the_core_reckons() -> None:
    """Two books on the same steps: the virtual worker's, from the plans alone, and the core's."""
    seen: list[tuple[int, int]] = []

    class Noting(Fixed):
        def step_ns(self, work: StepWork) -> int:
            seen.append((work.tokens, work.decode_context + work.chunk_pairs))
            return MS

    made = simulation(drawn(80), costs=Noting())
    core = made._groups[0].core
    expected: list[tuple[int, int]] = []
    plan_of = core.plan

    def plan(now: int) -> StepPlan | None:
        plan = plan_of(now)
        if plan is not None:
            expected.append((int(plan.num_tokens.sum()), core.in_flight[-1].context))
        return plan

    core.plan = plan  # type: ignore[method-assign]
    made.run()
    assert seen == expected


# -------------------------------------------------------------------------------------------------------- kinds of jobs


def test_a_following_turn_comes_its_pause_after_the_end_of_the_one_before() -> None:
    second = job(3, 4, 1)
    done = simulation([job(0, 4, 2, then=second), job(0, 4, 9)]).run()
    assert done.requests.arrival_ns.tolist() == [0, 0, 5 * MS], "2 ms and 3 ms"
    assert done.requests.reason == ["length"] * 3


def test_outputs_of_one_request_share_their_prompt() -> None:
    done = simulation([job(0, 10, 4, num_outputs=3)]).run()
    assert done.requests.output_tokens.tolist() == [4, 4, 4] and done.requests.reason == ["length"] * 3
    assert done.steps.tokens.sum() < 3 * (10 + 3)


def test_a_request_that_ends_by_itself_holds_what_it_asked_for_under_static() -> None:
    known, unknown = job(0, 8, 3), job(0, 8, 3, max_tokens=150)
    made = simulation([unknown, unknown], policy="static", facts=worker_facts(num_blocks=40, block_size=4))
    done = made.run()
    assert done.requests.reason == ["stop", "stop"] and done.requests.output_tokens.tolist() == [3, 3]
    assert done.requests.end_ns[1] > done.requests.end_ns[0], "158 tokens twice do not fit 160"
    together = simulation([known, known], policy="static", facts=worker_facts(num_blocks=40, block_size=4)).run()
    assert together.requests.end_ns[0] == together.requests.end_ns[1]


def test_a_cancelled_request_ends_at_its_time() -> None:
    done = simulation([job(0, 4, 50, cancel_ns=round(3.5 * MS)), job(0, 4, 2)]).run()
    assert done.requests.reason == ["cancelled", "length"]
    assert done.requests.end_ns[0] == 3.5 * MS and done.requests.output_tokens[0] == 3


def test_a_deadline_ends_a_request_even_when_nothing_else_happens() -> None:
    done = simulation([job(0, 4, 100, deadline_ns=5 * MS)]).run()
    assert done.requests.reason == ["deadline"] and done.requests.end_ns[0] == 5 * MS


def test_a_request_that_can_not_be_served_is_counted_as_refused() -> None:
    done = simulation([job(0, 199, 9), job(0, 4, 1)]).run()
    assert done.requests.reason == ["refused", "length"] and done.refused == {"INVALID_ARGUMENT": 1}


def test_a_full_queue_refuses() -> None:
    done = simulation([job(0, 4, 1) for _ in range(30)], max_queue_requests=5).run()
    assert done.refused == {"RESOURCE_EXHAUSTED": 25}


def test_the_higher_class_goes_first() -> None:
    crowd = [job(0, 30, 5) for _ in range(12)]
    late = job(0, 30, 5, priority=INTERACTIVE)
    done = simulation([*crowd, late]).run()
    assert done.requests.first_ns[12] == done.requests.first_ns.min()


def test_it_can_be_stopped_and_says_what_was_done() -> None:
    made = simulation(drawn(100))
    made.end_ns = 60 * MS
    done = made.run()
    assert not done.complete and 0 < sum(reason == "length" for reason in done.requests.reason) < 100
    assert done.requests.end_ns.max() <= 60 * MS and (done.steps.begin_ns <= 61 * MS).all()


def test_stop_from_outside_ends_it() -> None:
    class Costs(Fixed):
        def step_ns(self, work: StepWork) -> int:
            made.stop = made.stop or next(steps) > 20
            return MS

    steps = iter(range(10_000))
    made = simulation(drawn(100), costs=Costs())
    assert not made.run().complete


# -------------------------------------------------------------------------------------------------------- prefix cache


def sessions(count: int, seed: int = 0) -> list[Job]:
    return list(workloads.by_name("conversations").jobs(0.2, count, seed))


ROOMY = worker_facts(num_blocks=20_000, block_size=16, max_model_len=8000, max_batch_rows=16, max_step_tokens=256)


def test_conversations_hit_all_that_was_said_before() -> None:
    jobs = sessions(60)
    done = simulation(jobs, shares=True, facts=ROOMY).run()
    saved, possible = int(done.requests.cached_tokens.sum()), possible_hits(jobs, 16)
    assert 0.98 * possible <= saved <= possible
    assert (done.steps.used_tokens <= done.steps.held_blocks * 16).all(), "a shared block counts once"


def test_possible_hits_are_those_of_a_cache_that_forgets_nothing() -> None:
    """Against the tokens themselves."""
    from bench.jobs import token_ids

    seen: set[bytes] = set()
    expected = 0
    jobs = sessions(40)
    for job in (job for first in jobs for job in first.turns()):
        ids = token_ids(job.prompt, 1 << 30)
        ends = range(16, len(ids), 16)  # at least one token is computed
        expected += sum(16 for end in ends if ids[:end].tobytes() in seen)
        computed = np.append(ids, np.ones(job.output_tokens - 1, np.int32))
        seen.update(computed[:end].tobytes() for end in range(16, len(computed) + 1, 16))
    assert possible_hits(jobs, 16) == expected


def test_without_prefix_caching_nothing_is_hit() -> None:
    done = simulation(sessions(30), shares=True, facts=ROOMY, prefix_caching=False).run()
    assert done.counters["cached_tokens"] == 0


def test_unrelated_prompts_hit_nothing_and_take_the_same_time_with_and_without_caching() -> None:
    jobs = drawn(60)
    on, off = (simulation(jobs, shares=True, facts=ROOMY, prefix_caching=caching).run() for caching in (True, False))
    assert on.counters["cached_tokens"] == 0
    assert on.requests.end_ns.tolist() == off.requests.end_ns.tolist()


# ------------------------------------------------------------------------------------------------------ several workers


def test_several_workers_share_the_load() -> None:
    jobs = drawn(150, gap_ms=0.3)
    one, three = (simulation(jobs, workers=workers).run() for workers in (1, 3))
    assert three.requests.end_ns.max() < 0.5 * one.requests.end_ns.max()
    assert three.requests.reason == ["length"] * 150 and three.num_rows == 24


def test_a_conversation_stays_where_its_prefix_is() -> None:
    jobs = sessions(80)
    done = simulation(jobs, shares=True, facts=ROOMY, workers=2).run()
    systems = sum(first.prompt[0].length for first in jobs)  # each group has to compute each system prompt once
    assert int(done.requests.cached_tokens.sum()) >= 0.9 * (possible_hits(jobs, 16) - systems)


def test_preempted_requests_count_in_a_groups_load() -> None:
    """They have to be computed again before a new one is."""
    facts = worker_facts(num_blocks=20, block_size=4, max_model_len=80, max_batch_rows=8, max_step_tokens=32)
    made = simulation([job(0.001 * i, prompt=20, output=40) for i in range(4)], facts=facts)
    loads: list[int] = []

    def tell(now: int) -> StepPlan | None:
        core = made._groups[0].core
        waiting = [each for request in core.live_requests() for each in request.sequences if each.state is State.PREEMPTED]
        load = made._load(core, AddRequest(header, np.ones(5, np.int32)))
        loads.append(len(waiting))
        assert load.waiting_tokens >= core.queue.num_tokens + sum(each.num_tokens for each in waiting)
        return plan(now)

    header = AddHeader(99, "x", 0, 2, 4, SamplingSpec(0.0, 0, 1.0, 0.0, 0))
    plan = made._groups[0].core.plan
    made._groups[0].core.plan = tell  # type: ignore[method-assign]
    assert made.run().counters["preemptions"] and max(loads) >= 1


# ------------------------------------------------------------------------------------------------------------ policies


def capacity_of(policy: str) -> float:
    """Requests a second when all are there at once, with a workload whose outputs differ much in length."""
    jobs: Iterator[Job] = workloads.by_name("anyscale-512").jobs(math.inf, 150, 0)
    facts = worker_facts(num_blocks=600, block_size=16, max_model_len=2000, max_batch_rows=32, max_step_tokens=1024)
    done = Simulation(setup(facts, Line(5e6, 20e3, 0.0, 50.0, {}), policy=policy), jobs).run()
    return len(done.requests.end_ns) / float(done.requests.end_ns.max())


def test_continuous_serves_more_than_prefill_first_and_that_more_than_static() -> None:
    continuous, prefill_first, static = (capacity_of(policy) for policy in POLICIES)
    assert continuous > 1.3 * prefill_first > 1.3 * 1.3 * static
