"""Every message that crosses a process boundary inside Carousel. Nothing here opens a socket or knows who sends what when.

A message is a small typed header (msgspec) and, where there is something per row or per token, a few integer arrays
(numpy, little-endian) that travel as raw bytes. Legend for array lengths: R rows computed, P padding rows, E ended rows,
G blocks appended, T tokens, B blocks, N sampled rows, F full blocks of a prompt, C copies of blocks,
O outputs of a request.

Three links use them, and the journal:
  worker → core   WorkerHello, Heartbeat, Logprobs, StepResult, StepFailed
  core → worker   Welcome, StepPlan, Probe, Retired
  front end → core  FrontendHello, AddRequest, AbortRequest, TruncateRequest, Credit, WatchSteps, and the queries
  core → core       RestoreRequest, by way of the journal; MovedRequest, in one process
  core → front end  Facts, Refused, Logprobs, TokenBatch, StepRecord, Probe, and the replies to queries
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

WIRE_VERSION = 2

U8: TypeAlias = NDArray[np.uint8]
U16: TypeAlias = NDArray[np.uint16]
I32: TypeAlias = NDArray[np.int32]
U32: TypeAlias = NDArray[np.uint32]
F32: TypeAlias = NDArray[np.float32]


# Shared by all messages that leave an array out; nothing can be written to an empty array.
_NO_U8: U8 = np.empty(0, np.uint8)
_NO_U16: U16 = np.empty(0, np.uint16)
_NO_I32: I32 = np.empty(0, np.int32)
_NO_U32: U32 = np.empty(0, np.uint32)
_NO_F32: F32 = np.empty(0, np.float32)


def _u8() -> U8:
    return _NO_U8


def _u16() -> U16:
    return _NO_U16


def _i32() -> I32:
    return _NO_I32


def _u32() -> U32:
    return _NO_U32


def _f32() -> F32:
    return _NO_F32


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
    num_host_blocks: int = 0  # blocks of host memory for swapped sequences; their ids are 1..num_host_blocks
    swap_block_ns: int = 0  # measured time to copy one block between device and host; 0: not known


class WorkerHello(Header, tag="worker_hello"):
    """First message of a worker, once its model is loaded and it can take plans. Where there is a worker already, it stands by
    until that one is lost."""

    group: int  # that it computed for last, or would like to; Welcome says for which it does
    facts: WorkerFacts
    link_id: str = ""  # drawn by the worker: its heartbeats come by another connection and carry it
    heartbeat_ms: int = 0  # from one to the next; 0: there are none
    replaces: bool = False  # it takes the place of the worker that is there, which drains


class Heartbeat(Header, tag="heartbeat"):
    """The worker's process lives, whatever its step does: sent by a thread of its own."""

    link_id: str
    stalled_ms: int  # so long the step under way has used no processor time; 0 where that means nothing, as on a GPU


class Retired(Header, tag="retired"):
    """The worker is not wanted any more: another one has taken its place, or it can't take the place that it came for."""

    reason: str


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
    repetition_penalty: float = 1.0  # (0, 10]; 1 = off. Of tokens in prompt or output
    presence_penalty: float = 0.0  # [-2, 2]. Of tokens in the output
    frequency_penalty: float = 0.0  # [-2, 2]. Of tokens in the output, times their count
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    logprobs: int = -1  # so many most likely tokens are told of each drawn token, besides itself; -1: nothing is
    prompt_logprobs: int = -1  # the same of each prompt token that is computed


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

    The worker applies it in this order: forget `ended`, take up `starts`, append `grow_*`; then on the blocks' contents swap
    out, swap in, copy; then compute. Row i computes the next num_tokens[i] tokens of slots[i], and samples one iff it then has
    computed all that it knows. A padding row computes its last known token again and writes nothing that is read. Tables may
    share a block; a row never writes to a block that another table holds too, and swaps and copies write only to blocks that no
    table held before this plan. What a start says is computed must be in its blocks after swaps and copies.
    Steady state: 6 bytes per row, 6 more when it takes a block.
    """

    header: PlanHeader
    num_tokens: I32 = field(default_factory=_i32)  # [R]
    grow_blocks: I32 = field(default_factory=_i32)  # [G] appended to the table of grow_slots[i], in order
    start_tokens: I32 = field(default_factory=_i32)  # [T]
    start_blocks: I32 = field(default_factory=_i32)  # [B]
    swap_out_blocks: I32 = field(default_factory=_i32)  # [C] device blocks whose contents go to …
    swap_out_host_blocks: I32 = field(default_factory=_i32)  # [C] … these host blocks, none twice
    swap_in_host_blocks: I32 = field(default_factory=_i32)  # [C'] host blocks whose contents come back to …
    swap_in_blocks: I32 = field(default_factory=_i32)  # [C'] … these device blocks; a host block is empty then
    copy_from: I32 = field(default_factory=_i32)  # [C"] copy on write: device block copy_from[i] is copied to …
    copy_to: I32 = field(default_factory=_i32)  # [C"] … copy_to[i], which is no source of this step
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
        ("swap_out_blocks", "<i4"),
        ("swap_out_host_blocks", "<i4"),
        ("swap_in_host_blocks", "<i4"),
        ("swap_in_blocks", "<i4"),
        ("copy_from", "<i4"),
        ("copy_to", "<i4"),
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


class LogprobRun(Header):
    """Of `num_tokens` tokens of one sequence: its own log-probability, then those of the `num_best` most likely, best first."""

    row: int  # the slot; to a front end, the output's handle
    position: int  # of the first token, in the sequence
    num_tokens: int
    num_best: int


class LogprobsHeader(Header, tag="logprobs"):
    group: int
    epoch: int
    step_id: int
    runs: tuple[LogprobRun, ...]


@dataclass(slots=True)
class Logprobs:
    """What some rows of a step asked for beyond their tokens; sent before them. The runs' entries, one run after the other,
    (1 + num_best) for each token."""

    header: LogprobsHeader
    logprobs: F32 = field(default_factory=_f32)  # [X] natural logarithms
    token_ids: I32 = field(default_factory=_i32)  # [X]

    HEADER: ClassVar[type[Header]] = LogprobsHeader
    ARRAYS: ClassVar[tuple[tuple[str, str], ...]] = (("logprobs", "<f4"), ("token_ids", "<i4"))


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
    DEADLINE = "deadline"  # its time was over, or can't suffice any more
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
    max_unread_tokens: int = 0  # of one output; beyond it the core waits for Credit. 0: no bound, no Credit wanted


class AddHeader(Header, tag="add"):
    handle: int  # chosen by the front end, 32 bits; output i answers with handle + i, and all of them are unique in it
    request_id: str
    arrival_ns: int  # CLOCK_MONOTONIC when the call came in
    priority: int  # 1 BATCH, 2 NORMAL, 3 INTERACTIVE
    max_tokens: int  # 0: what the model's length leaves
    sampling: SamplingSpec
    num_outputs: int = 1
    tenant: str = ""
    deadline_ns: int = 0  # CLOCK_MONOTONIC; 0: none
    partial_at_deadline: bool = False  # it ends a margin before the deadline, with what there is
    whole_by_deadline: bool = False  # refused unless all max_tokens can come in time, not only the first
    prefix_key: bytes = b""  # kvcache.prefix_index.root(): keys the chain of hashes; empty: past the prefix cache
    hash_block_size: int = 0  # tokens of a block that prefix_hashes were made for; 0: none were made
    resume_window_ms: int = (
        0  # so long it goes on when its reader is gone, and is kept after its end; 0: it ends with its reader
    )
    resume_state: bytes = b""  # what a front end must know to go on with it; the core process keeps and does not read it


@dataclass(slots=True)
class AddRequest:
    """A request, tokenized and checked as far as the front end can."""

    header: AddHeader
    prompt: I32 = field(default_factory=_i32)  # [T]
    prefix_hashes: U8 = field(default_factory=_u8)  # [16 F] of the prompt's full blocks, in order

    HEADER: ClassVar[type[Header]] = AddHeader
    ARRAYS: ClassVar[tuple[tuple[str, str], ...]] = (("prompt", "<i4"), ("prefix_hashes", "|u1"))


class RestoreHeader(Header, tag="restore"):
    add: AddHeader
    ended: tuple[OutputEnded | None, ...] = ()  # of each output; None: it goes on


@dataclass(slots=True)
class RestoreRequest:
    """A request with all that is known of it: what the journal keeps, and what a new core begins with."""

    header: RestoreHeader
    prompt: I32 = field(default_factory=_i32)  # [T]
    tokens: I32 = field(default_factory=_i32)  # [N] of all outputs, one after the other
    num_tokens: I32 = field(default_factory=_i32)  # [O] of each output

    HEADER: ClassVar[type[Header]] = RestoreHeader
    ARRAYS: ClassVar[tuple[tuple[str, str], ...]] = (("prompt", "<i4"), ("tokens", "<i4"), ("num_tokens", "<i4"))


class MovedOutput(Header):
    """What stands in no token of an output that goes from one core to another. Times are CLOCK_MONOTONIC nanoseconds, -1: not
    yet; all of it as scheduler/core/request.py names it."""

    order_ns: int
    taken: int  # tokens that its reader took
    crash_point: int
    lost_tokens: int
    preemptions: int
    preempted_by: tuple[Preemption, ...]
    cached_tokens: int
    recomputed_tokens: int
    block_ns: int
    admitted_ns: int
    first_token_ns: int
    ended_ns: int
    preempted_since_ns: int
    preempted_ns: int
    preempted_first_ns: int
    end_reason: str  # empty: it goes on
    first_step: int
    last_step: int
    num_ended_outputs: int


class MovedHeader(Header, tag="moved"):
    add: AddHeader
    accepted_ns: int
    outputs: tuple[MovedOutput, ...]
    crashes: int = 0  # of the worker while it was computed, since it last got past one
    crashes_alone: int = 0  # of these, while nobody else was
    is_tried: bool = False  # it may have crashed the worker so often that it is tried apart from all others …
    is_tried_with_last: bool = False  # … together with the one that moved before it
    hash_block_size: int = 0  # tokens of a block that prefix_hashes were made for


@dataclass(slots=True)
class MovedRequest:
    """A request on its way from a core whose worker is away to another one, with all that is known of it."""

    header: MovedHeader
    prompt: I32 = field(default_factory=_i32)  # [T]
    tokens: I32 = field(default_factory=_i32)  # [N] of all outputs that go on, one after the other
    num_tokens: I32 = field(default_factory=_i32)  # [O] of each output
    prefix_hashes: U8 = field(default_factory=_u8)  # [16 F] of the prompt's full blocks, in order

    HEADER: ClassVar[type[Header]] = MovedHeader
    ARRAYS: ClassVar[tuple[tuple[str, str], ...]] = (
        ("prompt", "<i4"),
        ("tokens", "<i4"),
        ("num_tokens", "<i4"),
        ("prefix_hashes", "|u1"),
    )


class AbortRequest(Header, tag="abort"):
    """The client dropped the stream: forget the request with all its outputs; OutputEnded(CANCELLED) comes back for each that
    had not ended. One with a resume window goes on without a reader instead, and nothing comes back."""

    handle: int  # of its first output


class TruncateRequest(Header, tag="truncate"):
    """A stop string was found in the text: the output ends with reason STOP after `num_output_tokens` tokens."""

    handle: int
    num_output_tokens: int


class CreditHeader(Header, tag="credit"):
    pass


@dataclass(slots=True)
class Credit:
    """Readers took tokens: of each handle so many more than it had taken before. What is not taken is bounded by the core."""

    header: CreditHeader = field(default_factory=CreditHeader)
    num_tokens: I32 = field(default_factory=_i32)  # [N] at least 1
    handles: U32 = field(default_factory=_u32)  # [N]

    HEADER: ClassVar[type[Header]] = CreditHeader
    ARRAYS: ClassVar[tuple[tuple[str, str], ...]] = (("num_tokens", "<i4"), ("handles", "<u4"))


class Refused(Header, tag="refused"):
    """A request that was not accepted, or a stream that has lost its request to another one (ABORTED; `handle` is of any output
    of it that goes on). `code` is the name of a gRPC status."""

    handle: int
    code: str
    message: str
    field: str = ""  # the field of the public request that is wrong, for INVALID_ARGUMENT
    retry_after_ns: int = 0  # for RESOURCE_EXHAUSTED and UNAVAILABLE
    details: dict[
        str, str
    ] = {}  # numbers for ErrorInfo, such as estimate_ms; `reason`: its word, where the code leaves it open


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


class ResumeQuery(Header, tag="resume"):
    """Takes over a request that has a resume window: what comes of its output i from now on goes to handle + i."""

    query_id: int
    request_id: str
    handle: int  # chosen by the front end, for as many outputs as a request may have
    arrival_ns: int = (
        0  # CLOCK_MONOTONIC when the call came in; the latest call has the request, in whatever order they are read
    )


class ResumeHeader(Header, tag="resume_reply"):
    query_id: int
    handle: int  # as in the query
    is_known: bool  # False: no such request is kept, and nothing else is said
    resume_state: bytes = b""
    ended: tuple[OutputEnded | None, ...] = ()  # of each output; None: it goes on


@dataclass(slots=True)
class ResumeReply:
    """A request so far; all of it counts as taken by the reader."""

    header: ResumeHeader
    prompt: I32 = field(default_factory=_i32)  # [T]
    tokens: I32 = field(default_factory=_i32)  # [N] of all outputs, one after the other
    num_tokens: I32 = field(default_factory=_i32)  # [O] of each output

    HEADER: ClassVar[type[Header]] = ResumeHeader
    ARRAYS: ClassVar[tuple[tuple[str, str], ...]] = (("prompt", "<i4"), ("tokens", "<i4"), ("num_tokens", "<i4"))


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
    recomputed_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    prompt_tokens: int = 0  # of requests admitted
    held_host_blocks: int = 0
    swapped_blocks: int = 0


class GroupLoadReply(Header):
    """One of several groups."""

    group: int
    has_worker: bool
    epoch: int
    load: LoadReply


class Distribution(Header):
    """How often a measured value fell where."""

    bounds: tuple[float, ...]  # rising; values up to bounds[i], and above bounds[i-1], are counts[i]
    counts: tuple[int, ...]  # one more than bounds: the last are above all of them
    total: float  # of all values


class MetricsQuery(Header, tag="metrics"):
    query_id: int


class MetricsReply(Header, tag="metrics_reply"):
    """What the core counts, at this moment; distributions since its start."""

    query_id: int
    facts: Facts
    load: LoadReply
    group: int
    epoch: int
    block_size: int
    shared_blocks: int  # in more than one table
    empty_slots: int  # of held blocks, that hold no computed token
    step_seconds: Distribution  # a step, by the worker's own clock
    step_tokens: Distribution  # computed in a step
    inter_token_seconds: Distribution  # between two tokens of one output, preemptions included
    groups: tuple[GroupLoadReply, ...] = ()  # where there are several; all else is of all of them


class SetPolicyQuery(Header, tag="set_policy"):
    query_id: int
    policy: str


class SetPolicyReply(Header, tag="set_policy_reply"):
    query_id: int
    policy: str  # in force now
    error: str = ""  # why it was not changed; empty when it was


class DrainQuery(Header, tag="drain"):
    """End, once those alive have ended or their time is over."""

    query_id: int
    timeout_ms: int  # at most; negative: as configured


class DrainReply(Header, tag="drain_reply"):
    query_id: int
    num_requests: int  # alive
    left_ns: int  # until they are ended


class ReplaceQuery(Header, tag="replace"):
    """Start a new worker, and let it take the place of the one that computes now."""

    query_id: int
    device: str  # to compute on; empty: as now
    group: int = -1  # whose worker; -1: the first group's that has one


class ReplaceReply(Header, tag="replace_reply"):
    """Once the new one computes, or it is known that none will."""

    query_id: int
    epoch: int  # in force now
    pid: int  # of the worker that computes now; 0: none does
    error: str = ""  # why there is no new one; empty: there is


class Hindrance(enum.StrEnum):
    """Why a request is not computing."""

    NONE = ""  # it is
    ORDER = "order"  # others go first
    ROWS = "rows"  # no row of the batch is free
    BLOCKS = "blocks"  # too few blocks are free
    QUOTA = "quota"  # its tenant holds as many blocks as it may
    READER = "reader"  # its reader does not take the tokens
    SIBLING = "sibling"  # its first output computes the prompt
    WORKER = "worker"  # there is none
    POLICY = "policy"  # the policy admits nobody now, as static batching in the midst of a batch


class Preemption(Header):
    at_ns: int  # CLOCK_MONOTONIC
    by_request_id: str  # for whose blocks; empty: the worker was lost
    lost_tokens: int  # computed tokens given up, or swapped
    swapped: bool
    step_id: int = -1  # the next plan then
    until_ns: int = -1  # when it had a row again; -1: not yet
    until_step: int = -1  # the plan with which it came back


class Explanation(Header):
    """Why a request waits, or what became of its time. Times are CLOCK_MONOTONIC nanoseconds, -1: not known or not yet."""

    request_id: str
    state: str  # waiting, running, preempted or ended
    tenant: str
    priority: int
    arrival_ns: int
    now_ns: int
    hindrance: Hindrance
    rank: int  # about how many go first; 0: next, or not waiting
    missing_rows: int
    missing_blocks: int
    needed_blocks: int  # to be admitted
    tenant_tokens: int  # the tenant's tokens served, weighted: what is kept fair
    least_tenant_tokens: int  # the least of those that wait in the class
    predicted_start_ns: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_computed_tokens: int
    preemptions: tuple[Preemption, ...]
    stats: RequestStats  # so far, or at the end
    end_reason: str = ""
    text: str = ""  # all of it in a sentence or two, for people
    first_step: int = -1  # the plan that it joined first with; -1: none
    last_step: int = -1  # the last plan with it, once it has ended
    group: int = 0


class ExplainQuery(Header, tag="explain"):
    query_id: int
    request_id: str


class ExplainReply(Header, tag="explain_reply"):
    query_id: int
    explanation: Explanation | None  # None: not known


class RequestSummary(Header):
    request_id: str
    state: str  # waiting, running or preempted
    tenant: str
    priority: int
    arrival_ns: int
    num_prompt_tokens: int
    num_output_tokens: int  # of all its outputs
    num_outputs: int
    held_blocks: int  # a shared block counts for each that holds it
    group: int = 0


class ListQuery(Header, tag="list"):
    query_id: int
    after: int  # what the reply before said as next; 0: from the start
    limit: int


class ListReply(Header, tag="list_reply"):
    query_id: int
    requests: tuple[RequestSummary, ...]  # by group, in a group by arrival
    next: int  # 0: that was all
    total: int


class BlockTable(Header):
    request_id: str
    output_index: int
    slot: int
    num_tokens: int  # computed
    blocks: tuple[int, ...]


class BlockTablesQuery(Header, tag="block_tables"):
    query_id: int
    group: int = 0


class BlockTablesHeader(Header, tag="block_tables_reply"):
    query_id: int
    group: int
    block_size: int
    num_blocks: int
    tables: tuple[BlockTable, ...]
    num_host_blocks: int = 0
    held_host_blocks: int = 0


@dataclass(slots=True)
class BlockTablesReply:
    """Who holds which block. states[i] is of block i+1: 0 free, 1 held, 2 retiring, 3 cached."""

    header: BlockTablesHeader
    ref_counts: I32 = field(default_factory=_i32)  # [num_blocks]
    states: U8 = field(default_factory=_u8)  # [num_blocks]

    HEADER: ClassVar[type[Header]] = BlockTablesHeader
    ARRAYS: ClassVar[tuple[tuple[str, str], ...]] = (("ref_counts", "<i4"), ("states", "|u1"))


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
    output_index: int = 0
    tenant: str = ""
    num_cached_tokens: int = 0  # taken from the prefix cache when it joined in this step


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
    cached_blocks: int = 0
    free_blocks: int = 0
    token_budget: int = 0
    num_copies: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    policy: str = ""


Message: TypeAlias = (
    WorkerHello
    | Heartbeat
    | Retired
    | Welcome
    | Probe
    | StepPlan
    | StepResult
    | Logprobs
    | StepFailed
    | FrontendHello
    | Facts
    | AddRequest
    | RestoreRequest
    | MovedRequest
    | AbortRequest
    | TruncateRequest
    | Credit
    | Refused
    | TokenBatch
    | CancelQuery
    | CancelReply
    | ResumeQuery
    | ResumeReply
    | LoadQuery
    | LoadReply
    | MetricsQuery
    | MetricsReply
    | SetPolicyQuery
    | SetPolicyReply
    | DrainQuery
    | DrainReply
    | ReplaceQuery
    | ReplaceReply
    | ExplainQuery
    | ExplainReply
    | ListQuery
    | ListReply
    | BlockTablesQuery
    | BlockTablesReply
    | WatchSteps
    | StepRecord
)

WITH_ARRAYS: dict[type[Header], Any] = {
    cls.HEADER: cls
    for cls in (
        StepPlan,
        StepResult,
        Logprobs,
        AddRequest,
        RestoreRequest,
        MovedRequest,
        Credit,
        TokenBatch,
        ResumeReply,
        BlockTablesReply,
    )
}
