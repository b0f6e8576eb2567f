"""What the core is told once, at its start."""

from __future__ import annotations

from dataclasses import dataclass

_MOST_PER_S = 1_000_000
EVERY_TENANT = "*"  # stands for the tenants that have no entry of their own


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What one tenant gets, or each of those without an entry (`name` "*")."""

    name: str
    weight: int = 1  # its share of the tokens served, against the others' weights
    max_blocks: int = 0  # most blocks that its sequences may hold at a time, one that several share for each; 0: no quota
    max_requests: int = 0  # most requests that it may have alive at a time, waiting or running; 0: no limit
    max_requests_per_s: int = 0  # most a second, in the long run; so many may come at once; 0: no limit

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError('a tenant needs a name; "*" stands for all that are not listed')
        if self.weight < 1 or min(self.max_blocks, self.max_requests, self.max_requests_per_s) < 0:
            raise ValueError(f"tenant {self.name!r}: weight is at least 1, all other limits at least 0")
        if self.max_requests_per_s > _MOST_PER_S:
            raise ValueError(f"tenant {self.name!r}: at most {_MOST_PER_S} requests a second can be counted")


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """Limits and policy. Those that depend on the model come with the worker's facts."""

    policy: str = "continuous"
    group: int = 0
    max_batch_rows: int = 64  # sequences in the batch; at most 65,535 and at most what the worker sized for
    max_step_tokens: int = 512  # token budget of a step; likewise
    max_queue_requests: int = 4096  # waiting requests
    max_queue_tokens: int = 4_000_000  # prompt tokens of the waiting requests
    static_batch_size: int = 0  # rows of a static batch; 0: as many as max_batch_rows and the reservation allow
    max_crashes: int = 2  # after so many failed steps or lost workers the same rows run in halves; one alone ends with ERROR
    prefix_caching: bool = True
    target_itl_ns: int = 100_000_000  # chunks of prompts are cut so that a step with decodes keeps to it; 0: no target
    max_preemptions: int = 3  # after so many a request comes back only with all its blocks reserved, and stays
    oldest_every: int = 16  # one admission in so many goes to whoever waits longest, so that nobody starves
    max_unread_tokens: int = 1024  # tokens of one output that its reader has not taken; then it stops being scheduled
    input_token_weight: int = 1  # of a prompt token in the tenants' counters
    output_token_weight: int = 2
    first_epoch: int = 0  # epochs count from here: no worker takes a core for the one before it
    tenants: tuple[TenantLimits, ...] = ()  # none: every tenant has weight 1 and no quota; without "*" nobody else is served

    def __post_init__(self) -> None:
        for name in ("max_batch_rows", "max_step_tokens", "max_queue_requests", "max_queue_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_batch_rows > 65_535:
            raise ValueError(f"max_batch_rows is at most 65535, not {self.max_batch_rows}")
        for name in ("max_crashes", "oldest_every", "max_unread_tokens", "input_token_weight", "output_token_weight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.first_epoch < 0:
            raise ValueError("first_epoch is at least 0")
        if self.target_itl_ns < 0 or self.max_preemptions < 0:
            raise ValueError("target_itl_ns and max_preemptions are at least 0")
        names = [tenant.name for tenant in self.tenants]
        if len(set(names)) != len(names):
            raise ValueError(f"a tenant is listed twice: {', '.join(sorted(names))}")
        if self.static_batch_size < 0:
            raise ValueError("static_batch_size is at least 0")
