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
    BlockTable,
    BlockTablesHeader,
    BlockTablesQuery,
    BlockTablesReply,
    CancelOutcome,
    CancelQuery,
    CancelReply,
    Credit,
    Distribution,
    DrainQuery,
    DrainReply,
    EndReason,
    ExplainQuery,
    ExplainReply,
    Explanation,
    Facts,
    FrontendHello,
    Heartbeat,
    Hindrance,
    ListQuery,
    ListReply,
    LoadQuery,
    LoadReply,
    LogprobRun,
    Logprobs,
    LogprobsHeader,
    Message,
    MetricsQuery,
    MetricsReply,
    MovedHeader,
    MovedOutput,
    MovedRequest,
    OutputEnded,
    PlanHeader,
    Preemption,
    Probe,
    Refused,
    ReplaceQuery,
    ReplaceReply,
    RequestStats,
    RequestSummary,
    RestoreHeader,
    RestoreRequest,
    ResultHeader,
    ResumeHeader,
    ResumeQuery,
    ResumeReply,
    Retired,
    RowRecord,
    SamplingSpec,
    SequenceStart,
    SetPolicyQuery,
    SetPolicyReply,
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


def u8(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint8)


def u16(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint16)


def u32(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint32)


_sampling = SamplingSpec(0.75, 40, 0.9, 0.05, 2**64 - 1, 3, (2, 7))
_facts = WorkerFacts(
    "cpu", 4711, "two cores", "LlamaForCausalLM", "f32", 4096, 2048, 16, 640, 768, 9_000_000, 64, 512, 128, 40_000
)
_stats = RequestStats(5, 1, 6, 2, 3, 10, 20, 30, 40, 50, 60)

_explanation = Explanation(
    request_id="request-ü",
    state="preempted",
    tenant="tenant",
    priority=2,
    arrival_ns=-1,
    now_ns=1000,
    hindrance=Hindrance.BLOCKS,
    rank=3,
    missing_rows=1,
    missing_blocks=4,
    needed_blocks=5,
    tenant_tokens=600,
    least_tenant_tokens=500,
    predicted_start_ns=1100,
    num_prompt_tokens=7,
    num_output_tokens=8,
    num_computed_tokens=9,
    preemptions=(Preemption(10, "other", 11, True, 3, 11, 4), Preemption(12, "", 13, False)),
    stats=_stats,
    end_reason="stop",
    text="It waits.",
    first_step=2,
    last_step=9,
)
_served = Facts("1.2.3", "continuous", 123_456_789, True, False, "because", 512, 64, 4096, 4_000_000, ((3, 9, _facts),))
_distribution = Distribution((0.5, 1.0), (3, 0, 1), 3.25)

SAMPLES: tuple[Message, ...] = (
    WorkerHello(3, _facts, "link-ü", 250, True),
    Heartbeat("link-ü", 1250),
    Retired("another worker has taken its place"),
    Welcome(3, 9),
    Probe(),
    StepPlan(
        PlanHeader(
            3, 9, 17, (SequenceStart(4, 100, 0, 2, 3, 0, 1, _sampling), SequenceStart(5, 101, 1, 1, 2, 1, 1, _sampling))
        ),
        num_tokens=i32(3, 1, 1),
        grow_blocks=i32(90, -(2**31)),
        start_tokens=i32(11, 12, 13, 14),
        start_blocks=i32(77, 2**31 - 1),
        swap_out_blocks=i32(31, 32),
        swap_out_host_blocks=i32(33, 34),
        swap_in_host_blocks=i32(35),
        swap_in_blocks=i32(36),
        copy_from=i32(37, 37),
        copy_to=i32(38, 39),
        slots=u16(4, 5, 65535),
        grow_slots=u16(6, 7),
        padding=u16(8),
        ended=u16(1, 2),
    ),
    StepResult(ResultHeader(3, 9, 17, 1_500_000), tokens=i32(21, 22), slots=u16(4, 6)),
    Logprobs(
        LogprobsHeader(3, 9, 17, (LogprobRun(4, 35, 2, 1), LogprobRun(6, 17, 1, 0))),
        logprobs=np.array([-0.5, -0.25, -1.5, -1.5, -2.0], np.float32),
        token_ids=i32(21, 22, 23, 23, 24),
    ),
    StepFailed(3, 9, 17, "out of memory"),
    FrontendHello(4712),
    _served,
    AddRequest(
        AddHeader(
            2**32 - 1,
            "request-ü",
            987_654_321,
            2,
            128,
            _sampling,
            4,
            "tenant",
            988_000_000,
            True,
            True,
            b"\x00\xffkey",
            16,
            600_000,
            b"\x00\xffstate",
        ),
        prompt=i32(1, 2, 3),
        prefix_hashes=u8(*range(240, 256), *range(16)),
    ),
    RestoreRequest(
        RestoreHeader(
            AddHeader(1, "request-ü", 987_654_321, 2, 128, _sampling, 2, resume_window_ms=1000, resume_state=b"\x00\xffstate"),
            (OutputEnded(1, EndReason.STOP, _stats, 2, "why"), None),
        ),
        prompt=i32(1, 2, 3),
        tokens=i32(21, 22, 23),
        num_tokens=i32(2, 1),
    ),
    MovedRequest(
        MovedHeader(
            AddHeader(15, "request-ü", 987_654_321, 2, 128, _sampling, 2),
            987_654_400,
            (
                MovedOutput(100, 1, 5, 4, 1, (Preemption(10, "other", 11, True, 3),), *range(6, 15), "", 3, 4, 0),
                MovedOutput(101, 2, 0, 0, 0, (), *range(6, 15), "stop", 3, 4, 2),
            ),
            2,
            1,
            True,
            True,
            16,
        ),
        prompt=i32(1, 2, 3),
        tokens=i32(21, 22),
        num_tokens=i32(2, 0),
        prefix_hashes=u8(*range(16)),
    ),
    AbortRequest(15),
    TruncateRequest(15, 4),
    Credit(num_tokens=i32(1, 200), handles=u32(15, 2**32 - 1)),
    Refused(15, "RESOURCE_EXHAUSTED", "full", "prompt", 10_000_000, {"estimate_ms": "12"}),
    TokenBatch(
        TokenBatchHeader(17, (OutputEnded(15, EndReason.STOP, _stats, 2, "why"), OutputEnded(16, EndReason.DEADLINE, _stats))),
        handles=u32(15, 2**32 - 1),
        tokens=i32(21, 22),
    ),
    CancelQuery(33, "request-ü"),
    CancelReply(33, CancelOutcome.ALREADY_FINISHED),
    ResumeQuery(39, "request-ü", 18, 5_000_000_000),
    ResumeReply(
        ResumeHeader(39, 18, True, b"\x00\xffstate", (None, OutputEnded(19, EndReason.LENGTH, _stats))),
        prompt=i32(1, 2, 3),
        tokens=i32(21, 22, 23),
        num_tokens=i32(1, 2),
    ),
    LoadQuery(34),
    LoadReply(34, *range(1, 22)),
    MetricsQuery(40),
    MetricsReply(40, _served, LoadReply(34, *range(1, 22)), 3, 9, 16, 4, 5, _distribution, _distribution, _distribution),
    SetPolicyQuery(35, "static"),
    SetPolicyReply(35, "continuous", "no such policy"),
    DrainQuery(39, -1),
    DrainReply(39, 3, 30_000_000_000),
    ReplaceQuery(41, "cuda"),
    ReplaceReply(41, 4, 4711, "it did not start"),
    ExplainQuery(36, "request-ü"),
    ExplainReply(36, _explanation),
    ListQuery(37, 100, 50),
    ListReply(37, (RequestSummary("a", "running", "tenant", 3, 123, 5, 6, 2, 7),), 101, 9),
    BlockTablesQuery(38),
    BlockTablesReply(
        BlockTablesHeader(38, 3, 16, 4, (BlockTable("a", 1, 4, 20, (1, 3)), BlockTable("b", 0, 5, 4, (1,))), 128, 6),
        ref_counts=i32(2, 0, 1, 0),
        states=u8(1, 3, 1, 2),
    ),
    WatchSteps(True),
    StepRecord(
        17,
        3,
        1000,
        2000,
        (RowRecord("a", 4, 1, True, False, True, 1, "tenant", 32),),
        (("b", "stop"),),
        *range(10, 20),
        "continuous",
    ),
)


def recorded(message: Message) -> str:
    return f"{type(message).__name__} {' '.join(frame.hex() for frame in encode(message))}"


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(map(recorded, SAMPLES)) + "\n")
