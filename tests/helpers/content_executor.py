"""The simulated executor with a memory: what keys and values a block holds is kept, moved and checked as a number per token.

The key and value of a position depend on all tokens up to it; here a 64-bit hash of those tokens stands for them. Rows write
it where their block table says, swaps and copies move it, and before a row computes, its table must hold exactly the hashes
of its own tokens: a wrong hit, a wrong copy or swap, a block used after it was given away shows at once, as AssertionError.
Everything else is the simulated executor's: tokens, the mirror, its refusals (which are AssertionErrors here too).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wire.messages import I32, SamplingSpec, SequenceStart, StepFailed, StepPlan, StepResult, WorkerFacts
from worker.executor import Deliver
from worker.sim_executor import Latency, SimExecutor, draw, prompt_hash

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

LATENCY = Latency(base_ns=1_000_000, per_token_ns=20_000, per_context_token_ns=50, per_swapped_block_ns=50_000)


class ContentExecutor:
    """Composed with a SimExecutor, which computes; answers at once, in the thread that submits. reset() empties all blocks.

    Legend: R rows, T tokens, L largest number of tokens.
    """

    def __init__(self, sim: SimExecutor) -> None:
        facts = sim.facts
        self.facts: WorkerFacts = facts
        self._sim = sim
        self._expected: U64 = np.empty((facts.max_batch_rows, facts.max_model_len + 1), np.uint64)  # [slot, L], as known
        self._device: U64 = np.zeros((1 + facts.num_blocks, facts.block_size), np.uint64)  # 0: nothing was written
        self._host: U64 = np.zeros((1 + facts.num_host_blocks, facts.block_size), np.uint64)
        self.num_checked = 0  # hashes compared since it was made

    @staticmethod
    def of(facts: WorkerFacts, latency: Latency = LATENCY, end_chance: float = 0.0) -> ContentExecutor:
        """One whose steps last as long as the formula says, exactly, and take no time."""
        return ContentExecutor(SimExecutor(facts, latency, end_chance, sleep=lambda _: None, clock=lambda: 0))

    def reset(self) -> None:
        self._sim.reset()
        self._device[:] = 0
        self._host[:] = 0

    def submit(self, plan: StepPlan, deliver: Deliver) -> None:
        answers: list[StepResult | StepFailed] = []
        self._sim.submit(plan, answers.append)
        (answer,) = answers
        assert isinstance(answer, StepResult), f"step {plan.header.step_id}: {answer.message}"
        # The mirror is past this step now; nothing that is read from it below has been changed by its samples.
        at = 0
        for start in plan.header.starts:
            self._expect(start, plan.start_tokens[at : at + start.num_tokens])
            at += start.num_tokens
        self._move(plan)
        slots = plan.slots.astype(np.intp)
        after = self._sim.sequences.num_computed[slots]
        self._check(slots, after - plan.num_tokens, plan.header.step_id)
        self._write(slots, after - plan.num_tokens, after)
        self._feed(answer)
        deliver(answer)

    def close(self) -> None:
        self._sim.close()

    def _expect(self, start: SequenceStart, tokens: I32) -> None:
        self._expected[start.slot, : len(tokens)] = prefix_hashes(tokens)

    def _feed(self, answer: StepResult) -> None:
        """The sampled tokens' keys and values come behind those of their sequences."""
        slots = answer.slots.astype(np.intp)
        position = self._sim.sequences.num_tokens[slots] - 1
        self._expected[slots, position] = self._expected[slots, position - 1] + _mixed(answer.tokens, position)

    def _move(self, plan: StepPlan) -> None:
        self._host[plan.swap_out_host_blocks] = self._device[plan.swap_out_blocks]
        self._device[plan.swap_in_blocks] = self._host[plan.swap_in_host_blocks]
        self._host[plan.swap_in_host_blocks] = 0
        self._device[plan.copy_to] = self._device[plan.copy_from]

    def _check(self, slots: NDArray[np.intp], computed: I64, step_id: int) -> None:
        row, position, block, offset = self._places(slots, np.zeros_like(computed), computed)
        held, wanted = self._device[block, offset], self._expected[slots[row], position]
        self.num_checked += len(row)
        if not np.array_equal(held, wanted):
            i = int((held != wanted).argmax())
            what = "nothing" if held[i] == 0 else "something else"
            raise AssertionError(
                f"step {step_id}: slot {slots[row[i]]} reads {what} at position {position[i]} "
                f"(block {block[i]}, offset {offset[i]})"
            )

    def _write(self, slots: NDArray[np.intp], first: I64, after: I64) -> None:
        row, position, block, offset = self._places(slots, first, after)
        self._device[block, offset] = self._expected[slots[row], position]

    def _places(self, slots: NDArray[np.intp], first: I64, after: I64) -> tuple[I64, I64, I32, I64]:
        """The positions first .. after - 1 of each row, one row after the other [T]: row, position, block, offset in it."""
        count, size = after - first, self.facts.block_size
        row = np.repeat(np.arange(len(slots)), count)
        position = np.arange(len(row)) + np.repeat(first - np.cumsum(count) + count, count)
        return row, position, self._sim.sequences.block_tables[slots[row], position // size], position % size


def prefix_hashes(tokens: I32) -> U64:
    """A 64-bit hash for each position, of all tokens up to it and of their order."""
    return np.cumsum(_mixed(tokens, np.arange(len(tokens))), dtype=np.uint64)


def _mixed(tokens: I32, position: I64) -> U64:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) of token and position: sums of these collide by chance only."""
    x = (position.astype(np.uint64) << np.uint64(32)) + tokens.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def undisturbed(
    prompt: Sequence[int],
    max_outputs: int,
    vocab_size: int,
    sampling: SamplingSpec,
    output_index: int = 0,
    end_chance: float = 0.0,
) -> list[int]:
    """The tokens that a simulated executor gives to a request which runs alone, end token included: computed from the request,
    without any step."""
    position = len(prompt) + np.arange(max_outputs)
    stops = [token for token in sampling.stop_token_ids if 0 <= token < vocab_size]
    key = np.uint64(prompt_hash(np.array(prompt, np.int32))) ^ np.uint64(sampling.seed & 0xFFFF_FFFF_FFFF_FFFF)
    tokens = draw(
        key=np.full(max_outputs, key),
        position=position,
        output_index=np.full(max_outputs, output_index, np.int32),
        stops=np.tile(np.array(stops or [-1], np.int32), (max_outputs, 1)),
        may_end=np.arange(max_outputs) >= sampling.min_tokens,
        vocab_size=vocab_size,
        end_below=np.uint64(round(end_chance * 2**32)),
    ).tolist()
    ends = [i for i, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0] + 1] if ends else tokens
