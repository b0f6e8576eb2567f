"""A ModelInferRequest of KServe v2 as the GenerateRequest that it means. Pure; knows messages, not gRPC.

Looked at here is what the tensors and parameters are: their names, types and number. What a value may be, check_options knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from carousel.inference import grpc_service_pb2 as kserve
from carousel.v1 import generation_pb2 as pb
from scheduler.errors import InvalidFieldError, UnsupportedFieldError

TEXT_INPUT, TEXT_OUTPUT = "text_input", "text_output"
STREAM, SAMPLING_PARAMETERS, EXCLUDE_INPUT = "stream", "sampling_parameters", "exclude_input_in_output"
DATATYPES = {TEXT_INPUT: "BYTES", STREAM: "BOOL", SAMPLING_PARAMETERS: "BYTES", EXCLUDE_INPUT: "BOOL", TEXT_OUTPUT: "BYTES"}
INPUTS = (TEXT_INPUT, STREAM, SAMPLING_PARAMETERS, EXCLUDE_INPUT)  # all but the first may be left out

_LENGTH_BYTES = 4  # before each element of a BYTES tensor, little-endian
_SHOWN_CHARACTERS = 64  # of a caller's words in an answer
_LONGEST_MS = 2**32 - 1  # 50 days
_PRIORITIES = (pb.PRIORITY_CLASS_UNSPECIFIED, pb.PRIORITY_CLASS_INTERACTIVE, pb.PRIORITY_CLASS_NORMAL, pb.PRIORITY_CLASS_BATCH)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client of KServe asked for."""

    request: pb.GenerateRequest
    id: str  # the client's; need not be unique
    stream: bool  # a response whenever there is new text; else one, at the end
    empty_final: bool  # a response without output is the last one


def translate(infer: kserve.ModelInferRequest) -> Asked:
    """Raises InvalidFieldError, UnsupportedFieldError."""
    _check_outputs(infer)
    inputs, parameters = _inputs(infer), {name: _value(each) for name, each in infer.parameters.items()}
    if TEXT_INPUT not in inputs:
        raise InvalidFieldError(f"inputs.{TEXT_INPUT}", "must be given")
    request = pb.GenerateRequest(text=_text(inputs[TEXT_INPUT]))
    request.output.echo = not inputs.get(EXCLUDE_INPUT, True)
    if SAMPLING_PARAMETERS in inputs:
        _apply(request, _json(inputs[SAMPLING_PARAMETERS]), SAMPLING_PARAMETERS)
    else:
        _apply(request, {name: value for name, value in parameters.items() if name in _CONVERTERS}, "parameters")
    request.scheduling.priority = _priority(parameters.get("priority", 0))
    _set_time(request, parameters.get("timeout", 0))
    empty_final = parameters.get("triton_enable_empty_final_response", False)
    if not isinstance(empty_final, bool):
        raise InvalidFieldError("parameters.triton_enable_empty_final_response", "must be a bool_param")
    return Asked(request, infer.id, bool(inputs.get(STREAM, False)), empty_final)


def to_raw(text: str) -> bytes:
    """As the one element of a BYTES tensor."""
    encoded = text.encode()
    return len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded


# ------------------------------------------------------------------------------------------------------------- tensors


def _check_outputs(infer: kserve.ModelInferRequest) -> None:
    for output in infer.outputs:
        field = f"outputs.{_shown(output.name)}"
        if output.name != TEXT_OUTPUT:
            raise InvalidFieldError(field, f"is no output of the model; it has {TEXT_OUTPUT}")
        _check_parameters(field, output.parameters)


def _check_parameters(field: str, parameters: Iterable[str]) -> None:
    """Those of a tensor: it lies in shared memory, or is to be put there."""
    for name in parameters:
        raise UnsupportedFieldError(f"{field}.parameters.{_shown(name)}")


def _inputs(infer: kserve.ModelInferRequest) -> dict[str, bytes | bool]:
    """The one element of each input."""
    for tensor in infer.inputs:
        _check_input(tensor)
    raw, inputs = infer.raw_input_contents, dict[str, bytes | bool]()
    if raw and len(raw) != len(infer.inputs):
        raise InvalidFieldError(
            "raw_input_contents", f"must have an entry for each of {len(infer.inputs)} inputs, not {len(raw)}"
        )
    for i, tensor in enumerate(infer.inputs):
        if tensor.name in inputs:
            raise InvalidFieldError(f"inputs.{tensor.name}", "is given twice")
        inputs[tensor.name] = _raw_element(tensor, raw[i]) if raw else _element(tensor)
    return inputs


def _check_input(tensor: kserve.ModelInferRequest.InferInputTensor) -> None:
    field = f"inputs.{_shown(tensor.name)}"
    if tensor.name not in INPUTS:
        raise InvalidFieldError(field, f"is no input of the model; it has {', '.join(INPUTS)}")
    _check_parameters(field, tensor.parameters)
    if tensor.datatype != DATATYPES[tensor.name]:
        raise InvalidFieldError(field, f"must be of datatype {DATATYPES[tensor.name]}, not {_shown(tensor.datatype)!r}")
    if list(tensor.shape) != [1]:
        raise InvalidFieldError(field, f"must be of shape [1], not {_shown(list(tensor.shape[:_SHOWN_CHARACTERS]))}")


def _raw_element(tensor: kserve.ModelInferRequest.InferInputTensor, raw: bytes) -> bytes | bool:
    field = f"inputs.{tensor.name}"
    if tensor.HasField("contents"):
        raise InvalidFieldError(field, "has contents beside raw_input_contents")
    if tensor.datatype == "BOOL":
        if raw not in (b"\0", b"\1"):
            raise InvalidFieldError(field, "must be one byte, 0 or 1")
        return raw == b"\1"
    if len(raw) < _LENGTH_BYTES or int.from_bytes(raw[:_LENGTH_BYTES], "little") != len(raw) - _LENGTH_BYTES:
        raise InvalidFieldError(
            field, f"must be one element: {_LENGTH_BYTES} bytes of length, little-endian, and so many bytes"
        )
    return raw[_LENGTH_BYTES:]


def _element(tensor: kserve.ModelInferRequest.InferInputTensor) -> bytes | bool:
    contents = tensor.contents
    elements: list[bytes | bool] = [*(contents.bool_contents if tensor.datatype == "BOOL" else contents.bytes_contents)]
    if len(elements) != 1:
        raise InvalidFieldError(f"inputs.{tensor.name}", f"must have one element, not {len(elements)}")
    return elements[0]


def _text(element: bytes | bool) -> str:
    assert isinstance(element, bytes)
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise InvalidFieldError(f"inputs.{TEXT_INPUT}", f"is not UTF-8: {error.reason} at byte {error.start}") from None


# ------------------------------------------------------------------------------------------------------------ sampling


def _json(element: bytes | bool) -> dict[str, Any]:
    assert isinstance(element, bytes)
    try:
        return msgspec.json.decode(element or b"{}", type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise InvalidFieldError(f"inputs.{SAMPLING_PARAMETERS}", "must be a JSON object") from None


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _int(value: Any) -> int:
    if isinstance(value, bool | float):
        raise TypeError
    return int(value)


def _bool(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _top_k(value: Any) -> int:
    """−1, as vLLM has it, is all, too."""
    return 0 if _int(value) == -1 else _int(value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError
    return value


def _strings(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else _list(value)


def _ints(value: Any) -> list[int]:
    return [_int(each) for each in _list(value)]


# What a value becomes. Numbers may be written as strings: Triton's own example of a client does so.
_SAMPLING: dict[str, Callable[[Any], Any]] = {
    "temperature": _float,
    "top_k": _top_k,
    "top_p": _float,
    "min_p": _float,
    "repetition_penalty": _float,
    "presence_penalty": _float,
    "frequency_penalty": _float,
    "seed": _int,
}
_STOPPING: dict[str, Callable[[Any], Any]] = {
    "max_tokens": _int,
    "min_tokens": _int,
    "stop": _strings,
    "stop_token_ids": _ints,
    "ignore_eos": _bool,
}
_CONVERTERS = _SAMPLING | _STOPPING | {"n": _int}


def _apply(request: pb.GenerateRequest, values: Mapping[str, Any], where: str) -> None:
    """null is as if it were absent."""
    for name, value in values.items():
        field = f"{where}.{_shown(name)}"
        if name not in _CONVERTERS:
            raise UnsupportedFieldError(field)
        if value is None:
            continue
        try:
            converted = _CONVERTERS[name](value)
            if name == "n":
                _check_number(field, converted)
            else:
                _put(request.sampling if name in _SAMPLING else request.stopping, name, converted)
        except (TypeError, ValueError, KeyError, OverflowError):
            raise InvalidFieldError(field, f"can't be {_shown(repr(value))}") from None


def _check_number(field: str, number: int) -> None:
    if number != 1:
        raise UnsupportedFieldError(field, "other than 1 here; carousel.v1 has num_outputs")


def _put(group: pb.SamplingParams | pb.StoppingParams, name: str, value: Any) -> None:
    """Raises TypeError or ValueError for what the field can't hold."""
    if isinstance(value, list):
        getattr(group, name).extend(value)
    else:
        setattr(group, name, value)


# ---------------------------------------------------------------------------------------------------------- parameters


def _value(parameter: kserve.InferParameter) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return None if kind is None else getattr(parameter, kind)


def _priority(level: Any) -> pb.PriorityClass.ValueType:
    """Triton counts down: 1 goes first; 0 is the default."""
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < len(_PRIORITIES):
        raise InvalidFieldError("parameters.priority", f"must be a whole number from 0 to {len(_PRIORITIES) - 1}")
    return _PRIORITIES[level]


def _set_time(request: pb.GenerateRequest, timeout_us: Any) -> None:
    """0: none."""
    if isinstance(timeout_us, bool) or not isinstance(timeout_us, int) or timeout_us < 0:
        raise InvalidFieldError("parameters.timeout", "must be a whole number of microseconds, 0 or more")
    if timeout_us:
        request.scheduling.max_time_ms = min(-(-timeout_us // 1000), _LONGEST_MS)


def _shown(words: object) -> str:
    return str(words)[:_SHOWN_CHARACTERS]
