"""`python -m demo.run`: 24 requests at once through a real server with continuous batching, then the same with static.

Starts the server as a user would, streams the tokens, shows who held which row of the batch in which step, compares the two
runs, stops everything. Exit code 0: done; 1: something failed, and its last words are shown; 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import os
import queue
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from carousel.v1 import control_pb2, inspect_pb2
from client import CarouselClient, CarouselError
from demo import callers, record, timeline
from demo.figures import Figures, Outcome, comparison, differences, figures
from demo.interrupts import Interrupted, Interrupts
from demo.picture import picture
from demo.server import CAROUSEL, DemoServer, ServerFailedError
from demo.views import View, colored, view_for
from demo.workload import MAX_TOKENS, MEAN_TOKENS, PAUSE_TOKENS, Work, workload

MODEL = Path(__file__).parent / "model"
_PLAIN_WIDTH = 110
_LAST_STEPS_S = 2.0  # how long the last step's record may come after the last token
_STALLED_S = 60.0  # a run in which nothing happens for so long has failed
_POLL_S = 0.1
_WARM_UPS, _WARM_TOKENS = 20, 32


class RunFailedError(Exception):
    """A request of the demo was refused or broke, or nothing comes any more. server_lines: the last that the server said."""

    def __init__(self, message: str, server_lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.server_lines = server_lines


@dataclass(frozen=True)
class Stage:
    """Where the demo plays."""

    console: Console
    interrupts: Interrupts
    command: Sequence[str]  # what is started as `carousel`


@dataclass
class Run:
    """Everything that was seen of one policy."""

    policy: str
    server: control_pb2.GetServerInfoResponse
    model: control_pb2.GetModelInfoResponse
    pause_s: float
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    steps: list[inspect_pb2.WatchStepsResponse] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return self.server.max_batch_rows

    def figures(self) -> Figures:
        return figures(list(self.outcomes.values()), self.steps, self.num_rows, self.model.block_size)

    def differences(self, other: Run) -> dict[str, int]:
        return differences(list(self.outcomes.values()), list(other.outcomes.values()))


def run_policy(policy: str, works: list[Work], arguments: argparse.Namespace, stage: Stage, first: Run | None) -> Run:
    """One server, all requests, and the server's end. first: the run to compare with; requests come at the same times."""
    options = ["--model", arguments.model, "--device", arguments.device, "--policy", policy]
    options += ["--max-batch-rows", str(arguments.rows), "--drain-timeout", "2"]
    console = stage.console
    server = DemoServer(
        options, lambda line: console.out(f"  {line}", style="dim", highlight=False), stage.interrupts, stage.command
    )
    console.out(f"$ {server.shown}", style="bold", highlight=False)
    with server, CarouselClient(server.target) as client:
        seen = Watch(stage.interrupts)
        try:
            with callers.watch(client, seen.queue):
                alone_s = _warm_up(client, seen)
                pause_s = first.pause_s if first is not None else alone_s * PAUSE_TOKENS
                run = Run(policy, client.server_info(), client.model_info(), pause_s)
                with view_for(console, works, run.num_rows, policy, with_text=first is None) as view:
                    _turn(client, works, seen, view, run)
        except (RunFailedError, CarouselError) as error:
            raise RunFailedError(str(error), server.last_lines()) from None
    return run


class Watch:
    """What callers see, one after the other; ends by exception when one failed, when nothing comes, or by a signal."""

    def __init__(self, interrupts: Interrupts) -> None:
        self.queue: callers.SeenQueue = queue.SimpleQueue()
        self.quiet_since_s = time.monotonic()
        self._interrupts = interrupts

    def next(self, timeout_s: float = _POLL_S) -> callers.Seen | None:
        """What was seen next, None if nothing was in this time."""
        self._interrupts.check()
        try:
            event = self.queue.get(timeout=max(0.0, min(timeout_s, _POLL_S)))
        except queue.Empty:
            if time.monotonic() - self.quiet_since_s > _STALLED_S:
                raise RunFailedError(f"no token came for {_STALLED_S:g} s") from None
            return None
        if isinstance(event, callers.Failed):
            raise RunFailedError(f"{event.who} failed: {event.error}")
        self.quiet_since_s = time.monotonic()
        return event


def _warm_up(client: CarouselClient, seen: Watch) -> float:
    """Short requests until the watcher has seen a step, so that what follows is measured warm and seen from its first step on.

    Returns the seconds that a token takes one request alone.
    """
    for number in range(_WARM_UPS):
        callers.send(client, Work(f"warm-up {number}", "def ", _WARM_TOKENS, 0), seen.queue)
        steps_came = False
        while not isinstance(event := seen.next(), callers.Ended):
            steps_came |= isinstance(event, inspect_pb2.WatchStepsResponse)
        if steps_came:
            return (event.outcome.ended_s - event.outcome.first_token_s) / _WARM_TOKENS
    raise RunFailedError("the server answers, and shows no steps")


def _turn(client: CarouselClient, works: list[Work], seen: Watch, view: View, run: Run) -> None:
    """Sends the opener; when its first token is there, the crowd; then the rest in their time. Until all have ended."""
    opener, *others = works
    ids = {callers.request_id(work) for work in works}
    due: list[tuple[float, Work]] = []  # when to send, soonest first
    crowd_came = False
    callers.send(client, opener, seen.queue)
    while True:
        now = time.monotonic()
        while due and due[0][0] <= now:
            callers.send(client, due.pop(0)[1], seen.queue)
        if len(run.outcomes) == len(works) and (_all_left(run.steps, ids) or now - seen.quiet_since_s > _LAST_STEPS_S):
            return
        event = seen.next(due[0][0] - now if due else _POLL_S)
        match event:
            case None:
                continue
            case inspect_pb2.WatchStepsResponse():
                if run.steps or any(row.request_id in ids for row in event.rows):
                    run.steps.append(event)
            case callers.Text() if not crowd_came:
                crowd_came = True
                due = [(now + work.after_crowd * run.pause_s, work) for work in others]
            case callers.Ended(outcome):
                run.outcomes[outcome.label] = outcome
        view.show(event)


def _all_left(steps: list[inspect_pb2.WatchStepsResponse], ids: set[str]) -> bool:
    return ids <= {leave.request_id for step in steps for leave in step.leaves}


# ------------------------------------------------------------------------------------------------------------ afterwards


def show_timelines(console: Console, runs: Sequence[Run], works: list[Work]) -> None:
    """Both runs at the same scale, so that the longer one looks longer."""
    labels = {callers.request_id(work): work.label for work in works}
    per_column = timeline.steps_per_column(max(len(run.steps) for run in runs), console.width)
    for line in ("", "Who held which row in which step", *timeline.LEGEND):
        console.out(line, highlight=False)
    for run in runs:
        columns = "one column is one step" if per_column == 1 else f"one column is {per_column} steps"
        console.out(f"\n{run.policy}: {len(run.steps)} steps, {columns}", highlight=False)
        for line in timeline.chart(run.steps, labels, run.num_rows, per_column):
            console.print(colored(line), no_wrap=True)
        console.out("joined and left:", highlight=False)
        for line in timeline.joins_and_leaves(run.steps, labels, console.width):
            console.out(line, highlight=False)
        if skipped := sum(step.skipped_steps for step in run.steps):
            console.out(f"({skipped} steps went by unseen: the watcher was too slow)", highlight=False)


def show_comparison(console: Console, continuous: Run, static: Run) -> None:
    new, old = continuous.figures(), static.figures()
    console.out("\nThe same requests under both policies", highlight=False)
    console.print(comparison(new, old), highlight=False)
    different = continuous.differences(static)
    same = f"{len(continuous.outcomes) - len(different)} of {len(continuous.outcomes)}"
    console.out(f"Tokens: {same} requests got exactly the same tokens from both.", highlight=False)
    if different:
        places = ", ".join(f"{label} from token {position}" for label, position in sorted(different.items()))
        console.out(f"Others: {places}. Two tokens can be equally likely to the last bit but one.", highlight=False)
    faster, sooner = new.tokens_per_s / old.tokens_per_s, old.e2e_p50_s / new.e2e_p50_s
    ratio = f"{faster:.2f}x the throughput, and the middle request is done {sooner:.2f}x sooner"
    console.out(f"Continuous ÷ static on the same requests: {ratio}.", highlight=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description="See the batch turn, and what that is worth.")
    parser.add_argument("--model", default=os.path.relpath(MODEL), help="checkpoint directory or hub id (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="as in carousel serve (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the output lengths (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="add the figures to this file, as one JSON line")
    parser.add_argument("--svg", metavar="FILE", help="draw both batches over time into this file")
    parser.add_argument("--plain", action="store_true", help="lines instead of the live picture, on a terminal too")
    return parser.parse_args(argv)


def demo(arguments: argparse.Namespace, stage: Stage) -> None:
    began_s, console = time.monotonic(), stage.console
    works = workload(arguments.seed)
    tokens = sum(work.max_tokens for work in works)
    console.out(f"{len(works)} requests, {tokens} tokens to make, {arguments.rows} rows in the batch.\n", highlight=False)
    continuous = run_policy("continuous", works, arguments, stage, first=None)
    console.out("\nThe same requests with static batching: a batch runs until its last request has ended.", highlight=False)
    static = run_policy("static", works, arguments, stage, first=continuous)
    show_timelines(console, (continuous, static), works)
    show_comparison(console, continuous, static)
    if arguments.json:
        asked = {"seed": arguments.seed, "requests": len(works), "mean_tokens": MEAN_TOKENS, "max_tokens": MAX_TOKENS}
        same = len(works) - len(continuous.differences(static))
        new, old = continuous.figures(), static.figures()
        record.append(arguments.json, record.record(continuous.server, continuous.model, asked, new, old, same))
    if arguments.svg:
        labels = {callers.request_id(work): work.label for work in works}
        panels = [(f"{run.policy} batching", run.steps) for run in (continuous, static)]
        Path(arguments.svg).write_text(picture(panels, labels, arguments.rows))
    console.out(f"Both servers are stopped. All of it took {time.monotonic() - began_s:.0f} s.", highlight=False)


def main(argv: Sequence[str] | None = None, command: Sequence[str] = CAROUSEL) -> int:
    """command: what is started in place of `carousel`. Returns the exit code."""
    arguments = _parse(argv)
    interrupts = Interrupts()
    interrupts.install()
    plain = arguments.plain or not sys.stdout.isatty()
    console = Console(force_terminal=False if plain else None, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        demo(arguments, Stage(console, interrupts, command))
        return 0
    except RunFailedError as error:
        for line in error.server_lines:
            console.out(f"  {line}", highlight=False)
        print(f"demo: {error}", file=sys.stderr)
    except ServerFailedError as error:
        print(f"demo: {error}", file=sys.stderr)
    except Interrupted as error:
        print("demo: interrupted; the server is stopped", file=sys.stderr)
        return 128 + error.number
    return 1


if __name__ == "__main__":
    sys.exit(main())
