"""`python -m scheduler replay FILE`, which is also `carousel replay`: the shipped core on the inputs of a recording.

It must plan, byte for byte, what it planned when it was recorded, in this process and in one with another hash seed; the first
difference is named. Reads files and starts itself again; opens no socket.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec
import numpy as np

from scheduler.command import OneLineCommand
from scheduler.core import Core
from scheduler.core.arrival import Elsewhere
from scheduler.core.core import ProtocolError
from scheduler.recorder import renewed
from scheduler.recording import Event, Recording, RecordingError, RecordingHeader, Verb
from wire import (
    AbortRequest,
    AddRequest,
    CancelQuery,
    Credit,
    Message,
    MovedRequest,
    RestoreRequest,
    SetPolicyQuery,
    StepPlan,
    StepResult,
    TruncateRequest,
    WorkerHello,
    encode,
)
from wire.messages import WITH_ARRAYS, Header

_CHILD_S = 3600
_MOST_DIFFERENCES = 8  # of a plan, shown


@dataclass(slots=True)
class Report:
    """What a replay found. `same`: every plan is the recorded one, and the recording was read to its end."""

    same: bool = False
    error: str = ""  # why the recording could not be read to its end
    difference: list[str] = field(default_factory=list)  # the first one, in lines
    failures: list[str] = field(default_factory=list)  # of the core, recorded and found again
    ended: str = ""  # why the recorder stopped before the service did
    events: int = 0
    inputs: int = 0  # events that the core was told, without the questions for a plan
    requests: int = 0
    refused: int = 0
    steps: int = 0  # plans
    output_tokens: int = 0
    epochs: int = 0
    seconds: float = 0.0  # that the recording covers
    wall_seconds: float = 0.0  # that the replay took
    digest: str = ""  # of all plans' bytes
    hash_seed: str = ""


class Replay:
    """The core, and what has come of the events so far."""

    def __init__(self, header: RecordingHeader) -> None:
        self.core = Core(header.core)
        self.report = Report(hash_seed=os.environ.get("PYTHONHASHSEED", "random"))
        self._digest = hashlib.blake2b(digest_size=16)
        self._first_ns = self._last_ns = 0
        self._failed: Exception | None = None  # raised by the core at the event before

    def run(self, events: Iterator[Event]) -> Report:
        """Up to the first difference or the recording's end."""
        started, report = time.monotonic(), self.report
        try:
            report.same = all(self._is_as_recorded(event) for event in events) and self._is_closed()
        except RecordingError as error:
            report.error = str(error)
        report.wall_seconds = time.monotonic() - started
        report.seconds = (self._last_ns - self._first_ns) / 1e9
        report.digest = self._digest.hexdigest()
        return report

    def _is_as_recorded(self, event: Event) -> bool:
        report = self.report
        report.events += 1
        report.inputs += event.verb not in (Verb.PLAN, Verb.FAILED, Verb.RENEWED)
        self._first_ns = self._first_ns or event.now
        self._last_ns = max(self._last_ns, event.now)
        if event.verb is Verb.FAILED:
            return self._is_found_again(event)
        if not self._is_closed():
            return False
        plan = None
        try:
            plan = self._do(event)
        except ProtocolError:
            return True  # the words of a worker that was given up for them
        except Exception as error:
            self._failed = error  # the next event is FAILED
            return True
        return event.verb is not Verb.PLAN or event.text != "" or self._is_same(event, plan)

    def _is_same(self, event: Event, plan: StepPlan | None) -> bool:
        frames = tuple(encode(plan)) if plan is not None else ()
        self.core.take_outputs()
        if frames != event.frames:
            assert event.message is None or isinstance(event.message, StepPlan)
            self._differs(event, _differences(event.message, plan))
            return False
        for frame in frames:
            self._digest.update(frame)
        self.report.steps += plan is not None
        return True

    def _is_found_again(self, event: Event) -> bool:
        if self._failed is None:
            self._differs(event, [f"recorded: the core failed with {event.text}; now it does not"])
            return False
        self.report.failures.append("".join(traceback.format_exception(self._failed)))
        self._failed = None
        return True

    def _is_closed(self) -> bool:
        """Whether nothing is left of the event before."""
        if self._failed is None:
            return True
        words = "the core fails here, and did not when it was recorded:"
        self.report.difference = [words, *"".join(traceback.format_exception(self._failed)).splitlines()]
        return False

    def _differs(self, event: Event, lines: list[str]) -> None:
        plan = event.message.header if isinstance(event.message, StepPlan) else None
        step = f", recorded as step {plan.epoch}.{plan.step_id}" if plan is not None else ""
        seconds = (event.now - self._first_ns) / 1e9 if event.now else 0.0
        place = f"event {self.report.events}, {event.verb.value}{step}, {seconds:.6f} s after the first"
        self.report.difference = [f"the first difference: {place}", *(f"  {line}" for line in lines)]

    def _do(self, event: Event) -> StepPlan | None:
        """Gives the core what it was given."""
        core, now, frontend = self.core, event.now, event.frontend
        match event.verb, event.message:
            case Verb.PLAN, _:
                return core.plan(now)
            case Verb.APPLY, StepResult() as result:
                core.apply(result, now)
                self.report.output_tokens += len(result.tokens)
            case Verb.ADD, AddRequest() as add:
                refused = core.add(add, frontend, now, Elsewhere(*map(int, event.text.split())))
                self.report.requests += refused is None
                self.report.refused += refused is not None
            case Verb.RESTORE, RestoreRequest() as restored:
                self.report.requests += core.restore(restored, frontend, now) == ""
            case Verb.GIVE, AbortRequest(handle=handle):
                core.give(frontend, handle, now)
            case Verb.TAKE, MovedRequest() as moved:
                core.take(moved, frontend, now)
                self.report.requests += 1
            case Verb.ABORT, AbortRequest(handle=handle):
                core.abort(frontend, handle, now)
            case Verb.CANCEL, CancelQuery(request_id=request_id):
                core.cancel(request_id, now)
            case Verb.TRUNCATE, TruncateRequest(handle=handle, num_output_tokens=num_outputs):
                core.truncate(frontend, handle, num_outputs, now)
            case Verb.CREDIT, Credit(handles=handles, num_tokens=num_tokens):
                core.credit(frontend, handles, num_tokens, now)
            case Verb.FRONTEND_LOST, _:
                core.frontend_lost(frontend, now)
            case Verb.WORKER_JOINED, WorkerHello(facts=facts):
                core.worker_joined(facts, now)
                self.report.epochs += 1
            case Verb.WORKER_LOST, _:
                core.worker_lost(now)
            case Verb.SET_POLICY, SetPolicyQuery(policy=policy):
                core.set_policy(policy, now)
            case Verb.DROP_ALL, _:
                core.drop_all(event.text, now)
            case Verb.DRAIN, _:
                core.drain()
            case Verb.RENEWED, _:
                self.core = renewed(core)
            case _:
                raise AssertionError(f"{event.verb.value} with {event.message}")
        return None


# ---------------------------------------------------------------------------------------------------------- differences


def _differences(recorded: StepPlan | None, now: StepPlan | None) -> list[str]:
    """Which fields of a plan differ, and where, in lines."""
    if recorded is None or now is None:
        return [f"recorded: {_outline(recorded)}; now: {_outline(now)}"]
    lines = [f"recorded: {_outline(recorded)}", f"now:      {_outline(now)}"]
    for name in ("group", "epoch", "step_id"):
        lines += _value_differences(name, getattr(recorded.header, name), getattr(now.header, name))
    lines += _start_differences(recorded, now)
    for name, _ in StepPlan.ARRAYS:
        lines += _array_differences(name, getattr(recorded, name), getattr(now, name))
    if len(lines) > _MOST_DIFFERENCES:
        lines[_MOST_DIFFERENCES:] = [f"… and {len(lines) - _MOST_DIFFERENCES} more"]
    return lines


def _outline(plan: StepPlan | None) -> str:
    if plan is None:
        return "no plan"
    return f"step {plan.header.epoch}.{plan.header.step_id} with {len(plan.slots)} rows, {int(plan.num_tokens.sum())} tokens"


def _value_differences(name: str, recorded: object, now: object) -> list[str]:
    return [] if recorded == now else [f"{name}: recorded {recorded}, now {now}"]


def _start_differences(recorded: StepPlan, now: StepPlan) -> list[str]:
    first, second = recorded.header.starts, now.header.starts
    lines = _value_differences("starts", f"{len(first)} entries", f"{len(second)} entries")
    for i, (mine, theirs) in enumerate(zip(first, second, strict=False)):
        for name in mine.__struct_fields__:
            lines += _value_differences(f"starts[{i}].{name}", getattr(mine, name), getattr(theirs, name))
    return lines


def _array_differences(name: str, recorded: np.ndarray[Any, Any], now: np.ndarray[Any, Any]) -> list[str]:
    if np.array_equal(recorded, now):
        return []
    shared = min(len(recorded), len(now))
    differing = (recorded[:shared] != now[:shared]).nonzero()[0]
    lengths = f"recorded {len(recorded)} entries, now {len(now)}; " if len(recorded) != len(now) else ""
    if not len(differing):
        return [f"{name}: {lengths}the same up to [{shared}]"]
    at = int(differing[0])
    return [f"{name}: {lengths}[{at}] recorded {recorded[at]}, now {now[at]}"]


# -------------------------------------------------------------------------------------------------------------- listing


def _line(number: int, event: Event, first_ns: int) -> str:
    """One event for people."""
    when = f"{(event.now - first_ns) / 1e9:12.6f}" if event.now else " " * 12
    return f"{number:8} {when} {event.verb.value:13} {_in_words(event)}".rstrip()


def _in_words(event: Event) -> str:
    match event.message:
        case AddRequest(header=header, prompt=prompt):
            tenant = f", tenant {header.tenant!r}" if header.tenant else ""
            deadline = f", deadline in {(header.deadline_ns - event.now) // 1_000_000} ms" if header.deadline_ns else ""
            outputs = f"{header.num_outputs} × " if header.num_outputs > 1 else ""
            return (
                f"front end {event.frontend}, {header.handle}: {header.request_id!r}, {len(prompt)} tokens"
                f" + {outputs}{header.max_tokens or 'any'}, class {header.priority}{tenant}{deadline}"
            )
        case RestoreRequest(header=restored, prompt=prompt, tokens=tokens):
            return f"{restored.add.request_id!r}, {len(prompt)} tokens and {len(tokens)} of its outputs"
        case MovedRequest(header=moved, prompt=prompt, tokens=tokens):
            return f"{moved.add.request_id!r}, {len(prompt)} tokens and {len(tokens)} of its outputs"
        case AbortRequest(handle=handle):
            return f"front end {event.frontend}, {handle}"
        case CancelQuery(request_id=request_id):
            return repr(request_id)
        case TruncateRequest(handle=handle, num_output_tokens=num_outputs):
            return f"front end {event.frontend}, {handle}: to {num_outputs} tokens"
        case Credit(handles=handles, num_tokens=num_tokens):
            taken = zip(handles.tolist(), num_tokens.tolist(), strict=False)
            return f"front end {event.frontend}: " + ", ".join(f"{handle} +{tokens}" for handle, tokens in taken)
        case WorkerHello(facts=facts):
            return f"{facts.description}: {facts.num_blocks} blocks of {facts.block_size}, {facts.max_batch_rows} rows"
        case SetPolicyQuery(policy=policy):
            return policy
        case StepPlan() as plan:
            return _plan_in_words(plan)
        case StepResult(header=header, tokens=tokens):
            return f"step {header.epoch}.{header.step_id}: {len(tokens)} tokens in {header.duration_ns / 1e6:.3f} ms"
    if event.verb is Verb.PLAN:
        return event.text or "none"
    return f"front end {event.frontend}" if event.verb is Verb.FRONTEND_LOST else event.text


def _plan_in_words(plan: StepPlan) -> str:
    parts = [_outline(plan)]
    for what, some in (
        ("starts", plan.header.starts),
        ("grown", plan.grow_slots),
        ("padding", plan.padding),
        ("ended", plan.ended),
        ("copied", plan.copy_to),
        ("swapped out", plan.swap_out_blocks),
        ("swapped in", plan.swap_in_blocks),
    ):
        if len(some):
            parts.append(f"{len(some)} {what}")
    return ", ".join(parts)


def _as_json(number: int, event: Event) -> str:
    """One event with all that it holds, on one line."""
    plain: dict[str, Any] = {"event": number, "verb": event.verb.value, "now": event.now}
    if event.frontend >= 0:
        plain["frontend"] = event.frontend
    if event.text:
        plain["text"] = event.text
    if event.message is not None:
        plain |= _message_fields(event.message)
    return json.dumps(plain, ensure_ascii=False)


def _message_fields(message: Message) -> dict[str, Any]:
    header = message if isinstance(message, Header) else message.header
    plain: dict[str, Any] = _named(header)
    cls = WITH_ARRAYS.get(type(header))
    return plain | {name: getattr(message, name).tolist() for name, _ in cls.ARRAYS} if cls is not None else plain


def _named(value: Any) -> Any:
    """Structs as dicts: on the wire they are arrays, which nobody can read."""
    if isinstance(value, msgspec.Struct):
        return {name: _named(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, tuple):
        return [_named(entry) for entry in value]
    return value.hex() if isinstance(value, bytes) else value


def list_events(recording: Recording, as_json: bool) -> int:
    """Prints all events; the exit code."""
    numbers, first_ns = count(recording.header.first_event + 1), 0
    try:
        for number, event in zip(numbers, recording.events(), strict=False):
            first_ns = first_ns or event.now
            print(_as_json(number, event) if as_json else _line(number, event, first_ns))
    except RecordingError as error:
        return _fail(str(error))
    return 0


# -------------------------------------------------------------------------------------------------------------- command


@click.command(
    cls=OneLineCommand, context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--hash-seeds",
    type=click.IntRange(1, 16),
    default=2,
    metavar="N",
    help="Replay in so many processes, each with another PYTHONHASHSEED; 1: only in this one.",
)
@click.option("--list", "lists", is_flag=True, help="Print the recorded events instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the report, or with --list one event a line.")
def replay_command(file: Path, hash_seeds: int, lists: bool, as_json: bool) -> NoReturn:
    """Run the core again on what a server recorded with --record, and compare what it plans, byte for byte.

    Exit code 0: every plan is the same. 1: one is not, or the recording is cut off, damaged, of another version, or begins
    midway.

    \b
    Examples:
      carousel serve --model ./my-checkpoint --record run.crec
      carousel replay run.crec
      carousel replay run.crec --list --json
    """
    try:
        recording = Recording(file)
        if lists:
            code = list_events(recording, as_json)
        elif recording.header.first_event:
            code = _fail(_begins_midway(recording))
        else:
            code = _replay(recording, file, hash_seeds, as_json)
    except RecordingError as error:
        code = _fail(str(error))
    sys.exit(code)


def _replay(recording: Recording, file: Path, hash_seeds: int, as_json: bool) -> int:
    children = [_child(file, seed) for seed in range(1, hash_seeds)]
    try:
        report = Replay(recording.header).run(recording.events())
        report.ended = recording.end
        others = [_finish(child) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    if as_json:
        print(json.dumps(asdict(report) | {"others": [asdict(other) for other in others]}))
    else:
        _say(recording.header, report, others)
    return 0 if report.same and all(other.same and other.digest == report.digest for other in others) else 1


def _child(file: Path, seed: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scheduler", "replay", str(file.absolute()), "--hash-seeds", "1", "--json"]
    environment = os.environ | {"PYTHONHASHSEED": str(seed)}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, text=True)


def _finish(child: subprocess.Popen[str]) -> Report:
    printed, _ = child.communicate(timeout=_CHILD_S)
    try:
        return msgspec.convert({k: v for k, v in json.loads(printed).items() if k != "others"}, Report)
    except (ValueError, AttributeError):
        return Report(error=f"the process exited with code {child.returncode} and said nothing")


def _say(header: RecordingHeader, report: Report, others: list[Report]) -> None:
    versions = f"carousel {header.carousel_version}, {header.date}"
    requests = f"{_counted(report.requests, 'request')} and {report.refused:,} refused"
    work = f"{_counted(report.steps, 'step')}, {_counted(report.output_tokens, 'output token')}"
    print(f"recording: {requests}, {work}, {_counted(report.epochs, 'epoch')}, {report.seconds:.3f} s ({versions})")
    for failure in report.failures:
        print(f"the core's failure that was recorded is here again:\n{failure.rstrip()}")
    if report.ended:
        print(f"           it ends before the service did: {report.ended}")
    verdict = "every plan is the same, byte for byte" if report.same else "not the same"
    if report.error and not report.difference:
        verdict = "every plan up to there is the same, byte for byte"
    if not report.steps and not report.difference:
        verdict = "there is no plan to compare"
    told = f"{_counted(report.inputs, 'input')}, {_counted(report.steps, 'plan')}"
    print(f"replay:    {told}: {verdict}; {report.wall_seconds:.3f} s, PYTHONHASHSEED {report.hash_seed}")
    for other in others:
        same = other.digest == report.digest and other.steps == report.steps
        print(f"           {'the same' if same else 'NOT the same'} with PYTHONHASHSEED {other.hash_seed or '?'}")
        if not same:
            print("\n".join(other.difference) or other.error)
    if report.difference:
        print("\n".join(report.difference))
        current = version("carousel-serve")
        if header.carousel_version != current:
            print(f"It was recorded by carousel {header.carousel_version}; this is {current}, which may decide otherwise.")
    if report.error:
        _fail(report.error)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _begins_midway(recording: Recording) -> str:
    header = recording.header
    why = f" (written because: {header.why})" if header.why else ""
    return (
        f"this recording begins midway, after {header.first_event:,} events that are gone{why}: "
        "it can't be replayed, but `carousel replay --list` shows what it holds"
    )


def _fail(words: str) -> int:
    sys.stdout.flush()
    print(f"carousel: {words}", file=sys.stderr)
    return 1
