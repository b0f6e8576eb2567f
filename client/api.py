"""The Python client: one object per connection, streams of the API's own messages.

    with CarouselClient("127.0.0.1:50051") as client:
        for text in client.generate("def fibonacci(n):", max_tokens=64, temperature=0).text():
            print(text, end="", flush=True)

Blocking; one client may be used by many threads, one stream by one thread at a time. Knows the public protos and grpc only.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from carousel.v1 import (
    control_pb2,
    control_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    inspect_pb2,
    inspect_pb2_grpc,
    tokenization_pb2,
    tokenization_pb2_grpc,
)
from client.errors import CarouselError, error_of

MESSAGE_LIMIT = 64 << 20  # bytes of one message, either way; the server's too
_ANSWER_S = 30.0  # unary calls answer at once; later than this, something is wrong
_RETRY_S = 0.05
_LOOPBACK = ("127.", "localhost", "[::1]", "unix:")

PRIORITIES = {
    "batch": generation_pb2.PRIORITY_CLASS_BATCH,
    "normal": generation_pb2.PRIORITY_CLASS_NORMAL,
    "interactive": generation_pb2.PRIORITY_CLASS_INTERACTIVE,
}
ON_TIMEOUT = {"partial": generation_pb2.ON_TIMEOUT_RETURN_PARTIAL, "fail": generation_pb2.ON_TIMEOUT_FAIL}

MessageT = TypeVar("MessageT")
MessageT_co = TypeVar("MessageT_co", covariant=True)
RequestT = TypeVar("RequestT")


class _Call(Protocol[MessageT_co]):
    """A streaming call, as grpc returns it."""

    def __iter__(self) -> Iterator[MessageT_co]: ...

    def cancel(self) -> bool: ...


class Stream(Generic[MessageT]):
    """The messages of one streaming call, as they come. Leaving it early (`with`, close, dropping it) cancels the call."""

    def __init__(self, call: _Call[MessageT], target: str) -> None:
        self._call = call
        self._messages = iter(call)
        self._target = target
        self._answered = False
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MessageT:
        """The next message. Raises CarouselError when the call fails."""
        try:
            message = next(self._messages)
        except grpc.RpcError as error:
            if self._closed:
                raise StopIteration from None
            raise error_of(error, self._target, self._answered) from None
        self._answered = True
        return message

    def close(self) -> None:
        """Cancels the call if it still runs. May be called from another thread; the iteration then ends."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class GenerateStream(Stream[generation_pb2.GenerateResponse]):
    """The events of one request: deltas, one Finished per output, one Summary at the end."""

    def __init__(self, call: _Call[generation_pb2.GenerateResponse], target: str, request_id: str) -> None:
        super().__init__(call, target)
        self.request_id = request_id
        self.finished: dict[int, generation_pb2.Finished] = {}  # by output_index, once they have come
        self.summary: generation_pb2.Summary | None = None  # once it has come

    def __next__(self) -> generation_pb2.GenerateResponse:
        event = super().__next__()
        match event.WhichOneof("event"):
            case "finished":
                self.finished[event.finished.output_index] = event.finished
            case "summary":
                self.summary = event.summary
        return event

    def text(self) -> Iterator[str]:
        """The new text of output 0, piece by piece. Leaving the loop early cancels the request."""
        for output_index, text in self.texts():
            if output_index == 0:
                yield text

    def texts(self) -> Iterator[tuple[int, str]]:
        """(output_index, new text) of all outputs, as they come. Leaving the loop early cancels the request."""
        with self:
            for event in self:
                if event.delta.text:
                    yield event.delta.output_index, event.delta.text


class CarouselClient:
    """A connection to one server. target: HOST:PORT. Connects with the first call; close it, or use `with`."""

    def __init__(self, target: str = "127.0.0.1:50051") -> None:
        self.target = target
        options: list[tuple[str, int]] = [
            ("grpc.max_send_message_length", MESSAGE_LIMIT),
            ("grpc.max_receive_message_length", MESSAGE_LIMIT),
            ("grpc.initial_reconnect_backoff_ms", 100),  # a server that is just starting is found at once
            ("grpc.max_reconnect_backoff_ms", 2000),
            # The transport takes 64 KiB of a stream that nobody reads, instead of up to some MB by probing: so the server
            # hears soon that a reader has stopped, and computes for others.
            ("grpc.http2.bdp_probe", 0),
        ]
        if target.startswith(_LOOPBACK):
            options.append(("grpc.enable_http_proxy", 0))  # http_proxy is not meant for this machine
        self._channel = grpc.insecure_channel(target, options)
        self._generation = generation_pb2_grpc.GenerationStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._tokenization = tokenization_pb2_grpc.TokenizationStub(self._channel)
        self._inspect = inspect_pb2_grpc.InspectStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and with it every call that still runs."""
        self._channel.close()

    # ---------------------------------------------------------------------------------------------------- requests

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        num_outputs: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool | None = None,
        echo: bool | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        priority: Literal["batch", "normal", "interactive"] | None = None,
        tenant: str | None = None,
        max_time_ms: int | None = None,
        on_timeout: Literal["partial", "fail"] | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
    ) -> GenerateStream:
        """Sends a prompt (text, or token ids) and returns the stream of its events. None: the server's default.

        For the fields that have no argument here, make a GenerateRequest and call `stream`. Raises ValueError or TypeError for
        a value that its field can't hold; what the server refuses is raised as CarouselError by the first `next`.
        """
        request = generation_pb2.GenerateRequest(
            request_id=request_id,
            sampling=generation_pb2.SamplingParams(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                logit_bias=logit_bias,
                seed=seed,
                num_outputs=num_outputs,
            ),
            stopping=generation_pb2.StoppingParams(
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                stop=[stop] if isinstance(stop, str) else stop,
                stop_token_ids=stop_token_ids,
                ignore_eos=ignore_eos,
            ),
            output=generation_pb2.OutputParams(echo=echo, logprobs=logprobs, prompt_logprobs=prompt_logprobs),
            scheduling=generation_pb2.SchedulingParams(tenant=tenant, max_time_ms=max_time_ms, cache_salt=cache_salt),
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
            request.token_ids.SetInParent()  # an empty prompt is sent as one, for the server to refuse
        if priority is not None:
            request.scheduling.priority = PRIORITIES[priority]
        if on_timeout is not None:
            request.scheduling.on_timeout = ON_TIMEOUT[on_timeout]
        return self.stream(request, timeout_s)

    def stream(self, request: generation_pb2.GenerateRequest, timeout_s: float | None = None) -> GenerateStream:
        """Sends any GenerateRequest. One without an id gets one, so that it can be cancelled by it. timeout_s: its deadline."""
        if not request.request_id:
            request.request_id = str(uuid.uuid4())
        return GenerateStream(self._generation.Generate(request, timeout=timeout_s), self.target, request.request_id)

    def cancel(self, request_id: str, timeout_s: float = _ANSWER_S) -> generation_pb2.CancelOutcome.ValueType:
        """Ends a request by its id; says whether it was alive (CANCEL_OUTCOME_…). May be called again."""
        request = generation_pb2.CancelRequest(request_id=request_id)
        return self._ask(self._generation.Cancel, request, timeout_s).outcome

    # ---------------------------------------------------------------------------------------------------- tokenizer

    def tokenize(self, text: str, *, add_special_tokens: bool | None = None) -> list[int]:
        """The token ids of a text, special tokens added as `generate` does, unless add_special_tokens is False."""
        request = tokenization_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list(self._ask(self._tokenization.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None) -> str:
        """The text of token ids, without special tokens unless skip_special_tokens is False."""
        request = tokenization_pb2.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return self._ask(self._tokenization.Detokenize, request).text

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
        request = tokenization_pb2.ApplyChatTemplateRequest(
            add_generation_prompt=add_generation_prompt,
            tools=[json.dumps(tool) for tool in tools],
            template_name=template_name,
            variables=json.dumps(variables) if variables else None,
        )
        for message in messages:
            more = {name: value for name, value in message.items() if name not in ("role", "content")}
            content = message.get("content") or ""
            request.messages.add(role=message["role"], content=content, more=json.dumps(more) if more else None)
        return list(self._ask(self._tokenization.ApplyChatTemplate, request).token_ids)

    # ------------------------------------------------------------------------------------------------------- facts

    def server_info(self) -> control_pb2.GetServerInfoResponse:
        """Version, policy, limits, workers."""
        return self._ask(self._control.GetServerInfo, control_pb2.GetServerInfoRequest())

    def model_info(self) -> control_pb2.GetModelInfoResponse:
        """The model that is served; UNAVAILABLE until a worker has loaded it."""
        return self._ask(self._control.GetModelInfo, control_pb2.GetModelInfoRequest())

    def load(self) -> control_pb2.GetLoadResponse:
        """Requests, rows and blocks at this moment."""
        return self._ask(self._control.GetLoad, control_pb2.GetLoadRequest())

    def block_tables(self) -> inspect_pb2.GetBlockTablesResponse:
        """Who holds which block at this moment, and how often blocks are shared."""
        return self._ask(self._inspect.GetBlockTables, inspect_pb2.GetBlockTablesRequest())

    def watch_steps(self) -> Stream[inspect_pb2.WatchStepsResponse]:
        """What each step does, from now on, until it is closed."""
        return Stream(self._inspect.WatchSteps(inspect_pb2.WatchStepsRequest()), self.target)

    # -------------------------------------------------------------------------------------------------- scheduling

    def set_policy(self, name: str) -> str:
        """Another scheduling policy from the next step on; returns the one in force. Raises CarouselError (INVALID_ARGUMENT)
        when there is no such policy."""
        return self._ask(self._control.SetPolicy, control_pb2.SetPolicyRequest(policy=name)).policy

    def list_requests(self, page_size: int | None = None, page_token: str = "") -> control_pb2.ListRequestsResponse:
        """One page of the requests that are alive, by arrival; page_token: next_page_token of the page before."""
        request = control_pb2.ListRequestsRequest(page_size=page_size, page_token=page_token)
        return self._ask(self._control.ListRequests, request)

    def explain(self, request_id: str) -> control_pb2.ExplainRequestResponse:
        """Why a request waits, or where its time went. Raises CarouselError (NOT_FOUND)."""
        return self._ask(self._control.ExplainRequest, control_pb2.ExplainRequestRequest(request_id=request_id))

    # ------------------------------------------------------------------------------------------------------- start

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns once health says SERVING. Raises CarouselError (DEADLINE_EXCEEDED) when it does not within the time."""
        until = time.monotonic() + timeout_s
        while True:
            call = self._health.Watch(
                health_pb2.HealthCheckRequest(), timeout=max(0.0, until - time.monotonic()), wait_for_ready=True
            )
            try:
                for answer in Stream[health_pb2.HealthCheckResponse](call, self.target):
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except CarouselError as error:
                if error.code not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                    raise
                time.sleep(min(_RETRY_S, max(0.0, until - time.monotonic())))  # it went away while it was watched
            if time.monotonic() >= until:
                raise CarouselError(
                    grpc.StatusCode.DEADLINE_EXCEEDED, f"the server at {self.target} was not ready within {timeout_s:g} s"
                )

    def _ask(
        self, method: grpc.UnaryUnaryMultiCallable[RequestT, MessageT], request: RequestT, timeout_s: float = _ANSWER_S
    ) -> MessageT:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_of(error, self.target, answered=False) from None
