"""The journal's files: whatever is cut off, damaged or full, what was written before is found again, and nothing else."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import journal_files
from scheduler.core import Output
from scheduler.errors import StartError
from scheduler.framing import framed
from scheduler.journal import Fsync, Journal
from scheduler.journal_files import (
    Batch,
    Found,
    JournalError,
    JournalHeader,
    Kept,
    claim,
    packed,
    read,
    segment_path,
    segments,
)
from wire import (
    AbortRequest,
    AddHeader,
    AddRequest,
    EndReason,
    OutputEnded,
    RequestStats,
    RestoreHeader,
    RestoreRequest,
    SamplingSpec,
    TokenBatch,
    TokenBatchHeader,
    encode,
)

MODEL = "demo (0123)"
SAMPLING = SamplingSpec(0.7, 0, 1.0, 0.0, 2**64 - 1)
SECOND = 1_000_000_000
MIB = 1 << 20
Key = tuple[int, int]
Known = tuple[str, list[int], list[list[int]], list[str]]


class Told:
    """A journal, and what it was told: what must be found again."""

    def __init__(self, folder: Path, *, fsync: str = "never", max_mib: int = 8) -> None:
        self.folder, self.now = folder, 1000 * SECOND
        self.requests: dict[Key, AddRequest] = {}
        self.tokens: dict[Key, list[list[int]]] = {}
        self.ends: dict[Key, list[OutputEnded | None]] = {}
        self.journal = Journal(folder, MODEL, fsync=Fsync(fsync), max_bytes=max_mib * MIB, clock=lambda: self.now)
        self.journal.begin((), 0)
        self._next = 1

    def add(self, num_prompt: int = 3, num_outputs: int = 1, frontend: int = 1, deadline_ns: int = 0) -> Key:
        handle, self._next = self._next, self._next + num_outputs
        header = AddHeader(handle, f"r{handle}", self.now + handle, 2, 9, SAMPLING, num_outputs, resume_window_ms=1000)
        header.deadline_ns, header.resume_state = deadline_ns, b"state%d" % handle
        add = AddRequest(header, np.arange(num_prompt, dtype=np.int32))
        key = (frontend, handle)
        if self.journal.added(add, frontend):
            self.requests[key], self.tokens[key] = add, [[] for _ in range(num_outputs)]
            self.ends[key] = [None] * num_outputs
        return key

    def step(self, draws: dict[tuple[Key, int], int], ends: tuple[tuple[Key, int], ...] = (), strangers: int = 0) -> None:
        """draws: a token by request and output. strangers: rows of requests that are not in the journal."""
        outputs = []
        for frontend in sorted({key[0] for key, _ in (*draws, *ends)}):
            mine = {key[1] + index: token for (key, index), token in draws.items() if key[0] == frontend}
            mine |= {1_000_000 + i: 7 for i in range(strangers)}
            for (key, index), token in draws.items():
                if key[0] == frontend:
                    self.tokens[key][index].append(token)
            ended = []
            for key, index in ends:
                if key[0] == frontend:
                    stats = RequestStats(output_tokens=len(self.tokens[key][index]))
                    ended.append(OutputEnded(key[1] + index, EndReason.LENGTH, stats))
                    self.ends[key][index] = ended[-1]
            batch = TokenBatch(TokenBatchHeader(1, tuple(ended)), np.array(list(mine), np.uint32), i32(*mine.values()))
            outputs.append(Output(frontend, batch))
        self.journal.tokens(outputs)

    def forget(self, key: Key) -> None:
        self.journal.forget(key)
        del self.requests[key], self.tokens[key], self.ends[key]

    def snapshot(self, key: Key) -> RestoreRequest | None:
        if key not in self.requests:
            return None
        add, tokens = self.requests[key], self.tokens[key]
        header = RestoreHeader(add.header, tuple(self.ends[key]))
        flat = [token for output in tokens for token in output]
        return RestoreRequest(header, prompt=add.prompt, tokens=i32(*flat), num_tokens=i32(*map(len, tokens)))

    def tidy(self) -> None:
        self.journal.tidy(self.snapshot)

    def live(self) -> list[tuple[Key, int]]:
        return [(key, index) for key, ends in self.ends.items() for index, end in enumerate(ends) if end is None]

    def expected(self) -> list[Known]:
        return [known(message) for key in self.requests if (message := self.snapshot(key)) is not None]


def i32(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def known(message: RestoreRequest) -> Known:
    """What must be the same."""
    header, bounds = message.header, np.cumsum(message.num_tokens)[:-1]
    parts = [part.tolist() for part in np.split(message.tokens, bounds)]
    ends = ["" if end is None else f"{end.reason.value} {end.stats.output_tokens}" for end in header.ended]
    return f"{header.add.request_id} {header.add.resume_state!r}", message.prompt.tolist(), parts, ends


def found(folder: Path) -> Found:
    return read(folder, MODEL, 1000 * SECOND, 0)


def what(result: Found) -> list[Known]:
    return [known(message) for message in result.requests]


def last_segment(folder: Path) -> Path:
    return segment_path(folder, segments(folder)[-1])


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """As on a full disk: what fits is written, then write(2) fails."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def history(told: Told, dice: random.Random, moves: int, check: bool = False) -> list[tuple[int, list[Known]]]:
    """Random requests, tokens, ends. Returns the file's size after each write, with what it then holds, if asked."""
    states = [(last_segment(told.folder).stat().st_size, told.expected())]
    for _ in range(moves):
        live = told.live()
        match dice.choice(["add", "step", "step", "step", "forget"]):
            case "add":
                told.add(dice.randint(1, 9), dice.choice([1, 1, 3]), dice.randint(1, 3), dice.choice([0, 10**15]))
            case "step" if live:
                some = dice.sample(live, dice.randint(1, len(live)))
                draws = {each: dice.randrange(50_000) for each in some}
                told.step(draws, tuple(each for each in some if dice.random() < 0.1), strangers=dice.randrange(2))
            case "forget" if told.requests:
                told.forget(dice.choice(list(told.requests)))
                told.tidy()  # written with what comes next, or now
        if check:
            states.append((last_segment(told.folder).stat().st_size, told.expected()))
    return states


# ------------------------------------------------------------------------------------------------------ what is found


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_what_was_told_is_found(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    told = Told(tmp_path_factory.mktemp("journal"))
    history(told, random.Random(seed), 60)
    got = found(told.folder)
    assert what(got) == told.expected() and got.notes == [] and not got.damaged


@given(seed=st.integers(0, 2**32))
@settings(max_examples=4, deadline=None)
def test_cut_at_any_byte_all_before_the_cut_record_is_found(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    told = Told(tmp_path_factory.mktemp("journal"))
    states = history(told, random.Random(seed), 14, check=True)
    path = last_segment(told.folder)
    whole = path.read_bytes()
    assert states[-1][0] == len(whole)
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        got = found(told.folder)
        at_a_boundary = [expected for size, expected in states if size == cut]
        before = [expected for size, expected in states if size <= cut]
        if at_a_boundary:
            assert what(got) == at_a_boundary[-1] and got.notes == []
            continue
        # Several records of one write may be cut between.
        assert len(got.notes) <= 1 and not got.damaged
        if before:
            assert set(map(str, ids(before[-1]))) - set(map(str, ids(what(got)))) <= forgotten_later(states, cut)
        else:
            assert what(got) == []


def ids(requests: list[Known]) -> list[str]:
    return [request[0] for request in requests]


def forgotten_later(states: list[tuple[int, list[Known]]], cut: int) -> set[str]:
    """By the write that was cut."""
    after = next(expected for size, expected in states if size > cut)
    before = [expected for size, expected in states if size <= cut][-1]
    return set(ids(before)) - set(ids(after))


def test_a_step_that_is_cut_off_is_dropped_as_a_whole_and_said_in_one_line(tmp_path: Path) -> None:
    told = Told(tmp_path)
    keys = [told.add(num_outputs=2) for _ in range(3)]
    told.step({(key, index): 5 for key in keys for index in (0, 1)})
    path, before = last_segment(tmp_path), told.expected()
    start = path.stat().st_size
    told.step({(key, index): 6 for key in keys for index in (0, 1)}, ends=((keys[0], 0),))
    whole = path.read_bytes()
    for cut in range(start + 1, len(whole)):
        path.write_bytes(whole[:cut])
        got = found(tmp_path)
        assert what(got) == before
        assert got.notes == [f"{path}: its last record is cut off at byte {start}, its {cut - start} bytes are dropped"]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damage_is_named_by_its_place_and_what_stands_before_it_is_used(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    told = Told(tmp_path_factory.mktemp("journal"))
    states = history(told, random.Random(data.draw(st.integers(0, 100))), 30, check=True)
    path = last_segment(told.folder)
    whole = bytearray(path.read_bytes())
    place = data.draw(st.integers(states[0][0], len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    got = found(told.folder)
    assert len(got.notes) == 1 and str(path) in got.notes[0]
    at = int(got.notes[0].partition("at byte ")[2].split(":")[0].split(",")[0])
    assert states[0][0] <= at <= place, "the record that holds the byte begins there"
    boundary = [expected for size, expected in states if size == at]
    if boundary:
        assert what(got) == boundary[-1]


def test_damage_in_an_older_segment_ends_the_reading_there(tmp_path: Path) -> None:
    told = Told(tmp_path)
    for _ in range(25):
        told.add(30_000)
        told.tidy()
    numbers = segments(tmp_path)
    assert len(numbers) >= 3
    middle = segment_path(tmp_path, numbers[1])
    content = bytearray(middle.read_bytes())
    content[len(content) // 2] ^= 1
    middle.write_bytes(content)
    got = found(tmp_path)
    expected = told.expected()
    assert got.damaged and what(got) == expected[: len(got.requests)] and 0 < len(got.requests) < len(expected)
    assert f"{len(numbers) - 2} later files are not" in got.notes[0]
    middle.unlink()
    assert found(tmp_path).damaged


def test_a_file_of_zeros_behind_the_last_record_is_a_cut_one(tmp_path: Path) -> None:
    """A file may have grown before its content came, when the power went."""
    told = Told(tmp_path)
    told.add()
    with last_segment(tmp_path).open("ab") as file:
        file.write(bytes(500))
    got = found(tmp_path)
    assert what(got) == told.expected() and "cut off" in got.notes[0] and not got.damaged


def test_handles_are_given_anew_and_times_are_those_of_this_machine(tmp_path: Path) -> None:
    """The clock of deadlines begins anew with the machine; what is left of a request's time does not."""
    told = Told(tmp_path)
    told.add(num_outputs=3, frontend=9)
    told.add(frontend=9, deadline_ns=told.now + 5 * SECOND)
    kept = [record for record in records(tmp_path) if isinstance(record, Kept)]
    two_later = kept[-1].wall + 2 * SECOND
    got = read(tmp_path, MODEL, 7 * SECOND, two_later)
    assert [message.header.add.handle for message in got.requests] == [1, 4]
    assert got.requests[1].header.add.deadline_ns == pytest.approx(7 * SECOND + 3 * SECOND, abs=SECOND // 100)
    assert got.requests[0].header.add.deadline_ns == 0


def records(folder: Path) -> list[object]:
    data = last_segment(folder).read_bytes()
    contents = list(journal_files._records(data, journal_files._FIRST))[1:]
    return [journal_files._decoder.decode(content) for _, content in contents]


def another_message() -> Batch:
    return Batch(1, tuple(encode(AbortRequest(1))))


def counts_that_do_not_add_up() -> Kept:
    header = RestoreHeader(AddHeader(7, "r", 0, 2, 9, SAMPLING, 2), (None, None))
    return Kept(0, 0, 1, tuple(encode(RestoreRequest(header, prompt=i32(1), tokens=i32(1, 2), num_tokens=i32(3, 1)))))


@pytest.mark.parametrize("record", [Batch(1, (b"",)), Batch(1, (b"\2x",)), another_message(), counts_that_do_not_add_up()])
def test_what_is_sound_in_form_and_makes_no_sense_is_damage(tmp_path: Path, record: Batch | Kept) -> None:
    told = Told(tmp_path)
    told.add()
    with last_segment(tmp_path).open("ab") as file:
        file.write(packed(record))
    got = found(tmp_path)
    assert got.damaged and what(got) == told.expected()


# -------------------------------------------------------------------------------------------------- bounds, failures


def test_files_stay_below_the_limit_and_lose_nothing(tmp_path: Path) -> None:
    told, dice, largest = Told(tmp_path, max_mib=8), random.Random(1), 0
    long_lived = [told.add(20_000, frontend=1) for _ in range(4)]
    short: list[Key] = []
    for number in range(1500):
        short.append(told.add(dice.randint(1, 10_000), frontend=dice.randint(1, 2)))
        told.step(dict.fromkeys(told.live(), number), strangers=20)
        if len(short) > 8:
            done = short.pop(0)
            told.step({}, ends=((done, 0),))
            told.forget(done)
        told.tidy()
        largest = max(largest, sum(path.stat().st_size for path in tmp_path.iterdir()))
        if not number % 300:
            assert sorted(what(found(tmp_path))) == sorted(told.expected())
    assert largest <= 8 * MIB + MIB, "and one segment more"
    assert segments(tmp_path)[0] > 10, "the first ones have gone"
    got = found(tmp_path)
    assert sorted(what(got)) == sorted(told.expected()) and got.notes == []
    assert all(key in told.requests for key in long_lived)


def test_what_is_alive_may_take_half_of_the_limit(tmp_path: Path) -> None:
    told = Told(tmp_path, max_mib=8)
    for _ in range(4):
        told.add(MIB // 4)
        told.tidy()
    assert told.journal.refusal == "the journal is full: requests that may be resumed take 4 of its 8 MiB"
    told.step(dict.fromkeys(told.live(), 1))
    told.forget(next(iter(told.requests)))
    assert told.journal.refusal == ""
    told.tidy()
    assert what(found(tmp_path)) == told.expected()


@pytest.mark.parametrize("room", [0, 1, 7, 8, 30, 100])
def test_a_full_disk_refuses_new_requests_and_the_old_ones_go_on(tmp_path: Path, room: int) -> None:
    told = Told(tmp_path)
    keys = [told.add() for _ in range(3)]
    told.step({(key, 0): 5 for key in keys})
    before = told.expected()
    with no_file_longer_than(last_segment(tmp_path).stat().st_size + room):
        refused = told.add(1000)
        assert refused not in told.requests and "File too large" in told.journal.refusal
        told.step({(key, 0): 6 for key in keys})
        told.tidy()
        assert what(found(tmp_path)) == before and found(tmp_path).notes == [], "no half record is left"
        told.now += 5 * SECOND
        told.forget(keys[0])
    assert told.journal.next_due_ns() <= told.now
    told.tidy()
    assert told.journal.refusal == ""
    assert what(found(tmp_path)) == told.expected() and len(told.requests) == 2, "with the tokens of meanwhile"
    told.add()
    told.step(dict.fromkeys(told.live(), 7))
    assert what(found(tmp_path)) == told.expected()


def test_a_disk_that_stays_full_is_tried_ever_more_rarely(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.add()
    before, waits = told.expected(), []
    with no_file_longer_than(200):
        told.add(1000)
        for _ in range(8):
            waits.append(told.journal.next_due_ns() - told.now)
            told.now = told.journal.next_due_ns()
            told.tidy()
    assert waits == sorted(waits) and waits[0] == SECOND and waits[-1] == 60 * SECOND
    assert what(found(tmp_path)) == before and len(list(tmp_path.iterdir())) == 1


def test_a_core_that_begins_on_a_full_disk_leaves_the_old_files(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.add()
    told.journal.close()
    left, clock = found(tmp_path), 10 * SECOND
    journal = Journal(tmp_path, MODEL, fsync=Fsync("never"), max_bytes=8 * MIB, clock=lambda: clock)
    with no_file_longer_than(10):
        journal.begin(left.requests, 0)
        assert journal.refusal
        assert what(found(tmp_path)) == told.expected()
    clock += 2 * SECOND
    journal.tidy({(0, message.header.add.handle): message for message in left.requests}.get)
    assert journal.refusal == "" and what(found(tmp_path)) == told.expected()


def test_fsync_is_due_by_its_policy(tmp_path: Path) -> None:
    for policy, due in (("never", 0), ("always", 0), ("interval:50", 50_000_000)):
        folder = tmp_path / policy.partition(":")[0]
        folder.mkdir()
        told = Told(folder, fsync=policy)
        told.add()
        assert told.journal.next_due_ns() == (told.now + due if due else 0)
        told.now += due
        told.tidy()
        assert told.journal.next_due_ns() == 0
    for wrong in ("sometimes", "interval", "interval:0", "interval:x", "never:3"):
        with pytest.raises(ValueError, match="--journal-fsync"):
            Fsync(wrong)


# ------------------------------------------------------------------------------------------------------- whose it is


def test_the_folder_is_ours_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "journal"
    lock = claim(folder, MODEL)
    assert folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(StartError, match="in use by another server"):
        claim(folder, MODEL)
    os.close(lock)
    told = Told(folder)
    told.add()
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
    os.close(claim(folder, MODEL))
    folder.chmod(0o750)
    with pytest.raises(JournalError, match=f"chmod 700 {folder}"):
        claim(folder, MODEL)
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError):
        claim(tmp_path / "file", MODEL)


def test_another_model_or_version_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    told = Told(tmp_path)
    told.add()
    with pytest.raises(JournalError, match=r"requests to the model demo \(0123\), this server has other"):
        claim(tmp_path, "other")
    path = last_segment(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"\x63" + content[9:])
    with pytest.raises(JournalError, match="is of format 99, this program writes 1"):
        claim(tmp_path, MODEL)
    header = JournalHeader(wire_version=1, carousel_version="0", date="", model=MODEL, starts=True)
    path.write_bytes(content[:9] + framed(msgspec.msgpack.encode(header)))
    with pytest.raises(JournalError, match="holds messages of version 1, this program speaks version"):
        claim(tmp_path, MODEL)
