"""Calls for fuzzing: messages that a service's descriptors allow, whatever the values mean; the same ones damaged; noise.

Knows protobuf's descriptors, Hypothesis, and which values the fields of this API take: one wrong field ends a call at the first
check, so most messages have sound values only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from carousel.inference import grpc_service_pb2 as kserve

_DEEPEST = 3  # messages in messages
_MOST_ELEMENTS = 3
_PRESENT = 0.35  # of the fields; a prompt is nearly always there


@dataclass(frozen=True, slots=True)
class Call:
    """One call: bytes as they go over the wire, and when its caller loses patience."""

    method: str  # /package.Service/Method
    messages: tuple[bytes, ...]  # one, but for streams
    timeout_s: float | None  # the call's deadline
    cancel_after: int | None  # messages of the answer; None: it is read to its end
    client_streams: bool
    server_streams: bool
    answer: type[Message]


def methods(services: Collection[ServiceDescriptor], without: Collection[str] = ()) -> list[MethodDescriptor]:
    """All of these services, without those of these full names."""
    found = [method for service in services for method in service.methods if method.full_name not in without]
    assert len(found) + len(without) == sum(len(service.methods) for service in services)
    return found


def calls(of: Collection[MethodDescriptor], often: Collection[str], endless: Collection[str]) -> st.SearchStrategy[Call]:
    """Of any of the methods, two in three of those `often`; `endless` ones end only when their caller ends them. Full names."""
    by_name = {method.full_name: method for method in of}
    names = st.integers(0, 2).flatmap(lambda choice: st.sampled_from(sorted(often if choice else by_name)))
    return names.flatmap(lambda name: _call(by_name[name], name in endless))


def _call(method: MethodDescriptor, is_endless: bool) -> st.SearchStrategy[Call]:
    client_streams, server_streams = bool(method.client_streaming), bool(method.server_streaming)
    one = raw(method.input_type)
    messages = st.lists(one, max_size=_MOST_ELEMENTS).map(tuple) if client_streams else st.tuples(one)
    patience = st.sampled_from((0.05, 0.3)) if is_endless else st.sampled_from((*[None] * 7, 0.001, 0.05, 1.0))
    return st.builds(
        Call,
        method=st.just(f"/{method.containing_service.full_name}/{method.name}"),
        messages=messages,
        timeout_s=patience,
        cancel_after=st.sampled_from((*[None] * 8, 0, 1)),
        client_streams=st.just(client_streams),
        server_streams=st.just(server_streams),
        answer=st.just(message_factory.GetMessageClass(method.output_type)),
    )


@st.composite
def raw(draw: st.DrawFn, descriptor: Descriptor) -> bytes:
    """A message of this type with sound values (six in ten), or with odd ones; one that is damaged, or noise."""
    kind = draw(st.integers(0, 9))
    if kind == 9:
        return draw(st.binary(max_size=64))
    message = draw(messages(descriptor, kind < 7)).SerializeToString()
    return draw(_damaged(message)) if kind in (6, 8) else message


@st.composite
def _damaged(draw: st.DrawFn, message: bytes) -> bytes:
    """A byte changed, left out or put in, or the rest left out; one to four times."""
    damaged = bytearray(message)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(damaged)))
        match draw(st.sampled_from(("change", "drop", "insert", "cut"))):
            case "change":
                damaged[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "drop":
                del damaged[at : at + 1]
            case "insert":
                damaged[at:at] = draw(st.binary(min_size=1, max_size=4))
            case "cut":
                del damaged[at:]
    return bytes(damaged)


# ------------------------------------------------------------------------------------------------------------ messages


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, is_sound: bool, depth: int = 0) -> Message:
    """Any message of this type; of a oneof at most one field. is_sound: with values that are likely to be taken."""
    if is_sound and descriptor.full_name in _SOUND_MESSAGES:
        return draw(st.sampled_from(_SOUND_MESSAGES[descriptor.full_name]))
    made: Message = message_factory.GetMessageClass(descriptor)()
    choices = [[field.name for field in oneof.fields] for oneof in descriptor.oneofs if len(oneof.fields) > 1]
    chosen = {draw(st.sampled_from(names)) for names in choices}
    for field in descriptor.fields:
        if field.containing_oneof is not None and len(field.containing_oneof.fields) > 1:
            share = 0.98 if field.name in chosen else 0.0
        elif field.name in _NEEDED:
            share = 0.98
        else:
            share = 0.0 if is_sound and field.name in _LEFT_OUT else _PRESENT
        if share and draw(st.floats(0, 1)) < share:
            _fill(draw, made, field, is_sound, depth)
    return made


def _fill(draw: st.DrawFn, made: Message, field: FieldDescriptor, is_sound: bool, depth: int) -> None:
    least = 1 if field.name in _NEEDED else 0
    if field.message_type is None:
        if field.is_repeated:
            values = draw(st.lists(_scalar(field, is_sound), min_size=least, max_size=_MOST_ELEMENTS))
            getattr(made, field.name).extend(values)
        else:
            setattr(made, field.name, draw(_scalar(field, is_sound)))
    elif field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        for each in draw(st.lists(_scalar(key, is_sound), max_size=_MOST_ELEMENTS)):
            if value.message_type is None:
                getattr(made, field.name)[each] = draw(_scalar(value, is_sound))
            else:
                getattr(made, field.name)[each].CopyFrom(draw(messages(value.message_type, is_sound, depth + 1)))
    elif depth < _DEEPEST:
        one = messages(field.message_type, is_sound, depth + 1)
        if field.is_repeated:
            getattr(made, field.name).extend(draw(st.lists(one, min_size=least, max_size=_MOST_ELEMENTS)))
        else:
            getattr(made, field.name).CopyFrom(draw(one))


# ------------------------------------------------------------------------------------------------------------- scalars

_NEEDED = {
    "text",
    "ids",
    "request",
    "submit",
    "max_tokens",
    "messages",
    "content",
    "role",
    "request_id",
    "model_name",
    "inputs",
}
_LEFT_OUT = {"raw_input_contents", "prompt_logprobs", "model_version", "outputs", "more", "template_name", "page_token"}
_TEXTS = ("The quick brown fox", "def f(x):\n", "naïve 東京 🦊", "\0", " ", "\ufffd\u200d")
_SAMPLING: tuple[dict[str, Any], ...] = (
    {"max_tokens": 5},
    {"max_tokens": 5, "temperature": 0.5, "stop": ["a", "b"]},
    {"max_tokens": "7", "top_k": -1, "seed": 2**64 - 1},
)
_ODD_SAMPLING = ({"max_tokens": 10**400}, {"max_tokens": 1e400}, {"stop": "\ud800", "max_tokens": 3}, {"n": 2}, {"seed": [[]]})
_ODD_JSON = ("[]", "null", "NaN", '{"a": "\\ud800"}', '{"messages": 3}', '{"add_generation_prompt": 1}', "{" * 2000)

# By a field's name: values that are taken, wherever they stand.
_SOUND: dict[str, Any] = {
    "request_id": tuple("abcdefgh"),
    "tenant": ("a", "b"),
    "text": _TEXTS,
    "content": _TEXTS,
    "role": ("user", "assistant", "system"),
    "more": ("{}", '{"a": 1}'),
    "variables": ("{}", '{"a": 1}'),
    "tools": ("{}", '{"a": 1}'),
    "stop": ("e", "the", "\n\n", "é"),
    "policy": ("continuous", "static", "prefill_first"),
    "max_tokens": (5, 20, 60),
    "min_tokens": (0, 1, 4),
    "num_outputs": (1, 2, 3),
    "temperature": (0.0, 0.7, 1.5, 100.0),
    "top_k": (0, 1, 5),
    "top_p": (0.5, 1.0),
    "min_p": (0.0, 0.1, 1.0),
    "repetition_penalty": (0.5, 1.0, 1.2),
    "presence_penalty": (-2.0, 0.0, 0.5),
    "frequency_penalty": (-1.0, 0.0, 2.0),
    "key": (5, 50),
    "value": (-100.0, 1.0, 100.0),
    "max_time_ms": (20, 1000, 60_000),
    "resume_window_ms": (0, 50, 1000),
    "logprobs": (0, 1, 5),
    "window_tokens": (0, 1, 3, 10**6),
    "num_tokens": (1, 10, 10**6),
    "ids": (3, 50, 100),
    "token_ids": (3, 50, 100),
    "stop_token_ids": (3, 50),
    "interval_ms": (100, 1000),
    "page_size": (1, 100, 1000),
    "token_offset": (0, 1, 3),
    "text_offset": (0, 1, 3),
    "output_index": (0, 1),
    "model_name": ("tiny",),
    "name": ("tiny",),
    "version": ("", "1"),
    "service": ("", "carousel.v1.Generation"),
    "list_services": ("",),
}
# … and values that are near what the field means, and wrong or seldom.
_ODD: dict[str, Any] = {
    "request_id": ("é/東", "x" * 128, "x" * 129, ""),
    "tenant": ("", "b/c"),
    "text": ("", "a" * 3000),
    "more": _ODD_JSON,
    "variables": _ODD_JSON,
    "tools": _ODD_JSON,
    "template_name": ("default", "other"),
    "stop": ("", "y" * 300),
    "policy": ("fifo", ""),
    "page_token": ("", "AAAAAAAAAAE=", "gAAAAAAAAAA=", "%"),
    "max_tokens": (0, 2**32 - 1),
    "min_tokens": (1000, 2**32 - 1),
    "num_outputs": (64, 65, 0),
    "resume_window_ms": (2**32 - 1,),
    "logprobs": (20, 21),
    "prompt_logprobs": (0, 1, 5, 21),
    "ids": (0, 383, 384, 2**31, 2**32 - 1),
    "token_ids": (0, 383, 384, 2**31, 2**32 - 1),
    "stop_token_ids": (0, 384, 2**32 - 1),
    "model_name": ("other", ""),
    "model_version": ("", "1", "2"),
    "name": ("text_input", "text_output", "stream", "sampling_parameters", "exclude_input_in_output"),
    "datatype": ("BYTES", "BOOL", "FP32"),
    "shape": (1, 2, -1),
    "bytes_contents": (*(json.dumps(each).encode() for each in (*_SAMPLING, *_ODD_SAMPLING)), b"\xff"),
    "raw_input_contents": (b"\x03\0\0\0fox", b"\x03\0\0\0fo", b"\1", b"\2", b""),
    "key": ("max_tokens", "temperature", "stop", "priority", "timeout", "triton_enable_empty_final_response"),
}


def _tensor(name: str, datatype: str, content: bytes | bool) -> Message:
    tensor = kserve.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=[1])
    if isinstance(content, bool):
        tensor.contents.bool_contents.append(content)
    else:
        tensor.contents.bytes_contents.append(content)
    return tensor


# Of some types a sound message is more than sound values.
_SOUND_MESSAGES: dict[str, list[Message]] = {
    "inference.ModelInferRequest.InferInputTensor": [
        *(_tensor("text_input", "BYTES", text.encode()) for text in _TEXTS),
        *(_tensor("sampling_parameters", "BYTES", json.dumps(each).encode()) for each in _SAMPLING),
        _tensor("stream", "BOOL", True),
    ],
    "inference.InferParameter": [kserve.InferParameter(int64_param=1), kserve.InferParameter(string_param="5")],
}

_KIND = FieldDescriptor
_BY_TYPE: dict[int, Callable[[], st.SearchStrategy[Any]]] = {
    _KIND.CPPTYPE_INT32: lambda: st.integers(-(2**31), 2**31 - 1),
    _KIND.CPPTYPE_INT64: lambda: st.integers(-(2**63), 2**63 - 1),
    _KIND.CPPTYPE_UINT32: lambda: st.integers(0, 2**32 - 1),
    _KIND.CPPTYPE_UINT64: lambda: st.integers(0, 2**64 - 1),
    _KIND.CPPTYPE_DOUBLE: st.floats,
    _KIND.CPPTYPE_FLOAT: lambda: st.floats(width=32),
    _KIND.CPPTYPE_BOOL: st.booleans,
}


def _scalar(field: FieldDescriptor, is_sound: bool) -> st.SearchStrategy[Any]:
    """is_sound: a value that is taken, where one is known; else any that the field can hold, mostly a likely one."""
    sound = [value for value in _SOUND.get(field.name, ()) if _holds(field, value)]
    if field.type == _KIND.TYPE_ENUM:
        sound = [value.number for value in field.enum_type.values]
    if is_sound and sound:
        return st.sampled_from(sound)
    likely = [*sound, *(value for value in _ODD.get(field.name, ()) if _holds(field, value))]
    return st.one_of(st.sampled_from(likely), _any(field)) if likely else _any(field)


def _any(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == _KIND.TYPE_ENUM:
        return st.integers(-(2**31), 2**31 - 1)
    if field.type == _KIND.TYPE_BYTES:
        return st.binary(max_size=40)
    if field.cpp_type == _KIND.CPPTYPE_STRING:
        return st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
    return _BY_TYPE[field.cpp_type]()


def _holds(field: FieldDescriptor, value: object) -> bool:
    if field.type == _KIND.TYPE_BYTES:
        return isinstance(value, bytes)
    if field.cpp_type == _KIND.CPPTYPE_STRING:
        return isinstance(value, str)
    if field.cpp_type in (_KIND.CPPTYPE_FLOAT, _KIND.CPPTYPE_DOUBLE):
        return isinstance(value, float)
    return isinstance(value, int)
