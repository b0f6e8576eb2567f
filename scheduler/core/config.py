"""What the core is told once, at its start."""

from __future__ import annotations

from dataclasses import dataclass


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
    max_crashes: int = 2  # a request that ran in more failed steps or lost workers than this ends with ERROR

    def __post_init__(self) -> None:
        for name in ("max_batch_rows", "max_step_tokens", "max_queue_requests", "max_queue_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_batch_rows > 65_535:
            raise ValueError(f"max_batch_rows is at most 65535, not {self.max_batch_rows}")
        if self.static_batch_size < 0 or self.max_crashes < 0:
            raise ValueError("static_batch_size and max_crashes are at least 0")
