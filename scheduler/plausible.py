"""Whether a well-formed message can be meant: ranges and lengths that its types do not say. What can't be is malformed, and
goes no further; so nobody's absurd number becomes everybody's failure of the core. Pure.
"""

from __future__ import annotations

import math

from wire import (
    AddRequest,
    Credit,
    Logprobs,
    Message,
    ResumeQuery,
    SamplingSpec,
    StepResult,
    TruncateRequest,
    WireError,
)

_HANDLES = 1 << 32
_MOST_OUTPUTS = 1 << 16
_MOST_TOKENS = 1 << 31
_MOST_NS = 1 << 62
_MOST_WINDOW_MS = 1 << 40


def check(message: Message) -> None:
    """Raises WireError."""
    match message:
        case Credit(num_tokens=num_tokens, handles=handles):
            _need(len(num_tokens) == len(handles), f"Credit: {len(num_tokens)} numbers for {len(handles)} handles")
        case AddRequest():
            _check_add(message)
        case TruncateRequest(num_output_tokens=count):
            _need(0 <= count < _MOST_TOKENS, f"TruncateRequest: to {count} tokens")
        case ResumeQuery(handle=handle):
            _need(0 <= handle <= _HANDLES - _MOST_OUTPUTS, f"ResumeQuery: handle {handle}")
        case StepResult(header=header):
            _need(0 <= header.duration_ns < _MOST_NS, f"StepResult: {header.duration_ns} ns")
        case Logprobs(header=header):
            for run in header.runs:
                least = min(run.row, run.position, run.num_tokens, run.num_best)
                most = max(run.row, run.position, run.num_tokens, run.num_best)
                _need(least >= 0 and most < _MOST_TOKENS, f"Logprobs: {run}")


def _check_add(add: AddRequest) -> None:
    header = add.header
    outputs = header.num_outputs
    _need(0 <= outputs < _MOST_OUTPUTS, f"AddRequest: {outputs} outputs")
    _need(0 <= header.handle <= _HANDLES - max(outputs, 1), f"AddRequest: handle {header.handle}")
    _need(0 <= header.max_tokens < _MOST_TOKENS, f"AddRequest: at most {header.max_tokens} tokens")
    _need(0 <= header.arrival_ns < _MOST_NS and 0 <= header.deadline_ns < _MOST_NS, "AddRequest: a time that never comes")
    _need(0 <= header.resume_window_ms < _MOST_WINDOW_MS, f"AddRequest: a window of {header.resume_window_ms} ms")
    _check_sampling(header.sampling)


def _check_sampling(sampling: SamplingSpec) -> None:
    numbers = (
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        *(bias for _, bias in sampling.logit_bias),
    )
    _need(all(map(math.isfinite, numbers)), "AddRequest: a sampling parameter that is no finite number")
    counts = (sampling.top_k, sampling.min_tokens, sampling.logprobs + 1, sampling.prompt_logprobs + 1)
    _need(all(0 <= count < _MOST_TOKENS for count in counts), "AddRequest: a sampling parameter out of range")


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise WireError(what)
