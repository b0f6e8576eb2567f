"""Recordings as `carousel serve --record` writes them, of the shipped core on a virtual clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from bench.cost_models import Line
from bench.jobs import Job, Part
from bench.runs import Run
from bench.simulator import Setup, Simulation
from scheduler.core import Core, CoreConfig
from scheduler.recorder import Recorded, RecordingFile
from tests.helpers.fake_worker import worker_facts

MS = 1_000_000
COSTS = Line(2e6, 20e3, 50e3, 40.0, {})


def record(path: Path, jobs: Iterable[Job], *, num_blocks: int = 60, rows: int = 4, policy: str = "continuous") -> Run:
    """Requests share what parts of prompts with the same key share."""
    facts = worker_facts(num_blocks=num_blocks, block_size=16, max_model_len=400, max_batch_rows=rows, max_step_tokens=64)
    config = CoreConfig(policy=policy, max_batch_rows=rows, max_step_tokens=64)
    file = RecordingFile(path, replace(config, max_unread_tokens=1 << 30))
    simulation = Simulation(
        Setup(facts, COSTS, config),
        iter(jobs),
        shares_prefixes=True,
        core_of=lambda config: Recorded(Core(config), file),  # type: ignore[arg-type,return-value]
    )
    done = simulation.run()
    file.close()
    return done


def jobs_of_all_kinds() -> list[Job]:
    """Chunked and shared prompts, two outputs, a cancel, and more tokens in the end than a pool of 30 blocks holds."""
    return [
        Job(0, (Part(1, 64), Part(10, 90)), 60),
        Job(1 * MS, (Part(1, 64), Part(11, 20)), 80, num_outputs=2),
        Job(2 * MS, (Part(12, 40),), 120),
        Job(3 * MS, (Part(13, 70),), 100, cancel_ns=60 * MS),
        *(Job((4 + i) * MS, (Part(20 + i, 20 + 9 * i),), 60 + 40 * i) for i in range(6)),
    ]
