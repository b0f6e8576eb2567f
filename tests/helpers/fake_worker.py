"""A worker in memory that believes nothing: plain dictionaries, no tensors, no sockets.

It does what StepPlan's docstring says, and checks every word of every plan against its mirror. Instead of keys and values
it writes a hash of the sequence's prefix into the block and offset that the block table names, and reads the whole prefix
back at every computed row: a wrong, stale or doubly used block, or a token lost, doubled or out of order, shows at once.
It knows nothing of the scheduler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from wire import ResultHeader, SamplingSpec, SequenceStart, StepFailed, StepPlan, StepResult, WorkerFacts, decode, encode

PIPELINE_DEPTH = 2
GREEDY = SamplingSpec(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
_MODULUS = (1 << 61) - 1


def worker_facts(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 256,
    max_batch_rows: int = 8,
    max_step_tokens: int = 32,
    vocab_size: int = 1000,
) -> WorkerFacts:
    """Facts of a small worker."""
    return WorkerFacts(
        device="sim",
        pid=1,
        description="a worker in memory",
        architecture="none",
        dtype="f32",
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_bytes_per_token=8,
        num_parameters=0,
        max_batch_rows=max_batch_rows,
        max_step_tokens=max_step_tokens,
    )


def prefix_hashes(tokens: Iterable[int], before: int = 1) -> list[int]:
    """One number per position, which depends on all tokens up to it and on their order: our keys and values."""
    hashes, value = [], before
    for token in tokens:
        value = (value * 1_000_003 + token + 1) % _MODULUS
        hashes.append(value)
    return hashes


def next_token(prefix_hash: int, vocab_size: int, sampling: SamplingSpec, num_outputs: int) -> int:
    """The token after this prefix, of which the last `num_outputs` are outputs. End tokens are masked before min_tokens."""
    token = prefix_hash % vocab_size
    if num_outputs < sampling.min_tokens:
        while token in sampling.stop_token_ids:
            token = (token + 1) % vocab_size
    return token


def undisturbed(prompt: Sequence[int], max_outputs: int, vocab_size: int, sampling: SamplingSpec = GREEDY) -> list[int]:
    """The outputs of a request that runs alone, without cache, batch or interruption, end token included."""
    outputs: list[int] = []
    prefix = prefix_hashes(prompt)[-1]
    while len(outputs) < max_outputs:
        outputs.append(next_token(prefix, vocab_size, sampling, len(outputs)))
        if outputs[-1] in sampling.stop_token_ids:
            break
        prefix = prefix_hashes(outputs[-1:], prefix)[-1]
    return outputs


@dataclass(slots=True)
class Mirrored:
    """A sequence as the worker knows it."""

    start: SequenceStart
    tokens: list[int]
    hashes: list[int]
    table: list[int]
    num_computed: int = 0

    def take(self, token: int) -> None:
        self.tokens.append(token)
        self.hashes += prefix_hashes([token], self.hashes[-1])


@dataclass(slots=True)
class Unanswered:
    """A step whose result has not been handed over. It is computed already: a worker works in the order of the plans, so
    holding back the results is all that lateness is."""

    plan: StepPlan
    result: StepResult
    named: frozenset[int]  # blocks of all sequences that the plan computes, pads with or starts


@dataclass(slots=True)
class FakeWorker:
    """One epoch of one worker. AssertionError means that a plan is wrong."""

    facts: WorkerFacts
    epoch: int
    group: int = 0
    sequences: dict[int, Mirrored] = field(default_factory=dict)  # slot -> what it knows
    unanswered: deque[Unanswered] = field(default_factory=deque)
    num_computed_tokens: int = 0
    num_padding_rows: int = 0
    _next_step: int = 0
    _owner: dict[int, int] = field(default_factory=dict)  # block -> slot
    _store: dict[tuple[int, int], int] = field(default_factory=dict)  # (block, offset) -> prefix hash

    def submit(self, plan: StepPlan) -> None:
        """Takes a plan, over the wire's bytes, checks it and computes it."""
        decoded = decode(encode(plan))
        assert isinstance(decoded, StepPlan)
        self._check_shape(decoded)
        self._forget(decoded)
        self._take_up(decoded)
        self._grow(decoded)
        named = self._named(decoded)
        result = self._compute(decoded)
        self.unanswered.append(Unanswered(decoded, result, named))
        self._next_step += 1

    def answer(self) -> StepResult:
        """The oldest result that was held back, over the wire's bytes."""
        result = decode(encode(self.unanswered.popleft().result))
        assert isinstance(result, StepResult)
        return result

    def fail(self) -> StepFailed:
        """The oldest step fails instead; the mirror is void afterwards."""
        return StepFailed(self.group, self.epoch, self.unanswered[0].plan.header.step_id, "out of luck")

    def blocks_in_flight(self) -> frozenset[int]:
        """Blocks that a plan names whose result has not been handed over."""
        return frozenset().union(*(step.named for step in self.unanswered))

    def _check_shape(self, plan: StepPlan) -> None:
        header, facts = plan.header, self.facts
        assert (header.group, header.epoch, header.step_id) == (self.group, self.epoch, self._next_step)
        assert len(self.unanswered) < PIPELINE_DEPTH, "more plans in flight than the pipeline is deep"
        assert len(plan.slots) == len(plan.num_tokens) and len(plan.grow_slots) == len(plan.grow_blocks)
        assert len(plan.slots) + len(plan.padding) > 0, "a plan without rows"
        rows = plan.slots.tolist() + plan.padding.tolist()
        assert len(set(rows)) == len(rows) <= facts.max_batch_rows, "a slot twice, or too many rows"
        assert all(count >= 1 for count in plan.num_tokens.tolist())
        assert int(plan.num_tokens.sum()) + len(plan.padding) <= facts.max_step_tokens, "larger than the worker sized for"
        assert len(plan.start_tokens) == sum(start.num_tokens for start in header.starts)
        assert len(plan.start_blocks) == sum(start.num_blocks for start in header.starts)

    def _forget(self, plan: StepPlan) -> None:
        for slot in plan.ended.tolist():
            assert slot in self.sequences, f"slot {slot} ended, which is not known"
            for block in self.sequences.pop(slot).table:
                del self._owner[block]

    def _take_up(self, plan: StepPlan) -> None:
        tokens, blocks = plan.start_tokens.tolist(), plan.start_blocks.tolist()
        alive = {known.start.sequence_id for known in self.sequences.values()}
        for start in plan.header.starts:
            mine, tokens = tokens[: start.num_tokens], tokens[start.num_tokens :]
            table, blocks = blocks[: start.num_blocks], blocks[start.num_blocks :]
            assert 0 <= start.slot < self.facts.max_batch_rows
            assert start.slot not in self.sequences, f"slot {start.slot} starts, but is known"
            assert start.sequence_id not in alive, f"sequence {start.sequence_id} in two slots"
            assert 1 <= start.num_prompt_tokens <= start.num_tokens < self.facts.max_model_len
            assert start.num_computed_tokens == 0, "nothing is cached beforehand"
            assert all(0 <= token < self.facts.vocab_size for token in mine)
            alive.add(start.sequence_id)
            known = Mirrored(start, mine, prefix_hashes(mine), [])
            self.sequences[start.slot] = known
            for block in table:
                self._give(block, start.slot, known)

    def _grow(self, plan: StepPlan) -> None:
        assert len(set(plan.grow_slots.tolist())) == len(plan.grow_slots)
        for slot, block in zip(plan.grow_slots.tolist(), plan.grow_blocks.tolist(), strict=True):
            assert slot in self.sequences, f"slot {slot} grows, which is not known"
            self._give(block, slot, self.sequences[slot])

    def _give(self, block: int, slot: int, known: Mirrored) -> None:
        assert 1 <= block <= self.facts.num_blocks, f"no block {block}"
        assert block not in self._owner, f"block {block} of slot {self._owner.get(block)} given to slot {slot}"
        assert block not in self.blocks_in_flight(), f"block {block} is still named by a plan in flight"
        self._owner[block] = slot
        known.table.append(block)

    def _named(self, plan: StepPlan) -> frozenset[int]:
        slots = plan.slots.tolist() + plan.padding.tolist() + [start.slot for start in plan.header.starts]
        for slot in slots:
            assert slot in self.sequences, f"slot {slot} is in the plan, but not known"
        return frozenset(block for slot in slots for block in self.sequences[slot].table)

    def _compute(self, plan: StepPlan) -> StepResult:
        sampled = []
        for slot, count in zip(plan.slots.tolist(), plan.num_tokens.tolist(), strict=True):
            known = self.sequences[slot]
            self._compute_row(slot, known, count)
            if known.num_computed == len(known.tokens):
                num_outputs = len(known.tokens) - known.start.num_prompt_tokens
                known.take(next_token(known.hashes[-1], self.facts.vocab_size, known.start.sampling, num_outputs))
                sampled.append(slot)
        self.num_padding_rows += len(plan.padding)
        header = ResultHeader(self.group, self.epoch, plan.header.step_id, duration_ns=1000)
        tokens = [self.sequences[slot].tokens[-1] for slot in sampled]
        return StepResult(header, np.array(tokens, np.int32), np.array(sampled, np.uint16))

    def _compute_row(self, slot: int, known: Mirrored, count: int) -> None:
        size = self.facts.block_size
        end = known.num_computed + count
        assert end <= len(known.tokens), f"slot {slot} computes {end} of {len(known.tokens)} known tokens"
        assert end <= len(known.table) * size, f"slot {slot} computes {end} tokens on {len(known.table)} blocks"
        for position in range(known.num_computed, end):
            self._store[known.table[position // size], position % size] = known.hashes[position]
        for position in range(end):
            stored = self._store[known.table[position // size], position % size]
            assert stored == known.hashes[position], f"slot {slot} reads something else's keys at position {position}"
        known.num_computed = end
        self.num_computed_tokens += count
