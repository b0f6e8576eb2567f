"""Every message that crosses a process boundary inside Carousel. Nothing here opens a socket or knows who sends what when.

A message is a small typed header (msgspec) and, where there is something per row or per token, a few integer arrays
(numpy, little-endian) that travel as raw bytes. Legend for array lengths: R rows computed, P padding rows, E ended rows,
G blocks appended, T tokens, B blocks, N sampled rows.

Three links use them:
  worker → core   WorkerHello, StepResult, StepFailed            core → worker      Welcome, StepPlan, Probe
  front end → core  FrontendHello, AddRequest, AbortRequest, TruncateRequest, CancelQuery, LoadQuery, WatchSteps
  core → front end  Facts, Refused, TokenBatch, CancelReply, LoadReply, StepRecord, Probe
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

WIRE_VERSION = 1

U16: TypeAlias = NDArray[np.uint16]
I32: TypeAlias = NDArray[np.int32]
U32: TypeAlias = NDArray[np.uint32]


def _u16() -> U16:
    return np.empty(0, np.uint16)


def _i32() -> I32:
    return np.empty(0, np.int32)


def _u32() -> U32:
    return np.empty(0, np.uint32)


class Header(msgspec.Struct, array_like=True):
    """Base of all headers: encoded as an array, so field order is the format; new fields go last, with a default."""


# ---------------------------------------------------------------------------------------------------------------- worker


class WorkerFacts(Header):
    """What a worker learnt when it loaded its model; the scheduler takes its limits from here."""

    device: str  # cpu, cuda or sim
    pid: int
    description: str  # one line about device and memory, for people
    architecture: str
    dtype: str
    vocab_size: int
    max_model_len: int  # tokens of prompt and output together
    block_size: int  # tokens of one block
    num_blocks: int  # pool size without block 0, which is the dump for padding; block ids are 1..num_blocks
    kv_bytes_per_token: int
    num_parameters: int
    max_batch_rows: int  # slots are 0..max_batch_rows-1
    max_step_tokens: int  # largest step that was sized for


class WorkerHello(Header, tag="worker_hello"):
    """First message of a worker, once its model is loaded and it can take plans."""

    group: int
    facts: WorkerFacts


class Welcome(Header, tag="welcome"):
    """The core's answer: plans and results carry this epoch from now on; anything of an older one is dropped."""

    group: int
    epoch: int


class Probe(Header, tag="probe"):
    """Carries nothing: the core sends it to see whether a peer is still there. Receivers ignore it."""


class SamplingSpec(Header):
    """How a sequence's tokens are drawn. Draws depend on (seed, output_index, position) only."""

    temperature: float  # 0 = greedy
    top_k: int  # 0 = all
    top_p: float  # (0, 1]
    min_p: float  # [0, 1]
    seed: int  # 64 bits
    min_tokens: int = 0  # stop_token_ids are masked before this many output tokens
    stop_token_ids: tuple[int, ...] = ()


class SequenceStart(Header):
    """All that a worker needs to know of a sequence that is new to it, or that comes back after preemption or a restart.

    Its `num_tokens` known tokens and `num_blocks` blocks stand in the plan's start_tokens and start_blocks, one sequence
    after the other in the order of the plan's `starts`.
    """

    slot: int
    sequence_id: int
    output_index: int
    num_prompt_tokens: int
    num_tokens: int  # prompt and output tokens known so far
    num_computed_tokens: int  # of these, in the KV cache already
    num_blocks: int
    sampling: SamplingSpec


class PlanHeader(Header, tag="plan"):
    group: int
    epoch: int
    step_id: int  # counts up by one within an epoch, from 0
    starts: tuple[SequenceStart, ...] = ()


@dataclass(slots=True)
class StepPlan:
    """One iteration, as a difference to what the worker's mirror knows.

    The worker applies it in this order: forget `ended`, take up `starts`, append `grow_*`, compute. Row i computes the next
    num_tokens[i] tokens of slots[i], and samples one iff it then has computed all that it knows. A padding row computes its
    last known token again and writes nothing that is read. Steady state: 6 bytes per row, 6 more when it takes a block.
    """

    header: PlanHeader
    num_tokens: I32 = field(default_factory=_i32)  # [R]
    grow_blocks: I32 = field(default_factory=_i32)  # [G] appended to the table of grow_slots[i], in order
    start_tokens: I32 = field(default_factory=_i32)  # [T]
    start_blocks: I32 = field(default_factory=_i32)  # [B]
    slots: U16 = field(default_factory=_u16)  # [R] no slot twice
    grow_slots: U16 = field(default_factory=_u16)  # [G]
    padding: U16 = field(default_factory=_u16)  # [P]
    ended: U16 = field(default_factory=_u16)  # [E]

    HEADER: ClassVar[type[Header]] = PlanHeader
    ARRAYS: ClassVar[tuple[tuple[str, str], ...]] = (
        ("num_tokens", "<i4"),
        ("grow_blocks", "<i4"),
        ("start_tokens", "<i4"),
        ("start_blocks", "<i4"),
        ("slots", "<u2"),
        ("grow_slots", "<u2"),
        ("padding", "<u2"),
        ("ended", "<u2"),
    )


class ResultHeader(Header, tag="result"):
    group: int
    epoch: int
    step_id: int
    duration_ns: int  # the worker's own time for the step


@dataclass(slots=True)
class StepResult:
    """The tokens that a step sampled, one per row that sampled, in the order of the plan's rows."""

    header: ResultHeader
    tokens: I32 = field(default_factory=_i32)  # [N]
    slots: U16 = field(default_factory=_u16)  # [N]

    HEADER: ClassVar[type[Header]] = ResultHeader
    ARRAYS: ClassVar[tuple[tuple[str, str], ...]] = (("tokens", "<i4"), ("slots", "<u2"))


class StepFailed(Header, tag="step_failed"):
    """A step could not be computed. The worker's mirror is void after it: the core resyncs by starting a new epoch."""

    group: int
    epoch: int
    step_id: int
    message: str


# ------------------------------------------------------------------------------------------------------------- front end


class EndReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"  # our own fault
    UNAVAILABLE = "unavailable"  # the server stops


class CancelOutcome(enum.StrEnum):
    CANCELLED = "cancelled"
    ALREADY_FINISHED = "already_finished"
    NOT_FOUND = "not_found"


class FrontendHello(Header, tag="frontend_hello"):
    """First message of a front end; the core answers with Facts, and sends them again whenever they change."""

    pid: int


class Facts(Header, tag="facts"):
    """What a front end must know of the core: limits, policy, workers. ready: a worker can take requests."""

    version: str
    policy: str
    started_ns: int  # CLOCK_MONOTONIC of the core's start; same machine
    ready: bool
    draining: bool
    reason: str  # why not ready, for people; empty when ready
    max_step_tokens: int
    max_batch_rows: int
    max_queue_requests: int
    max_queue_tokens: int
    workers: tuple[tuple[int, int, WorkerFacts], ...] = ()  # (group, epoch, facts)


class AddHeader(Header, tag="add"):
    handle: int  # chosen by the front end, 32 bits, unique in it; the answers carry it
    request_id: str
    arrival_ns: int  # CLOCK_MONOTONIC when the call came in
    priority: int  # 1 BATCH, 2 NORMAL, 3 INTERACTIVE
    max_tokens: int  # 0: what the model's length leaves
    sampling: SamplingSpec


@dataclass(slots=True)
class AddRequest:
    """A request, tokenized and checked as far as the front end can."""

    header: AddHeader
    prompt: I32 = field(default_factory=_i32)  # [T]

    HEADER: ClassVar[type[Header]] = AddHeader
    ARRAYS: ClassVar[tuple[tuple[str, str], ...]] = (("prompt", "<i4"),)


class AbortRequest(Header, tag="abort"):
    """The client dropped the stream: forget the request; OutputEnded(CANCELLED) comes back."""

    handle: int


class TruncateRequest(Header, tag="truncate"):
    """A stop string was found in the text: the output ends with reason STOP after `num_output_tokens` tokens."""

    handle: int
    num_output_tokens: int


class Refused(Header, tag="refused"):
    """A request that was not accepted. `code` is the name of a gRPC status."""

    handle: int
    code: str
    message: str
    field: str = ""  # the field of the public request that is wrong, for INVALID_ARGUMENT
    retry_after_ns: int = 0  # for RESOURCE_EXHAUSTED and UNAVAILABLE


class RequestStats(Header):
    """Counts and nanoseconds of one request, as Summary reports them."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    queued_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    preempted_ns: int = 0
    first_token_ns: int = 0  # arrival to first token; 0 if there was none
    block_ns: int = 0  # blocks held, summed over nanoseconds


class OutputEnded(Header):
    handle: int
    reason: EndReason
    stats: RequestStats
    stop_token_id: int = -1  # the end token that was drawn (then the last of the tokens), else -1
    message: str = ""  # for ERROR


class TokenBatchHeader(Header, tag="tokens"):
    step_id: int
    ended: tuple[OutputEnded, ...] = ()


@dataclass(slots=True)
class TokenBatch:
    """What one step brought to one front end: at most one token per handle, then the outputs that ended."""

    header: TokenBatchHeader
    handles: U32 = field(default_factory=_u32)  # [N]
    tokens: I32 = field(default_factory=_i32)  # [N]

    HEADER: ClassVar[type[Header]] = TokenBatchHeader
    ARRAYS: ClassVar[tuple[tuple[str, str], ...]] = (("handles", "<u4"), ("tokens", "<i4"))


class CancelQuery(Header, tag="cancel"):
    query_id: int
    request_id: str


class CancelReply(Header, tag="cancel_reply"):
    query_id: int
    outcome: CancelOutcome


class LoadQuery(Header, tag="load"):
    query_id: int


class LoadReply(Header, tag="load_reply"):
    query_id: int
    running_requests: int
    waiting_requests: int
    waiting_tokens: int
    total_blocks: int
    free_blocks: int
    held_blocks: int
    retiring_blocks: int
    cached_blocks: int
    kv_tokens: int
    steps: int
    output_tokens: int
    accepted_requests: int
    finished_requests: int
    cancelled_requests: int
    refused_requests: int
    preemptions: int


class WatchSteps(Header, tag="watch_steps"):
    """Turns the stream of StepRecords to this front end on or off."""

    on: bool


class RowRecord(Header):
    request_id: str
    slot: int
    num_tokens: int
    sampled: bool
    joined: bool
    padding: bool


class StepRecord(Header, tag="step_record"):
    """One step as a watcher sees it, sent when its result has arrived."""

    step_id: int
    group: int
    planned_ns: int  # since the core's start
    duration_ns: int
    rows: tuple[RowRecord, ...]
    leaves: tuple[tuple[str, str], ...]  # (request_id, reason)
    held_blocks: int
    total_blocks: int
    kv_tokens: int
    waiting_requests: int


Message: TypeAlias = (
    WorkerHello
    | Welcome
    | Probe
    | StepPlan
    | StepResult
    | StepFailed
    | FrontendHello
    | Facts
    | AddRequest
    | AbortRequest
    | TruncateRequest
    | Refused
    | TokenBatch
    | CancelQuery
    | CancelReply
    | LoadQuery
    | LoadReply
    | WatchSteps
    | StepRecord
)

WITH_ARRAYS: dict[type[Header], Any] = {cls.HEADER: cls for cls in (StepPlan, StepResult, AddRequest, TokenBatch)}
