"""Tenants with a limit of requests, at a time or a second: who is refused, with which delay, and who is not concerned."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import CoreConfig
from scheduler.core.config import TenantLimits
from scheduler.core.tenants import Tenants
from tests.helpers.core_driver import CoreDriver, Tracked
from tests.helpers.fake_worker import worker_facts
from wire import Refused

SECOND = 1_000_000_000


def driver(*tenants: TenantLimits) -> CoreDriver:
    facts = worker_facts(num_blocks=40, max_batch_rows=8, max_step_tokens=64)
    return CoreDriver(CoreConfig(max_batch_rows=8, max_step_tokens=64, tenants=tenants), facts)


def refused(answer: Tracked | Refused) -> Refused:
    assert isinstance(answer, Refused)
    return answer


def test_a_tenant_has_so_many_requests_at_a_time_and_the_others_have_theirs() -> None:
    core = driver(TenantLimits("a", max_requests=2), TenantLimits("*"))
    for _ in range(2):
        core.accepted([1, 2], 3, tenant="a")
    answer = refused(core.add([1], 3, tenant="a", handle=77))
    assert (answer.handle, answer.code, answer.message) == (
        77,
        "RESOURCE_EXHAUSTED",
        "tenant 'a' may have 2 requests at a time",
    )
    assert answer.details == {"reason": "TENANT_REQUESTS", "max_requests": "2"} and answer.retry_after_ns == SECOND
    for _ in range(5):
        core.accepted([1, 2], 3, tenant="b")
    core.finish()
    core.accepted([1, 2], 3, tenant="a")
    core.finish()


def test_everybody_without_an_entry_has_the_common_limit_for_themselves() -> None:
    core = driver(TenantLimits("*", max_requests=1))
    core.accepted([1], 3, tenant="a")
    core.accepted([1], 3, tenant="b")
    assert refused(core.add([1], 3, tenant="a")).code == refused(core.add([1], 3, tenant="b")).code == "RESOURCE_EXHAUSTED"
    core.finish()


def test_a_tenant_begins_so_many_requests_a_second_and_hears_when_to_come_again() -> None:
    core = driver(TenantLimits("a", max_requests_per_s=4), TenantLimits("*"))
    core.now, core.tick = 10 * SECOND, 0
    for _ in range(4):
        core.accepted([1], 1, tenant="a")
    answer = refused(core.add([1], 1, tenant="a"))
    assert (answer.code, answer.message) == ("RESOURCE_EXHAUSTED", "tenant 'a' may send 4 requests a second")
    assert answer.details == {"reason": "TENANT_RATE", "max_requests_per_s": "4"} and answer.retry_after_ns == SECOND // 4
    core.accepted([1], 1, tenant="b")
    core.now += answer.retry_after_ns - 1
    assert refused(core.add([1], 1, tenant="a")).retry_after_ns == 1
    core.now += 1
    core.accepted([1], 1, tenant="a")
    assert refused(core.add([1], 1, tenant="a")).retry_after_ns == SECOND // 4
    core.tick = 10
    core.finish()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.lists(st.integers(0, SECOND // 2), min_size=1, max_size=80))
def test_who_waits_as_told_is_accepted_and_in_the_long_run_no_more_than_the_rate(rate: int, pauses: list[int]) -> None:
    tenants = Tenants(CoreConfig(tenants=(TenantLimits("a", max_requests_per_s=rate),)))
    now, accepted = 5 * SECOND, []
    for pause in pauses:
        now += pause
        wait_ns = tenants.wait_ns(0, now)
        assert 0 <= wait_ns <= SECOND // rate + 1
        assert tenants.wait_ns(0, now + wait_ns) == 0
        if not wait_ns:
            tenants.count(0, now)
            accepted.append(now)
        # So many at once, and as many in the second after that.
        assert sum(now - SECOND < at for at in accepted) <= 2 * rate
    assert len(accepted) <= rate + (now - accepted[0]) * rate / SECOND + 1
