"""Every field of GenerateRequest: what is refused, with which status and field; what is taken, and how it is understood."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from carousel.v1 import generation_pb2 as pb
from scheduler.errors import InvalidFieldError, UnsupportedFieldError
from scheduler.frontend.defaults import ModelDefaults
from scheduler.frontend.validation import Options, check_options, check_prompt_length, check_token_ids
from tests.helpers.fake_core import worker_facts

LIMITS = worker_facts(vocab_size=600, max_model_len=256)
GREEDY = ModelDefaults(0.0, 0, 1.0, 0.0, (2,))
SAMPLING = ModelDefaults(0.7, 20, 0.9, 0.05, (2, 599, 600))


def request(**fields: Any) -> pb.GenerateRequest:
    """A request with a prompt; `fields` by their group: sampling=dict(top_p=0.5)."""
    groups = {"sampling": pb.SamplingParams, "stopping": pb.StoppingParams, "output": pb.OutputParams}
    groups["scheduling"] = pb.SchedulingParams
    made = {name: groups[name](**value) if name in groups else value for name, value in fields.items()}
    return pb.GenerateRequest(**({"text": "a"} | made))


def check(message: pb.GenerateRequest, defaults: ModelDefaults = GREEDY) -> Options:
    return check_options(message, LIMITS, defaults)


INVALID = [
    ("request_id", dict(request_id="")),
    ("request_id", dict(request_id="x" * 129)),
    ("prompt", dict(text="")),
    ("prompt", dict(text=None)),
    ("prompt", dict(text=None, token_ids=pb.TokenIds())),
    ("prompt", dict(text=None, token_ids=pb.TokenIds(ids=[1] * 256))),
    *[("sampling.temperature", dict(sampling=dict(temperature=value))) for value in (-0.1, 100.1, math.nan, math.inf)],
    ("sampling.top_k", dict(sampling=dict(top_k=601))),
    *[("sampling.top_p", dict(sampling=dict(top_p=value))) for value in (0.0, -0.5, 1.1, math.nan, math.inf)],
    *[("sampling.min_p", dict(sampling=dict(min_p=value))) for value in (-0.1, 1.1, math.nan)],
    *[("sampling.repetition_penalty", dict(sampling=dict(repetition_penalty=value))) for value in (0.0, 10.5, math.nan)],
    *[("sampling.presence_penalty", dict(sampling=dict(presence_penalty=value))) for value in (-2.1, 2.1, math.nan)],
    *[("sampling.frequency_penalty", dict(sampling=dict(frequency_penalty=value))) for value in (-2.1, 2.1, -math.inf)],
    ("sampling.logit_bias", dict(sampling=dict(logit_bias={5: 100.5}))),
    ("sampling.logit_bias", dict(sampling=dict(logit_bias={5: math.nan}))),
    ("sampling.logit_bias", dict(sampling=dict(logit_bias={600: 1.0}))),
    ("sampling.logit_bias", dict(sampling=dict(logit_bias=dict.fromkeys(range(1025), 1.0)))),
    ("sampling.num_outputs", dict(sampling=dict(num_outputs=0))),
    ("sampling.num_outputs", dict(sampling=dict(num_outputs=65))),
    ("stopping.max_tokens", dict(stopping=dict(max_tokens=0))),
    ("stopping.max_tokens", dict(stopping=dict(max_tokens=256))),
    ("stopping.max_tokens", dict(stopping=dict(max_tokens=2**32 - 1))),
    ("stopping.min_tokens", dict(stopping=dict(max_tokens=5, min_tokens=6))),
    ("stopping.min_tokens", dict(stopping=dict(min_tokens=257))),
    ("stopping.stop", dict(stopping=dict(stop=["x"] * 17))),
    ("stopping.stop[1]", dict(stopping=dict(stop=["x", ""]))),
    ("stopping.stop[0]", dict(stopping=dict(stop=["x" * 257]))),
    ("stopping.stop_token_ids", dict(stopping=dict(stop_token_ids=[1] * 65))),
    ("stopping.stop_token_ids", dict(stopping=dict(stop_token_ids=[600]))),
    ("output.logprobs", dict(output=dict(logprobs=21))),
    ("output.prompt_logprobs", dict(output=dict(prompt_logprobs=21))),
    ("scheduling.priority", dict(scheduling=dict(priority=4))),
    ("scheduling.on_timeout", dict(scheduling=dict(on_timeout=3))),
    ("scheduling.tenant", dict(scheduling=dict(tenant=""))),
    ("scheduling.tenant", dict(scheduling=dict(tenant="x" * 129))),
    ("scheduling.tenant", dict(scheduling=dict(tenant="a\nb"))),
    ("scheduling.tenant", dict(scheduling=dict(tenant="\x1b[2J"))),
    ("scheduling.max_time_ms", dict(scheduling=dict(max_time_ms=0))),
    ("scheduling.cache_salt", dict(scheduling=dict(cache_salt="x" * 257))),
    ("scheduling.resume_window_ms", dict(scheduling=dict(resume_window_ms=600_001))),
]


@pytest.mark.parametrize(("field", "fields"), INVALID)
def test_out_of_range_is_refused_with_the_field(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        check(request(**fields))
    assert caught.value.field == field
    assert caught.value.status == "INVALID_ARGUMENT"
    assert str(caught.value).startswith(field)


UNSUPPORTED = [
    ("output.logprobs", dict(output=dict(logprobs=0))),
    ("output.prompt_logprobs", dict(output=dict(prompt_logprobs=5))),
]


@pytest.mark.parametrize(("field", "fields"), UNSUPPORTED)
def test_what_can_not_be_honoured_is_refused_by_name(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        check(request(**fields))
    assert caught.value.field == field and caught.value.status == "UNIMPLEMENTED"


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_log_probabilities_are_not_kept_for_a_resume_and_that_is_said(name: str) -> None:
    limits = worker_facts(vocab_size=600, max_model_len=256, device="cpu")
    asked = request(output={name: 0}, scheduling=dict(resume_window_ms=1))
    with pytest.raises(UnsupportedFieldError, match="together with scheduling") as caught:
        check_options(asked, limits, GREEDY)
    assert caught.value.field == f"output.{name}"
    asked.scheduling.resume_window_ms = 0
    assert check_options(asked, limits, GREEDY).resume_window_ms == 0
    asked = request(scheduling=dict(resume_window_ms=600_000))
    assert check_options(asked, limits, GREEDY).resume_window_ms == 600_000


def test_neutral_values_are_taken() -> None:
    check(
        request(
            sampling=dict(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, num_outputs=1),
            scheduling=dict(on_timeout=pb.ON_TIMEOUT_FAIL, cache_salt="", resume_window_ms=0),
        )
    )


def test_logprobs_reach_a_worker_that_has_a_model() -> None:
    limits = msgspec.structs.replace(LIMITS, device="cpu")
    spec = check_options(request(output=dict(logprobs=0, prompt_logprobs=20)), limits, GREEDY).sampling
    assert (spec.logprobs, spec.prompt_logprobs) == (0, 20)
    assert check(request()).sampling.logprobs == check(request()).sampling.prompt_logprobs == -1


def test_penalties_and_bias_reach_the_worker() -> None:
    sampling = dict(repetition_penalty=1.25, presence_penalty=-2.0, frequency_penalty=0.5, logit_bias={9: -100.0, 5: 1.5})
    spec = check(request(sampling=sampling)).sampling
    assert (spec.repetition_penalty, spec.presence_penalty, spec.frequency_penalty) == (1.25, -2.0, 0.5)
    assert spec.logit_bias == ((5, 1.5), (9, -100.0))


def test_limits_themselves_are_taken() -> None:
    sampling = dict(temperature=100.0, top_k=600, top_p=1.0, min_p=1.0, seed=2**64 - 1, num_outputs=64)
    stopping = dict(max_tokens=255, min_tokens=255, stop=["x" * 256] * 16, stop_token_ids=[599] * 64)
    scheduling = dict(tenant="é" * 128, cache_salt="\n" * 256, max_time_ms=2**32 - 1)
    options = check(request(request_id="x" * 128, sampling=sampling, stopping=stopping, scheduling=scheduling))
    assert (options.request_id, options.max_tokens, options.stop) == ("x" * 128, 255, ("x" * 256,) * 16)
    assert (options.tenant, options.cache_salt, options.num_outputs) == ("é" * 128, "\n" * 256, 64)
    assert options.max_time_ns == (2**32 - 1) * 1_000_000
    spec = options.sampling
    assert (spec.temperature, spec.top_k, spec.top_p, spec.min_p, spec.seed) == (100.0, 600, 1.0, 1.0, 2**64 - 1)
    assert (spec.min_tokens, spec.stop_token_ids) == (255, (599, 2))


def test_absent_fields_get_the_models_defaults() -> None:
    options = check(request(), SAMPLING)
    spec = options.sampling
    assert (spec.temperature, spec.top_k, spec.top_p, spec.min_p) == (0.7, 20, 0.9, 0.05)
    assert spec.stop_token_ids == (2, 599), "an end token beyond the vocabulary can't be drawn"
    assert (options.max_tokens, options.priority, options.text, options.echo) == (0, 2, True, False)
    assert (options.num_outputs, options.tenant, options.cache_salt, options.max_time_ns) == (1, "", "", 0)
    assert not options.partial_at_deadline and not options.whole_by_deadline
    uuid.UUID(options.request_id)


def test_zero_is_not_unset() -> None:
    spec = check(request(sampling=dict(temperature=0.0, top_k=0, min_p=0.0, seed=0)), SAMPLING).sampling
    assert (spec.temperature, spec.top_k, spec.top_p, spec.min_p, spec.seed) == (0.0, 0, 0.9, 0.0, 0)


def test_a_temperature_turns_sampling_on_where_the_model_is_greedy() -> None:
    spec = check(request(sampling=dict(temperature=0.5))).sampling
    assert (spec.temperature, spec.top_k, spec.top_p, spec.min_p) == (0.5, 0, 1.0, 0.0)


def test_absent_seeds_differ() -> None:
    assert check(request()).sampling.seed != check(request()).sampling.seed


def test_ignore_eos_leaves_the_requests_own_stop_tokens() -> None:
    stopping = dict(ignore_eos=True, stop_token_ids=[7, 8, 7])
    assert check(request(stopping=stopping)).sampling.stop_token_ids == (7, 8)


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        (pb.PRIORITY_CLASS_UNSPECIFIED, 2),
        (pb.PRIORITY_CLASS_BATCH, 1),
        (pb.PRIORITY_CLASS_NORMAL, 2),
        (pb.PRIORITY_CLASS_INTERACTIVE, 3),
    ],
)
def test_priority_classes(given: int, understood: int) -> None:
    assert check(request(scheduling=dict(priority=given))).priority == understood


@pytest.mark.parametrize(
    ("act", "field"),
    [
        (lambda: check_prompt_length(0, 0, LIMITS), "prompt"),
        (lambda: check_prompt_length(256, 0, LIMITS), "prompt"),
        (lambda: check_prompt_length(250, 7, LIMITS), "stopping.max_tokens"),
        (lambda: check_token_ids([1, 600], "prompt.token_ids", LIMITS), "prompt.token_ids"),
    ],
)
def test_prompts_beyond_the_model_are_refused(act: Callable[[], None], field: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        act()
    assert caught.value.field == field


def test_prompts_that_just_fit_are_taken() -> None:
    check_prompt_length(255, 1, LIMITS)
    check_prompt_length(255, 0, LIMITS)
    check_token_ids([0, 599], "prompt.token_ids", LIMITS)
