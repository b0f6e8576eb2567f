"""GenerateRequests made short, and their streams put together: offsets and order are checked on the way."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from carousel.v1 import generation_pb2 as pb
from wire import AddRequest


def make(prompt: str | list[int] = "The quick brown fox", **options: Any) -> pb.GenerateRequest:
    """A request with these fields, each put into its own group; max_tokens is 12 when nothing is said."""
    request = pb.GenerateRequest(stopping=pb.StoppingParams(max_tokens=options.pop("max_tokens", 12)))
    for name, value in options.items():
        for group in (request, request.stopping, request.sampling, request.output, request.scheduling):
            if name in group.DESCRIPTOR.fields_by_name:
                if isinstance(value, list):
                    getattr(group, name).extend(value)
                else:
                    setattr(group, name, value)
                break
        else:
            raise AssertionError(name)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request


def script(*tokens: int) -> Callable[[AddRequest], Iterator[int]]:
    """For a fake core: these tokens, then the last one for ever."""
    return lambda add: itertools.chain(tokens, itertools.repeat(tokens[-1]))


@dataclass
class GotOutput:
    """One output."""

    prompt: pb.Delta | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    num_deltas: int = 0
    finished: pb.Finished | None = None

    def take(self, delta: pb.Delta) -> None:
        assert self.finished is None, "a delta after the end"
        if delta.is_prompt:
            assert self.num_deltas == 0 and self.prompt is None, "the prompt is first, once"
            self.prompt = delta
            return
        assert delta.token_offset == len(self.tokens)
        assert delta.text_offset == len(self.text.encode())
        assert delta.token_ids or delta.text, "an empty delta"
        self.tokens += delta.token_ids
        self.text += delta.text
        self.num_deltas += 1


class Got:
    """A whole stream. `tokens`, `text` and so on are those of output 0."""

    def __init__(self) -> None:
        self.outputs: dict[int, GotOutput] = defaultdict(GotOutput)
        self.summary: pb.Summary | None = None

    def take(self, message: pb.GenerateResponse) -> None:
        assert self.summary is None, "the summary is last"
        match message.WhichOneof("event"):
            case "delta":
                self.outputs[message.delta.output_index].take(message.delta)
            case "finished":
                output = self.outputs[message.finished.output_index]
                assert output.finished is None, "finished twice"
                output.finished = message.finished
            case "summary":
                assert self.outputs and all(output.finished is not None for output in self.outputs.values())
                self.summary = message.summary

    prompt = property(lambda self: self.outputs[0].prompt)
    tokens = property(lambda self: self.outputs[0].tokens)
    text = property(lambda self: self.outputs[0].text)
    num_deltas = property(lambda self: self.outputs[0].num_deltas)
    finished = property(lambda self: self.outputs[0].finished)
    reason = property(lambda self: self.outputs[0].finished.reason)


def collect(stream: Iterable[pb.GenerateResponse]) -> Got:
    got = Got()
    for message in stream:
        got.take(message)
    return got


def failure(stream: Iterable[pb.GenerateResponse], got: Got | None = None) -> grpc.RpcError:
    """What the stream ends with; `got` takes what came before."""
    got = got or Got()
    with pytest.raises(grpc.RpcError) as caught:
        for message in stream:
            got.take(message)
    return caught.value


def details(error: grpc.RpcError) -> dict[str, Message]:
    """The google.rpc details, by their type's name."""
    found: dict[str, Message] = {}
    for packed in rpc_status.from_call(error).details:
        message = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        packed.Unpack(message)
        found[type(message).__name__] = message
    return found


def bad_field(error: grpc.RpcError) -> str:
    [violation] = details(error)["BadRequest"].field_violations
    assert violation.description
    return violation.field
