"""The recorder: what is written is read back, what is cut or damaged is read up to there, and the ring stays bounded."""

from __future__ import annotations

import inspect
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from scheduler.core import Core, CoreConfig
from scheduler.core.config import TenantLimits
from scheduler.core.core import ProtocolError
from scheduler.recorder import CoreFailureError, Recorded, RecordingFile, Ring
from scheduler.recording import (
    FORMAT_VERSION,
    MAGIC,
    Event,
    Recording,
    RecordingError,
    RecordingHeader,
    RecordingWriter,
    Verb,
    pack,
)
from tests.helpers.churn import Churn
from wire import AddHeader, AddRequest, Credit, PlanHeader, ResultHeader, SamplingSpec, StepPlan, StepResult, encode

CONFIG = CoreConfig(max_batch_rows=6, max_step_tokens=16, max_crashes=5, max_unread_tokens=8)
SECOND = 1_000_000_000
MARKS = {Verb.FAILED, Verb.RENEWED, Verb.END}


class Notebook:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def note(self, event: Event) -> None:
        self.events.append(event)


def churned(seed: int = 1, moves: int = 300) -> list[Event]:
    notebook = Notebook()
    Churn(Recorded(Core(CONFIG), notebook), seed).run(moves)
    return notebook.events


def written(path: Path, events: list[Event], header: RecordingHeader | None = None) -> Path:
    writer = RecordingWriter(path.open("wb"), header or RecordingHeader(carousel_version="1", date="today", core=CONFIG))
    for event in events:
        writer.write(pack(event), event.now)
    writer.close()
    return path


def read(path: Path) -> tuple[list[Event], str]:
    """The events that can be read, and what was wrong behind them."""
    events: list[Event] = []
    try:
        for event in Recording(path).events():
            events.append(event)
    except RecordingError as error:
        return events, str(error)
    return events, ""


def same(event: Event, other: Event) -> bool:
    mine = tuple(encode(event.message)) if event.message is not None else ()
    return (event.verb, event.now, event.frontend, event.text, mine) == (
        other.verb,
        other.now,
        other.frontend,
        other.text,
        other.frames,
    )


def all_same(events: list[Event], others: list[Event]) -> bool:
    return all(same(event, other) for event, other in zip(events, others, strict=False))


# ------------------------------------------------------------------------------------------------------------ the file


def test_what_was_noted_is_read_back(tmp_path: Path) -> None:
    events = churned(moves=600)
    of_others = {Verb.DROP_ALL, Verb.DRAIN, Verb.RESTORE, Verb.GIVE, Verb.TAKE}
    assert {event.verb for event in events} >= set(Verb) - MARKS - of_others
    got, error = read(written(tmp_path / "a.rec", events))
    assert error == "" and len(got) == len(events) and all_same(events, got)


def test_the_header_keeps_the_configuration(tmp_path: Path) -> None:
    config = CoreConfig(policy="static", tenants=(TenantLimits("a", 3, 40), TenantLimits("*")), target_itl_ns=7)
    header = RecordingHeader(carousel_version="1", date="today", core=config, first_event=9, why="because")
    assert Recording(written(tmp_path / "a.rec", [], header)).header == header


def test_a_steady_step_takes_few_bytes(tmp_path: Path) -> None:
    rows, steps, rng = 256, 400, np.random.default_rng(0)
    slots, ones, path = np.arange(rows, dtype=np.uint16), np.ones(rows, np.int32), tmp_path / "a.rec"
    events = []
    for step in range(steps):
        tokens = rng.integers(0, 50_000, rows).astype(np.int32)
        plan = StepPlan(PlanHeader(0, 1, step), num_tokens=ones, slots=slots)
        events.append(Event(Verb.PLAN, step, message=plan))
        events.append(Event(Verb.APPLY, step, message=StepResult(ResultHeader(0, 1, step, 10), tokens, slots)))
    written(path, events)
    assert path.stat().st_size < 3.5 * rows * steps, "of which 2 are what a token of 50,000 takes at the least"


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    RecordingFile(path, CONFIG).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_was_flushed_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    events, path = churned(), tmp_path / "a.rec"
    file = RecordingFile(path, CONFIG)
    for event in events[:50]:
        file.note(event)
    file.flush()
    got, error = read(path)
    assert len(got) == 50 and all_same(events, got) and "cut off" in error


@pytest.mark.parametrize("kib", [1, 4, 16])
def test_the_limit_ends_the_recording_and_it_says_so(tmp_path: Path, kib: int, caplog: pytest.LogCaptureFixture) -> None:
    events, path = churned(moves=1000), tmp_path / "a.rec"
    file = RecordingFile(path, CONFIG, max_bytes=kib << 10)
    for event in events:
        file.note(event)
    assert path.stat().st_size <= kib << 10
    got, error = read(path)
    assert error == "" and 0 < len(got) < len(events) and all_same(events, got)
    assert "limit" in caplog.text and caplog.text.count("\n") == 1


def test_a_full_disk_ends_the_recording_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OSError):
        RecordingFile(Path("/dev/full"), CONFIG)
    file = RecordingFile(Path("/dev/null"), CONFIG)
    full = RecordingWriter.__new__(RecordingWriter)
    full.__dict__.update(file._writer.__dict__, _file=Path("/dev/full").open("wb", buffering=0))  # noqa: SIM115
    file._writer = full
    Churn(Recorded(Core(CONFIG), file), 1).run(500)
    file.flush()
    file.close()
    assert caplog.text.count("ends here") == 1 and "No space left" in caplog.text


# ---------------------------------------------------------------------------------------------------- cut and damaged


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Event], bytes]:
    events = churned(moves=60)
    return events, written(tmp_path_factory.mktemp("small") / "a.rec", events).read_bytes()


def test_cut_at_any_byte_it_is_read_up_to_there(small: tuple[list[Event], bytes], tmp_path: Path) -> None:
    events, data = small
    counts = []
    for size in range(1, len(data), 11):
        path = tmp_path / "cut.rec"
        path.write_bytes(data[:size])
        got, error = read(path)
        assert f"cut off at byte {size}" in error and all_same(events, got)
        counts.append(len(got))
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == len(events)


def test_damaged_anywhere_it_is_read_up_to_there(small: tuple[list[Event], bytes], tmp_path: Path) -> None:
    events, data = small
    for at in range(0, len(data), 17):
        path, damaged = tmp_path / "damaged.rec", bytearray(data)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        got, error = read(path)
        assert all_same(events, got), f"byte {at}"
        assert error or len(got) == len(events), f"byte {at}"  # some bits only fill up a byte
        if "good up to" in error:
            good, wrong = (int(word) for word in re.findall(r"byte (\d+)", error))
            assert good <= wrong and at <= wrong


def test_what_follows_the_end_is_named(small: tuple[list[Event], bytes], tmp_path: Path) -> None:
    events, data = small
    path = tmp_path / "a.rec"
    path.write_bytes(data + b"xyz")
    got, error = read(path)
    assert len(got) == len(events) and error == f"the recording ends at byte {len(data)}, and 3 bytes follow"


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\0" * 100, MAGIC[:4] + b"nope"])
def test_another_file_is_no_recording(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match="not a recording"):
        Recording(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="No such file"):
        Recording(tmp_path / "nowhere")


def test_another_version_is_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a.rec", [])
    data = bytearray(path.read_bytes())
    data[len(MAGIC)] = FORMAT_VERSION + 1
    path.write_bytes(data)
    with pytest.raises(RecordingError, match=f"of format {FORMAT_VERSION + 1}, this program reads format {FORMAT_VERSION}"):
        Recording(path)
    other = RecordingHeader(carousel_version="1", date="today", core=CONFIG, wire_version=1)
    with pytest.raises(RecordingError, match="messages of version 1"):
        Recording(written(path, [], other))


def test_an_option_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    header = RecordingHeader(carousel_version="9.9", date="today", core=CONFIG)
    plain = msgspec.to_builtins(header)
    plain["core"]["quantum_rows"] = 4
    with pytest.raises(RecordingError, match=r"9\.9.*quantum_rows"):
        Recording(written(tmp_path / "a.rec", [], plain))
    del plain["core"]["quantum_rows"]
    plain["core"]["max_batch_rows"] = -1
    with pytest.raises(RecordingError, match="max_batch_rows must be at least 1"):
        Recording(written(tmp_path / "a.rec", [], plain))


def test_an_event_with_the_wrong_message_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.rec", [Event(Verb.DRAIN), Event(Verb.APPLY, 5, message=Credit())])
    events, error = read(path)
    assert len(events) == 1 and "'apply' with Credit" in error


# ------------------------------------------------------------------------------------------------------------ the verbs


def test_the_recorder_has_all_verbs_of_the_core_and_no_others() -> None:
    verbs = {verb.value for verb in set(Verb) - MARKS}
    methods = {name for name, value in vars(Recorded).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert methods == verbs | {"renew", "take_outputs"}
    for verb in verbs:
        mine, theirs = inspect.signature(getattr(Recorded, verb)), inspect.signature(getattr(Core, verb))
        assert mine.parameters.keys() == theirs.parameters.keys() and mine.return_annotation == theirs.return_annotation


def test_a_recorded_core_decides_as_one_alone() -> None:
    def plans(*sinks: Notebook) -> Iterator[bytes]:
        watcher = Notebook()
        Churn(Recorded(Core(CONFIG), watcher, *sinks), 3).run(300)
        return (b"".join(encode(event.message)) for event in watcher.events if isinstance(event.message, StepPlan))

    assert list(plans()) == list(plans(Notebook()))


def test_a_worker_s_wrong_answer_is_noted_and_passed_on() -> None:
    notebook = Notebook()
    core = Recorded(Core(CONFIG), notebook)
    Churn(core, 1)
    wrong = StepResult(ResultHeader(0, core.epoch, 7, 1))
    with pytest.raises(ProtocolError):
        core.apply(wrong, 10)
    assert notebook.events[-1].verb is Verb.APPLY and notebook.events[-1].message is wrong


@pytest.mark.parametrize("verb", ["add", "plan", "drain"])
def test_a_failure_of_the_core_is_noted_and_named(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook()
    core = Recorded(Core(CONFIG), notebook)

    def fail(*_: object) -> None:
        raise KeyError("slot 3")

    monkeypatch.setattr(core.core, verb, fail)
    calls: dict[str, Callable[[], object]] = {
        "add": lambda: core.add(AddRequest(AddHeader(1, "r", 0, 2, 3, SamplingSpec(0.0, 0, 1.0, 0.0, 0))), 0, 1),
        "plan": lambda: core.plan(1),
        "drain": core.drain,
    }
    with pytest.raises(CoreFailureError, match="slot 3") as caught:
        calls[verb]()
    assert isinstance(caught.value.__cause__, KeyError)
    assert [event.verb.value for event in notebook.events] == [verb, "failed"]
    assert "KeyError" in notebook.events[-1].text


def test_a_renewed_core_counts_epochs_on_and_keeps_policy_and_drain() -> None:
    core = Recorded(Core(CONFIG))
    churn = Churn(core, 1)
    churn.run(50)
    core.set_policy("static", churn.tick())
    core.drain()
    epoch = core.epoch
    core.renew()
    assert (core.epoch, core.policy.name, core.draining, core.num_requests, core.connected) == (epoch, "static", True, 0, False)


# ------------------------------------------------------------------------------------------------------------- the ring


def test_the_ring_keeps_the_last_events_in_bounds(tmp_path: Path) -> None:
    events = churned(moves=600)
    for ring in (Ring(max_bytes=100_000), Ring(max_ns=100_000_000)):
        for event in events:
            ring.note(event)
        path = ring.dump(tmp_path, CONFIG, "a test")
        got, error = read(path)
        header = Recording(path).header
        assert error == "" and 0 < len(got) < len(events)
        assert header.first_event == len(events) - len(got) and header.why == "a test"
        assert all_same(events[-len(got) :], got)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert got[0].now >= events[-1].now - 100_000_000


def test_the_ring_counts_about_what_its_events_hold() -> None:
    ring = Ring(max_bytes=1 << 20)
    prompt = np.zeros(300_000, np.int32)
    for handle in range(3):
        header = AddHeader(handle, f"r{handle}", 0, 2, 3, SamplingSpec(0.0, 0, 1.0, 0.0, 0))
        ring.note(Event(Verb.ADD, handle, 0, message=AddRequest(header, prompt)))
    assert len(ring._events) == 0, "each alone is larger than the ring"
    for step in range(5000):
        plan = StepPlan(PlanHeader(0, 1, step), num_tokens=np.ones(256, np.int32), slots=np.arange(256, dtype=np.uint16))
        ring.note(Event(Verb.PLAN, step, message=plan))
    assert 100 < len(ring._events) < 500
