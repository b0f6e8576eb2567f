"""The Python client: one object per connection, streams of the API's own messages.

    with CarouselClient("127.0.0.1:50051") as client:
        for text in client.generate("def fibonacci(n):", max_tokens=64, temperature=0).text():
            print(text, end="", flush=True)

Blocking; one client may be used by many threads, one stream by one thread at a time. Knows the public protos and grpc only.
"""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from carousel.v1 import control_pb2, control_pb2_grpc, generation_pb2, generation_pb2_grpc, inspect_pb2, inspect_pb2_grpc
from carousel.v1.tokenization_pb2_grpc import TokenizationStub
from client import questions
from client.connection import File, way_to
from client.errors import CarouselError, error_of
from client.leaving import TELL_S, Leaving
from client.many import Many
from client.progress import Progress
from client.questions import Question
from client.requests import Parameters, make_request, make_resume, prepared
from client.retries import RESUME_WINDOW_MS, RETRIES, Attempts, check_retries, wait_s
from client.streams import Call, GenerateStream, Stream

ANSWER_S = 30.0  # unary calls answer at once; later than this, something is wrong
REPLACE_S = 1800.0  # but one that waits for a model to be loaded
READY_RETRY_S = 0.05

AnswerT = TypeVar("AnswerT")


def not_ready(target: str, timeout_s: float) -> CarouselError:
    """What `wait_ready` raises."""
    return CarouselError(grpc.StatusCode.DEADLINE_EXCEEDED, f"the server at {target} was not ready within {timeout_s:g} s")


class CarouselClient:
    """A connection to one server. target: HOST:PORT. Connects with the first call; close it, or use `with`.

    tls_ca: a PEM file of certificates that vouch for the server's; calls are encrypted then. tls_cert, tls_key: PEM files of
    the certificate to show to a server that wants one, and of its key. token: says who calls, where the server wants to know;
    it can be read on the way unless calls are encrypted.

    retries: how often a call that the server refuses for now (UNAVAILABLE; RESOURCE_EXHAUSTED that says when to come again) is
    made again, with back-off, within its own time; 0: never. A request for tokens is sent again only while none has come.
    resume_window_ms: how long the server keeps a request whose connection broke; its stream goes on by itself within that time.
    0: a broken connection ends it.

    Raises OSError for a file that can't be read, ValueError for what can't be used.
    """

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
        self._channel = way.channel()
        self._generation = generation_pb2_grpc.GenerationStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._inspect = inspect_pb2_grpc.InspectStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        stubs = (self._generation, self._control, self._inspect, TokenizationStub(self._channel))
        self._stubs: dict[type, Any] = {type(stub): stub for stub in stubs}
        self._streams: weakref.WeakSet[GenerateStream] = weakref.WeakSet()
        cancel, metadata = self._generation.Cancel, self._metadata  # not self: a client that nobody holds is collected
        self._leaving = Leaving(
            lambda request_id: cancel.future(
                generation_pb2.CancelRequest(request_id=request_id), timeout=TELL_S, metadata=metadata
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and with it every call and every request that still runs."""
        for stream in list(self._streams):
            stream.close()
        self._leaving.close()
        self._channel.close()

    # ---------------------------------------------------------------------------------------------------- requests

    def generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **parameters: Unpack[Parameters]
    ) -> GenerateStream:
        """Sends a prompt (text, or token ids) and returns the stream of its events. timeout_s: the deadline of all that is done
        for it.

        For the fields that have no parameter, make a GenerateRequest and call `stream`. Raises ValueError or TypeError for a
        value that its field can't hold; what the server refuses is raised as CarouselError by the first `next`.
        """
        return self.stream(make_request(prompt, **parameters), timeout_s)

    def stream(self, request: generation_pb2.GenerateRequest, timeout_s: float | None = None) -> GenerateStream:
        """Sends a copy of any GenerateRequest. One without an id gets one, so that it can be cancelled by it. timeout_s: the
        deadline of all that is done for it."""
        sent, attempts = prepared(request, self._resume_window_ms), self._attempts(timeout_s)
        return self._begin(
            Progress(sent, sent.scheduling.resume_window_ms, attempts, own_id=sent.request_id != request.request_id)
        )

    def resume(
        self, request_id: str, offsets: Mapping[int, tuple[int, int]] | None = None, *, timeout_s: float | None = None
    ) -> GenerateStream:
        """Attaches to a request that this program, or another one before it, began: the stream of what comes after what the
        caller has. offsets: that, by output_index, as (tokens, UTF-8 bytes of text); without them from the start. Streams of
        `generate` need no such call. `next` raises CarouselError: NOT_FOUND where no such request is kept, OUT_OF_RANGE."""
        return self._begin(Progress(make_resume(request_id, offsets), self._resume_window_ms, self._attempts(timeout_s)))

    def generate_many(self, timeout_s: float | None = None) -> Many:
        """One connection for many requests: many times the tokens a second of a call for each. timeout_s: its deadline."""
        return Many(self._generation, self.target, timeout_s, self._metadata)

    def cancel(self, request_id: str, timeout_s: float = ANSWER_S) -> generation_pb2.CancelOutcome.ValueType:
        """Ends a request by its id; says whether it was alive (CANCEL_OUTCOME_…). May be called again."""
        return self._ask(questions.cancel(request_id), timeout_s)

    # ---------------------------------------------------------------------------------------------------- tokenizer

    def tokenize(self, text: str, *, add_special_tokens: bool | None = None) -> list[int]:
        """The token ids of a text, special tokens added as `generate` does, unless add_special_tokens is False."""
        return self._ask(questions.tokenize(text, add_special_tokens))

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None) -> str:
        """The text of token ids, without special tokens unless skip_special_tokens is False."""
        return self._ask(questions.detokenize(token_ids, skip_special_tokens))

    def apply_chat_template(
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
        return self._ask(questions.apply_chat_template(messages, add_generation_prompt, tools, template_name, variables))

    # ------------------------------------------------------------------------------------------------------- facts

    def server_info(self) -> control_pb2.GetServerInfoResponse:
        """Version, policy, limits, workers."""
        return self._ask(questions.server_info())

    def model_info(self) -> control_pb2.GetModelInfoResponse:
        """The model that is served; UNAVAILABLE until a worker has loaded it."""
        return self._ask(questions.model_info())

    def load(self) -> control_pb2.GetLoadResponse:
        """Requests, rows and blocks at this moment."""
        return self._ask(questions.load())

    def watch_load(self, interval_s: float | None = None) -> Stream[control_pb2.WatchLoadResponse]:
        """The load, at once and then every interval_s seconds (0.1 to 60, 1 by default), until it is closed."""
        request = questions.watch_load_request(interval_s)
        return Stream(self._control.WatchLoad(request, metadata=self._metadata), self.target)

    def block_tables(self, group: int = 0) -> inspect_pb2.GetBlockTablesResponse:
        """Who holds which block of a worker group at this moment, and how often blocks are shared."""
        return self._ask(questions.block_tables(group))

    def watch_steps(self) -> Stream[inspect_pb2.WatchStepsResponse]:
        """What each step does, from now on, until it is closed."""
        return Stream(self._inspect.WatchSteps(inspect_pb2.WatchStepsRequest(), metadata=self._metadata), self.target)

    # -------------------------------------------------------------------------------------------------- scheduling

    def set_policy(self, name: str) -> str:
        """Another scheduling policy from the next step on; returns the one in force. Raises CarouselError (INVALID_ARGUMENT)
        when there is no such policy."""
        return self._ask(questions.set_policy(name))

    def list_requests(self, page_size: int | None = None, page_token: str = "") -> control_pb2.ListRequestsResponse:
        """One page of the requests that are alive, by arrival; page_token: next_page_token of the page before."""
        return self._ask(questions.list_requests(page_size, page_token))

    def explain(self, request_id: str, tenant: str | None = None) -> control_pb2.ExplainRequestResponse:
        """Why a request waits, or where its time went. tenant: whose it is, where that is not the token's own. Raises
        CarouselError (NOT_FOUND)."""
        return self._ask(questions.explain(request_id, tenant))

    def drain(self, timeout_s: float | None = None) -> control_pb2.DrainResponse:
        """Ends the server as SIGTERM does: nothing new, those alive run to their end, then it exits. timeout_s: what they get,
        at most; the server's own limit can't be lengthened. Answers at once, and may be called again."""
        return self._ask(questions.drain(timeout_s))

    def replace_worker(self, device: str | None = None, group: int | None = None) -> control_pb2.ReplaceWorkerResponse:
        """Starts a new worker that takes the place of the one that computes; no request fails. device: auto, cpu, cuda or sim;
        None: as the server was told. group: whose worker; None: the first group's that has one. Returns once it computes,
        whatever the client's timeout for other calls. Raises CarouselError (FAILED_PRECONDITION) when it does not come to that:
        the old one goes on."""
        return self._ask(questions.replace_worker(device, group), REPLACE_S)

    # ------------------------------------------------------------------------------------------------------- start

    def wait_ready(self, timeout_s: float = 60.0) -> None:
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
                for answer in Stream[health_pb2.HealthCheckResponse](call, self.target):
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except CarouselError as error:
                if error.code not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                    raise
                time.sleep(min(READY_RETRY_S, max(0.0, until - time.monotonic())))  # it went away while it was watched
            if time.monotonic() >= until:
                raise not_ready(self.target, timeout_s)

    # ------------------------------------------------------------------------------------------------------- calls

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self._retries, None if timeout_s is None else time.monotonic() + timeout_s)

    def _ask(self, question: Question[AnswerT], timeout_s: float = ANSWER_S) -> AnswerT:
        method, attempts = getattr(self._stubs[question.stub], question.method), self._attempts(timeout_s)
        while True:
            try:
                left_s = attempts.left_s(time.monotonic())
                return question.read(method(question.request, timeout=left_s, metadata=self._metadata))
            except grpc.RpcError as error:
                failure = error_of(error, self.target, answered=False)
            time.sleep(wait_s(attempts, failure, time.monotonic(), random.random()))

    def _begin(self, progress: Progress) -> GenerateStream:
        generation, metadata = self._generation, self._metadata

        def begin(
            request: generation_pb2.GenerateRequest | generation_pb2.ResumeRequest, timeout_s: float | None
        ) -> Call[generation_pb2.GenerateResponse]:
            if isinstance(request, generation_pb2.ResumeRequest):
                return generation.Resume(request, timeout=timeout_s, metadata=metadata)
            return generation.Generate(request, timeout=timeout_s, metadata=metadata)

        first = begin(*progress.call(time.monotonic()))
        stream = GenerateStream(first, self.target, progress, begin, self._leaving.tell)
        self._streams.add(stream)
        return stream
