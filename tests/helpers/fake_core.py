"""A core without a scheduler: a real ROUTER socket in a thread that speaks the wire contract and invents tokens.

Each request gets the tokens that `script` gives for it (by default its prompt again and again), one per step and handle, ends
at an end token or after max_tokens, and can be aborted, truncated and cancelled. Steps run by themselves, or one by one when
the test holds them (`hold`, `step`). Everything that front ends said is kept (`heard`).
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
    Refused,
    RequestStats,
    RowRecord,
    StepRecord,
    TokenBatch,
    TokenBatchHeader,
    TruncateRequest,
    WatchSteps,
    WorkerFacts,
    decode,
    encode,
)

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
    )
    return msgspec.structs.replace(facts, **changes)


@dataclass(slots=True)
class _Request:
    peer: bytes
    add: AddRequest
    tokens: Iterator[int]
    num_outputs: int = 0


class FakeCore:
    """Serves from `with` on, until its end; `endpoint` is where front ends connect."""

    def __init__(self, facts: Facts | None = None, endpoint: str | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="carousel-test-")
        self.endpoint = endpoint or f"ipc://{self._folder.name}/core"
        self.facts = facts or ready_facts()
        self.script: Callable[[AddRequest], Iterable[int]] = lambda add: itertools.cycle(add.prompt.tolist())
        self.refuse: Callable[[AddRequest], Refused | None] = lambda add: None
        self.answers_queries = True
        self.stats = RequestStats(prompt_tokens=7, queued_ns=1, prefill_ns=2, decode_ns=3, first_token_ns=4, block_ns=5 * 10**8)
        self.load = LoadReply(0, *range(1, 17))
        self.heard: SimpleQueue[Message] = SimpleQueue()
        self.num_steps = 0
        self.step_pause_s = 0.0  # at least so long from one step to the next
        self._held = False
        self._unclaimed: list[Message] = []
        self._conditions: list[tuple[Callable[[], bool], Future[None]]] = []
        self._requests: dict[tuple[bytes, int], _Request] = {}
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

    def num_outputs(self) -> int:
        """Tokens invented for the requests alive; for `wait_until`."""
        return sum(request.num_outputs for request in self._requests.values())

    def is_idle(self) -> bool:
        """For `wait_until`."""
        return not self._requests

    def end_all(self, reason: EndReason, message: str = "") -> None:
        self.call(lambda: [self._end(request, reason, message=message) for request in list(self._requests.values())])

    def num_requests(self) -> int:
        return self.call(lambda: len(self._requests))

    def forget(self) -> None:
        """What was heard so far."""
        self._unclaimed.clear()
        while not self.heard.empty():
            self.heard.get()

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
            steps = bool(self._requests) and not self._held
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
                self._end_if_alive(peer, handle, EndReason.CANCELLED)
            case TruncateRequest(handle=handle, num_output_tokens=count):
                self._end_if_alive(peer, handle, EndReason.STOP, num_outputs=count)
            case CancelQuery(query_id=query_id, request_id=request_id) if self.answers_queries:
                self._send(peer, CancelReply(query_id, self._cancel(request_id)))
            case LoadQuery(query_id=query_id) if self.answers_queries:
                self._send(peer, msgspec.structs.replace(self.load, query_id=query_id))
            case WatchSteps(on=on):
                (self._watchers.add if on else self._watchers.discard)(peer)
        self.heard.put(message)

    def _add(self, peer: bytes, add: AddRequest) -> None:
        refused = self.refuse(add)
        if refused is None and any(
            request.add.header.request_id == add.header.request_id for request in self._requests.values()
        ):
            refused = Refused(add.header.handle, "ALREADY_EXISTS", f"request_id {add.header.request_id!r} is alive")
        if refused is not None:
            self._send(peer, refused)
            return
        self._requests[peer, add.header.handle] = _Request(peer, add, iter(self.script(add)))

    def _cancel(self, request_id: str) -> CancelOutcome:
        for request in self._requests.values():
            if request.add.header.request_id == request_id:
                self._end(request, EndReason.CANCELLED)
                return CancelOutcome.CANCELLED
        return CancelOutcome.ALREADY_FINISHED if request_id in self._ended_ids else CancelOutcome.NOT_FOUND

    def _end_if_alive(self, peer: bytes, handle: int, reason: EndReason, num_outputs: int | None = None) -> None:
        request = self._requests.get((peer, handle))
        if request is not None:
            request.num_outputs = request.num_outputs if num_outputs is None else num_outputs
            self._end(request, reason)

    def _end(self, request: _Request, reason: EndReason, message: str = "") -> None:
        ended = self._ended(request, reason, message=message)
        self._send(request.peer, TokenBatch(TokenBatchHeader(self.num_steps, (ended,))))

    def _ended(self, request: _Request, reason: EndReason, stop_token_id: int = -1, message: str = "") -> OutputEnded:
        handle, request_id = request.add.header.handle, request.add.header.request_id
        del self._requests[request.peer, handle]
        self._ended_ids.add(request_id)
        stats = msgspec.structs.replace(self.stats, output_tokens=request.num_outputs)
        return OutputEnded(handle, reason, stats, stop_token_id, message)

    def _step(self) -> None:
        """One token for each request."""
        self.num_steps += 1
        by_peer: dict[bytes, tuple[list[int], list[int], list[OutputEnded]]] = {}
        rows = tuple(
            RowRecord(request.add.header.request_id, slot, 1, True, request.num_outputs == 0, False)
            for slot, request in enumerate(self._requests.values())
        )
        leaves = []
        for request in list(self._requests.values()):
            header = request.add.header
            handles, tokens, ended = by_peer.setdefault(request.peer, ([], [], []))
            token = next(request.tokens)
            request.num_outputs += 1
            handles.append(header.handle)
            tokens.append(token)
            limit = header.max_tokens or 10**9
            if token in header.sampling.stop_token_ids and request.num_outputs > header.sampling.min_tokens:
                ended.append(self._ended(request, EndReason.STOP, stop_token_id=token))
                leaves.append((header.request_id, "stop"))
            elif request.num_outputs == limit:
                ended.append(self._ended(request, EndReason.LENGTH))
                leaves.append((header.request_id, "length"))
        for peer, (handles, tokens, ended) in by_peer.items():
            header = TokenBatchHeader(self.num_steps, tuple(ended))
            self._send(peer, TokenBatch(header, np.array(handles, np.uint32), np.array(tokens, np.int32)))
        for peer in self._watchers:
            self._send(peer, StepRecord(self.num_steps, 0, self.num_steps * 10, 5, rows, tuple(leaves), 3, 64, 40, 2))
