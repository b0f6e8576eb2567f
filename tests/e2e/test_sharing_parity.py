"""With everything that shares and moves blocks, the whole engine still gives the tokens of transformers.

Prefix hits on prompts and on outputs, n outputs of one prompt, preemption by recompute and by swap, a worker's death: each
output is held against a run of transformers alone, greedy or with the slow sampler on its logits (law 12).
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from scheduler.core import CoreConfig
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.executors import model_executor
from tests.helpers.local_loop import GREEDY, LocalLoop
from tests.helpers.reference import Comparison, Reference, greedy, sampled
from wire import SamplingSpec

VOCABULARY, MODEL_LEN, BLOCK = 256, 256, 16
NUM_OUTPUTS = 4
SEEDED = SamplingSpec(temperature=0.9, top_k=0, top_p=1.0, min_p=0.0, seed=2024)


class Case:
    """A checkpoint; 20 prompts in four families that begin alike, for 0 to 70 tokens; what transformers says to each."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self.name = architecture
        lengths = dict(vocab_size=VOCABULARY, max_position_embeddings=MODEL_LEN)
        self.model_dir = make_checkpoint(folder, architecture, **lengths)
        rng = random.Random(architecture)
        families = [self.tokens(rng, length) for length in (0, 16, 39, 70)]
        self.prompts = [families[i % 4] + self.tokens(rng, rng.randint(1, 40)) for i in range(18)]
        self.prompts += [self.prompts[3], self.prompts[3]]  # the same again
        self.max_tokens = [rng.randint(4, 40) for _ in self.prompts]
        self.references = greedy(self.model_dir, self.prompts, self.max_tokens)

    @staticmethod
    def tokens(rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    def loop(
        self, num_blocks: int = 300, num_host_blocks: int = 0, max_batch_rows: int = 16, policy: str = "continuous"
    ) -> LocalLoop:
        executor = model_executor(self.model_dir, num_blocks, BLOCK, num_host_blocks)
        return LocalLoop(executor, CoreConfig(policy=policy, max_batch_rows=max_batch_rows, max_step_tokens=96))

    def add(self, loop: LocalLoop, number: int) -> int:
        return loop.add_many(self.prompts[number], self.max_tokens[number], num_outputs=1, salt="")[0]

    def compare(self, loop: LocalLoop, wanted: dict[int, Reference]) -> None:
        """Runs until all have ended, and holds these handles against the references."""
        got, comparison = loop.run(), Comparison()
        for handle, reference in wanted.items():
            comparison.add(f"{self.name}, handle {handle}", got[handle].tokens, reference)
        comparison.check()

    def run_all(self, loop: LocalLoop) -> None:
        """All requests, some of which join while others decode; each twice, the second time with what the cache still has."""
        wanted = {}
        for number, reference in enumerate(self.references):
            wanted[self.add(loop, number)] = reference
            for _ in range(number % 4):
                loop.step()
        wanted |= {self.add(loop, number): reference for number, reference in enumerate(self.references)}
        self.compare(loop, wanted)


@pytest.fixture(
    scope="module",
    params=["llama", pytest.param("qwen3", marks=pytest.mark.slow), pytest.param("opt", marks=pytest.mark.slow)],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("model"), request.param)


def cached(loop: LocalLoop, handle: int) -> int:
    """Tokens that the output found in the prefix cache, as its end says."""
    ended = loop.got[handle].ended
    assert ended is not None
    return ended.stats.cached_tokens


# --------------------------------------------------------------------------------------------------------- prefix cache


def test_prefix_hits_while_others_run(case: Case) -> None:
    loop = case.loop()
    case.run_all(loop)
    again = range(len(case.prompts), 2 * len(case.prompts))
    assert [cached(loop, handle) for handle in again] == [(len(prompt) - 1) // BLOCK * BLOCK for prompt in case.prompts]
    assert loop.core.counters.preemptions == 0


def test_a_prompt_of_full_blocks_computes_its_last_block_again(case: Case) -> None:
    prompt = case.prompts[3][: 4 * BLOCK]
    reference = greedy(case.model_dir, [prompt], [10])[0]
    loop = case.loop()
    wanted = {loop.add_many(prompt, 10, num_outputs=1, salt="")[0]: reference}
    loop.run()
    wanted[second := loop.add_many(prompt, 10, num_outputs=1, salt="")[0]] = reference
    case.compare(loop, wanted)
    assert cached(loop, second) == 3 * BLOCK, "one token at least is computed"


def test_the_next_turn_of_a_dialogue_finds_the_answer_of_the_last(case: Case) -> None:
    """Blocks that outputs have filled are found too: all but what the last tokens did not fill."""
    loop, history, computed = case.loop(), case.prompts[3], 0
    rng = random.Random(5)
    for _ in range(3):
        (reference,) = greedy(case.model_dir, [history], [30])
        (handle,) = loop.add_many(history, 30, num_outputs=1, salt="")
        case.compare(loop, {handle: reference})
        assert cached(loop, handle) == computed // BLOCK * BLOCK
        computed = len(history) + 30 - 1  # the last output token was not
        history = history + loop.got[handle].tokens + case.tokens(rng, 7)


def test_another_salt_or_none_shares_nothing(case: Case) -> None:
    loop, wanted = case.loop(), {}
    for salt in ("", "a", "b", None, None):
        (handle,) = loop.add_many(case.prompts[3], case.max_tokens[3], num_outputs=1, salt=salt)
        wanted[handle] = case.references[3]
        case.compare(loop, wanted)
    assert loop.core.counters.cached_tokens == 0


def test_prefix_hits_in_a_pool_that_keeps_evicting(case: Case) -> None:
    loop = case.loop(num_blocks=24)
    case.run_all(loop)
    assert loop.core.counters.cached_tokens > 0 and loop.core.counters.preemptions > 0


# ------------------------------------------------------------------------------------------------------------ preemption


def test_preempted_by_recompute_with_what_the_cache_still_has(case: Case) -> None:
    loop = case.loop(num_blocks=16, max_batch_rows=8)
    case.run_all(loop)
    counters = loop.core.counters
    assert counters.preemptions > 3 and counters.swapped_blocks == 0
    lost = sum(got.ended.stats.recomputed_tokens for got in loop.got.values() if got.ended is not None)
    assert lost == counters.recomputed_tokens


@pytest.mark.parametrize("num_host_blocks", [200, 9])
def test_preempted_by_swap(case: Case, num_host_blocks: int) -> None:
    """With room on the host for all, and for some."""
    loop = case.loop(num_blocks=16, num_host_blocks=num_host_blocks, max_batch_rows=8)
    case.run_all(loop)
    counters = loop.core.counters
    assert counters.preemptions > 3 and counters.swapped_blocks > 0
    moved = sum(len(plan.swap_out_blocks) + len(plan.swap_in_blocks) for plan in loop.plans)
    assert moved == counters.swapped_blocks and loop.core.load(0).held_host_blocks == 0


def test_swapped_without_prefix_cache(case: Case) -> None:
    loop = case.loop(num_blocks=16, num_host_blocks=200, max_batch_rows=8)
    wanted = {}
    for number, reference in enumerate(case.references):
        wanted[loop.add(case.prompts[number], case.max_tokens[number])] = reference
    case.compare(loop, wanted)
    assert loop.core.counters.swapped_blocks > 0 and loop.core.counters.recomputed_tokens == 0


# ------------------------------------------------------------------------------------------------------------- n outputs


@pytest.mark.parametrize("policy", ["continuous", "static", "prefill_first"])
def test_greedy_outputs_of_one_prompt_are_all_the_same(case: Case, policy: str) -> None:
    loop, wanted = case.loop(policy=policy), {}
    for number in range(5):
        handles = loop.add_many(case.prompts[number], case.max_tokens[number], GREEDY, num_outputs=NUM_OUTPUTS, salt="")
        wanted |= dict.fromkeys(handles, case.references[number])
    case.compare(loop, wanted)


@pytest.fixture(scope="module")
def drawn(case: Case) -> dict[int, list[Reference]]:
    """For a few prompts: what each of their outputs is, by number of the prompt."""
    return {number: sampled(case.model_dir, case.prompts[number], 24, SEEDED, NUM_OUTPUTS) for number in (1, 3, 6, 7, 11)}


@pytest.mark.parametrize(
    "pools",
    [
        dict(num_blocks=300),
        dict(num_blocks=16, max_batch_rows=8),
        dict(num_blocks=16, num_host_blocks=200, max_batch_rows=8),
        dict(num_blocks=16, num_host_blocks=6, max_batch_rows=7),
        dict(num_blocks=300, policy="static"),
        dict(num_blocks=300, policy="prefill_first"),
    ],
    ids=["room", "recompute", "swap", "both", "static", "prefill-first"],
)
@pytest.mark.parametrize("salt", ["", None], ids=["cached", "uncached"])
def test_each_drawn_output_is_its_own(
    case: Case, drawn: dict[int, list[Reference]], pools: dict[str, int | str], salt: str | None
) -> None:
    loop, wanted = case.loop(**pools), {}  # type: ignore[arg-type]
    for number, references in drawn.items():
        handles = loop.add_many(case.prompts[number], 24, SEEDED, num_outputs=NUM_OUTPUTS, salt=salt)
        wanted |= dict(zip(handles, references, strict=True))
        loop.step()
    case.compare(loop, wanted)
    assert len({tuple(reference.tokens) for reference in drawn[3]}) == NUM_OUTPUTS
    if "policy" not in pools:
        assert sum(len(plan.copy_to) for plan in loop.plans) > 0
        assert (loop.core.counters.preemptions > 0) == (pools["num_blocks"] != 300)
        assert (loop.core.counters.swapped_blocks > 0) == ("num_host_blocks" in pools)


def test_eight_outputs_hold_the_prompt_once(case: Case) -> None:
    prompt = case.tokens(random.Random(8), 200)
    references = sampled(case.model_dir, prompt, 20, SEEDED, 8)
    loop = case.loop()
    handles = loop.add_many(prompt, 20, SEEDED, num_outputs=8)
    most_held = 0
    while not loop.core.is_idle:
        loop.step()
        most_held = max(most_held, loop.core.load(0).held_blocks)
    case.compare(loop, dict(zip(handles, references, strict=True)))
    shared, own = 200 // BLOCK, 2  # of each output: 8 tokens of the prompt and 19 of its own
    assert most_held == shared + 8 * own
    assert sum(len(plan.copy_to) for plan in loop.plans) == 7
    computed = sum(int(plan.num_tokens.sum()) for plan in loop.plans)
    assert computed == 200 + 7 + 8 * 19, "the others compute the prompt's last token again, and nothing else"


# --------------------------------------------------------------------------------------------------------- a worker's death


def test_after_a_workers_death_with_outputs_that_share_and_some_swapped(case: Case, drawn: dict[int, list[Reference]]) -> None:
    loop, wanted = case.loop(num_blocks=16, num_host_blocks=200, max_batch_rows=8), {}
    for number, references in drawn.items():
        handles = loop.add_many(case.prompts[number], 24, SEEDED, num_outputs=NUM_OUTPUTS, salt="")
        wanted |= dict(zip(handles, references, strict=True))
    while loop.core.load(0).held_host_blocks == 0:
        loop.step()
    loop.core.worker_lost(loop.now)
    loop.join()
    assert loop.core.load(0).held_host_blocks == 0
    case.compare(loop, wanted)


def test_after_a_worker_with_blocks_of_another_size_has_come(case: Case) -> None:
    """Its blocks are larger or smaller: prompts are hashed again for them."""
    loop, wanted = case.loop(), {}
    for number, reference in enumerate(case.references[:8]):
        wanted[case.add(loop, number)] = reference
    for _ in range(4):
        loop.step()
    loop.core.worker_lost(loop.now)
    loop.executor = model_executor(case.model_dir, 120, block_size=32)
    loop.join()
    for number, reference in enumerate(case.references[:8]):
        wanted[case.add(loop, number)] = reference
    case.compare(loop, wanted)
    assert np.all(np.array([cached(loop, handle) for handle in list(wanted)[8:]]) % 32 == 0)
