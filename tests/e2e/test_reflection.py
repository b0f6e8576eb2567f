"""A caller that has no stubs, as grpcurl and grpc_cli: it learns services and messages by reflection, and makes its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.helpers.server import Server, running

BUNDLED_MODEL = Path(__file__).parents[2] / "demo" / "model"
RPCS = {
    "Generation": {"Generate": "server", "GenerateMany": "both", "Cancel": "none"},
    "Tokenization": {"Tokenize": "none", "Detokenize": "none", "ApplyChatTemplate": "none"},
    "Control": {"GetServerInfo": "none", "GetLoad": "none", "ListRequests": "none", "SetPolicy": "none"},
    "Inspect": {"WatchSteps": "server", "GetBlockTables": "none"},
}
BESIDE = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", "inference.GRPCInferenceService"}
PROMPT = "def fibonacci(n):"


class Reflected:
    """A server as its reflection describes it: descriptors of a pool of their own, nothing that protoc made for us."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._database = ProtoReflectionDescriptorDatabase(channel)
        self.pool = DescriptorPool(self._database)

    def services(self) -> set[str]:
        return set(self._database.get_services())

    def method(self, name: str) -> MethodDescriptor:
        """name: as in carousel.v1.Generation/Generate."""
        service, _, method = name.partition("/")
        return self.pool.FindServiceByName(service).methods_by_name[method]

    def call(self, name: str, fields: dict[str, Any]) -> Any:
        """With the fields of the request, as grpcurl -d takes them: what answers is a message, or a stream of them."""
        method = self.method(name)
        assert not method.client_streaming
        opened = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        answered, request = GetMessageClass(method.output_type), GetMessageClass(method.input_type)()
        multicallable = opened(
            f"/{name}", request_serializer=type(request).SerializeToString, response_deserializer=answered.FromString
        )
        return multicallable(json_format.ParseDict(fields, request, descriptor_pool=self.pool), timeout=30)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running("--model", str(BUNDLED_MODEL), "--device", "cpu", "--kv-memory-gib", "0.1") as server:
        yield server


@pytest.fixture
def reflected(server: Server) -> Iterator[Reflected]:
    with grpc.insecure_channel(server.target) as channel:
        yield Reflected(channel)


def as_json(message: Message) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def test_it_lists_every_service(reflected: Reflected) -> None:
    assert reflected.services() == {f"carousel.v1.{name}" for name in RPCS} | BESIDE


@pytest.mark.parametrize("service", RPCS)
def test_it_describes_methods_with_their_streams(reflected: Reflected, service: str) -> None:
    methods = reflected.pool.FindServiceByName(f"carousel.v1.{service}").methods_by_name
    kinds = {(False, False): "none", (False, True): "server", (True, False): "client", (True, True): "both"}
    found = {name: kinds[method.client_streaming, method.server_streaming] for name, method in methods.items()}
    assert found.items() >= RPCS[service].items()


def test_it_describes_every_message_that_a_service_names(reflected: Reflected) -> None:
    for service in sorted(reflected.services()):
        for method in reflected.pool.FindServiceByName(service).methods:
            assert GetMessageClass(method.input_type)() is not None
            assert GetMessageClass(method.output_type)() is not None
    fields = reflected.method("carousel.v1.Generation/Generate").input_type.fields_by_name
    assert {"text", "token_ids", "sampling", "stopping", "output", "scheduling"} <= set(fields)


def test_generate_is_called_with_what_it_described(reflected: Reflected) -> None:
    fields = {"text": PROMPT, "stopping": {"max_tokens": 12, "ignore_eos": True}, "sampling": {"temperature": 0.0}}
    events = [as_json(message) for message in reflected.call("carousel.v1.Generation/Generate", fields)]
    assert [next(iter(event)) for event in events[-2:]] == ["finished", "summary"]
    usage = events[-1]["summary"]["usage"]
    deltas = [event["delta"] for event in events[:-2]]
    ids = [token for delta in deltas for token in delta.get("token_ids", [])]
    assert usage["output_tokens"] == len(ids) == 12 and usage["prompt_tokens"] > 0
    text = "".join(delta.get("text", "") for delta in deltas)
    detokenized = reflected.call("carousel.v1.Tokenization/Detokenize", {"token_ids": ids})
    assert text == detokenized.text != ""


def test_a_refusal_reaches_it_as_a_status(reflected: Reflected) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(reflected.call("carousel.v1.Generation/Generate", {"text": PROMPT, "stopping": {"max_tokens": 0}}))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "max_tokens" in caught.value.details()


def test_what_is_not_there_is_not_found(reflected: Reflected) -> None:
    with pytest.raises(KeyError):
        reflected.pool.FindServiceByName("carousel.v1.NoSuchService")


def test_present_tools_find_the_older_reflection_when_the_newer_is_not_there(server: Server) -> None:
    """grpcurl asks grpc.reflection.v1 first and goes on to v1alpha when that is UNIMPLEMENTED, and only then."""
    with grpc.insecure_channel(server.target) as channel:
        newer = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as caught:
            list(newer(iter([b"\x3a\x00"]), timeout=10))  # list_services
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
