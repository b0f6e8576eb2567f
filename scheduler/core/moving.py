"""A request between two cores: what of it travels. Nothing that matters to what it still gets is left behind: its tokens, what
its reader has taken, its order, and how often it was computed when a worker was lost.

Knows requests and messages; no queue, rows, blocks or clock.
"""

from __future__ import annotations

import numpy as np

from scheduler.core.request import Request, Sequence, State
from wire import MovedHeader, MovedOutput, MovedRequest, Preemption
from wire.messages import I32

_COLUMNS = tuple(name for name in MovedOutput.__struct_fields__ if name != "preempted_by")


def packed(request: Request, block_size: int, *, is_tried: bool, is_tried_with_last: bool) -> MovedRequest:
    """It holds no row. block_size: of the hashes of its prompt."""
    outputs = [sequence.outputs for sequence in request.sequences]
    header = MovedHeader(
        add=request.header,
        accepted_ns=request.accepted_ns,
        outputs=tuple(_output(sequence) for sequence in request.sequences),
        crashes=request.crashes,
        crashes_alone=request.crashes_alone,
        is_tried=is_tried,
        is_tried_with_last=is_tried_with_last,
        hash_block_size=block_size if request.digests else 0,
    )
    return MovedRequest(
        header,
        prompt=request.prompt,
        tokens=np.concatenate(outputs),
        num_tokens=np.array([len(mine) for mine in outputs], np.int32),
        prefix_hashes=np.frombuffer(request.digests, np.uint8),
    )


def _output(sequence: Sequence) -> MovedOutput:
    columns = {name: getattr(sequence, name) for name in _COLUMNS}
    return MovedOutput(preempted_by=tuple(sequence.preempted_by), **columns)


def _copied(preemption: Preemption) -> Preemption:
    return Preemption(*(getattr(preemption, name) for name in Preemption.__struct_fields__))


def sequence_of(request: Request, index: int, sequence_id: int, moved: MovedOutput, tokens: I32, most_unread: int) -> Sequence:
    """The output in its new core. Who was running goes on before who never was; most_unread: tokens that its reader may be
    behind."""
    sequence = Sequence(request, index, sequence_id, moved.order_ns, digests=request.digests)
    for name in _COLUMNS:
        setattr(sequence, name, getattr(moved, name))
    sequence.preempted_by = [_copied(preemption) for preemption in moved.preempted_by]  # they are written to
    if moved.end_reason:
        sequence.state = State.ENDED
        return sequence
    sequence.outputs = tokens
    if moved.admitted_ns >= 0:
        sequence.state = State.PARKED if len(tokens) - moved.taken >= most_unread else State.PREEMPTED
    return sequence
