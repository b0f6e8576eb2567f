"""Which blocks of running rows go to the prefix index, and when: full, known and computed by the plans made so far.

Plans run in order, so a plan made later may use what an earlier one computes. Output blocks are hashed here when they are full:
several steps' together, but before anybody looks for a prefix and before their row leaves, so that nobody can tell.
"""

from __future__ import annotations

import numpy as np

from kvcache.manager import KVCacheManager
from kvcache.prefix_index import chain, chain_many
from scheduler.core.rows import NEVER, Rows
from wire.messages import I32


def publish(rows: Rows, kv: KVCacheManager, slot: int) -> None:
    """What of this row's blocks is full, known and computed, by the plans made so far, goes to the prefix index."""
    size = kv.block_size
    first, sequence = int(rows.num_published[slot]), rows.sequence(slot)
    known = sequence.num_prompt_tokens + int(rows.num_outputs[slot])
    end = min(known, int(rows.num_computed[slot])) // size
    if end <= first or rows.next_publish[slot] == NEVER:
        return
    for block in range(int(rows.num_hashed[slot]), end):
        parent = rows.digests[slot, block - 1].tobytes() if block else sequence.header.prefix_key
        rows.add_digests(slot, chain(parent, _tokens_of_block(rows, size, slot, block)))
    kv.publish(kv.tables.row(slot)[first:end], rows.digests[slot, first:end].tolist())
    rows.num_published[slot] = end
    rows.next_publish[slot] = (end + 1) * size - sequence.num_prompt_tokens + 1


def _tokens_of_block(rows: Rows, size: int, slot: int, block: int) -> I32:
    request = rows.sequence(slot).request
    start = block * size - request.num_prompt_tokens  # in the outputs
    outputs: I32 = rows.outputs[slot, max(0, start) : start + size]
    return outputs if start >= 0 else np.concatenate([request.prompt[block * size :], outputs])


def publish_full(rows: Rows, kv: KVCacheManager) -> None:
    """`publish` for every row whose next block has become full. Those with one such block, of outputs only and not hashed
    before a preemption, which are nearly all, go together."""
    size, slots = kv.block_size, rows.in_order()
    counts, due = rows.num_outputs[slots], rows.next_publish[slots]
    full = (counts >= due).nonzero()[0]
    if not len(full):
        return
    slots, counts, due = slots[full], counts[full], due[full]
    first = rows.num_published[slots]
    usual = (counts < due + size) & (due > size) & (rows.num_hashed[slots] == first)
    if not usual.all():
        for slot in slots[~usual].tolist():
            publish(rows, kv, slot)
        slots, due, first = slots[usual], due[usual], first[usual]
    tokens = rows.outputs[slots[:, None], (due - size - 1)[:, None] + np.arange(size)]
    digests = chain_many(rows.digests[slots, first - 1], tokens)
    kv.publish(kv.tables.ids[slots, first], digests)
    rows.reserve_digests(int(first.max(initial=0)) + 1)
    rows.digests[slots, first] = np.frombuffer(b"".join(digests), rows.digests.dtype)
    rows.num_hashed[slots] = rows.num_published[slots] = first + 1
    rows.next_publish[slots] = due + size
