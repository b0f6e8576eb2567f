"""The metrics: their names, and what each process adds to them. Front ends and the supervisor count in files of a private
folder (prometheus_client's multiprocess mode), the core counts by itself and is asked; `exporter.py` puts both together.

Imported only by processes of a server with metrics on, after PROMETHEUS_MULTIPROC_DIR was set. Knows no sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from scheduler.frontend.ledger import Ended
from wire import Distribution, GroupLoadReply, LoadReply, MetricsReply

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own
OTHER_TENANTS = "other"
MOST_TENANTS = 64  # that a front end tells apart; all further ones are counted together

# Seconds. First tokens of short prompts come after 10 ms, those of long ones or of a full queue after minutes.
_FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
_REQUEST = (
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
)
_WAIT = (0.001, 0.01, *_REQUEST)
_PER_TOKEN = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class RequestMetrics:
    """A front end's: what became of requests."""

    def __init__(self) -> None:
        registry = CollectorRegistry()  # what is exported is read from the files

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"carousel_{name}", what, labels, registry=registry)

        def histogram(name: str, what: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"carousel_{name}", what, registry=registry, buckets=tuple(buckets))

        self._ended = counter("requests_ended", "Requests whose call is over, by gRPC status.", "status")
        self._finished = counter("requests_finished", "Requests that ended well, by why their first output ended.", "reason")
        self._refused = counter("requests_refused", "Requests that were not accepted, by why.", "reason")
        self._tenant_tokens = counter("tenant_tokens", "Tokens of requests that ended.", "tenant", "kind")
        self._first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the end, of those that ended well.", _REQUEST)
        self._queue = histogram("request_queue_time_seconds", "From arrival to the first step.", _WAIT)
        self._prefill = histogram("request_prefill_time_seconds", "From the first step to the first token.", _REQUEST)
        self._decode = histogram(
            "request_decode_time_seconds", "From the first token to the last, preemptions left out.", _REQUEST
        )
        self._preempted = histogram("request_preempted_time_seconds", "Waited after preemptions, of those preempted.", _WAIT)
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "A request's mean time between tokens.", _PER_TOKEN
        )
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._output = histogram("request_output_tokens", "Output tokens of a request, all its outputs.", _TOKENS)
        self._tenants: set[str] = set()
        for reason in ("stop", "length"):  # there from the start, so that a rate can be told from the first one on
            self._finished.labels(reason)
        self._ended.labels("OK")

    def ended(self, ended: Ended) -> None:
        self._ended.labels(ended.status).inc()
        if ended.refusal:
            self._refused.labels(ended.refusal).inc()
            return
        if ended.is_detached:  # it goes on, and is counted when it has ended
            return
        if ended.first_token_ns:
            self._first_token.observe(ended.first_token_ns / 1e9)
        self._count_tokens(ended)
        if ended.is_whole:
            self._observe(ended)
        if ended.status == "OK":
            self._finished.labels(ended.finish_reasons[0]).inc()
            self._whole.observe(ended.whole_ns / 1e9)

    def _observe(self, ended: Ended) -> None:
        stats = ended.stats
        self._queue.observe(stats.queued_ns / 1e9)
        self._prompt.observe(stats.prompt_tokens)
        self._output.observe(stats.output_tokens)
        if stats.preempted_ns:
            self._preempted.observe(stats.preempted_ns / 1e9)
        if stats.first_token_ns:
            self._prefill.observe(stats.prefill_ns / 1e9)
            self._decode.observe(stats.decode_ns / 1e9)
            per_output = stats.output_tokens // len(ended.finish_reasons)
            if per_output > 1:
                self._per_token.observe((stats.decode_ns + stats.preempted_ns) / 1e9 / (per_output - 1))

    def _count_tokens(self, ended: Ended) -> None:
        """Tenants may be whatever callers write: only so many are told apart."""
        tenant, stats = ended.tenant, ended.stats
        if tenant not in self._tenants:
            if len(self._tenants) < MOST_TENANTS:
                self._tenants.add(tenant)
            else:
                tenant = OTHER_TENANTS
        self._tenant_tokens.labels(tenant, "prompt").inc(stats.prompt_tokens)
        self._tenant_tokens.labels(tenant, "output").inc(stats.output_tokens)


class RestartMetrics:
    """The supervisor's: which processes it had to start again."""

    def __init__(self, roles: Iterable[str]) -> None:
        what = "Times that a process of the server was started again."
        self._restarts = Counter("carousel_process_restarts", what, ["role"], registry=CollectorRegistry())
        for role in roles:
            self._restarts.labels(role)

    def restarted(self, role: str) -> None:
        self._restarts.labels(role).inc()


# ------------------------------------------------------------------------------------------------------------------- the core


def core_families(reply: MetricsReply, model: str) -> Iterator[Metric]:
    """What the core counts, as it stands."""
    load, facts = reply.load, reply.facts
    held_slots, prompt_tokens = max(1, load.held_blocks * reply.block_size), load.prompt_tokens
    worker = facts.workers[0][2] if facts.workers else None
    told = {"version": facts.version, "model_name": model, "policy": facts.policy}
    told |= {"device": worker.device if worker else "", "dtype": worker.dtype if worker else ""}
    info = GaugeMetricFamily("carousel_server_info", "1, with what is served in the labels.", labels=list(told))
    info.add_metric(list(told.values()), 1)
    yield info
    blocks = GaugeMetricFamily(
        "carousel_kv_blocks", "Blocks of the KV cache, by state; all states are the pool.", labels=["state"]
    )
    states = {
        "free": load.free_blocks,
        "cached": load.cached_blocks,
        "held": load.held_blocks,
        "retiring": load.retiring_blocks,
    }
    for state, number in states.items():
        blocks.add_metric([state], number)
    yield blocks
    gauges: dict[str, tuple[str, float]] = {
        "ready": ("1 while requests are taken.", facts.ready),
        "epoch": ("Counts up whenever a worker joins or its mirror is made anew.", reply.epoch),
        "requests_running": ("Requests in the batch.", load.running_requests),
        "requests_waiting": ("Requests that wait, preempted ones too.", load.waiting_requests),
        "queue_tokens": ("Prompt tokens that wait.", load.waiting_tokens),
        "kv_blocks_shared": ("Blocks held by more than one sequence.", reply.shared_blocks),
        "kv_usage_ratio": ("Part of the blocks that can't be taken now, 0 to 1.", _usage(load)),
        "kv_waste_ratio": ("Part of the slots of held blocks without a token, 0 to 1.", reply.empty_slots / held_slots),
        "kv_tokens": ("Tokens with keys and values, of all in the batch.", load.kv_tokens),
        "host_blocks_held": ("Blocks of host memory with swapped sequences.", load.held_host_blocks),
        "prefix_hit_ratio": ("Prompt tokens from the cache, since the start.", load.cached_tokens / max(1, prompt_tokens)),
    }
    for name, (what, value) in gauges.items():
        yield GaugeMetricFamily(f"carousel_{name}", what, value=value)
    counters: dict[str, tuple[str, float]] = {
        "steps": ("Steps planned.", load.steps),
        "prompt_tokens": ("Prompt tokens of requests admitted.", load.prompt_tokens),
        "prefix_hit_tokens": ("Of these, tokens found in the prefix cache.", load.cached_tokens),
        "output_tokens": ("Tokens generated.", load.output_tokens),
        "recomputed_tokens": ("Tokens computed again after preemptions.", load.recomputed_tokens),
        "preemptions": ("Times that a sequence lost its place in the batch.", load.preemptions),
        "swapped_blocks": ("Blocks copied between device and host.", load.swapped_blocks),
        "requests_accepted": ("Requests that the core took.", load.accepted_requests),
        "requests_cancelled": ("Requests that were cancelled, or whose reader went.", load.cancelled_requests),
        "core_refused": ("Requests that the core refused.", load.refused_requests),
    }
    for name, (what, value) in counters.items():
        yield CounterMetricFamily(f"carousel_{name}", what, value=value)
    yield from _of_groups(reply)
    yield _histogram("carousel_step_duration_seconds", "A step, by the worker's clock.", reply.step_seconds)
    yield _histogram("carousel_step_tokens", "Tokens computed in a step.", reply.step_tokens)
    yield _histogram("carousel_inter_token_latency_seconds", "Between two tokens of an output.", reply.inter_token_seconds)


def _of_groups(reply: MetricsReply) -> Iterator[Metric]:
    """What differs between worker groups, by the label `group`, where there are several; all else is summed over them."""
    gauges: dict[str, tuple[str, Callable[[GroupLoadReply], float]]] = {
        "worker_up": ("1 while the group has a worker.", lambda group: group.has_worker),
        "epoch": ("Counts up whenever a worker joins the group.", lambda group: group.epoch),
        "requests_running": ("Requests in the group's batch.", lambda group: group.load.running_requests),
        "requests_waiting": ("Requests that wait in the group.", lambda group: group.load.waiting_requests),
        "kv_usage_ratio": ("Part of the group's blocks that can't be taken now, 0 to 1.", lambda group: _usage(group.load)),
    }
    for name, (what, value) in gauges.items() if reply.groups else ():
        family = GaugeMetricFamily(f"carousel_group_{name}", what, labels=["group"])
        for group in reply.groups:
            family.add_metric([str(group.group)], value(group))
        yield family


def _usage(load: LoadReply) -> float:
    return (load.held_blocks + load.retiring_blocks) / max(1, load.total_blocks)


def _histogram(name: str, what: str, distribution: Distribution) -> Metric:
    buckets, below = [], 0
    for bound, count in zip((*map(str, distribution.bounds), "+Inf"), distribution.counts, strict=True):
        below += count
        buckets.append((bound, below))
    return HistogramMetricFamily(name, what, buckets=buckets, sum_value=distribution.total)


# ------------------------------------------------------------------------------------------------------------- vLLM's names

# Ours and theirs, where the meaning is the same; a counter's or histogram's name without its ending.
_ALIASES = {
    "carousel_requests_running": "vllm:num_requests_running",
    "carousel_requests_waiting": "vllm:num_requests_waiting",
    "carousel_kv_usage_ratio": "vllm:kv_cache_usage_perc",
    "carousel_preemptions": "vllm:num_preemptions",
    "carousel_prompt_tokens": "vllm:prompt_tokens",
    "carousel_output_tokens": "vllm:generation_tokens",
    "carousel_requests_finished": "vllm:request_success",
    "carousel_step_tokens": "vllm:iteration_tokens_total",
    "carousel_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "carousel_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "carousel_request_time_per_output_token_seconds": "vllm:request_time_per_output_token_seconds",
    "carousel_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "carousel_request_queue_time_seconds": "vllm:request_queue_time_seconds",
    "carousel_request_prefill_time_seconds": "vllm:request_prefill_time_seconds",
    "carousel_request_decode_time_seconds": "vllm:request_decode_time_seconds",
    "carousel_request_prompt_tokens": "vllm:request_prompt_tokens",
    "carousel_request_output_tokens": "vllm:request_generation_tokens",
}


def vllm_alias(family: Metric, model: str) -> Metric | None:
    """The family as dashboards for vLLM look for it."""
    theirs = _ALIASES.get(family.name)
    if theirs is None:
        return None
    alias = Metric(theirs, family.documentation, family.type)
    for sample in family.samples:
        labels = {"finished_reason" if key == "reason" else key: value for key, value in sample.labels.items()}
        labels |= {"model_name": model, "engine": "0"}
        alias.add_sample(theirs + sample.name.removeprefix(family.name), labels, sample.value)
    return alias
