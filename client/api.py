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
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

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
from client.connection import File, open_channel
from client.errors import CarouselError, error_of
from client.many import Many
from client.requests import Parameters, make_request
from client.streams import GenerateStream, Stream

_ANSWER_S = 30.0  # unary calls answer at once; later than this, something is wrong
_RETRY_S = 0.05

MessageT = TypeVar("MessageT")
RequestT = TypeVar("RequestT")


class CarouselClient:
    """A connection to one server. target: HOST:PORT. Connects with the first call; close it, or use `with`.

    tls_ca: a PEM file of certificates that vouch for the server's; calls are encrypted then. tls_cert, tls_key: PEM files of
    the certificate to show to a server that wants one, and of its key. token: says who calls, where the server wants to know;
    it can be read on the way unless calls are encrypted. Raises OSError for a file that can't be read, ValueError for what
    can't be used.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        tls_ca: File | None = None,
        tls_cert: File | None = None,
        tls_key: File | None = None,
        token: str | None = None,
    ) -> None:
        self.target = target
        self._channel = open_channel(target, tls_ca, tls_cert, tls_key, token)
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
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **parameters: Unpack[Parameters]
    ) -> GenerateStream:
        """Sends a prompt (text, or token ids) and returns the stream of its events. timeout_s: the call's deadline.

        For the fields that have no parameter, make a GenerateRequest and call `stream`. Raises ValueError or TypeError for a
        value that its field can't hold; what the server refuses is raised as CarouselError by the first `next`.
        """
        return self.stream(make_request(prompt, **parameters), timeout_s)

    def stream(self, request: generation_pb2.GenerateRequest, timeout_s: float | None = None) -> GenerateStream:
        """Sends any GenerateRequest. One without an id gets one, so that it can be cancelled by it. timeout_s: its deadline."""
        if not request.request_id:
            request.request_id = str(uuid.uuid4())
        return GenerateStream(self._generation.Generate(request, timeout=timeout_s), self.target, request.request_id)

    def generate_many(self, timeout_s: float | None = None) -> Many:
        """One connection for many requests: many times the tokens a second of a call for each. timeout_s: its deadline."""
        return Many(self._generation, self.target, timeout_s)

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

    def explain(self, request_id: str, tenant: str | None = None) -> control_pb2.ExplainRequestResponse:
        """Why a request waits, or where its time went. tenant: whose it is, where that is not the token's own. Raises
        CarouselError (NOT_FOUND)."""
        request = control_pb2.ExplainRequestRequest(request_id=request_id, tenant=tenant)
        return self._ask(self._control.ExplainRequest, request)

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
