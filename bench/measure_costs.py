"""`python -m bench.measure_costs --model DIR`: how long the worker's steps take on this machine, as a table for the simulator.

Steps of many kinds go through the real executor, without sockets: decodes of some rows at some context, chunks of prompts, both
together. A step's time is then the sum of parts (cost_models.Table), fitted to the medians; how well it fits the mixed steps,
which the fit has not seen, is told and goes into the file.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track

from bench import provenance
from bench.cost_models import Curve, StepWork, Table
from bench.fit import Floats, hats, relative
from bench.roofline import SHAPES
from wire import PlanHeader, SamplingSpec, SequenceStart, StepFailed, StepPlan, StepResult, WorkerFacts
from wire.messages import I32
from worker import openmp

if TYPE_CHECKING:
    from worker.model_executor import ModelExecutor

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CONTEXTS = (16, 128, 512, 1536, 4096)
_CHUNKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_ROOM = 64  # tokens that a sequence can go on for, behind its context
_GREEDY = SamplingSpec(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


@dataclass(frozen=True)
class Kind:
    """A step: some decodes, each with so many tokens in the cache before, and at most one chunk."""

    decodes: int
    context: int = 0
    chunk: int = 0
    chunk_context: int = 0
    samples: bool = True  # the chunk is its prompt's last

    @property
    def rows(self) -> int:
        return self.decodes + (self.chunk > 0)

    @property
    def work(self) -> StepWork:
        n, before = self.chunk, self.chunk_context
        return StepWork(
            decodes=self.decodes,
            decode_context=self.decodes * (self.context + 1),
            chunks=int(n > 0),
            chunk_tokens=n,
            chunk_context=before + n if n else 0,
            chunk_pairs=n * before + n * (n + 1) // 2,
            sampled=self.decodes + (n > 0 and self.samples),
        )


def kinds(facts: WorkerFacts) -> tuple[list[Kind], list[Kind]]:
    """Those to fit, and mixed ones to see how well it fits; as far as rows, step, pool and model allow."""
    most = facts.max_model_len - _ROOM
    decodes = [Kind(rows, context) for rows in _ROWS for context in _CONTEXTS]
    chunks = [Kind(0, chunk=n, samples=samples) for n in _CHUNKS for samples in (False, True)]
    later = [Kind(0, chunk=n, chunk_context=before) for n in (16, 64, 256, 512) for before in (512, 1536, 4096)]
    mixed = [Kind(rows, 256, n, before) for rows in (2, 8, 24, 48) for n in (32, 192) for before in (0, 768)]

    def fits(kind: Kind) -> bool:
        blocks = longest_context(facts) // facts.block_size + kind.decodes * (kind.context // facts.block_size + 2)
        blocks += (kind.chunk_context + kind.chunk) // facts.block_size + 1
        longest = max(kind.context + 1, kind.chunk_context + kind.chunk)
        tokens = kind.decodes + kind.chunk
        return (
            kind.rows < facts.max_batch_rows
            and tokens <= facts.max_step_tokens
            and longest <= most
            and blocks <= facts.num_blocks
        )

    return [kind for kind in (*decodes, *chunks, *later) if fits(kind)], [kind for kind in mixed if fits(kind)]


def longest_context(facts: WorkerFacts) -> int:
    """Of the kinds' contexts, that the model allows."""
    return max((context for context in _CONTEXTS if context < facts.max_model_len - _ROOM), default=0)


class Bench:
    """An executor, and plans for it. One sequence computes a long text at first; whoever needs something in the cache gets
    copies of its blocks, as the worker takes no other blocks for computed."""

    def __init__(self, executor: ModelExecutor, longest: int) -> None:
        self.facts = executor.facts
        self._executor = executor
        self._random = np.random.default_rng(0)
        self._step = self._sequence = 0
        self._source = 0  # slot
        self._source_blocks = np.arange(1, longest // self.facts.block_size + 1, dtype=np.int32)
        start = self._start(self._source, 0, longest, len(self._source_blocks))
        plan = StepPlan(self._header(start), start_tokens=self._text(longest), start_blocks=self._source_blocks)
        for first in range(0, longest, self.facts.max_step_tokens):
            plan.slots = np.array([self._source], np.uint16)
            plan.num_tokens = np.array([min(self.facts.max_step_tokens, longest - first)], np.int32)
            self._do(plan)
            plan = StepPlan(self._header())

    def nanoseconds(self, kind: Kind, repeats: int) -> float:
        """The median of so many steps, after one to warm up."""
        took = []
        for repeat in range(1 + repeats):
            if not repeat or kind.chunk:
                self._do(self._setup(kind, 1 + repeats, again=repeat > 0))
            counts = [1] * kind.decodes + [kind.chunk] * (kind.chunk > 0)
            plan = StepPlan(self._header(), np.array(counts, np.int32))
            plan.slots = np.arange(1, len(counts) + 1, dtype=np.uint16)
            took.append(self._do(plan))
        self._do(StepPlan(self._header(), ended=np.arange(1, kind.rows + 1, dtype=np.uint16)))
        return statistics.median(took[1:])

    def _setup(self, kind: Kind, steps: int, again: bool) -> StepPlan:
        """The sequences of the step come, with what they have in the cache."""
        size, slot = self.facts.block_size, 0
        starts, tokens = [], []
        copies: list[tuple[I32, I32]] = []
        next_block = len(self._source_blocks) + 1

        def start(computed: int, known: int, room: int) -> None:
            nonlocal slot, next_block
            assert computed % size == 0
            slot += 1
            blocks, filled = -(-room // size), computed // size
            starts.append(self._start(slot, computed, known, blocks))
            tokens.append(self._text(known))
            copies.append((self._source_blocks[:filled], np.arange(next_block, next_block + filled, dtype=np.int32)))
            next_block += blocks

        for _ in range(kind.decodes):
            start(kind.context, kind.context + 1, kind.context + 1 + steps)
        if kind.chunk:
            end = kind.chunk_context + kind.chunk
            start(kind.chunk_context, end + (not kind.samples), end)
        plan = StepPlan(self._header(*starts), start_tokens=np.concatenate(tokens))
        plan.start_blocks = np.arange(len(self._source_blocks) + 1, next_block, dtype=np.int32)
        plan.copy_from, plan.copy_to = (np.concatenate(blocks) for blocks in zip(*copies, strict=True))
        if again:
            plan.ended = np.arange(1, kind.rows + 1, dtype=np.uint16)
        return plan

    def _start(self, slot: int, computed: int, known: int, num_blocks: int) -> SequenceStart:
        self._sequence += 1
        return SequenceStart(slot, self._sequence, 0, known, known, computed, num_blocks, _GREEDY)

    def _text(self, count: int) -> I32:
        return self._random.integers(0, self.facts.vocab_size, count).astype(np.int32)

    def _header(self, *starts: SequenceStart) -> PlanHeader:
        return PlanHeader(0, 0, -1, starts)

    def _do(self, plan: StepPlan) -> int:
        """The worker's time for it."""
        plan.header.step_id = self._step
        self._step += 1
        took: list[int] = []

        def deliver(result: StepResult | StepFailed) -> None:
            if isinstance(result, StepFailed):
                raise RuntimeError(result.message)
            took.append(result.header.duration_ns)

        self._executor.submit(plan, deliver)
        return took[0]


def fit(samples: Sequence[tuple[Kind, float]], facts: WorkerFacts, about: dict[str, Any]) -> Table:
    """The table whose sums come nearest to the samples, by relative error."""
    works = [kind.work for kind, _ in samples]
    took = np.array([nanoseconds for _, nanoseconds in samples])
    tokens, sampled, rows = (
        np.array(column, float) for column in zip(*((w.tokens, w.sampled, w.decodes) for w in works), strict=True)
    )
    context = np.array([w.decode_context for w in works], float)
    at_tokens, at_sampled, at_rows = (np.unique(column[column > 0]) for column in (tokens, sampled, rows))
    matrix = np.concatenate(
        [
            hats(at_tokens, tokens),
            hats(at_sampled, sampled) * (sampled > 0)[:, None],
            hats(at_rows, rows) * context[:, None],
            np.array([[w.chunk_pairs] for w in works], float),
        ],
        axis=1,
    )
    found = relative(matrix, took)
    first, second = len(at_tokens), len(at_tokens) + len(at_sampled)
    return Table(
        tokens=_curve(at_tokens, found[:first]),
        sampled=_curve(at_sampled, found[first:second]),
        context=_curve(at_rows, found[second:-1]),
        chunk_pair=float(found[-1]),
        facts={name: getattr(facts, name) for name in WorkerFacts.__struct_fields__},
        about=about,
    )


def _curve(at: Floats, value: Floats) -> Curve:
    return Curve(tuple(at.tolist()), tuple(value.tolist()))


def errors(table: Table, samples: Sequence[tuple[Kind, float]]) -> Floats:
    """Relative ones."""
    return np.array([table.step_ns(kind.work) / took - 1 for kind, took in samples])


def as_json(table: Table, samples: Sequence[tuple[Kind, float]]) -> dict[str, Any]:
    """What cost_models.read_table reads."""
    points = {
        name: [list(point) for point in zip(curve.at, curve.value, strict=True)]
        for name, curve in (("tokens", table.tokens), ("sampled", table.sampled), ("context", table.context))
    }
    measured = [{"ns": took} | {name: value for name, value in asdict(kind).items() if value} for kind, took in samples]
    return table.about | {"facts": table.facts, "ns": points | {"chunk_pair": table.chunk_pair}, "samples": measured}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A checkpoint.")
@click.option("--shape", type=click.Choice([*SHAPES]), help="Or random weights of this shape, in float32.")
@click.option("--threads", type=click.IntRange(1), help="[default: one per core]")
@click.option("--batch-rows", type=click.IntRange(1), default=64)
@click.option("--step-tokens", type=click.IntRange(1), default=512)
@click.option("--kv-memory-gib", type=click.FloatRange(0, min_open=True), default=2.0)
@click.option("--repeats", type=click.IntRange(1), default=5, help="Steps of each kind; the median counts.")
@click.option("--out", type=click.Path(path_type=Path), help="[default: bench/results/step_costs_NAME.json]")
def main(model: Path | None, shape: str | None, repeats: int, out: Path | None, **options: Any) -> None:
    """Measure how long the CPU worker's steps take, for `carousel simulate --costs`. Leave the machine alone meanwhile."""
    if (model is None) == (shape is None):
        raise click.UsageError("give one of --model DIR and --shape NAME")
    openmp.set_defaults()  # as the worker does, before torch is loaded
    name = shape if model is None else model.resolve().parent.name if model.name == "model" else model.name
    with tempfile.TemporaryDirectory() as folder:
        if shape is not None:
            from bench import random_checkpoint

            model = random_checkpoint.write(SHAPES[shape], Path(folder))
        assert model is not None
        line = measure(model, str(name), repeats, **options)
    path = out or Path("bench/results") / f"step_costs_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(provenance.rounded(line), indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)


def measure(
    model: Path, name: str, repeats: int, *, threads: int | None, batch_rows: int, step_tokens: int, kv_memory_gib: float
) -> dict[str, Any]:
    from worker.config import WorkerConfig
    from worker.model_executor import ModelExecutor

    config = WorkerConfig(
        "ipc://none",
        str(model),
        device="cpu",
        threads=threads,
        max_batch_rows=batch_rows + 1,  # and the one whose blocks are copied
        max_step_tokens=step_tokens,
        kv_memory_gib=kv_memory_gib,
    )
    executor = ModelExecutor.of(config, model)
    bench = Bench(executor, longest_context(executor.facts))
    to_fit, to_check = kinds(bench.facts)
    samples = list(_measured(bench, [*to_fit, *to_check], repeats))
    about = provenance.provenance("step costs") | {"model": name, "worker": bench.facts.description, "repeats": repeats}
    table = fit(samples[: len(to_fit)], bench.facts, about)
    for what, some in (("fitted", samples[: len(to_fit)]), ("mixed, not fitted", samples[len(to_fit) :])):
        if some:
            error = np.abs(errors(table, some))
            about[f"error {what}"] = {"median": float(np.median(error)), "worst": float(error.max()), "kinds": len(some)}
            print(f"{what}: median error {np.median(error):.1%}, worst {error.max():.1%}, {len(some)} kinds", file=sys.stderr)
    table.facts["max_batch_rows"] -= 1
    return as_json(table, samples)


def _measured(bench: Bench, wanted: Sequence[Kind], repeats: int) -> Iterator[tuple[Kind, float]]:
    console = Console(stderr=True)
    for kind in track(wanted, "measuring", console=console, transient=True, disable=not console.is_terminal):
        yield kind, bench.nanoseconds(kind, repeats)


if __name__ == "__main__":
    main()
