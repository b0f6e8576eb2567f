"""What a ModelInferRequest means: tensors, raw or not; sampling parameters; Triton's parameters. What is refused, by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from carousel.inference import grpc_service_pb2 as kserve
from carousel.v1 import generation_pb2 as pb
from scheduler.errors import InvalidFieldError, RequestError, UnsupportedFieldError
from scheduler.frontend.kserve_request import Asked, to_raw, translate
from tests.helpers.kserve import infer_request


def refused(infer: kserve.ModelInferRequest) -> RequestError:
    with pytest.raises((InvalidFieldError, UnsupportedFieldError)) as caught:
        translate(infer)
    return caught.value


def sampled(**parameters: Any) -> Asked:
    return translate(infer_request("fox", sampling_parameters=json.dumps(parameters)))


def asked_with(**parameters: Any) -> Asked:
    return translate(infer_request("fox", parameters=parameters))


# ------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("raw", [True, False], ids=["raw_input_contents", "contents"])
def test_all_inputs_are_understood(raw: bool) -> None:
    parameters = json.dumps({"temperature": 0.5})
    infer = infer_request(
        "naïve 東京",
        raw,
        id="7",
        stream=True,
        sampling_parameters=parameters,
        exclude_input_in_output=False,
        outputs=["text_output"],
    )
    asked = translate(infer)
    assert (asked.request.text, asked.request.sampling.temperature, asked.request.output.echo) == ("naïve 東京", 0.5, True)
    assert (asked.id, asked.stream, asked.empty_final) == ("7", True, False)


@pytest.mark.parametrize("raw", [True, False], ids=["raw_input_contents", "contents"])
def test_what_is_left_out_is_the_default(raw: bool) -> None:
    asked = translate(infer_request("fox", raw))
    assert (asked.id, asked.stream, asked.empty_final, asked.request.output.echo) == ("", False, False, False)
    assert not asked.request.HasField("request_id"), "the client's id need not be unique"
    assert not asked.request.sampling.ListFields() and not asked.request.stopping.ListFields()
    assert not asked.request.scheduling.HasField("max_time_ms") and not asked.request.scheduling.priority


def test_the_order_of_the_inputs_is_free() -> None:
    infer = infer_request("fox", stream=True)
    for entries in (infer.inputs, infer.raw_input_contents):
        backwards = list(entries)[::-1]
        del entries[:]
        entries.extend(backwards)
    assert (translate(infer).request.text, translate(infer).stream) == ("fox", True)


def test_a_bytes_element_has_its_length_before_it() -> None:
    assert to_raw("é") == b"\x02\0\0\0\xc3\xa9" and to_raw("") == b"\0\0\0\0"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("inputs.text_input", {"name": "stream", "datatype": "BOOL", "raw": b"\1"}),  # there is no prompt
        ("inputs.image", {"name": "image"}),
        ("inputs.text_input", {"datatype": "FP32"}),
        ("inputs.text_input", {"shape": [1, 1]}),
        ("inputs.text_input", {"shape": []}),
        ("inputs.text_input", {"shape": [2]}),
        ("inputs.text_input", {"raw": b""}),
        ("inputs.text_input", {"raw": b"\3\0\0"}),
        ("inputs.text_input", {"raw": b"\3\0\0\0fo"}),
        ("inputs.text_input", {"raw": b"\3\0\0\0foxx"}),
        ("inputs.text_input", {"raw": b"\1\0\0\0\xff"}),  # not UTF-8
        ("inputs.stream", {"name": "stream", "datatype": "BOOL", "raw": b"\2"}),
        ("inputs.stream", {"name": "stream", "datatype": "BOOL", "raw": b""}),
        ("inputs.sampling_parameters", {"name": "sampling_parameters", "raw": to_raw("[1]")}),
        ("inputs.sampling_parameters", {"name": "sampling_parameters", "raw": to_raw('{"n": ')}),
        ("inputs.sampling_parameters", {"name": "sampling_parameters", "raw": to_raw('{"a":' * 100_000)}),
        ("inputs.sampling_parameters", {"name": "sampling_parameters", "raw": to_raw(r'{"stop": "\ud800"}')}),
        ("inputs.sampling_parameters", {"name": "sampling_parameters", "raw": b'\4\0\0\0{"\xff"'}),
    ],
    ids=str,
)
def test_a_tensor_that_is_not_as_it_should_be_is_refused(field: str, change: dict[str, Any]) -> None:
    given = {"name": "text_input", "datatype": "BYTES", "shape": [1], "raw": to_raw("fox")} | change
    infer = kserve.ModelInferRequest() if given["name"] in ("text_input", "image", "stream") else infer_request("fox")
    raw = given.pop("raw")
    infer.inputs.add(**given)
    infer.raw_input_contents.append(raw)
    error = refused(infer)
    assert (error.status, error.field) == ("INVALID_ARGUMENT", field)


def test_an_input_that_is_given_twice_is_refused() -> None:
    infer = infer_request("fox")
    infer.MergeFrom(infer_request("dog"))
    assert refused(infer).field == "inputs.text_input"


def test_raw_contents_are_for_all_inputs_or_for_none() -> None:
    infer = infer_request("fox", stream=True)
    del infer.raw_input_contents[1]
    assert refused(infer).field == "raw_input_contents"
    infer = infer_request("fox")
    infer.inputs[0].contents.bytes_contents.append(b"dog")
    assert refused(infer).field == "inputs.text_input"


@pytest.mark.parametrize("elements", [[], [b"a", b"b"]], ids=len)
def test_one_element_is_one(elements: list[bytes]) -> None:
    infer = infer_request("fox", raw=False)
    del infer.inputs[0].contents.bytes_contents[:]
    infer.inputs[0].contents.bytes_contents.extend(elements)
    assert refused(infer).field == "inputs.text_input"


def test_tensors_in_shared_memory_are_refused() -> None:
    infer = infer_request("fox", stream=True)
    infer.inputs[0].parameters["shared_memory_region"].string_param = "region"
    del infer.raw_input_contents[0]
    error = refused(infer)
    assert (error.status, error.field) == ("UNIMPLEMENTED", "inputs.text_input.parameters.shared_memory_region")
    infer = infer_request("fox", outputs=["text_output"])
    infer.outputs[0].parameters["shared_memory_region"].string_param = "region"
    error = refused(infer)
    assert (error.status, error.field) == ("UNIMPLEMENTED", "outputs.text_output.parameters.shared_memory_region")


def test_an_output_that_the_model_has_not_is_refused() -> None:
    assert refused(infer_request("fox", outputs=["text_output", "logits"])).field == "outputs.logits"


# ------------------------------------------------------------------------------------------------------------ sampling


def test_sampling_parameters_are_those_of_generate() -> None:
    request = sampled(
        temperature=0.5,
        top_k=5,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=1,
        seed=2**64 - 1,
        max_tokens=7,
        min_tokens=0,
        stop=["a", "b"],
        stop_token_ids=[3, 4],
        ignore_eos=True,
        n=1,
    ).request
    assert request.sampling == pb.SamplingParams(
        temperature=0.5,
        top_k=5,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=1,
        seed=2**64 - 1,
    )
    stopping = pb.StoppingParams(max_tokens=7, min_tokens=0, stop=["a", "b"], stop_token_ids=[3, 4], ignore_eos=True)
    assert request.stopping == stopping


def test_numbers_may_be_strings_and_one_stop_string_may_stand_alone() -> None:
    request = sampled(temperature="0.5", top_k="5", max_tokens="7", ignore_eos="True", n="1", stop="a").request
    assert request.sampling == pb.SamplingParams(temperature=0.5, top_k=5)
    assert request.stopping == pb.StoppingParams(max_tokens=7, ignore_eos=True, stop=["a"])


def test_minus_one_is_all_for_top_k() -> None:
    assert sampled(top_k=-1).request.sampling == pb.SamplingParams(top_k=0)


def test_null_is_the_default_and_so_is_nothing() -> None:
    request = sampled(temperature=None, seed=None, stop=None).request
    assert not request.sampling.ListFields() and not request.stopping.ListFields()
    assert not translate(infer_request("fox", sampling_parameters="")).request.sampling.ListFields()


@pytest.mark.parametrize("name", ["best_of", "num_outputs", "text", "x" * 100_000], ids=lambda name: name[:10])
def test_an_unknown_sampling_parameter_is_refused_by_name(name: str) -> None:
    error = refused(infer_request("fox", sampling_parameters=json.dumps({name: 1})))
    assert (error.status, error.field) == ("UNIMPLEMENTED", f"sampling_parameters.{name[:64]}")
    assert len(error.message) < 200


@pytest.mark.parametrize("number", [0, 2, "3"], ids=str)
def test_more_outputs_than_one_are_refused(number: object) -> None:
    error = refused(infer_request("fox", sampling_parameters=json.dumps({"n": number})))
    assert (error.status, error.field) == ("UNIMPLEMENTED", "sampling_parameters.n")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", True),
        ("temperature", "hot"),
        ("temperature", [1]),
        ("temperature", 10**400),
        ("top_k", 1.5),
        ("top_k", -2),
        ("max_tokens", 2**32),
        ("max_tokens", False),
        ("seed", -1),
        ("n", "one"),
        ("ignore_eos", 1),
        ("ignore_eos", "maybe"),
        ("stop", 1),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("stop_token_ids", 1),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [None]),
    ],
    ids=str,
)
def test_what_a_sampling_parameter_can_not_hold_is_refused(name: str, value: object) -> None:
    error = refused(infer_request("fox", sampling_parameters=json.dumps({name: value})))
    assert (error.status, error.field) == ("INVALID_ARGUMENT", f"sampling_parameters.{name}")
    assert len(error.message) < 200


# ---------------------------------------------------------------------------------------------------------- parameters


def test_sampling_may_stand_among_the_requests_parameters() -> None:
    request = asked_with(temperature=0.5, max_tokens=7, stop="a", ignore_eos=True).request
    assert request.sampling == pb.SamplingParams(temperature=0.5)
    assert request.stopping == pb.StoppingParams(max_tokens=7, stop=["a"], ignore_eos=True)
    error = refused(infer_request("fox", parameters={"max_tokens": "many"}))
    assert (error.status, error.field) == ("INVALID_ARGUMENT", "parameters.max_tokens")


def test_the_tensor_goes_before_the_parameters() -> None:
    infer = infer_request("fox", sampling_parameters='{"max_tokens": 3}', parameters={"max_tokens": 7, "temperature": "hot"})
    assert translate(infer).request.stopping.max_tokens == 3
    assert not translate(infer).request.sampling.ListFields()


def test_unknown_parameters_and_those_of_sequences_are_ignored() -> None:
    asked = asked_with(color="red", sequence_id=7, sequence_start=True, sequence_end=True, triton_other=1)
    assert asked == translate(infer_request("fox"))


def test_priorities_count_down() -> None:
    classes = [asked_with(priority=level).request.scheduling.priority for level in (0, 1, 2, 3)]
    assert classes == [0, pb.PRIORITY_CLASS_INTERACTIVE, pb.PRIORITY_CLASS_NORMAL, pb.PRIORITY_CLASS_BATCH]


@pytest.mark.parametrize(("timeout_us", "ms"), [(1, 1), (1000, 1), (1_000_001, 1001), (2**63 - 1, 2**32 - 1)])
def test_a_timeout_is_the_requests_time(timeout_us: int, ms: int) -> None:
    assert asked_with(timeout=timeout_us).request.scheduling.max_time_ms == ms
    assert not asked_with(timeout=0).request.scheduling.HasField("max_time_ms")


def test_an_empty_final_response_is_for_who_asks() -> None:
    assert asked_with(triton_enable_empty_final_response=True).empty_final
    assert not asked_with(triton_enable_empty_final_response=False).empty_final


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("priority", 4),
        ("priority", -1),
        ("priority", "high"),
        ("priority", True),
        ("priority", None),
        ("timeout", -1),
        ("timeout", 0.5),
        ("timeout", "1s"),
        ("triton_enable_empty_final_response", 1),
    ],
    ids=str,
)
def test_a_parameter_of_tritons_that_is_not_as_it_should_be_is_refused(name: str, value: object) -> None:
    error = refused(infer_request("fox", parameters={name: value}))
    assert (error.status, error.field) == ("INVALID_ARGUMENT", f"parameters.{name}")
