"""The Python client for asyncio: one object per connection, streams of the API's own messages.

    async with AsyncCarouselClient("127.0.0.1:50051") as client:
        async for text in client.generate("def fibonacci(n):", max_tokens=64, temperature=0).text():
            print(text, end="", flush=True)

One client may be used by many tasks of one event loop, one stream by one task at a time. Knows the public protos and grpc.aio
only.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from carousel.v1 import control_pb2, control_pb2_grpc, generation_pb2, generation_pb2_grpc, inspect_pb2, inspect_pb2_grpc
from carousel.v1.tokenization_pb2_grpc import TokenizationStub
from client import questions
from client.aio.many import AsyncMany
from client.aio.streams import AsyncGenerateStream, AsyncStream, Call
from client.api import ANSWER_S, READY_RETRY_S, REPLACE_S, not_ready
from client.connection import File, way_to
from client.errors import CarouselError, error_of
from client.leaving import TELL_S
from client.progress import Progress
from client.questions import Question
from client.requests import Parameters, make_request, make_resume, prepared
from client.retries import RESUME_WINDOW_MS, RETRIES, Attempts, check_retries, wait_s

AnswerT = TypeVar("AnswerT")


class AsyncCarouselClient:
    """A connection to one server, for the event loop in which it is made. Connects with the first call; close it, or use
    `async with`. Arguments and errors are those of CarouselClient."""

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        tls_ca: File | None = None,
        tls_cert: File | None = None,
        tls_key: File | None = None,
        token: str | None = None,
        retries: int = RETRIES,
        resume_window_ms: int = RESUME_WINDOW_MS,
    ) -> None:
        check_retries(retries, resume_window_ms)
        way = way_to(target, tls_ca, tls_cert, tls_key, token)
        self.target, self._metadata = target, way.metadata
        self._retries, self._resume_window_ms = retries, resume_window_ms
        self._loop = asyncio.get_running_loop()
        self._channel = way.aio_channel()
        self._generation = generation_pb2_grpc.GenerationStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._inspect = inspect_pb2_grpc.InspectStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        stubs = (self._generation, self._control, self._inspect, TokenizationStub(self._channel))
        self._stubs: dict[type, Any] = {type(stub): stub for stub in stubs}
        self._streams: weakref.WeakSet[AsyncGenerateStream] = weakref.WeakSet()
        self._telling: set[asyncio.Task[None]] = set()  # the server of requests that nobody wants any more

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection, and with it every call and every request that still runs."""
        for stream in list(self._streams):
            await stream.close()
        await asyncio.sleep(0)  # what was left a moment ago begins to be told
        if self._telling:
            await asyncio.wait(self._telling)
        await self._channel.close()

    # ---------------------------------------------------------------------------------------------------- requests

    def generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **parameters: Unpack[Parameters]
    ) -> AsyncGenerateStream:
        """Sends a prompt (text, or token ids) and returns the stream of its events. timeout_s: the deadline of all that is done
        for it.

        For the fields that have no parameter, make a GenerateRequest and call `stream`. Raises ValueError or TypeError for a
        value that its field can't hold; what the server refuses is raised as CarouselError by the first `anext`.
        """
        return self.stream(make_request(prompt, **parameters), timeout_s)

    def stream(self, request: generation_pb2.GenerateRequest, timeout_s: float | None = None) -> AsyncGenerateStream:
        """Sends a copy of any GenerateRequest. One without an id gets one, so that it can be cancelled by it. timeout_s: the
        deadline of all that is done for it."""
        sent, attempts = prepared(request, self._resume_window_ms), self._attempts(timeout_s)
        return self._begin(
            Progress(sent, sent.scheduling.resume_window_ms, attempts, own_id=sent.request_id != request.request_id)
        )

    def resume(
        self, request_id: str, offsets: Mapping[int, tuple[int, int]] | None = None, *, timeout_s: float | None = None
    ) -> AsyncGenerateStream:
        """Attaches to a request that this program, or another one before it, began: the stream of what comes after what the
        caller has. offsets: that, by output_index, as (tokens, UTF-8 bytes of text); without them from the start. Streams of
        `generate` need no such call. `anext` raises CarouselError: NOT_FOUND where no such request is kept, OUT_OF_RANGE."""
        return self._begin(Progress(make_resume(request_id, offsets), self._resume_window_ms, self._attempts(timeout_s)))

    def generate_many(self, timeout_s: float | None = None) -> AsyncMany:
        """One connection for many requests: many times the tokens a second of a call for each. timeout_s: its deadline."""
        return AsyncMany(self._generation, self.target, timeout_s, self._metadata)

    async def cancel(self, request_id: str, timeout_s: float = ANSWER_S) -> generation_pb2.CancelOutcome.ValueType:
        """Ends a request by its id; says whether it was alive (CANCEL_OUTCOME_…). May be called again."""
        return await self._ask(questions.cancel(request_id), timeout_s)

    # ---------------------------------------------------------------------------------------------------- tokenizer

    async def tokenize(self, text: str, *, add_special_tokens: bool | None = None) -> list[int]:
        """The token ids of a text, special tokens added as `generate` does, unless add_special_tokens is False."""
        return await self._ask(questions.tokenize(text, add_special_tokens))

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None) -> str:
        """The text of token ids, without special tokens unless skip_special_tokens is False."""
        return await self._ask(questions.detokenize(token_ids, skip_special_tokens))

    async def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        template_name: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """The prompt of a conversation, [{"role": "user", "content": "…"}, …], as token ids for `generate`. variables: what
        else the model's template knows. Raises CarouselError: FAILED_PRECONDITION when the model has no template."""
        return await self._ask(questions.apply_chat_template(messages, add_generation_prompt, tools, template_name, variables))

    # ------------------------------------------------------------------------------------------------------- facts

    async def server_info(self) -> control_pb2.GetServerInfoResponse:
        """Version, policy, limits, workers."""
        return await self._ask(questions.server_info())

    async def model_info(self) -> control_pb2.GetModelInfoResponse:
        """The model that is served; UNAVAILABLE until a worker has loaded it."""
        return await self._ask(questions.model_info())

    async def load(self) -> control_pb2.GetLoadResponse:
        """Requests, rows and blocks at this moment."""
        return await self._ask(questions.load())

    def watch_load(self, interval_s: float | None = None) -> AsyncStream[control_pb2.WatchLoadResponse]:
        """The load, at once and then every interval_s seconds (0.1 to 60, 1 by default), until it is closed."""
        request = questions.watch_load_request(interval_s)
        return AsyncStream(self._control.WatchLoad(request, metadata=self._metadata), self.target)

    async def block_tables(self, group: int = 0) -> inspect_pb2.GetBlockTablesResponse:
        """Who holds which block of a worker group at this moment, and how often blocks are shared."""
        return await self._ask(questions.block_tables(group))

    def watch_steps(self) -> AsyncStream[inspect_pb2.WatchStepsResponse]:
        """What each step does, from now on, until it is closed."""
        request = inspect_pb2.WatchStepsRequest()
        return AsyncStream(self._inspect.WatchSteps(request, metadata=self._metadata), self.target)

    # -------------------------------------------------------------------------------------------------- scheduling

    async def set_policy(self, name: str) -> str:
        """Another scheduling policy from the next step on; returns the one in force. Raises CarouselError (INVALID_ARGUMENT)
        when there is no such policy."""
        return await self._ask(questions.set_policy(name))

    async def list_requests(self, page_size: int | None = None, page_token: str = "") -> control_pb2.ListRequestsResponse:
        """One page of the requests that are alive, by arrival; page_token: next_page_token of the page before."""
        return await self._ask(questions.list_requests(page_size, page_token))

    async def explain(self, request_id: str, tenant: str | None = None) -> control_pb2.ExplainRequestResponse:
        """Why a request waits, or where its time went. tenant: whose it is, where that is not the token's own. Raises
        CarouselError (NOT_FOUND)."""
        return await self._ask(questions.explain(request_id, tenant))

    async def drain(self, timeout_s: float | None = None) -> control_pb2.DrainResponse:
        """Ends the server as SIGTERM does: nothing new, those alive run to their end, then it exits. timeout_s: what they get,
        at most; the server's own limit can't be lengthened. Answers at once, and may be called again."""
        return await self._ask(questions.drain(timeout_s))

    async def replace_worker(self, device: str | None = None, group: int | None = None) -> control_pb2.ReplaceWorkerResponse:
        """Starts a new worker that takes the place of the one that computes; no request fails. device: auto, cpu, cuda or sim;
        None: as the server was told. group: whose worker; None: the first group's that has one. Returns once it computes,
        whatever the client's timeout for other calls. Raises CarouselError (FAILED_PRECONDITION) when it does not come to that:
        the old one goes on."""
        return await self._ask(questions.replace_worker(device, group), REPLACE_S)

    # ------------------------------------------------------------------------------------------------------- start

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns once health says SERVING. Raises CarouselError (DEADLINE_EXCEEDED) when it does not within the time."""
        until = time.monotonic() + timeout_s
        while True:
            call = self._health.Watch(
                health_pb2.HealthCheckRequest(),
                timeout=max(0.0, until - time.monotonic()),
                metadata=self._metadata,
                wait_for_ready=True,
            )
            try:
                async for answer in AsyncStream[health_pb2.HealthCheckResponse](call, self.target):
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except CarouselError as error:
                if error.code not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                    raise
                await asyncio.sleep(min(READY_RETRY_S, max(0.0, until - time.monotonic())))  # it went away
            if time.monotonic() >= until:
                raise not_ready(self.target, timeout_s)

    # ------------------------------------------------------------------------------------------------------- calls

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self._retries, None if timeout_s is None else time.monotonic() + timeout_s)

    async def _ask(self, question: Question[AnswerT], timeout_s: float = ANSWER_S) -> AnswerT:
        method, attempts = getattr(self._stubs[question.stub], question.method), self._attempts(timeout_s)
        while True:
            try:
                left_s = attempts.left_s(time.monotonic())
                return question.read(await method(question.request, timeout=left_s, metadata=self._metadata))
            except grpc.aio.AioRpcError as error:
                failure = error_of(error, self.target, answered=False)
            await asyncio.sleep(wait_s(attempts, failure, time.monotonic(), random.random()))

    def _begin(self, progress: Progress) -> AsyncGenerateStream:
        stream = AsyncGenerateStream(
            self._call(*progress.call(time.monotonic())), self.target, progress, self._call, self._leave
        )
        self._streams.add(stream)
        return stream

    def _call(
        self, request: generation_pb2.GenerateRequest | generation_pb2.ResumeRequest, timeout_s: float | None
    ) -> Call[generation_pb2.GenerateResponse]:
        if isinstance(request, generation_pb2.ResumeRequest):
            return self._generation.Resume(request, timeout=timeout_s, metadata=self._metadata)
        return self._generation.Generate(request, timeout=timeout_s, metadata=self._metadata)

    def _leave(self, request_id: str) -> None:
        """From anywhere, a destructor in another thread too: the server is told by the loop."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed: the window ends the request
            self._loop.call_soon_threadsafe(self._begin_to_tell, request_id)

    def _begin_to_tell(self, request_id: str) -> None:
        task = self._loop.create_task(self._tell(request_id))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell(self, request_id: str) -> None:
        request = generation_pb2.CancelRequest(request_id=request_id)
        with contextlib.suppress(grpc.RpcError, grpc.aio.UsageError):  # it can't be told: its window ends it
            await self._generation.Cancel(request, timeout=TELL_S, metadata=self._metadata)
