"""Requests whose answer is a stream, from keyword arguments. Knows the public protos only."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

from carousel.v1 import generation_pb2 as pb

PRIORITIES = {
    "batch": pb.PRIORITY_CLASS_BATCH,
    "normal": pb.PRIORITY_CLASS_NORMAL,
    "interactive": pb.PRIORITY_CLASS_INTERACTIVE,
}
ON_TIMEOUT = {"partial": pb.ON_TIMEOUT_RETURN_PARTIAL, "fail": pb.ON_TIMEOUT_FAIL}


class Parameters(TypedDict, total=False):
    """What a request may say besides its prompt; absent or None: the server's default. The fields' comments in
    generation.proto give units and ranges."""

    request_id: str | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    num_outputs: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool | None
    include_stop: bool | None
    text: bool | None
    echo: bool | None
    logprobs: int | None
    prompt_logprobs: int | None
    priority: Literal["batch", "normal", "interactive"] | None
    tenant: str | None
    max_time_ms: int | None
    on_timeout: Literal["partial", "fail"] | None
    cache_salt: str | None
    resume_window_ms: int | None
    whole_by_deadline: bool | None


def make_request(prompt: str | Sequence[int], **parameters: Unpack[Parameters]) -> pb.GenerateRequest:
    """Raises ValueError or TypeError for a value that its field can't hold, and for a parameter that is none. KeyError for a
    priority or on_timeout that is none."""
    given: dict[str, Any] = {name: value for name, value in parameters.items() if value is not None}
    unknown = given.keys() - Parameters.__annotations__.keys()
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))}: no such parameter")
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if "priority" in given:
        given["priority"] = PRIORITIES[given["priority"]]
    if "on_timeout" in given:
        given["on_timeout"] = ON_TIMEOUT[given["on_timeout"]]
    request = pb.GenerateRequest(
        request_id=given.get("request_id"),
        sampling=_group(pb.SamplingParams, given),
        stopping=_group(pb.StoppingParams, given),
        output=_group(pb.OutputParams, given),
        scheduling=_group(pb.SchedulingParams, given),
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()  # an empty prompt is sent as one, for the server to refuse
    return request


def prepared(request: pb.GenerateRequest, resume_window_ms: int) -> pb.GenerateRequest:
    """A copy to be sent: with an id, so that it can be cancelled and resumed by it, and with the window where it says none and
    may have one: log-probabilities are not kept for it."""
    sent = pb.GenerateRequest()
    sent.CopyFrom(request)
    if not sent.request_id:
        sent.request_id = str(uuid.uuid4())
    asks_logprobs = sent.output.HasField("logprobs") or sent.output.HasField("prompt_logprobs")
    if resume_window_ms and not sent.scheduling.HasField("resume_window_ms") and not asks_logprobs:
        sent.scheduling.resume_window_ms = resume_window_ms
    return sent


def make_resume(request_id: str, offsets: Mapping[int, tuple[int, int]] | None) -> pb.ResumeRequest:
    """offsets: by output_index, what the caller has: (tokens, UTF-8 bytes of text)."""
    request = pb.ResumeRequest(request_id=request_id)
    for index, (tokens, text_bytes) in (offsets or {}).items():
        request.outputs.add(output_index=index, token_offset=tokens, text_offset=text_bytes)
    return request


def _group(kind: type[Any], given: dict[str, Any]) -> Any:
    """The message with those of its fields that are given."""
    return kind(**{name: given[name] for name in kind.DESCRIPTOR.fields_by_name if name in given})
