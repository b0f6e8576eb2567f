"""Replay: the same inputs give the same plans in every process, and the first plan that differs is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from scheduler.core import Core, CoreConfig
from scheduler.core.config import TenantLimits
from scheduler.core.explain import explain
from scheduler.core.observe import block_tables, list_requests
from scheduler.recorder import CoreFailureError, Recorded, RecordingFile, Ring
from scheduler.recording import Event, Recording, RecordingHeader, RecordingWriter, Verb, pack
from scheduler.replay import Replay, Report
from tests.helpers.churn import Churn
from wire import StepPlan

ROOT = Path(__file__).parents[2]
CONFIG = CoreConfig(
    max_batch_rows=6,
    max_step_tokens=16,
    max_crashes=5,
    max_unread_tokens=8,
    max_queue_requests=6,
    target_itl_ns=2_000_000,
    tenants=(TenantLimits("a", weight=3, max_blocks=15), TenantLimits("*")),
)


def record(path: Path, seed: int, moves: int = 500, config: CoreConfig = CONFIG, churn: type[Churn] = Churn) -> Path:
    file = RecordingFile(path, config)
    some = churn(Recorded(Core(config), file), seed)
    some.run(moves)
    some.finish()
    file.close()
    return path


def replayed(path: Path) -> Report:
    recording = Recording(path)
    return Replay(recording.header).run(recording.events())


def changed(path: Path, change: Callable[[list[Event]], None]) -> Path:
    """The same recording with other events in it."""
    recording = Recording(path)
    events = list(recording.events())
    change(events)
    writer = RecordingWriter(path.with_suffix(".changed").open("wb"), recording.header)
    for event in events:
        writer.write(pack(event), event.now)
    writer.close()
    return path.with_suffix(".changed")


def command(path: Path, *options: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "client", "replay", str(path), *options]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recording") / "a.rec", seed=7)


# ---------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("policy", ["continuous", "static", "prefill_first"])
@pytest.mark.parametrize("seed", range(4))
def test_everything_that_can_happen_replays_to_the_byte(policy: str, seed: int, tmp_path: Path) -> None:
    path = record(tmp_path / "a.rec", seed, config=replace(CONFIG, policy=policy))
    report = replayed(path)
    assert report.same and not report.difference and not report.error, report.difference
    assert report.steps > 100 and report.requests > 20 and report.refused > 0 and report.epochs > 1


class Curious(Churn):
    """Asks about everything before every move."""

    def ask(self) -> None:
        core = self.core.core
        core.load(1)
        list_requests(core, 2, 0, 100)
        block_tables(core, 3)
        assert core.next_wakeup_ns >= 0
        for _, _, request_id in self.added[-5:]:
            explain(core, request_id, self.now)
        core.check_invariants()


def test_questions_change_nothing(tmp_path: Path) -> None:
    asked, unasked = (record(tmp_path / churn.__name__, 5, churn=churn) for churn in (Curious, Churn))
    first, second = replayed(asked), replayed(unasked)
    assert first.same and second.same and first.digest == second.digest


def test_the_command_replays_under_other_hash_seeds_too(recording: Path) -> None:
    done = command(recording, "--hash-seeds", "3", "--json", hash_seed="77")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["same"] and [other["hash_seed"] for other in report["others"]] == ["1", "2"]
    assert {other["digest"] for other in report["others"]} == {report["digest"]}
    assert report["hash_seed"] == "77"


def test_the_command_says_what_it_did(recording: Path) -> None:
    done = command(recording)
    report = replayed(recording)
    assert done.returncode == 0 and done.stderr == ""
    assert f"{report.steps:,} steps" in done.stdout and f"{report.requests:,} requests" in done.stdout
    assert "every plan is the same, byte for byte" in done.stdout and "the same with PYTHONHASHSEED 1" in done.stdout
    inputs = [event for event in Recording(recording).events() if event.verb is not Verb.PLAN]
    assert f"{len(inputs):,} inputs, {report.steps:,} plans" in done.stdout and "ends before" not in done.stdout


def test_a_recording_that_reached_its_limit_is_replayed_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    file = RecordingFile(path, CONFIG, max_bytes=30_000)
    Churn(Recorded(Core(CONFIG), file), 3).run(400)
    file.close()
    done = command(path)
    assert done.returncode == 0 and "it ends before the service did: the limit of its size was reached" in done.stdout
    file = RecordingFile(path, CONFIG)
    file.close()
    assert "0 inputs, 0 plans: there is no plan to compare" in command(path).stdout


def test_the_ring_of_a_young_process_replays_too(tmp_path: Path) -> None:
    ring = Ring()
    Churn(Recorded(Core(CONFIG), ring), 3).run(200)
    assert replayed(ring.dump(tmp_path, CONFIG, "a test")).same


# ---------------------------------------------------------------------------------------------------- the first difference


def plans(events: list[Event]) -> list[int]:
    return [i for i, event in enumerate(events) if isinstance(event.message, StepPlan)]


def test_an_array_that_differs_is_named_with_its_step(recording: Path) -> None:
    def change(events: list[Event]) -> None:
        event = events[plans(events)[40]]
        assert isinstance(event.message, StepPlan)
        event.message.num_tokens = event.message.num_tokens + np.array([0] * (len(event.message.slots) - 1) + [3], np.int32)

    path = changed(recording, change)
    report = replayed(path)
    assert not report.same and report.steps == 40
    header = next(event for i, event in enumerate(Recording(path).events()) if i == report.events - 1).message.header
    assert f"step {header.epoch}.{header.step_id}" in report.difference[0]
    named = [line for line in report.difference if line.strip().startswith("num_tokens")]
    assert len(named) == 1 and "recorded" in named[0] and "now" in named[0]
    done = command(path, "--hash-seeds", "1")
    assert done.returncode == 1 and "the first difference" in done.stdout and named[0] in done.stdout


def test_a_start_that_differs_is_named_with_its_field(recording: Path) -> None:
    def change(events: list[Event]) -> None:
        for i in plans(events)[30:]:
            plan = events[i].message
            assert isinstance(plan, StepPlan)
            if plan.header.starts:
                plan.header.starts[0].num_blocks += 1
                return

    report = replayed(changed(recording, change))
    assert not report.same and any("starts[0].num_blocks" in line for line in report.difference)
    assert len(report.difference) < 12


def test_a_plan_that_is_missing_or_too_many_is_named(recording: Path) -> None:
    def drop(events: list[Event]) -> None:
        events[plans(events)[10]].message = None

    report = replayed(changed(recording, drop))
    assert not report.same and "recorded: no plan; now: step" in report.difference[1]

    def double(events: list[Event]) -> None:
        at = plans(events)[10]
        events.insert(at, events[at])

    assert not replayed(changed(recording, double)).same


def test_an_input_that_is_missing_shows_in_the_plans(recording: Path) -> None:
    def drop(events: list[Event]) -> None:
        del events[next(i for i, event in enumerate(events) if event.verb is Verb.ADD)]

    report = replayed(changed(recording, drop))
    assert not report.same and report.difference


def test_a_failure_that_was_recorded_must_come_again(recording: Path, tmp_path: Path) -> None:
    def invent(events: list[Event]) -> None:
        events.insert(plans(events)[10] + 1, Event(Verb.FAILED, text="AssertionError: slot 3"))

    report = replayed(changed(recording, invent))
    assert not report.same and "slot 3" in report.difference[1] and "now it does not" in report.difference[1]


def test_a_failure_of_the_core_comes_again_with_its_trace(tmp_path: Path) -> None:
    """A worker that claims nonsense."""
    path = tmp_path / "a.rec"
    file = RecordingFile(path, CONFIG)
    core = Recorded(Core(CONFIG), file)
    churn = Churn(core, 2)
    churn.run(100)
    good = churn.facts
    churn.facts = msgspec.structs.replace(good, vocab_size=-1)
    with pytest.raises(CoreFailureError):
        churn.join()
    core.renew()
    churn.facts = good
    churn.join()
    churn.run(100)
    file.close()
    report = replayed(path)
    assert report.same and len(report.failures) == 1 and "ValueError" in report.failures[0]
    done = command(path, "--hash-seeds", "1")
    assert done.returncode == 0 and "is here again" in done.stdout and "ValueError" in done.stdout

    def forget(events: list[Event]) -> None:
        events[:] = [event for event in events if event.verb is not Verb.FAILED]

    report = replayed(changed(path, forget))
    assert not report.same and "did not when it was recorded" in report.difference[0]


# ------------------------------------------------------------------------------------------------------ bad recordings


def test_a_cut_recording_is_replayed_as_far_as_it_goes(recording: Path, tmp_path: Path) -> None:
    data, path = recording.read_bytes(), tmp_path / "cut.rec"
    path.write_bytes(data[: len(data) // 2])
    done = command(path, "--hash-seeds", "2")
    assert done.returncode == 1
    assert f"cut off at byte {len(data) // 2}" in done.stderr and done.stderr.count("\n") == 1
    assert "every plan up to there is the same" in done.stdout
    report = replayed(path)
    assert report.steps > 50 and not report.difference


def test_a_damaged_recording_is_replayed_as_far_as_it_is_good(recording: Path, tmp_path: Path) -> None:
    data, path = bytearray(recording.read_bytes()), tmp_path / "damaged.rec"
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    done = command(path, "--hash-seeds", "1")
    assert done.returncode == 1 and "damaged" in done.stderr and "makes no sense at byte" in done.stderr
    assert replayed(path).steps > 50


def test_a_recording_that_begins_midway_is_listed_and_not_replayed(tmp_path: Path) -> None:
    ring = Ring(max_bytes=50_000)
    Churn(Recorded(Core(CONFIG), ring), 3).run(300)
    path = ring.dump(tmp_path, CONFIG, "slot 3 was wrong")
    done = command(path)
    assert done.returncode == 1 and done.stdout == ""
    assert "begins midway" in done.stderr and "slot 3 was wrong" in done.stderr and "--list" in done.stderr
    listed = command(path, "--list")
    assert listed.returncode == 0
    first = Recording(path).header.first_event + 1
    assert listed.stdout.split(maxsplit=1)[0] == str(first)


def test_no_recording_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello")
    for path in (tmp_path / "x", tmp_path / "nowhere"):
        for options in ((), ("--list",)):
            done = command(path, *options)
            assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1


def test_another_version_is_one_line(tmp_path: Path) -> None:
    header = RecordingHeader(carousel_version="0", date="then", core=CONFIG, wire_version=1)
    RecordingWriter((tmp_path / "a.rec").open("wb"), header).close()
    done = command(tmp_path / "a.rec")
    assert done.returncode == 1 and "messages of version 1" in done.stderr and done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------- the list


def test_the_list_has_one_line_for_each_event(recording: Path) -> None:
    events = list(Recording(recording).events())
    listed = command(recording, "--list").stdout.splitlines()
    assert len(listed) == len(events)
    for number, (line, event) in enumerate(zip(listed, events, strict=True), 1):
        assert line.split()[0] == str(number) and event.verb.value in line
    assert any("'r3'" in line and "tokens" in line for line in listed)


def test_the_list_as_json_holds_everything(recording: Path) -> None:
    events = list(Recording(recording).events())
    listed = [json.loads(line) for line in command(recording, "--list", "--json").stdout.splitlines()]
    assert len(listed) == len(events)
    for plain, event in zip(listed, events, strict=True):
        assert plain["verb"] == event.verb.value and plain["now"] == event.now
        if isinstance(event.message, StepPlan):
            assert plain["slots"] == event.message.slots.tolist()
            assert plain["step_id"] == event.message.header.step_id


def test_the_list_of_a_cut_recording_ends_with_the_reason(recording: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.rec"
    path.write_bytes(recording.read_bytes()[:5000])
    done = command(path, "--list")
    assert done.returncode == 1 and len(done.stdout.splitlines()) > 10 and "cut off at byte 5000" in done.stderr


def test_a_pipe_that_closes_is_no_trace(recording: Path) -> None:
    line = f"{sys.executable} -m client replay {recording} --list | head -1"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
