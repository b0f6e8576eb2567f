"""Calls with one answer, as values: which rpc, its request, what is read from its answer. Both clients ask them. Knows the
public protos; no connection."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from google.protobuf.message import Message

from carousel.v1 import control_pb2, generation_pb2, inspect_pb2, tokenization_pb2
from carousel.v1.control_pb2_grpc import ControlStub
from carousel.v1.generation_pb2_grpc import GenerationStub
from carousel.v1.inspect_pb2_grpc import InspectStub
from carousel.v1.tokenization_pb2_grpc import TokenizationStub

AnswerT = TypeVar("AnswerT")
MessageT = TypeVar("MessageT", bound=Message)
Stub: TypeAlias = type[GenerationStub] | type[TokenizationStub] | type[ControlStub] | type[InspectStub]


@dataclass(frozen=True)
class Question(Generic[AnswerT]):
    """method: of the stub, as the .proto names it. read: what the caller gets of the answer. All of them are idempotent."""

    stub: Stub
    method: str
    request: Message
    read: Callable[[Any], AnswerT]


def _whole(answer: MessageT) -> MessageT:
    return answer


def cancel(request_id: str) -> Question[generation_pb2.CancelOutcome.ValueType]:
    return Question(
        GenerationStub, "Cancel", generation_pb2.CancelRequest(request_id=request_id), lambda answer: answer.outcome
    )


def tokenize(text: str, add_special_tokens: bool | None) -> Question[list[int]]:
    request = tokenization_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
    return Question(TokenizationStub, "Tokenize", request, lambda answer: list(answer.token_ids))


def detokenize(token_ids: Sequence[int], skip_special_tokens: bool | None) -> Question[str]:
    request = tokenization_pb2.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
    return Question(TokenizationStub, "Detokenize", request, lambda answer: answer.text)


def apply_chat_template(
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool | None,
    tools: Sequence[Mapping[str, Any]],
    template_name: str | None,
    variables: Mapping[str, Any],
) -> Question[list[int]]:
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
    return Question(TokenizationStub, "ApplyChatTemplate", request, lambda answer: list(answer.token_ids))


def server_info() -> Question[control_pb2.GetServerInfoResponse]:
    return Question(ControlStub, "GetServerInfo", control_pb2.GetServerInfoRequest(), _whole)


def model_info() -> Question[control_pb2.GetModelInfoResponse]:
    return Question(ControlStub, "GetModelInfo", control_pb2.GetModelInfoRequest(), _whole)


def load() -> Question[control_pb2.GetLoadResponse]:
    return Question(ControlStub, "GetLoad", control_pb2.GetLoadRequest(), _whole)


def block_tables(group: int) -> Question[inspect_pb2.GetBlockTablesResponse]:
    return Question(InspectStub, "GetBlockTables", inspect_pb2.GetBlockTablesRequest(group=group), _whole)


def set_policy(name: str) -> Question[str]:
    return Question(ControlStub, "SetPolicy", control_pb2.SetPolicyRequest(policy=name), lambda answer: answer.policy)


def list_requests(page_size: int | None, page_token: str) -> Question[control_pb2.ListRequestsResponse]:
    request = control_pb2.ListRequestsRequest(page_size=page_size, page_token=page_token)
    return Question(ControlStub, "ListRequests", request, _whole)


def explain(request_id: str, tenant: str | None) -> Question[control_pb2.ExplainRequestResponse]:
    request = control_pb2.ExplainRequestRequest(request_id=request_id, tenant=tenant)
    return Question(ControlStub, "ExplainRequest", request, _whole)


def drain(timeout_s: float | None) -> Question[control_pb2.DrainResponse]:
    timeout_ms = None if timeout_s is None else round(timeout_s * 1000)
    return Question(ControlStub, "Drain", control_pb2.DrainRequest(timeout_ms=timeout_ms), _whole)


def replace_worker(device: str | None, group: int | None) -> Question[control_pb2.ReplaceWorkerResponse]:
    return Question(ControlStub, "ReplaceWorker", control_pb2.ReplaceWorkerRequest(device=device, group=group), _whole)


def watch_load_request(interval_s: float | None) -> control_pb2.WatchLoadRequest:
    """interval_s: 0.1 to 60; None: the server's default."""
    return control_pb2.WatchLoadRequest(interval_ms=None if interval_s is None else round(interval_s * 1000))
