"""One message of every type, each field with a value of its own, and their recorded bytes.

`python -m tests.wire.samples` writes the bytes of today beside the golden traces. For a WIRE_VERSION that has been released
they must not change, except that new fields may be added at the end of a header: otherwise count the version up.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, get_args

import numpy as np

from wire import (
    WIRE_VERSION,
    AbortRequest,
    AddHeader,
    AddRequest,
    CancelOutcome,
    CancelQuery,
    CancelReply,
    EndReason,
    Facts,
    FrontendHello,
    LoadQuery,
    LoadReply,
    Message,
    OutputEnded,
    PlanHeader,
    Probe,
    Refused,
    RequestStats,
    ResultHeader,
    RowRecord,
    SamplingSpec,
    SequenceStart,
    StepFailed,
    StepPlan,
    StepRecord,
    StepResult,
    TokenBatch,
    TokenBatchHeader,
    TruncateRequest,
    WatchSteps,
    Welcome,
    WorkerFacts,
    WorkerHello,
    encode,
)

GOLDEN = Path(__file__).parents[1] / "golden" / f"wire_v{WIRE_VERSION}.txt"

assert isinstance(Message, types.UnionType)
MESSAGE_TYPES: tuple[type[Any], ...] = get_args(Message)


def i32(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def u16(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint16)


_sampling = SamplingSpec(0.75, 40, 0.9, 0.05, 2**64 - 1, 3, (2, 7))
_facts = WorkerFacts("cpu", 4711, "two cores", "LlamaForCausalLM", "f32", 4096, 2048, 16, 640, 768, 9_000_000, 64, 512)
_stats = RequestStats(5, 1, 6, 2, 3, 10, 20, 30, 40, 50, 60)

SAMPLES: tuple[Message, ...] = (
    WorkerHello(3, _facts),
    Welcome(3, 9),
    Probe(),
    StepPlan(
        PlanHeader(
            3, 9, 17, (SequenceStart(4, 100, 0, 2, 3, 0, 1, _sampling), SequenceStart(5, 101, 0, 1, 1, 0, 1, _sampling))
        ),
        num_tokens=i32(3, 1, 1),
        grow_blocks=i32(90, -(2**31)),
        start_tokens=i32(11, 12, 13, 14),
        start_blocks=i32(77, 2**31 - 1),
        slots=u16(4, 5, 65535),
        grow_slots=u16(6, 7),
        padding=u16(8),
        ended=u16(1, 2),
    ),
    StepResult(ResultHeader(3, 9, 17, 1_500_000), tokens=i32(21, 22), slots=u16(4, 6)),
    StepFailed(3, 9, 17, "out of memory"),
    FrontendHello(4712),
    Facts("1.2.3", "continuous", 123_456_789, True, False, "because", 512, 64, 4096, 4_000_000, ((3, 9, _facts),)),
    AddRequest(AddHeader(2**32 - 1, "request-ü", 987_654_321, 2, 128, _sampling), prompt=i32(1, 2, 3)),
    AbortRequest(15),
    TruncateRequest(15, 4),
    Refused(15, "RESOURCE_EXHAUSTED", "full", "prompt", 10_000_000),
    TokenBatch(
        TokenBatchHeader(17, (OutputEnded(15, EndReason.STOP, _stats, 2, "why"), OutputEnded(16, EndReason.LENGTH, _stats))),
        handles=np.array([15, 2**32 - 1], np.uint32),
        tokens=i32(21, 22),
    ),
    CancelQuery(33, "request-ü"),
    CancelReply(33, CancelOutcome.ALREADY_FINISHED),
    LoadQuery(34),
    LoadReply(34, *range(1, 17)),
    WatchSteps(True),
    StepRecord(17, 3, 1000, 2000, (RowRecord("a", 4, 1, True, False, True),), (("b", "stop"),), 10, 640, 99, 7),
)


def recorded(message: Message) -> str:
    return f"{type(message).__name__} {' '.join(frame.hex() for frame in encode(message))}"


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(map(recorded, SAMPLES)) + "\n")
