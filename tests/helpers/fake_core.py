"""A core without a scheduler: a real ROUTER socket in a thread that speaks the wire contract and invents tokens.

Each output of a request gets the tokens that `script` gives for it (by default the prompt again and again), one per step and
handle, ends at an end token or after max_tokens, and can be aborted, truncated and cancelled. An output whose reader is more
than max_unread_tokens behind gets none. Steps run by themselves, or one by one when the test holds them (`hold`, `step`).
Everything that front ends said is kept (`heard`). It knows no deadlines: a test ends what it likes (`end_all`).
"""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Self, TypeVar

import msgspec
import numpy as np
import zmq

from wire import (
    AbortRequest,
    AddRequest,
    BlockTable,
    BlockTablesHeader,
    BlockTablesQuery,
    BlockTablesReply,
    CancelOutcome,
    CancelQuery,
    CancelReply,
    Credit,
    DrainQuery,
    DrainReply,
    EndReason,
    ExplainQuery,
    ExplainReply,
    Explanation,
    Facts,
    FrontendHello,
    ListQuery,
    ListReply,
    LoadQuery,
    LoadReply,
    Message,
    OutputEnded,
    Refused,
    ReplaceQuery,
    ReplaceReply,
    RequestStats,
    RequestSummary,
    RowRecord,
    SetPolicyQuery,
    SetPolicyReply,
    StepRecord,
    TokenBatch,
    TokenBatchHeader,
    TruncateRequest,
    WatchSteps,
    WorkerFacts,
    decode,
    encode,
)

# What a test may set, for whoever puts it back.
CHANGEABLE = ("facts", "script", "sibling_script", "refuse", "stats", "load", "answers_queries", "policies", "explanations")
CHANGEABLE += ("listed", "tables", "ref_counts", "states", "record", "row")
PATIENCE_S = 20.0  # a test that waits this long has failed
MessageT = TypeVar("MessageT")
ResultT = TypeVar("ResultT")


def worker_facts(**changes: Any) -> WorkerFacts:
    facts = WorkerFacts(
        device="sim",
        pid=4321,
        description="invented tokens",
        architecture="LlamaForCausalLM",
        dtype="float32",
        vocab_size=600,
        max_model_len=256,
        block_size=16,
        num_blocks=64,
        kv_bytes_per_token=1024,
        num_parameters=1_000_000,
        max_batch_rows=64,
        max_step_tokens=512,
    )
    return msgspec.structs.replace(facts, **changes)


def ready_facts(worker: WorkerFacts | None = None, **changes: Any) -> Facts:
    facts = Facts(
        version="0.0.test",
        policy="continuous",
        started_ns=time.monotonic_ns() - 5_000_000_000,
        ready=True,
        draining=False,
        reason="",
        max_step_tokens=512,
        max_batch_rows=64,
        max_queue_requests=100,
        max_queue_tokens=10_000,
        workers=((0, 1, worker or worker_facts()),),
        max_unread_tokens=1024,
    )
    return msgspec.structs.replace(facts, **changes)


@dataclass(slots=True)
class _Output:
    """One output of a request."""

    peer: bytes
    add: AddRequest
    index: int
    tokens: Iterator[int]
    num_tokens: int = 0
    num_credited: int = 0

    @property
    def handle(self) -> int:
        return self.add.header.handle + self.index

    @property
    def request_id(self) -> str:
        return self.add.header.request_id


class FakeCore:
    """Serves from `with` on, until its end; `endpoint` is where front ends connect."""

    def __init__(self, facts: Facts | None = None, endpoint: str | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="carousel-test-")
        self.endpoint = endpoint or f"ipc://{self._folder.name}/core"
        self.facts = facts or ready_facts()
        self.script: Callable[[AddRequest], Iterable[int]] = lambda add: itertools.cycle(add.prompt.tolist())
        self.sibling_script: Callable[[AddRequest, int], Iterable[int]] = lambda add, index: self.script(add)  # index ≥ 1
        self.refuse: Callable[[AddRequest], Refused | None] = lambda add: None
        self.answers_queries = True
        self.stats = RequestStats(prompt_tokens=7, queued_ns=1, prefill_ns=2, decode_ns=3, first_token_ns=4, block_ns=5 * 10**8)
        self.load = LoadReply(0, *range(1, 22))
        self.policies = ("continuous", "prefill_first", "static")
        self.explanations: dict[str, Explanation] = {}  # by request_id
        self.listed: list[RequestSummary] = []
        self.tables: tuple[BlockTable, ...] = ()
        self.ref_counts: list[int] = [0] * 64
        self.states: list[int] = [0] * 64
        self.record: dict[str, Any] = {}  # more fields of step records
        self.row: dict[str, Any] = {}  # … and of their rows
        self.heard: SimpleQueue[Message] = SimpleQueue()
        self.num_steps = 0
        self.step_pause_s = 0.0  # at least so long from one step to the next
        self._held = False
        self._unclaimed: list[Message] = []
        self._conditions: list[tuple[Callable[[], bool], Future[None]]] = []
        self._outputs: dict[tuple[bytes, int], _Output] = {}
        self._ended_ids: set[str] = set()
        self._peers: list[bytes] = []
        self._watchers: set[bytes] = set()
        self._context = zmq.Context()
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fake-core", daemon=True)

    # --------------------------------------------------------------------------------------- for the test's thread

    def __enter__(self) -> Self:
        bell = self._context.socket(zmq.PAIR)
        bell.bind("inproc://calls")
        self._bell = bell
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Goes away, as a core that died."""
        if self._thread.is_alive():
            self.call(self._finish)
            self._thread.join(PATIENCE_S)
            self._bell.close(0)
            self._context.term()
            self._folder.cleanup()

    def call(self, function: Callable[[], ResultT]) -> ResultT:
        """Runs it in the core's thread."""
        result: Future[ResultT] = Future()

        def run() -> None:
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)

        self._calls.put(run)
        self._bell.send(b"")
        return result.result(PATIENCE_S)

    def hold(self, held: bool = True) -> None:
        """No step by itself from now on."""
        self.call(lambda: setattr(self, "_held", held))

    def step(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            self.call(self._step)

    def tell(self, facts: Facts) -> None:
        """New facts for all front ends."""

        def say() -> None:
            self.facts = facts
            for peer in self._peers:
                self._send(peer, facts)

        self.call(say)

    def send(self, *frames: bytes) -> None:
        """Raw frames to all front ends."""
        self.call(lambda: [self._socket.send_multipart([peer, *frames]) for peer in self._peers])

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until it is true, looked at in the core's thread after each step and message."""
        done: Future[None] = Future()
        self.call(lambda: self._conditions.append((condition, done)))
        done.result(PATIENCE_S)

    def num_tokens(self) -> int:
        """Tokens invented for the requests alive; for `wait_until`."""
        return sum(output.num_tokens for output in self._outputs.values())

    def is_idle(self) -> bool:
        """For `wait_until`."""
        return not self._outputs

    def is_stalled(self) -> bool:
        """All readers are too far behind; for `wait_until`."""
        return bool(self._outputs) and not any(self._is_read(output) for output in self._outputs.values())

    def end_all(self, reason: EndReason, message: str = "") -> None:
        self.call(lambda: [self._end(output, reason, message=message) for output in list(self._outputs.values())])

    def end(self, handle: int, reason: EndReason) -> None:
        """One output."""
        self.call(lambda: [self._end(output, reason) for output in list(self._outputs.values()) if output.handle == handle])

    def num_requests(self) -> int:
        return self.call(lambda: len({output.request_id for output in self._outputs.values()}))

    def forget(self) -> None:
        """What was heard so far."""
        self._unclaimed.clear()
        while not self.heard.empty():
            self.heard.get()

    def all_heard(self) -> list[Message]:
        """What nobody waited for."""
        while not self.heard.empty():
            self._unclaimed.append(self.heard.get())
        return self._unclaimed

    def wait_for(self, kind: type[MessageT], matches: Callable[[MessageT], bool] = lambda message: True) -> MessageT:
        """The next message of this kind that a front end says, or has said and nobody waited for."""
        for i, message in enumerate(self._unclaimed):
            if isinstance(message, kind) and matches(message):
                del self._unclaimed[i]
                return message
        until = time.monotonic() + PATIENCE_S
        while True:
            message = self.heard.get(timeout=max(0.001, until - time.monotonic()))
            if isinstance(message, kind) and matches(message):
                return message
            self._unclaimed.append(message)

    # --------------------------------------------------------------------------------------- for the core's thread

    def _run(self) -> None:
        self._running = True
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.bind(self.endpoint)
        bell = self._context.socket(zmq.PAIR)
        bell.connect("inproc://calls")
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(bell, zmq.POLLIN)
        next_step = 0.0
        while self._running:
            steps = not self._held and any(self._is_read(output) for output in self._outputs.values())
            wait_ms = max(0, int((next_step - time.monotonic()) * 1000)) if steps else None
            ready = dict(poller.poll(wait_ms))
            if bell in ready:
                bell.recv()
                self._calls.get()()
            elif self._socket in ready:
                self._hear_all()
            elif steps:
                next_step = time.monotonic() + self.step_pause_s
                self._step()
            for waiting in [waiting for waiting in self._conditions if waiting[0]()]:
                self._conditions.remove(waiting)
                waiting[1].set_result(None)
        bell.close(0)
        self._socket.close()

    def _finish(self) -> None:
        self._running = False

    def _hear_all(self) -> None:
        while True:
            try:
                peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._hear(peer, decode(frames))

    def _send(self, peer: bytes, message: Message) -> None:
        self._socket.send_multipart([peer, *encode(message)])

    def _hear(self, peer: bytes, message: Message) -> None:
        match message:
            case FrontendHello():
                self._peers.append(peer)
                self._send(peer, self.facts)
            case AddRequest():
                self._add(peer, message)
            case AbortRequest(handle=handle):
                for output in self._of_request(peer, handle):
                    self._end(output, EndReason.CANCELLED)
            case TruncateRequest(handle=handle, num_output_tokens=count):
                output = self._outputs.get((peer, handle))
                if output is not None:
                    output.num_tokens = count
                    self._end(output, EndReason.STOP)
            case Credit():
                self._credit(peer, message)
            case WatchSteps(on=on):
                (self._watchers.add if on else self._watchers.discard)(peer)
            case _ if self.answers_queries:
                self.heard.put(message)  # before whoever has the answer looks for it
                self._answer(peer, message)
                return
        self.heard.put(message)

    def _answer(self, peer: bytes, query: Message) -> None:
        match query:
            case CancelQuery(query_id=query_id, request_id=request_id):
                self._send(peer, CancelReply(query_id, self._cancel(request_id)))
            case LoadQuery(query_id=query_id):
                self._send(peer, msgspec.structs.replace(self.load, query_id=query_id))
            case SetPolicyQuery(query_id=query_id, policy=policy):
                known = policy in self.policies
                self.facts = msgspec.structs.replace(self.facts, policy=policy if known else self.facts.policy)
                error = "" if known else f"unknown policy {policy!r}: choose one of {', '.join(self.policies)}"
                self._send(peer, SetPolicyReply(query_id, self.facts.policy, error))
            case ReplaceQuery(query_id=query_id, device=device):
                error = "it did not start" if device == "cuda" else ""
                self._send(peer, ReplaceReply(query_id, 4, 4711, error))
            case DrainQuery(query_id=query_id):
                self.facts = msgspec.structs.replace(self.facts, ready=False, draining=True, reason="the server is draining")
                self._send(peer, self.facts)
                self._send(peer, DrainReply(query_id, len(self._outputs), 9_000_000_000))
            case ExplainQuery(query_id=query_id, request_id=request_id):
                self._send(peer, ExplainReply(query_id, self.explanations.get(request_id)))
            case ListQuery(query_id=query_id, after=after, limit=limit):
                page, total = self.listed[after : after + limit], len(self.listed)
                following = after + limit if after + limit < total else 0
                self._send(peer, ListReply(query_id, tuple(page), following, total))
            case BlockTablesQuery(query_id=query_id):
                header = BlockTablesHeader(query_id, 0, 16, 64, self.tables, num_host_blocks=8, held_host_blocks=3)
                self._send(peer, BlockTablesReply(header, np.array(self.ref_counts, np.int32), np.array(self.states, np.uint8)))

    def _add(self, peer: bytes, add: AddRequest) -> None:
        header, refused = add.header, self.refuse(add)
        if refused is None and any(output.request_id == header.request_id for output in self._outputs.values()):
            refused = Refused(header.handle, "ALREADY_EXISTS", "a request with this request_id is alive")
        if refused is not None:
            self._send(peer, refused)
            return
        for index in range(header.num_outputs):
            tokens = iter(self.sibling_script(add, index) if index else self.script(add))
            assert (peer, header.handle + index) not in self._outputs, "a handle is taken twice"
            self._outputs[peer, header.handle + index] = _Output(peer, add, index, tokens)

    def _of_request(self, peer: bytes, handle: int) -> list[_Output]:
        """Those alive of the request whose first output has this handle."""
        return [output for output in self._outputs.values() if output.peer == peer and output.add.header.handle == handle]

    def _is_read(self, output: _Output) -> bool:
        most = self.facts.max_unread_tokens
        return not most or output.num_tokens - output.num_credited <= most

    def _credit(self, peer: bytes, credit: Credit) -> None:
        for handle, count in zip(credit.handles.tolist(), credit.num_tokens.tolist(), strict=True):
            output = self._outputs.get((peer, handle))
            if output is not None:
                output.num_credited += count
                assert count >= 1 and output.num_credited <= output.num_tokens, "more was taken than there was"

    def _cancel(self, request_id: str) -> CancelOutcome:
        alive = [output for output in self._outputs.values() if output.request_id == request_id]
        for output in alive:
            self._end(output, EndReason.CANCELLED)
        if alive:
            return CancelOutcome.CANCELLED
        return CancelOutcome.ALREADY_FINISHED if request_id in self._ended_ids else CancelOutcome.NOT_FOUND

    def _end(self, output: _Output, reason: EndReason, message: str = "") -> None:
        ended = self._ended(output, reason, message=message)
        self._send(output.peer, TokenBatch(TokenBatchHeader(self.num_steps, (ended,))))

    def _ended(self, output: _Output, reason: EndReason, stop_token_id: int = -1, message: str = "") -> OutputEnded:
        del self._outputs[output.peer, output.handle]
        self._ended_ids.add(output.request_id)
        stats = msgspec.structs.replace(self.stats, output_tokens=output.num_tokens)
        return OutputEnded(output.handle, reason, stats, stop_token_id, message)

    def _step(self) -> None:
        """One token for each output that is read."""
        self.num_steps += 1
        by_peer: dict[bytes, tuple[list[int], list[int], list[OutputEnded]]] = {}
        outputs = [output for output in self._outputs.values() if self._is_read(output)]
        rows = tuple(
            RowRecord(output.request_id, slot, 1, True, output.num_tokens == 0, False, output.index, **self.row)
            for slot, output in enumerate(outputs)
        )
        leaves = []
        for output in outputs:
            header = output.add.header
            handles, tokens, ended = by_peer.setdefault(output.peer, ([], [], []))
            token = next(output.tokens)
            output.num_tokens += 1
            handles.append(output.handle)
            tokens.append(token)
            limit = header.max_tokens or 10**9
            if token in header.sampling.stop_token_ids and output.num_tokens > header.sampling.min_tokens:
                ended.append(self._ended(output, EndReason.STOP, stop_token_id=token))
                leaves.append((header.request_id, "stop"))
            elif output.num_tokens == limit:
                ended.append(self._ended(output, EndReason.LENGTH))
                leaves.append((header.request_id, "length"))
        for peer, (handles, tokens, ended) in by_peer.items():
            batch_header = TokenBatchHeader(self.num_steps, tuple(ended))
            self._send(peer, TokenBatch(batch_header, np.array(handles, np.uint32), np.array(tokens, np.int32)))
        record = StepRecord(self.num_steps, 0, self.num_steps * 10, 5, rows, tuple(leaves), 3, 64, 40, 2, **self.record)
        for peer in self._watchers:
            self._send(peer, record)
