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
    num_host_blocks: int = 0,
    swap_block_ns: int = 0,
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
        num_host_blocks=num_host_blocks,
        swap_block_ns=swap_block_ns,
    )


def prefix_hashes(tokens: Iterable[int], before: int = 1) -> list[int]:
    """One number per position, which depends on all tokens up to it and on their order: our keys and values."""
    hashes, value = [], before
    for token in tokens:
        value = (value * 1_000_003 + token + 1) % _MODULUS
        hashes.append(value)
    return hashes


def next_token(prefix_hash: int, vocab_size: int, sampling: SamplingSpec, num_outputs: int, output_index: int = 0) -> int:
    """The token after this prefix, of which the last `num_outputs` are outputs. End tokens are masked before min_tokens."""
    token = (prefix_hash + 7919 * output_index) % vocab_size
    if num_outputs < sampling.min_tokens:
        while token in sampling.stop_token_ids:
            token = (token + 1) % vocab_size
    return token


def undisturbed(
    prompt: Sequence[int], max_outputs: int, vocab_size: int, sampling: SamplingSpec = GREEDY, output_index: int = 0
) -> list[int]:
    """The outputs of a request that runs alone, without cache, batch or interruption, end token included."""
    outputs: list[int] = []
    prefix = prefix_hashes(prompt)[-1]
    while len(outputs) < max_outputs:
        outputs.append(next_token(prefix, vocab_size, sampling, len(outputs), output_index))
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
    named: frozenset[int]  # blocks of all sequences that the plan computes, pads with or starts, and those that it moves
    named_host: frozenset[int]


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
    _holders: dict[int, set[int]] = field(default_factory=dict)  # block -> slots whose tables have it
    _store: dict[tuple[int, int], int] = field(default_factory=dict)  # (block, offset) -> prefix hash
    _host: dict[int, list[int | None]] = field(default_factory=dict)  # host block -> what was swapped out to it

    def submit(self, plan: StepPlan) -> None:
        """Takes a plan, over the wire's bytes, checks it and computes it."""
        decoded = decode(encode(plan))
        assert isinstance(decoded, StepPlan)
        self._check_shape(decoded)
        self._forget(decoded)
        self._take_up(decoded)
        self._grow(decoded)
        named, named_host = self._named(decoded)
        self._move(decoded)
        result = self._compute(decoded)
        self.unanswered.append(Unanswered(decoded, result, named, named_host))
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
        assert len(plan.slots) + len(plan.padding) + len(plan.swap_out_blocks) > 0, "a plan of nothing"
        assert len(plan.copy_from) == len(plan.copy_to)
        assert len(plan.swap_out_blocks) == len(plan.swap_out_host_blocks)
        assert len(plan.swap_in_blocks) == len(plan.swap_in_host_blocks)
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
                self._holders[block].remove(slot)

    def _take_up(self, plan: StepPlan) -> None:
        tokens, blocks = plan.start_tokens.tolist(), plan.start_blocks.tolist()
        alive = {known.start.sequence_id for known in self.sequences.values()}
        filled = set(plan.copy_to.tolist()) | set(plan.swap_in_blocks.tolist())  # new to their table, but not empty
        for start in plan.header.starts:
            mine, tokens = tokens[: start.num_tokens], tokens[start.num_tokens :]
            table, blocks = blocks[: start.num_blocks], blocks[start.num_blocks :]
            assert 0 <= start.slot < self.facts.max_batch_rows
            assert start.slot not in self.sequences, f"slot {start.slot} starts, but is known"
            assert start.sequence_id not in alive, f"sequence {start.sequence_id} in two slots"
            assert 1 <= start.num_prompt_tokens <= start.num_tokens < self.facts.max_model_len
            assert 0 <= start.num_computed_tokens < start.num_tokens, "at least one token is computed"
            assert all(0 <= token < self.facts.vocab_size for token in mine)
            alive.add(start.sequence_id)
            known = Mirrored(start, mine, prefix_hashes(mine), [], start.num_computed_tokens)
            self.sequences[start.slot] = known
            for index, block in enumerate(table):
                found = index * self.facts.block_size < start.num_computed_tokens and block not in filled
                self._give(block, start.slot, known, found)

    def _grow(self, plan: StepPlan) -> None:
        assert len(set(plan.grow_slots.tolist())) == len(plan.grow_slots)
        for slot, block in zip(plan.grow_slots.tolist(), plan.grow_blocks.tolist(), strict=True):
            assert slot in self.sequences, f"slot {slot} grows, which is not known"
            self._give(block, slot, self.sequences[slot], False)

    def _give(self, block: int, slot: int, known: Mirrored, found: bool) -> None:
        """found: the block has the sequence's keys already, and may be others' too."""
        assert 1 <= block <= self.facts.num_blocks, f"no block {block}"
        holders = self._holders.setdefault(block, set())
        assert slot not in holders, f"block {block} twice in the table of slot {slot}"
        if not found:
            assert not holders, f"block {block} of slots {holders} given to slot {slot}"
            assert block not in self.blocks_in_flight(), f"block {block} is still named by a plan in flight"
        holders.add(slot)
        known.table.append(block)

    def _move(self, plan: StepPlan) -> None:
        size = self.facts.block_size
        for block, host in zip(plan.swap_out_blocks.tolist(), plan.swap_out_host_blocks.tolist(), strict=True):
            assert 1 <= host <= self.facts.num_host_blocks, f"no host block {host}"
            in_flight = frozenset().union(*(step.named_host for step in self.unanswered))
            assert host not in in_flight, f"host block {host} is still named by a plan in flight"
            self._host[host] = [self._store.get((block, offset)) for offset in range(size)]
        for host, block in zip(plan.swap_in_host_blocks.tolist(), plan.swap_in_blocks.tolist(), strict=True):
            for offset, value in enumerate(self._host[host]):
                self._put(block, offset, value)
        assert not set(plan.copy_to.tolist()) & set(plan.copy_from.tolist())
        for source, target in zip(plan.copy_from.tolist(), plan.copy_to.tolist(), strict=True):
            for offset in range(size):
                self._put(target, offset, self._store.get((source, offset)))

    def _put(self, block: int, offset: int, value: int | None) -> None:
        assert len(self._holders[block]) == 1, f"block {block} of slots {self._holders[block]} is written to"
        if value is None:
            self._store.pop((block, offset), None)
        else:
            self._store[block, offset] = value

    def _named(self, plan: StepPlan) -> tuple[frozenset[int], frozenset[int]]:
        """Device and host blocks."""
        slots = plan.slots.tolist() + plan.padding.tolist() + [start.slot for start in plan.header.starts]
        for slot in slots:
            assert slot in self.sequences, f"slot {slot} is in the plan, but not known"
        moved = plan.copy_from.tolist() + plan.swap_out_blocks.tolist()
        host = frozenset(plan.swap_out_host_blocks.tolist() + plan.swap_in_host_blocks.tolist())
        return frozenset([block for slot in slots for block in self.sequences[slot].table] + moved), host

    def _compute(self, plan: StepPlan) -> StepResult:
        sampled = []
        for slot, count in zip(plan.slots.tolist(), plan.num_tokens.tolist(), strict=True):
            known = self.sequences[slot]
            self._compute_row(slot, known, count)
            if known.num_computed == len(known.tokens):
                num_outputs = len(known.tokens) - known.start.num_prompt_tokens
                index = known.start.output_index
                known.take(next_token(known.hashes[-1], self.facts.vocab_size, known.start.sampling, num_outputs, index))
                sampled.append(slot)
        self.num_padding_rows += len(plan.padding)
        duration_ns = 1000 + 100 * int(plan.num_tokens.sum())
        header = ResultHeader(self.group, self.epoch, plan.header.step_id, duration_ns)
        tokens = [self.sequences[slot].tokens[-1] for slot in sampled]
        return StepResult(header, np.array(tokens, np.int32), np.array(sampled, np.uint16))

    def _compute_row(self, slot: int, known: Mirrored, count: int) -> None:
        size = self.facts.block_size
        end = known.num_computed + count
        assert end <= len(known.tokens), f"slot {slot} computes {end} of {len(known.tokens)} known tokens"
        assert end <= len(known.table) * size, f"slot {slot} computes {end} tokens on {len(known.table)} blocks"
        for position in range(known.num_computed, end):
            self._put(known.table[position // size], position % size, known.hashes[position])
        for position in range(end):
            stored = self._store.get((known.table[position // size], position % size))
            assert stored == known.hashes[position], f"slot {slot} reads something else's keys at position {position}"
        known.num_computed = end
        self.num_computed_tokens += count
