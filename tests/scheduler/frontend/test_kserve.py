"""inference.GRPCInferenceService over real gRPC and ZeroMQ, by our own stubs: facts, ModelInfer, ModelStreamInfer."""

from __future__ import annotations

import hashlib
import json
import queue
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from carousel.inference import grpc_service_pb2 as kserve
from carousel.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from carousel.v1 import generation_pb2 as pb
from scheduler.frontend.tokenizer import Tokenizer
from tests.helpers.fake_core import PATIENCE_S, FakeCore, ready_facts
from tests.helpers.frontend import Frontend, running
from tests.helpers.kserve import declarations, infer_request
from tests.helpers.streams import bad_field, collect, details, make, script
from wire import AbortRequest, AddRequest, EndReason, Refused

GOLDEN = Path(__file__).parents[2] / "golden"
PROMPT = "The quick brown fox"
TWELVE = json.dumps({"max_tokens": 12})


@pytest.fixture
def stub(frontend: Frontend) -> GRPCInferenceServiceStub:
    return GRPCInferenceServiceStub(frontend.channel)


def text_of(response: kserve.ModelInferResponse) -> str:
    """Of its one output, which is as it should be."""
    [output], [raw] = response.outputs, response.raw_output_contents
    assert (output.name, output.datatype, list(output.shape)) == ("text_output", "BYTES", [1])
    assert not output.HasField("contents") and int.from_bytes(raw[:4], "little") == len(raw) - 4
    return raw[4:].decode()


@dataclass
class Got:
    """The responses of one request."""

    texts: list[str] = field(default_factory=list)
    error: str = ""
    is_final: bool = False
    has_empty_final: bool = False

    def take(self, message: kserve.ModelStreamInferResponse) -> None:
        assert not self.is_final, "nothing comes after the final response"
        response = message.infer_response
        assert (response.model_name, response.model_version) == ("tiny", "1")
        self.is_final = response.parameters["triton_final_response"].bool_param
        self.error = message.error_message
        if self.error:
            assert self.is_final and not response.outputs
        elif response.outputs:
            self.texts.append(text_of(response))
        else:
            self.has_empty_final = self.is_final
            assert self.is_final and not response.raw_output_contents


class Connection:
    """A ModelStreamInfer call."""

    def __init__(self, stub: GRPCInferenceServiceStub) -> None:
        self._requests: queue.SimpleQueue[kserve.ModelInferRequest | None] = queue.SimpleQueue()
        self.call = stub.ModelStreamInfer(iter(self._requests.get, None), timeout=30)

    def send(self, *requests: kserve.ModelInferRequest) -> None:
        for request in requests:
            self._requests.put(request)

    def finish(self) -> None:
        self._requests.put(None)

    def __iter__(self) -> Iterator[tuple[str, kserve.ModelStreamInferResponse]]:
        for message in self.call:
            yield message.infer_response.id, message

    def next(self) -> kserve.ModelStreamInferResponse:
        return next(iter(self.call))


def stream(stub: GRPCInferenceServiceStub, *requests: kserve.ModelInferRequest) -> dict[str, Got]:
    """All that comes, by the requests' ids."""
    connection, got = Connection(stub), dict[str, Got]()
    connection.send(*requests)
    connection.finish()
    for request_id, message in connection:
        got.setdefault(request_id, Got()).take(message)
    assert all(each.is_final for each in got.values())
    return got


def infer_refused(stub: GRPCInferenceServiceStub, request: kserve.ModelInferRequest) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request, timeout=PATIENCE_S)
    return caught.value


# ------------------------------------------------------------------------------------------------------------ protocol


def test_names_types_and_numbers_are_those_of_the_public_protocol() -> None:
    """The record is compared with tritonclient's own by test_tritonclient."""
    file = FileDescriptorProto()
    kserve.DESCRIPTOR.CopyToProto(file)
    assert declarations(file) == json.loads((GOLDEN / "kserve.json").read_text())


# --------------------------------------------------------------------------------------------------------------- facts


def test_the_server_is_live_and_ready_as_the_core_is(
    core: FakeCore, frontend: Frontend, stub: GRPCInferenceServiceStub
) -> None:
    def answers() -> tuple[bool, bool, bool]:
        frontend.hear_core()
        live, ready = stub.ServerLive(kserve.ServerLiveRequest()).live, stub.ServerReady(kserve.ServerReadyRequest()).ready
        return live, ready, stub.ModelReady(kserve.ModelReadyRequest(name="tiny")).ready

    assert answers() == (True, True, True)
    core.tell(ready_facts(ready=False, reason="the worker loads its model"))
    assert answers() == (True, False, False)
    core.tell(ready_facts(draining=True))
    assert answers() == (True, False, False)


@pytest.mark.parametrize(
    ("name", "version", "ready"), [("tiny", "", True), ("tiny", "1", True), ("tiny", "2", False), ("other", "", False)]
)
def test_the_one_model_is_ready_and_no_other(
    core: FakeCore, stub: GRPCInferenceServiceStub, name: str, version: str, ready: bool
) -> None:
    assert stub.ModelReady(kserve.ModelReadyRequest(name=name, version=version)).ready is ready


def test_server_metadata(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    metadata = stub.ServerMetadata(kserve.ServerMetadataRequest())
    assert (metadata.name, metadata.version) == ("carousel", "0.0.test")
    assert list(metadata.extensions) == ["model_configuration", "parameters", "schedule_policy"]


def test_model_metadata_and_configuration_tell_the_same_tensors(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    metadata = stub.ModelMetadata(kserve.ModelMetadataRequest(name="tiny"))
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("tiny", ["1"], "carousel")
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs] == [
        ("text_input", "BYTES", [1]),
        ("stream", "BOOL", [1]),
        ("sampling_parameters", "BYTES", [1]),
        ("exclude_input_in_output", "BOOL", [1]),
    ]
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in metadata.outputs] == [
        ("text_output", "BYTES", [1])
    ]
    config = stub.ModelConfig(kserve.ModelConfigRequest(name="tiny", version="1")).config
    assert (config.name, config.backend, config.max_batch_size, config.model_transaction_policy.decoupled) == (
        "tiny",
        "carousel",
        0,
        True,
    )
    types = {"BYTES": kserve.TYPE_STRING, "BOOL": kserve.TYPE_BOOL}
    for mine, its in ((config.input, metadata.inputs), (config.output, metadata.outputs)):
        assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in mine] == [
            (tensor.name, types[tensor.datatype], [1]) for tensor in its
        ]
    assert [tensor.optional for tensor in config.input] == [False, True, True, True]


def test_another_model_is_not_found(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    for call, request in (
        (stub.ModelMetadata, kserve.ModelMetadataRequest(name="other")),
        (stub.ModelConfig, kserve.ModelConfigRequest(name="tiny", version="2")),
        (stub.ModelInfer, infer_request(PROMPT, model="other")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND and "'tiny'" in caught.value.details()


def test_the_repository_has_one_model(core: FakeCore, frontend: Frontend, stub: GRPCInferenceServiceStub) -> None:
    def index(ready: bool) -> list[tuple[str, str, str, str]]:
        frontend.hear_core()
        found = stub.RepositoryIndex(kserve.RepositoryIndexRequest(ready=ready)).models
        return [(model.name, model.version, model.state, model.reason) for model in found]

    assert index(ready=False) == index(ready=True) == [("tiny", "1", "READY", "")]
    core.tell(ready_facts(ready=False, reason="the worker loads its model"))
    assert index(ready=False) == [("tiny", "1", "UNAVAILABLE", "the worker loads its model")]
    assert index(ready=True) == []


def test_what_is_not_kept_of_the_protocol_says_so(core: FakeCore, frontend: Frontend) -> None:
    load = frontend.channel.unary_unary("/inference.GRPCInferenceService/RepositoryModelLoad")
    with pytest.raises(grpc.RpcError) as caught:
        load(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# ---------------------------------------------------------------------------------------------------------- ModelInfer


@pytest.mark.parametrize("raw", [True, False], ids=["raw_input_contents", "contents"])
def test_model_infer_gives_the_text_that_generate_gives(
    core: FakeCore, frontend: Frontend, stub: GRPCInferenceServiceStub, raw: bool
) -> None:
    alone = collect(frontend.generation.Generate(make(PROMPT)))
    response = stub.ModelInfer(infer_request(PROMPT, raw, id="mine", sampling_parameters=TWELVE, stream=False))
    assert text_of(response) == alone.text != ""
    assert (response.model_name, response.model_version, response.id) == ("tiny", "1", "mine")
    assert not response.parameters


def test_the_prompt_stands_before_the_output_when_it_is_not_excluded(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    plain = text_of(stub.ModelInfer(infer_request(PROMPT, sampling_parameters=TWELVE)))
    with_prompt = infer_request(PROMPT, sampling_parameters=TWELVE, exclude_input_in_output=False)
    assert text_of(stub.ModelInfer(with_prompt)) == PROMPT + plain


def test_a_request_reaches_the_core_as_it_was_asked(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    parameters = json.dumps(
        {"temperature": 0.5, "top_k": 5, "seed": 7, "max_tokens": 3, "min_tokens": 1, "stop_token_ids": [9]}
    )
    stub.ModelInfer(infer_request(PROMPT, id="mine", sampling_parameters=parameters, parameters={"priority": 1}))
    header = core.wait_for(AddRequest).header
    assert (header.max_tokens, header.priority, header.num_outputs) == (3, pb.PRIORITY_CLASS_INTERACTIVE, 1)
    assert (header.sampling.temperature, header.sampling.top_k, header.sampling.seed) == (0.5, 5, 7)
    assert (header.sampling.min_tokens, header.sampling.stop_token_ids) == (1, (9, 1))
    assert "mine" not in header.request_id, "the client's id need not be unique"


def test_a_text_without_a_token_is_an_empty_one(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    core.script = script(1)  # the end token
    assert text_of(stub.ModelInfer(infer_request(PROMPT))) == ""


def test_model_infer_has_one_response(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    error = infer_refused(stub, infer_request(PROMPT, stream=True))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == "inputs.stream"


@pytest.mark.parametrize(
    ("parameters", "status", "field"),
    [
        ({"temperature": 101}, grpc.StatusCode.INVALID_ARGUMENT, "sampling.temperature"),
        ({"temperature": "nan"}, grpc.StatusCode.INVALID_ARGUMENT, "sampling.temperature"),
        ({"max_tokens": 0}, grpc.StatusCode.INVALID_ARGUMENT, "stopping.max_tokens"),
        ({"top_k": "many"}, grpc.StatusCode.INVALID_ARGUMENT, "sampling_parameters.top_k"),
        ({"n": 2}, grpc.StatusCode.UNIMPLEMENTED, "sampling_parameters.n"),
        ({"best_of": 2}, grpc.StatusCode.UNIMPLEMENTED, "sampling_parameters.best_of"),
    ],
    ids=str,
)
def test_what_is_refused_is_named(
    core: FakeCore, stub: GRPCInferenceServiceStub, parameters: dict[str, object], status: grpc.StatusCode, field: str
) -> None:
    error = infer_refused(stub, infer_request(PROMPT, sampling_parameters=json.dumps(parameters)))
    assert error.code() is status and bad_field(error) == field


def test_an_empty_prompt_is_refused(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    error = infer_refused(stub, infer_request(""))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and bad_field(error) == "prompt"


def test_the_cores_refusal_is_the_status_with_its_details(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    core.refuse = lambda add: Refused(add.header.handle, "RESOURCE_EXHAUSTED", "the queue is full", retry_after_ns=2 * 10**9)
    error = infer_refused(stub, infer_request(PROMPT))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error)["RetryInfo"].retry_delay.seconds == 2


def test_the_calls_deadline_and_the_timeout_are_the_requests_time(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    def time_of(add: AddRequest) -> float:
        return (add.header.deadline_ns - add.header.arrival_ns) / 1e9

    stub.ModelInfer(infer_request(PROMPT, sampling_parameters=TWELVE), timeout=20)
    assert 5 < time_of(core.wait_for(AddRequest)) < 21
    stub.ModelInfer(infer_request(PROMPT, sampling_parameters=TWELVE, parameters={"timeout": 5_000_000}), timeout=20)
    assert time_of(core.wait_for(AddRequest)) == 5
    core.hold()
    call = stub.ModelInfer.future(infer_request(PROMPT, parameters={"timeout": 5_000_000}))
    core.wait_for(AddRequest)
    core.end_all(EndReason.DEADLINE)
    assert call.exception(PATIENCE_S).code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_reader_that_goes_away_ends_the_request(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    core.hold()
    call = stub.ModelInfer.future(infer_request(PROMPT))
    core.wait_for(AddRequest)
    call.cancel()
    core.wait_for(AbortRequest)
    core.wait_until(core.is_idle)


# ---------------------------------------------------------------------------------------------------- ModelStreamInfer


def test_many_requests_on_one_connection_get_what_generate_gives_each(
    core: FakeCore, frontend: Frontend, stub: GRPCInferenceServiceStub
) -> None:
    prompts = {f"r{i}": f"fox {i} " * (1 + i % 3) for i in range(30)}
    requests = [
        infer_request(prompt, i % 2 == 0, id=name, stream=i % 3 > 0, sampling_parameters=TWELVE)
        for i, (name, prompt) in enumerate(prompts.items())
    ]
    got = stream(stub, *requests)
    assert set(got) == set(prompts) and not any(each.error for each in got.values())
    for i, (name, prompt) in enumerate(prompts.items()):
        assert "".join(got[name].texts) == collect(frontend.generation.Generate(make(prompt))).text
        assert i % 3 or len(got[name].texts) == 1


def test_new_text_comes_at_once_and_the_last_response_is_marked(
    core: FakeCore, stub: GRPCInferenceServiceStub, model_dir: Path
) -> None:
    fox = Tokenizer.load(model_dir).encode("fox", add_special_tokens=False).ids
    core.script = script(*fox, fox[0])
    core.hold()
    connection, got = Connection(stub), Got()
    connection.send(infer_request(PROMPT, stream=True, sampling_parameters=json.dumps({"max_tokens": len(fox) + 1})))
    core.wait_for(AddRequest)
    for _ in fox:
        core.step()
        got.take(connection.next())
        assert not got.is_final
    assert "".join(got.texts) == "fox" and len(got.texts) == len(fox)
    core.step()
    got.take(connection.next())
    assert got.is_final and len(got.texts) == len(fox) + 1 and got.texts[-1], "the last text and the mark come together"
    connection.finish()
    assert list(connection) == []


def test_the_end_is_marked_even_where_no_text_is_new(core: FakeCore, stub: GRPCInferenceServiceStub, model_dir: Path) -> None:
    [*_, x] = Tokenizer.load(model_dir).encode("x", add_special_tokens=False).ids
    core.script = script(x, 1)
    core.hold()
    connection, got = Connection(stub), Got()
    connection.send(infer_request(PROMPT, stream=True))
    core.wait_for(AddRequest)
    core.step()
    got.take(connection.next())
    core.step()
    got.take(connection.next())
    assert (got.texts, got.is_final) == (["x", ""], True)
    connection.finish()
    assert list(connection) == []


@pytest.mark.parametrize("streams", [True, False])
def test_who_asks_for_an_empty_final_response_gets_all_text_before_it(
    core: FakeCore, frontend: Frontend, stub: GRPCInferenceServiceStub, streams: bool
) -> None:
    parameters = {"triton_enable_empty_final_response": True}
    [got] = stream(stub, infer_request(PROMPT, stream=streams, sampling_parameters=TWELVE, parameters=parameters)).values()
    assert got.has_empty_final and not got.error
    assert "".join(got.texts) == collect(frontend.generation.Generate(make(PROMPT))).text


def test_a_stream_begins_with_the_prompt_when_it_is_not_excluded(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    asked = {"id": "a", "stream": True, "sampling_parameters": TWELVE}
    plain = stream(stub, infer_request(PROMPT, **asked))["a"]  # type: ignore[arg-type]
    echoed = stream(stub, infer_request(PROMPT, exclude_input_in_output=False, **asked))["a"]  # type: ignore[arg-type]
    assert "".join(echoed.texts) == PROMPT + "".join(plain.texts)


def test_requests_that_fail_say_why_and_the_others_go_on(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    core.refuse = lambda add: (
        Refused(add.header.handle, "RESOURCE_EXHAUSTED", "the queue is full") if add.header.max_tokens == 5 else None
    )
    got = stream(
        stub,
        infer_request(PROMPT, id="hot", sampling_parameters='{"temperature": 101}'),
        infer_request(PROMPT, id="best", sampling_parameters='{"best_of": 3}'),
        infer_request(PROMPT, id="full", sampling_parameters='{"max_tokens": 5}'),
        infer_request(PROMPT, id="other", model="other"),
        infer_request("", id="empty"),
        infer_request(PROMPT, id="good", sampling_parameters='{"max_tokens": 2}'),
    )
    errors = {name: each.error for name, each in got.items()}
    assert "sampling.temperature must be" in errors.pop("hot")
    assert "sampling_parameters.best_of" in errors.pop("best")
    assert errors.pop("full") == "the queue is full"
    assert "'tiny'" in errors.pop("other")
    assert "prompt must not be empty" in errors.pop("empty")
    assert errors == {"good": ""} and got["good"].texts


def test_a_request_that_fails_half_way_gives_the_text_so_far(
    core: FakeCore, frontend: Frontend, stub: GRPCInferenceServiceStub
) -> None:
    core.hold()
    connection, got = Connection(stub), {"text": Got(), "whole": Got()}
    connection.send(*(infer_request(PROMPT, id=name, stream=name == "text") for name in got))
    for _ in got:
        core.wait_for(AddRequest)
    core.step(2)
    core.end_all(EndReason.DEADLINE)
    connection.finish()
    for name, message in connection:
        got[name].take(message)
    assert "is over after 2 tokens" in got["text"].error and got["text"].texts
    assert "is over after 2 tokens" in got["whole"].error and not got["whole"].texts


def test_ids_need_not_be_unique(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    connection, texts = Connection(stub), list[str]()
    connection.send(*(infer_request(PROMPT, id="same", sampling_parameters=TWELVE) for _ in range(3)))
    connection.finish()
    for name, message in connection:
        assert name == "same" and not message.error_message
        texts.append(text_of(message.infer_response))
    assert len(texts) == 3 and len(set(texts)) == 1


def test_a_request_that_is_cancelled_by_its_id_says_so(
    core: FakeCore, frontend: Frontend, stub: GRPCInferenceServiceStub
) -> None:
    core.hold()
    connection, got = Connection(stub), Got()
    connection.send(infer_request(PROMPT, stream=True))
    request_id = core.wait_for(AddRequest).header.request_id
    answer = frontend.generation.Cancel(pb.CancelRequest(request_id=request_id))
    assert answer.outcome == pb.CANCEL_OUTCOME_CANCELLED
    got.take(connection.next())
    assert "cancelled" in got.error
    connection.finish()


def test_when_the_call_ends_all_its_requests_do(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    core.hold()
    connection = Connection(stub)
    connection.send(*(infer_request(PROMPT) for _ in range(5)))
    for _ in range(5):
        core.wait_for(AddRequest)
    connection.call.cancel()
    for _ in range(5):
        core.wait_for(AbortRequest)
    core.wait_until(core.is_idle)
    connection.finish()


def test_a_connection_without_requests_is_none(core: FakeCore, stub: GRPCInferenceServiceStub) -> None:
    assert stream(stub) == {}


# -------------------------------------------------------------------------------------------------------------- callers


def test_where_tokens_are_asked_for_a_request_is_its_tokens_tenants(model_dir: Path, tmp_path: Path) -> None:
    file, key = tmp_path / "tokens.jsonl", "carousel_alice-0123456789abcdef"
    file.write_text(json.dumps({"sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": "alice"}) + "\n")
    request, token = infer_request(PROMPT, sampling_parameters=TWELVE), (("authorization", f"Bearer {key}"),)
    with FakeCore() as core, running(model_dir, core.endpoint, key_file=str(file)) as frontend:
        frontend.wait_serving()
        stub = GRPCInferenceServiceStub(frontend.channel)
        assert infer_refused(stub, request).code() is grpc.StatusCode.UNAUTHENTICATED
        assert text_of(stub.ModelInfer(request, timeout=PATIENCE_S, metadata=token))
        assert core.wait_for(AddRequest).header.tenant == "alice"
        assert list(stub.ModelStreamInfer(iter([request]), timeout=PATIENCE_S, metadata=token))
        assert core.wait_for(AddRequest).header.tenant == "alice"
