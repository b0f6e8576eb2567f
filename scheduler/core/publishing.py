"""Which blocks of running rows go to the prefix index, and when: full, known and computed by the plans made so far.

Plans run in order, so a plan made later may use what an earlier one computes. Output blocks are hashed here, when they fill.
"""

from __future__ import annotations

import numpy as np

from kvcache.block_table import Slots
from kvcache.manager import KVCacheManager
from kvcache.prefix_index import DIGEST_BYTES, chain
from scheduler.core.rows import NEVER, Rows


def publish(rows: Rows, kv: KVCacheManager, slot: int) -> None:
    """What of this row's blocks is full, known and computed, by the plans made so far, goes to the prefix index."""
    size = kv.block_size
    first, sequence = int(rows.num_published[slot]), rows.sequence(slot)
    known = sequence.num_prompt_tokens + int(rows.num_outputs[slot])
    end = min(known, int(rows.num_computed[slot])) // size
    if end <= first or rows.next_publish[slot] == NEVER:
        return
    digests = sequence.digests
    for block in range(len(digests) // DIGEST_BYTES, end):
        digests += chain(
            bytes(digests[-DIGEST_BYTES:]) or sequence.header.prefix_key, _tokens_of_block(rows, size, slot, block)
        )
    new = [bytes(digests[at : at + DIGEST_BYTES]) for at in range(first * DIGEST_BYTES, end * DIGEST_BYTES, DIGEST_BYTES)]
    kv.publish(kv.tables.row(slot)[first:end], new)
    rows.num_published[slot] = end
    rows.next_publish[slot] = (end + 1) * size - sequence.num_prompt_tokens + 1


def _tokens_of_block(rows: Rows, size: int, slot: int, block: int) -> bytes:
    request = rows.sequence(slot).request
    start = block * size - len(request.prompt)  # in the outputs
    outputs = rows.outputs[slot, max(0, start) : start + size]
    if start >= 0:
        return outputs.tobytes()
    return np.concatenate([request.prompt[block * size :], outputs]).astype("<i4").tobytes()


def publish_many(rows: Rows, kv: KVCacheManager, slots: Slots) -> None:
    """`publish` for rows with a block that has become full, many at once: mostly one block each, and of outputs only."""
    size = kv.block_size
    first = rows.num_published[slots]
    start = first * size - (rows.max_tokens[slots] - rows.max_outputs[slots])  # in the outputs
    usual = (start >= 0) & (rows.num_outputs[slots] - 1 - start < 2 * size) & (start < rows.num_outputs[slots] - size)
    for slot in slots[~usual].tolist():
        publish(rows, kv, slot)
    slots, first, start = slots[usual], first[usual], start[usual]
    data = rows.outputs[slots[:, None], start[:, None] + np.arange(size)].astype("<i4", copy=False).tobytes()
    width, new = size * 4, []
    for i, (slot, block) in enumerate(zip(slots.tolist(), first.tolist(), strict=True)):
        digests = rows.sequence(slot).digests
        if len(digests) == block * DIGEST_BYTES:
            digests += chain(bytes(digests[-DIGEST_BYTES:]), data[i * width : (i + 1) * width])
        new.append(bytes(digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]))
    kv.publish(kv.tables.ids[slots, first], new)
    rows.num_published[slots] += 1
    rows.next_publish[slots] += size
