"""A GenerateRequest checked, field by field, against the ranges of its .proto comments. Pure; knows messages, not gRPC.

What is out of range raises InvalidFieldError, what is in range and can't be honoured yet UnsupportedFieldError, both with the
field's path. Sizes are looked at before contents, so that a huge prompt costs nothing.
"""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from carousel.v1 import generation_pb2 as pb
from scheduler.errors import InvalidFieldError, UnsupportedFieldError
from scheduler.frontend.defaults import ModelDefaults
from wire import SamplingSpec, WorkerFacts

MAX_ID_CHARACTERS = 128
MAX_SALT_CHARACTERS = 256
MAX_OUTPUTS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_RESUME_WINDOW_MS = 600_000

_FloatName: TypeAlias = Literal["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]


@dataclass(frozen=True, slots=True)
class Options:
    """All of a request but its prompt."""

    request_id: str
    priority: int  # as on the inner wire: 1 BATCH, 2 NORMAL, 3 INTERACTIVE
    tenant: str  # empty: the one of all who name none
    max_time_ns: int  # 0: none of its own, only the call's
    partial_at_deadline: bool
    whole_by_deadline: bool
    cache_salt: str
    max_tokens: int  # 0: what the model's length leaves
    num_outputs: int
    sampling: SamplingSpec
    stop: tuple[str, ...]
    include_stop: bool
    text: bool
    echo: bool
    resume_window_ms: int = 0


def check_options(request: pb.GenerateRequest, limits: WorkerFacts, defaults: ModelDefaults) -> Options:
    """Raises InvalidFieldError, UnsupportedFieldError."""
    _check_prompt_size(request, limits)
    stopping, scheduling = request.stopping, request.scheduling
    max_tokens, stop = _max_tokens(stopping, limits), _stop_strings(stopping)
    _check_scheduling(scheduling)
    if stopping.min_tokens > (max_tokens or limits.max_model_len):
        raise InvalidFieldError("stopping.min_tokens", f"must be at most max_tokens, {max_tokens or limits.max_model_len}")
    return Options(
        request_id=_request_id(request),
        priority=scheduling.priority or int(pb.PRIORITY_CLASS_NORMAL),
        tenant=scheduling.tenant,
        max_time_ns=scheduling.max_time_ms * 1_000_000,
        partial_at_deadline=scheduling.on_timeout == pb.ON_TIMEOUT_RETURN_PARTIAL,
        whole_by_deadline=_whole_by_deadline(request, max_tokens),
        cache_salt=scheduling.cache_salt,
        max_tokens=max_tokens,
        num_outputs=_num_outputs(request.sampling),
        sampling=_sampling(request, limits, defaults),
        stop=stop,
        include_stop=stopping.include_stop,
        text=request.output.text if request.output.HasField("text") else True,
        echo=request.output.echo,
        resume_window_ms=_resume_window(request),
    )


def check_prompt_length(num_tokens: int, max_tokens: int, limits: WorkerFacts) -> None:
    """Raises InvalidFieldError."""
    longest = limits.max_model_len
    if num_tokens == 0:
        raise InvalidFieldError("prompt", "must not be empty")
    if num_tokens >= longest:
        raise InvalidFieldError("prompt", f"has {num_tokens} tokens; the model's length is {longest}, output included")
    if num_tokens + max_tokens > longest:
        what = f"{max_tokens} and the prompt's {num_tokens} tokens are more than the model's length, {longest}"
        raise InvalidFieldError("stopping.max_tokens", what)


def check_token_ids(token_ids: Iterable[int], field: str, limits: WorkerFacts) -> None:
    """Raises InvalidFieldError."""
    largest = max(token_ids, default=0)
    if largest >= limits.vocab_size:
        raise InvalidFieldError(field, f"has token id {largest}; the model's are below {limits.vocab_size}")


def _check_prompt_size(request: pb.GenerateRequest, limits: WorkerFacts) -> None:
    match request.WhichOneof("prompt"):
        case None:
            raise InvalidFieldError("prompt", "must be given, as text or as token_ids")
        case "text":
            if not request.text:
                raise InvalidFieldError("prompt", "must not be empty")
        case "token_ids":
            check_prompt_length(len(request.token_ids.ids), 0, limits)


def _request_id(request: pb.GenerateRequest) -> str:
    if not request.HasField("request_id"):
        return str(uuid.uuid4())
    check_id("request_id", request.request_id)
    return request.request_id


def check_id(field: str, value: str) -> None:
    """Raises InvalidFieldError."""
    if not 1 <= len(value) <= MAX_ID_CHARACTERS:
        raise InvalidFieldError(field, f"must have 1 to {MAX_ID_CHARACTERS} characters, not {len(value)}")


# ------------------------------------------------------------------------------------------------------------ sampling


def _sampling(request: pb.GenerateRequest, limits: WorkerFacts, defaults: ModelDefaults) -> SamplingSpec:
    params = request.sampling
    if params.top_k > limits.vocab_size:
        raise InvalidFieldError("sampling.top_k", f"must be at most the vocabulary size, {limits.vocab_size}")
    check_token_ids(request.stopping.stop_token_ids, "stopping.stop_token_ids", limits)
    own = () if request.stopping.ignore_eos else tuple(t for t in defaults.eos_token_ids if t < limits.vocab_size)
    return SamplingSpec(
        temperature=_float(params, "temperature", 0, 100, defaults.temperature),
        top_k=params.top_k if params.HasField("top_k") else min(defaults.top_k, limits.vocab_size),
        top_p=_float(params, "top_p", 0, 1, defaults.top_p, above=True),
        min_p=_float(params, "min_p", 0, 1, defaults.min_p),
        seed=params.seed if params.HasField("seed") else secrets.randbits(64),
        min_tokens=request.stopping.min_tokens,
        stop_token_ids=tuple(dict.fromkeys((*request.stopping.stop_token_ids, *own))),
        repetition_penalty=_float(params, "repetition_penalty", 0, 10, defaults.repetition_penalty, above=True),
        presence_penalty=_float(params, "presence_penalty", -2, 2, 0),
        frequency_penalty=_float(params, "frequency_penalty", -2, 2, 0),
        logit_bias=_bias(params, limits),
        logprobs=_logprobs(request.output, "logprobs", limits),
        prompt_logprobs=_logprobs(request.output, "prompt_logprobs", limits),
    )


def _num_outputs(params: pb.SamplingParams) -> int:
    if not params.HasField("num_outputs"):
        return 1
    if not 1 <= params.num_outputs <= MAX_OUTPUTS:
        raise InvalidFieldError("sampling.num_outputs", f"must be 1 to {MAX_OUTPUTS}, not {params.num_outputs}")
    return params.num_outputs


def _bias(params: pb.SamplingParams, limits: WorkerFacts) -> tuple[tuple[int, float], ...]:
    field, bias = "sampling.logit_bias", params.logit_bias
    if len(bias) > MAX_BIASES:
        raise InvalidFieldError(field, f"must be at most {MAX_BIASES} tokens, not {len(bias)}")
    check_token_ids(bias, field, limits)
    if not all(-100 <= value <= 100 for value in bias.values()):
        raise InvalidFieldError(field, "must be in [-100, 100]")
    return tuple(sorted(bias.items()))


def _float(params: pb.SamplingParams, name: _FloatName, low: float, high: float, default: float, above: bool = False) -> float:
    """The field's value in [low, high], or in (low, high] when it must be above."""
    if not params.HasField(name):
        return default
    value: float = getattr(params, name)
    if math.isnan(value) or not (low < value if above else low <= value) or value > high:
        raise InvalidFieldError(f"sampling.{name}", f"must be in {'(' if above else '['}{low:g}, {high:g}], not {value:g}")
    return value


# ---------------------------------------------------------------------------------------- stopping, output, scheduling


def _max_tokens(stopping: pb.StoppingParams, limits: WorkerFacts) -> int:
    if not stopping.HasField("max_tokens"):
        return 0
    if not 1 <= stopping.max_tokens < limits.max_model_len:
        what = f"must be 1 or more and below the model's length, {limits.max_model_len}, not {stopping.max_tokens}"
        raise InvalidFieldError("stopping.max_tokens", what)
    return stopping.max_tokens


def _stop_strings(stopping: pb.StoppingParams) -> tuple[str, ...]:
    """Checks how many stop tokens there are, too."""
    if len(stopping.stop) > MAX_STOP_STRINGS:
        raise InvalidFieldError("stopping.stop", f"must be at most {MAX_STOP_STRINGS} strings, not {len(stopping.stop)}")
    for i, string in enumerate(stopping.stop):
        if not 1 <= len(string) <= MAX_STOP_CHARACTERS:
            what = f"must have 1 to {MAX_STOP_CHARACTERS} characters, not {len(string)}"
            raise InvalidFieldError(f"stopping.stop[{i}]", what)
    if len(stopping.stop_token_ids) > MAX_STOP_TOKENS:
        what = f"must be at most {MAX_STOP_TOKENS} tokens, not {len(stopping.stop_token_ids)}"
        raise InvalidFieldError("stopping.stop_token_ids", what)
    return tuple(stopping.stop)


def _logprobs(output: pb.OutputParams, name: Literal["logprobs", "prompt_logprobs"], limits: WorkerFacts) -> int:
    """How many to tell of each token; −1: nothing."""
    if not output.HasField(name):
        return -1
    value: int = getattr(output, name)
    if value > MAX_LOGPROBS:
        raise InvalidFieldError(f"output.{name}", f"must be at most {MAX_LOGPROBS}, not {value}")
    if limits.device == "sim":
        raise UnsupportedFieldError(f"output.{name}", "by a simulated worker, which has no model")
    return value


def _check_scheduling(scheduling: pb.SchedulingParams) -> None:
    if scheduling.priority not in pb.PriorityClass.values():
        raise InvalidFieldError("scheduling.priority", f"must be a PriorityClass, not {scheduling.priority}")
    if scheduling.on_timeout not in pb.OnTimeout.values():
        raise InvalidFieldError("scheduling.on_timeout", f"must be an OnTimeout, not {scheduling.on_timeout}")
    if scheduling.HasField("tenant"):
        check_id("scheduling.tenant", scheduling.tenant)
        if not scheduling.tenant.isprintable():
            raise InvalidFieldError("scheduling.tenant", "must have printable characters only")
    if scheduling.HasField("max_time_ms") and scheduling.max_time_ms == 0:
        raise InvalidFieldError("scheduling.max_time_ms", "must be 1 or more")
    if len(scheduling.cache_salt) > MAX_SALT_CHARACTERS:
        what = f"must have at most {MAX_SALT_CHARACTERS} characters, not {len(scheduling.cache_salt)}"
        raise InvalidFieldError("scheduling.cache_salt", what)


def _resume_window(request: pb.GenerateRequest) -> int:
    window_ms: int = request.scheduling.resume_window_ms
    if window_ms > MAX_RESUME_WINDOW_MS:
        raise InvalidFieldError("scheduling.resume_window_ms", f"must be at most {MAX_RESUME_WINDOW_MS:,}, not {window_ms:,}")
    for name in ("logprobs", "prompt_logprobs"):
        if window_ms and request.output.HasField(name):
            raise UnsupportedFieldError(f"output.{name}", "together with scheduling.resume_window_ms")
    return window_ms


def _whole_by_deadline(request: pb.GenerateRequest, max_tokens: int) -> bool:
    """As it is asked for; else where the length is known in advance, and a part of it is of no use."""
    scheduling, stopping = request.scheduling, request.stopping
    if scheduling.HasField("whole_by_deadline"):
        return scheduling.whole_by_deadline
    known = stopping.ignore_eos and max_tokens > 0 and not stopping.stop and not stopping.stop_token_ids
    return known and scheduling.on_timeout != pb.ON_TIMEOUT_RETURN_PARTIAL
