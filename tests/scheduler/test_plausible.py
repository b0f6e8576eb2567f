"""Whatever the samples of the wire say is meant; absurd variants of them are not."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from scheduler import plausible
from tests.wire.samples import SAMPLES
from wire import AddRequest, Credit, Message, ResumeQuery, TruncateRequest, WireError

[ADD] = [message for message in SAMPLES if isinstance(message, AddRequest)]


def test_no_sample_is_absurd() -> None:
    for message in SAMPLES:
        if not isinstance(message, AddRequest):
            plausible.check(message)
    plausible.check(changed(handle=7))
    plausible.check(changed(handle=2**32 - ADD.header.num_outputs))


def changed(**fields: object) -> AddRequest:
    return AddRequest(msgspec.structs.replace(ADD.header, **fields), ADD.prompt)


def sampled(**fields: object) -> AddRequest:
    return changed(sampling=msgspec.structs.replace(ADD.header.sampling, **fields))


@pytest.mark.parametrize(
    "message",
    [
        Credit(num_tokens=np.ones(1, np.int32), handles=np.ones(2, np.uint32)),
        TruncateRequest(1, -1),
        ResumeQuery(1, "a", 2**32),
        changed(handle=-1),
        changed(handle=2**32 - 1, num_outputs=2),
        changed(num_outputs=-1),
        changed(max_tokens=-1),
        changed(deadline_ns=-1),
        changed(arrival_ns=2**63),
        changed(resume_window_ms=-1),
        sampled(temperature=float("inf")),
        sampled(logit_bias=((1, float("nan")),)),
        sampled(min_tokens=-1),
        sampled(logprobs=-2),
    ],
)
def test_what_can_not_be_meant_is_refused(message: Message) -> None:
    with pytest.raises(WireError):
        plausible.check(message)
