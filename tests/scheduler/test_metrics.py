"""Names, buckets and vLLM's names of the metrics; what a live server exports is tested end to end."""

from __future__ import annotations

import itertools

import pytest
from prometheus_client import CollectorRegistry

from scheduler import metrics
from scheduler.core import Core, CoreConfig
from scheduler.frontend.ledger import Ended
from scheduler.metrics import MOST_TENANTS, OTHER_TENANTS, RequestMetrics, core_families, vllm_alias
from scheduler.step_meter import INTER_TOKEN_SECONDS, STEP_SECONDS, STEP_TOKENS, StepMeter
from wire import Distribution, Facts, RequestStats

FACTS = Facts("0", "continuous", 0, True, False, "", 64, 8, 10, 100)
MS = 1_000_000


def ended(**changes: object) -> Ended:
    stats = RequestStats(20, 5, 10, 0, 0, 3 * MS, 4 * MS, 90 * MS, 0, 7 * MS, 0)
    told: dict[str, object] = {"request_id": "r", "core_id": "r", "tenant": "a", "status": "OK", "message": "", "refusal": ""}
    told |= {"stats": stats, "is_whole": True, "finish_reasons": ("length",), "is_resumed": False, "is_detached": False}
    told |= {"arrival_ns": 100 * MS, "first_ns": 108 * MS, "ended_ns": 200 * MS, "trace": {}}
    return Ended(**(told | changes))  # type: ignore[arg-type]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> tuple[RequestMetrics, CollectorRegistry]:
    """A front end's, kept in this process."""
    registry = CollectorRegistry()
    monkeypatch.setattr(metrics, "CollectorRegistry", lambda: registry)
    return RequestMetrics(), registry


def test_what_became_of_a_request_is_counted_once(requests: tuple[RequestMetrics, CollectorRegistry]) -> None:
    counted, registry = requests
    counted.ended(ended())
    counted.ended(ended(status="INVALID_ARGUMENT", refusal="INVALID_ARGUMENT", stats=RequestStats(), finish_reasons=()))
    counted.ended(ended(status="CANCELLED", is_whole=False, finish_reasons=(), is_detached=True))
    counted.ended(ended(status="CANCELLED", is_whole=False, finish_reasons=(), first_ns=0))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"carousel_{name}", labels)

    assert [value("requests_ended_total", status=status) for status in ("OK", "INVALID_ARGUMENT", "CANCELLED")] == [1, 1, 2]
    assert value("requests_refused_total", reason="INVALID_ARGUMENT") == 1
    assert value("requests_finished_total", reason="length") == 1
    assert value("time_to_first_token_seconds_count") == 1 and value("time_to_first_token_seconds_sum") == 0.008
    assert value("e2e_request_latency_seconds_sum") == 0.1
    assert value("request_time_per_output_token_seconds_sum") == pytest.approx(0.01)  # 90 ms, nine tokens after the first
    assert value("tenant_tokens_total", tenant="a", kind="output") == 20  # the detached one goes on, and is not counted yet


def test_a_resumed_request_has_the_times_of_its_first_call(requests: tuple[RequestMetrics, CollectorRegistry]) -> None:
    counted, registry = requests
    counted.ended(ended(is_resumed=True))
    assert registry.get_sample_value("carousel_time_to_first_token_seconds_sum") == 0.007
    assert registry.get_sample_value("carousel_e2e_request_latency_seconds_sum") == pytest.approx(0.097)


def test_tenants_are_bounded(requests: tuple[RequestMetrics, CollectorRegistry]) -> None:
    counted, registry = requests
    for number in [*range(MOST_TENANTS + 10), 0]:
        counted.ended(ended(tenant=f"t{number}"))

    def tokens(tenant: str) -> float | None:
        return registry.get_sample_value("carousel_tenant_tokens_total", {"tenant": tenant, "kind": "output"})

    assert (tokens("t0"), tokens(f"t{MOST_TENANTS}"), tokens(OTHER_TENANTS)) == (20, None, 100)


def families() -> list[metrics.Metric]:
    core = Core(CoreConfig(max_batch_rows=4, max_step_tokens=64))
    return list(core_families(StepMeter(4).reply(core, FACTS, 1), "the model"))


def test_every_name_of_vllms_stands_for_one_of_ours(requests: tuple[RequestMetrics, CollectorRegistry]) -> None:
    mine = families() + list(requests[1].collect())
    assert {family.name for family in mine} >= set(metrics._ALIASES)
    for family in mine:
        alias = vllm_alias(family, "the model")
        assert (alias is None) == (family.name not in metrics._ALIASES)
        for sample in alias.samples if alias is not None else ():
            assert sample.name.startswith("vllm:") and sample.labels["model_name"] == "the model"


def test_no_name_stands_for_two_things(requests: tuple[RequestMetrics, CollectorRegistry]) -> None:
    names = [sample.name for family in families() + list(requests[1].collect()) for sample in family.samples[:1]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("bounds", [STEP_SECONDS, STEP_TOKENS, INTER_TOKEN_SECONDS])
def test_bounds_rise(bounds: tuple[float, ...]) -> None:
    assert all(less < more for less, more in itertools.pairwise(bounds))


def test_buckets_count_all_that_is_not_above_them() -> None:
    family = metrics._histogram("h", "", Distribution((1.0, 2.0), (3, 0, 4), 30.5))
    told = {(sample.name, sample.labels.get("le")): sample.value for sample in family.samples}
    assert told == {
        ("h_bucket", "1.0"): 3,
        ("h_bucket", "2.0"): 3,
        ("h_bucket", "+Inf"): 7,
        ("h_count", None): 7,
        ("h_sum", None): 30.5,
    }
