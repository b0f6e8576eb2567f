"""The simulated executor: the same tokens in any batch, the time of the formula, every wrong plan refused, and no torch."""

import dataclasses
import subprocess
import sys

import msgspec
import numpy as np

from tests.helpers.content_executor import undisturbed
from tests.helpers.plans import PlanMaker
from wire import SamplingSpec, StepFailed, StepPlan, StepResult, decode, encode
from worker.sim_executor import Latency, SimExecutor, sim_facts

FACTS = sim_facts(vocab_size=50, max_model_len=64, block_size=4, num_blocks=60, max_batch_rows=6, max_step_tokens=128)


def spec(seed: int = 0, stops: tuple[int, ...] = (), min_tokens: int = 0) -> SamplingSpec:
    return SamplingSpec(1.0, 0, 1.0, 0.0, seed, min_tokens, stops)


def run(executor: SimExecutor, plan: StepPlan) -> StepResult:
    answers: list[StepResult | StepFailed] = []
    again = decode(encode(plan))
    assert isinstance(again, StepPlan)
    executor.submit(again, answers.append)
    (answer,) = answers
    assert isinstance(answer, StepResult), answer
    return answer


def by_slot(result: StepResult) -> dict[int, int]:
    return dict(zip(result.slots.tolist(), result.tokens.tolist(), strict=True))


def alone(prompt: list[int], count: int, sampling: SamplingSpec, end_chance: float = 0.0) -> list[int]:
    executor, maker = SimExecutor(FACTS, end_chance=end_chance), PlanMaker(FACTS)
    maker.start(0, prompt, sampling)
    return [by_slot(run(executor, maker.plan()))[0] for _ in range(count)]


def test_tokens_are_the_same_alone_batched_chunked_and_after_a_preemption() -> None:
    prompts = [[1, 2, 3], list(range(11)), [9] * 6]
    expected = [alone(prompt, 8, spec(seed)) for seed, prompt in enumerate(prompts)]
    executor, maker = SimExecutor(FACTS), PlanMaker(FACTS, shuffle=1)
    got: list[list[int]] = [[], [], []]
    for slot, prompt in enumerate(prompts):
        maker.start(slot, prompt, spec(slot))
    maker_plans = [{0: 3, 1: 4, 2: 2}, {1: 1, 0: 1, 2: 4}, {1: 5}, {2: 1, 1: 1}, {0: 1, 1: 1, 2: 1}, {0: 1, 1: 1}]
    for counts in maker_plans:
        for slot, token in by_slot(run(executor, maker.plan(counts))).items():
            got[slot].append(token)
    maker.end(1)
    run(executor, maker.plan({0: 1}))
    maker.start(4, prompts[1] + got[1], spec(1), num_prompt_tokens=len(prompts[1]))
    while len(got[1]) < 8:
        counts = {0: 1, 4: 5} if maker.sequences[4].computed == 0 else None
        got[1] += [token for slot, token in by_slot(run(executor, maker.plan(counts))).items() if slot == 4]
    for slot in range(3):
        assert got[slot] == expected[slot][: len(got[slot])] and len(got[slot]) >= 3
    assert got[1] == expected[1]


def test_another_prompt_seed_or_output_gives_other_tokens() -> None:
    base = alone([1, 2, 3], 8, spec(0))
    assert base != alone([1, 2, 4], 8, spec(0)) and base != alone([1, 2, 3], 8, spec(1))
    executor, maker = SimExecutor(FACTS), PlanMaker(FACTS)
    maker.start(0, [1, 2, 3], spec(0), output_index=1)
    assert base != [by_slot(run(executor, maker.plan()))[0] for _ in range(8)]


def test_stop_tokens_come_only_by_chance_and_not_before_min_tokens() -> None:
    stops = tuple(range(0, 45))
    assert not set(alone([1, 2], 60, spec(3, stops))) & set(stops)
    certain = alone([1, 2], 10, spec(3, (7, 8), min_tokens=4), end_chance=1.0)
    assert certain[4:] == [7] * 6 and not {7, 8} & set(certain[:4])
    assert set(alone([1, 2], 60, spec(3), end_chance=1.0)) != {7}, "a sequence without stop tokens never ends by itself"
    some = alone([1, 2], 60, spec(3, (7,)), end_chance=0.2)
    assert 3 <= some.count(7) <= 25


def test_a_vocabulary_of_stop_tokens_only_still_gives_tokens() -> None:
    assert len(alone([1], 5, spec(0, tuple(range(50))))) == 5


def test_a_step_takes_the_time_of_the_formula() -> None:
    slept: list[float] = []
    latency = Latency(
        base_ns=5_000_000_000, per_row_ns=1_000_000_000, per_token_ns=100_000_000, per_context_token_ns=10_000_000
    )
    executor, maker = SimExecutor(FACTS, latency, sleep=slept.append), PlanMaker(FACTS)
    maker.start(0, range(10))
    maker.start(1, range(4))
    result = run(executor, maker.plan({0: 6, 1: 4}))
    # 2 rows, 10 tokens, contexts of 6 and 4
    assert result.header.duration_ns == 8_100_000_000 and 7.0 < slept[0] <= 8.1
    padded = run(executor, maker.plan({0: 4}, padding=[1]))
    # 2 rows, 5 tokens, contexts of 10 and 5
    assert padded.header.duration_ns == 7_650_000_000


def test_blocks_that_are_moved_take_their_time() -> None:
    facts = msgspec.structs.replace(FACTS, num_host_blocks=20)
    latency = Latency(per_swapped_block_ns=1_000_000_000, per_copied_block_ns=10_000_000)
    executor, maker = SimExecutor(facts, latency, sleep=lambda _: None), PlanMaker(facts)
    maker.start(0, range(10))
    maker.start(1, range(4))
    run(executor, maker.plan())
    maker.start(2, range(10), prefix_of=0, num_computed=9)
    maker.start(3, range(10), prefix_of=0, num_computed=9)
    assert run(executor, maker.plan()).header.duration_ns == 20_000_000
    swapped = maker.swap_out(0)
    assert run(executor, maker.plan()).header.duration_ns == 3_000_000_000
    maker.start(0, range(12), swapped=swapped)
    maker.swap_out(1)
    assert run(executor, maker.plan()).header.duration_ns == 5_000_000_000, "three come back, two go"


def test_a_run_alone_can_be_said_without_any_step() -> None:
    for seed, index, stops, chance in (
        (0, 0, (), 0.0),
        (5, 3, (7, 8, 1000), 0.2),
        (-1, 1, (9,), 1.0),
        (2**64 - 1, 0, (3,), 0.1),
    ):
        sampling = spec(seed, stops, min_tokens=2)
        executor, maker = SimExecutor(FACTS, end_chance=chance), PlanMaker(FACTS)
        maker.start(0, [1, 2, 3], sampling, output_index=index)
        tokens = [by_slot(run(executor, maker.plan()))[0] for _ in range(30)]
        said = undisturbed([1, 2, 3], 30, FACTS.vocab_size, sampling, index, chance)
        assert said == tokens[: len(said)] and (len(said) == 30 or said[-1] in stops)
        assert chance < 1.0 or len(said) == 3


def test_without_latency_it_does_not_sleep() -> None:
    slept: list[float] = []
    executor, maker = SimExecutor(FACTS, sleep=slept.append), PlanMaker(FACTS)
    maker.start(0, [1])
    assert run(executor, maker.plan()).header.duration_ns > 0 and slept == []


def test_a_plan_that_does_not_fit_fails_and_reset_makes_it_usable_again() -> None:
    executor, maker = SimExecutor(FACTS), PlanMaker(FACTS, epoch=3, group=2)
    maker.start(0, range(6))
    plan = maker.plan()
    answers: list[StepResult | StepFailed] = []
    executor.submit(dataclasses.replace(plan, num_tokens=np.array([7], np.int32)), answers.append)
    (failed,) = answers
    assert isinstance(failed, StepFailed) and (failed.group, failed.epoch, failed.step_id) == (2, 3, 0)
    assert failed.message.startswith("PlanError: slot 0 computes more tokens than it knows") and "\n" not in failed.message
    executor.reset()
    assert run(executor, plan).slots.tolist() == [0]


def test_a_step_that_only_ends_sequences_gives_an_empty_result() -> None:
    executor, maker = SimExecutor(FACTS), PlanMaker(FACTS)
    maker.start(0, range(6))
    run(executor, maker.plan())
    maker.end(0)
    result = run(executor, maker.plan())
    assert result.header.step_id == 1 and len(result.tokens) == len(result.slots) == 0


def test_it_runs_where_importing_torch_raises() -> None:
    program = """
import sys
sys.modules["torch"] = None
import worker.main, worker.link, worker.sequences, worker.config, kvcache.sizing
from tests.helpers.content_executor import undisturbed
from tests.helpers.plans import PlanMaker
from worker.sim_executor import SimExecutor, sim_facts
maker = PlanMaker(sim_facts())
maker.start(0, [1, 2, 3])
SimExecutor(sim_facts()).submit(maker.plan(), print)
assert sys.modules["torch"] is None
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "StepResult" in done.stdout, done.stderr
