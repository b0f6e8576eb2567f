"""The core process and its workers over real sockets: hangs, standbys, a rolling change, and an inner wire that is hostile."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from scheduler import curve
from scheduler.core import CoreConfig
from tests.helpers.engine import Dealer, EngineProcess, HandWorker, request
from tests.helpers.server import eventually
from tests.scheduler.test_engine import FACTS, ended, is_end, load, run_steps, tokens_of
from wire import (
    Credit,
    EndReason,
    Facts,
    FrontendHello,
    Heartbeat,
    LogprobRun,
    Logprobs,
    LogprobsHeader,
    Message,
    ReplaceQuery,
    ReplaceReply,
    ResultHeader,
    ResumeQuery,
    Retired,
    SamplingSpec,
    StepPlan,
    StepResult,
    TruncateRequest,
    WorkerHello,
    encode,
)
from worker.curve import Keys
from worker.sim_executor import SimExecutor

PROMPT = list(range(100, 130))


@pytest.fixture
def engines() -> Iterator[Any]:
    started: list[EngineProcess] = []

    def start(**options: Any) -> tuple[EngineProcess, Dealer]:
        engine = EngineProcess(CoreConfig(max_batch_rows=8, max_step_tokens=64), **options)
        started.append(engine)
        frontend = Dealer(engine, engine.frontends)
        frontend.send(FrontendHello(pid=1))
        assert isinstance(frontend.receive(), Facts)
        return engine, frontend

    yield start
    for engine in started:
        engine.close()


def words(engine: EngineProcess, wanted: str) -> str:
    """What the supervisor is told, until `wanted` is in it."""
    got = ""
    while wanted not in got:
        got += os.read(engine.status, 256).decode()
    return got


def undisturbed(frontend: Dealer, worker: HandWorker, max_tokens: int) -> list[int]:
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, PROMPT, max_tokens))
    run_steps(worker, max_tokens)
    return tokens_of(frontend.until(is_end), 1)


def finish(worker: HandWorker) -> None:
    while worker.step(300) is not None:
        if worker.link_id:
            worker.beat()


# -------------------------------------------------------------------------------------------------------------- hangs


def test_a_worker_without_heartbeats_is_lost_within_the_time_and_its_late_words_count_for_nothing(engines: Any) -> None:
    engine, frontend = engines(worker_timeout_s=1.0)
    worker = HandWorker(engine, SimExecutor(FACTS), link_id="a")
    wanted = undisturbed(frontend, worker, 6)
    worker.beat()
    frontend.send(request(2, PROMPT, 6))
    run_steps(worker, 2)
    lost = frontend.until(lambda message: isinstance(message, Facts) and not message.ready)
    assert f"hangs {FACTS.pid}" in words(engine, "hangs"), "the supervisor ends it"
    while worker.step(50) is not None:
        pass  # plans that it had already; it answers them now
    again = HandWorker(engine, SimExecutor(FACTS))
    assert again.epoch == worker.epoch + 1
    finish(again)
    assert tokens_of(lost + frontend.until(is_end), 2) == wanted
    assert "nothing was heard of it for" in engine.log()


def test_a_step_that_uses_no_processor_time_is_a_hang_though_the_process_lives(engines: Any) -> None:
    engine, frontend = engines(worker_timeout_s=1.0)
    worker = HandWorker(engine, SimExecutor(FACTS), link_id="a")
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, PROMPT, 6))
    assert isinstance(worker.receive(), StepPlan)
    for stalled_ms in (250, 500, 1250):
        worker.beat(stalled_ms)
    frontend.until(lambda message: isinstance(message, Facts) and not message.ready)
    assert "its step has used no processor time for 1.2 s" in engine.log()


def test_a_long_step_is_no_hang(engines: Any) -> None:
    engine, frontend = engines(worker_timeout_s=1.0)
    worker = HandWorker(engine, SimExecutor(FACTS), link_id="a")
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, PROMPT, 1))
    for _ in range(10):  # 3 s: three times as long as silence may last
        worker.beat()
        assert frontend.receive(300) is None
    worker.step()
    assert len(tokens_of(frontend.until(is_end), 1)) == 1 and "lost" not in engine.log()


def test_one_that_was_given_up_and_lives_joins_again_with_its_next_beat(engines: Any) -> None:
    engine, frontend = engines(worker_timeout_s=1.0)
    worker = HandWorker(engine, SimExecutor(FACTS), link_id="a")
    wanted = undisturbed(frontend, worker, 6)
    frontend.send(request(2, PROMPT, 6))
    run_steps(worker, 2)
    got = frontend.until(lambda message: isinstance(message, Facts) and not message.ready)
    worker.beat()
    worker.welcome()
    finish(worker)
    assert tokens_of(got + frontend.until(is_end), 2) == wanted and worker.epoch == 2


def test_a_step_may_have_a_bound(engines: Any) -> None:
    engine, frontend = engines(step_timeout_s=0.5)
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, PROMPT, 3))
    assert isinstance(worker.receive(), StepPlan)
    frontend.until(lambda message: isinstance(message, Facts) and not message.ready)
    assert "a step takes longer than 0.5 s" in engine.log()


# ------------------------------------------------------------------------------------------------- standby and change


def test_one_who_stands_by_takes_over_at_once_and_no_token_is_lost(engines: Any) -> None:
    engine, frontend = engines()
    worker = HandWorker(engine, SimExecutor(FACTS))
    wanted = undisturbed(frontend, worker, 8)
    standby = HandWorker(engine, SimExecutor(FACTS), waits=False)
    frontend.send(request(2, PROMPT, 8))
    run_steps(worker, 3)
    assert standby.receive(100) is None, "it waits"
    worker.close()
    standby.welcome()
    assert standby.epoch == worker.epoch + 1
    finish(standby)
    got = frontend.until(is_end)
    assert tokens_of(got, 2) == wanted
    assert not any(isinstance(message, Facts) and not message.ready for message in got), "never was there no worker"


def test_one_who_stands_by_and_falls_silent_does_not_take_over(engines: Any) -> None:
    engine, frontend = engines(worker_timeout_s=1.0)
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    silent = HandWorker(engine, SimExecutor(FACTS), link_id="silent", waits=False)
    assert eventually(lambda: "is given up: nothing was heard of it" in engine.log())
    worker.close()
    frontend.until(lambda message: isinstance(message, Facts) and not message.ready)
    assert silent.receive(0) is None


def test_another_model_can_not_stand_by(engines: Any) -> None:
    engine, frontend = engines()
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    other = Dealer(engine, engine.workers)
    other.send(WorkerHello(0, msgspec.structs.replace(FACTS, vocab_size=999)))
    assert other.receive() == Retired("its vocab_size is 999, and 1000 is served")
    frontend.send(request(1, PROMPT, 2))
    run_steps(worker, 2)
    assert len(tokens_of(frontend.until(is_end), 1)) == 2


def test_a_rolling_change_loses_no_token_and_blames_nobody(engines: Any) -> None:
    engine, frontend = engines(control=True)
    worker = HandWorker(engine, SimExecutor(FACTS))
    wanted = undisturbed(frontend, worker, 8)
    frontend.send(request(2, PROMPT, 8))
    run_steps(worker, 3)
    frontend.send(ReplaceQuery(9, "cpu"))
    assert "replace cpu\n" in words(engine, "replace cpu")
    facts = msgspec.structs.replace(FACTS, pid=4712)
    new = HandWorker(engine, SimExecutor(facts), replaces=True, waits=False)
    while not isinstance(message := worker.receive(), Retired):  # the old one drains: it answers what it has
        assert isinstance(message, StepPlan)
        worker.executor.submit(message, worker.send)  # type: ignore[arg-type]
    assert f"replaced {FACTS.pid} 4712\n" in words(engine, "replaced")
    new.welcome()
    finish(new)
    got = frontend.until(is_end)
    assert tokens_of(got, 2) == wanted and [end.reason for end in ended(got)] == [EndReason.LENGTH]
    assert ReplaceReply(9, 2, 4712) in got
    assert "crashed it again" not in engine.log() and "lost" not in engine.log()


def test_a_change_that_does_not_come_about_is_said_and_the_old_one_goes_on(engines: Any) -> None:
    engine, frontend = engines(control=True)
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)

    def reply() -> str:
        found = frontend.until(lambda message: isinstance(message, ReplaceReply))[-1]
        assert isinstance(found, ReplaceReply) and found.epoch == 1
        return found.error

    frontend.send(ReplaceQuery(1, ""))
    frontend.send(ReplaceQuery(2, ""))
    assert reply() == "a worker is being replaced already"
    os.write(engine.control, b"failed\n")
    assert "did not start" in reply()
    frontend.send(ReplaceQuery(3, "sim"))
    words(engine, "replace sim")
    other = HandWorker(engine, SimExecutor(msgspec.structs.replace(FACTS, architecture="other")), replaces=True, waits=False)
    assert "its architecture is other" in reply()
    frontend.send(request(5, PROMPT, 400))
    run_steps(worker, 2)
    frontend.send(ReplaceQuery(4, "auto"))
    words(engine, "replace auto")
    small = HandWorker(engine, SimExecutor(msgspec.structs.replace(FACTS, num_blocks=8)), replaces=True, waits=False)
    assert "its KV cache has 8 blocks, and a request needs" in reply()
    assert all(isinstance(refused.receive(), Retired) for refused in (other, small))
    run_steps(worker, 2)


def test_a_worker_that_dies_while_its_successor_waits_is_followed_by_it(engines: Any) -> None:
    engine, frontend = engines(control=True)
    worker = HandWorker(engine, SimExecutor(FACTS))
    wanted = undisturbed(frontend, worker, 8)
    frontend.send(request(2, PROMPT, 8))
    run_steps(worker, 2)
    frontend.send(ReplaceQuery(9, "sim"))
    words(engine, "replace sim")
    new = HandWorker(engine, SimExecutor(msgspec.structs.replace(FACTS, pid=4712)), replaces=True, waits=False)
    assert eventually(lambda: "takes over from" in engine.log())
    worker.close()
    new.welcome()
    finish(new)
    got = frontend.until(is_end)
    assert tokens_of(got, 2) == wanted and ReplaceReply(9, 2, 4712) in got


# ---------------------------------------------------------------------------------------------------- the hostile wire


def test_what_is_sent_twice_counts_once(engines: Any) -> None:
    engine, frontend = engines()
    worker = HandWorker(engine, SimExecutor(FACTS))
    wanted = undisturbed(frontend, worker, 6)
    sent: list[Message] = [WorkerHello(0, FACTS)]
    send, worker.send = worker.send, lambda message: (sent.append(message), send(message))[1]  # type: ignore
    add = request(2, PROMPT, 6)
    for message in (add, add, FrontendHello(pid=1)):
        frontend.send(message)
    for _ in range(6):
        worker.step()
        for message in sent:
            send(message)
    got = frontend.until(is_end)
    assert tokens_of(got, 2) == wanted and worker.epoch == 1
    assert [getattr(message, "code", "") for message in got if hasattr(message, "code")] == ["ALREADY_EXISTS"]
    assert "dropped a second result of step" in engine.log() and "said hello twice" in engine.log()


def test_a_stranger_that_plays_the_worker_changes_nothing(engines: Any) -> None:
    engine, frontend = engines()
    worker = HandWorker(engine, SimExecutor(FACTS), link_id="secret")
    wanted = undisturbed(frontend, worker, 6)
    stranger = Dealer(engine, engine.workers)
    frontend.send(request(2, PROMPT, 6))
    for step in range(6):
        forged = StepResult(ResultHeader(0, 1, step + 6, 1), np.array([7], np.int32), np.array([0], np.uint16))
        for message in (forged, Heartbeat("guessed", 10_000_000), Credit(), TruncateRequest(2, 0), FrontendHello(1)):
            stranger.send(message)
        worker.step()
        worker.beat()
    assert tokens_of(frontend.until(is_end), 2) == wanted and worker.epoch == 1
    assert "is not the worker of a group: dropped StepResult" in engine.log()


@pytest.mark.parametrize(
    "wrong",
    [{"vocab_size": -1}, {"block_size": 0}, {"num_blocks": 1 << 40}, {"max_batch_rows": 70_000}, {"num_host_blocks": -5}],
)
def test_a_hello_that_makes_no_sense_is_dropped_with_a_line(engines: Any, wrong: dict[str, int]) -> None:
    engine, frontend = engines()
    stranger = Dealer(engine, engine.workers)
    stranger.send(WorkerHello(0, msgspec.structs.replace(FACTS, **wrong)))
    worker = HandWorker(engine, SimExecutor(FACTS))
    assert len(undisturbed(frontend, worker, 3)) == 3
    assert re.search(f"dropped the hello of peer .: its {next(iter(wrong))} is", engine.log())


def test_garbage_truncated_oversized_and_other_versions_are_dropped_and_named_but_not_for_ever(engines: Any) -> None:
    engine, frontend = engines()
    worker = HandWorker(engine, SimExecutor(FACTS))
    frames = encode(request(9, PROMPT, 2))
    wrongs: list[list[bytes]] = [
        [b""],
        [os.urandom(64)],
        [frames[0][:-3], frames[1]],
        [frames[0], frames[1][:-1]],
        [frames[0], frames[1] + b"\0" * 1_000_000],
        [b"\x63" + frames[0][1:], frames[1]],
        [frames[0]] * 40,
        [b"\x02" + b"\x91" * 100_000],
    ]
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    for _ in range(10):
        for wrong in wrongs:
            frontend.socket.send_multipart(wrong)
    frontend.send(request(1, PROMPT, 3))
    run_steps(worker, 3)
    assert len(tokens_of(frontend.until(is_end), 1)) == 3
    log = engine.log()
    assert log.count("dropped a message from peer") == 20 and "no more is said" in log and "Traceback" not in log
    assert "wire version 99" in log and max(map(len, log.splitlines())) < 400


def test_messages_that_are_well_formed_and_absurd_crash_nothing(engines: Any) -> None:
    engine, frontend = engines()
    worker = HandWorker(engine, SimExecutor(FACTS))
    frontend.until(lambda message: isinstance(message, Facts) and message.ready)
    frontend.send(request(1, PROMPT, 4))
    big = 2**63 - 1
    absurd: list[Message] = [
        Credit(num_tokens=np.array([5], np.int32), handles=np.array([1, 2], np.uint32)),
        Credit(num_tokens=np.array([-5], np.int32), handles=np.array([1], np.uint32)),
        TruncateRequest(big, -big),
        request(-1, PROMPT, 4),
        request(2**32 + 5, PROMPT, 4),
        request(7, PROMPT, -4),
        request(7, PROMPT, 4, SamplingSpec(float("nan"), 0, 1.0, 0.0, 0)),
        request(7, PROMPT, 4, SamplingSpec(1.0, -3, 1.0, 0.0, 0)),
        ResumeQuery(1, "request-1", -7),
        WorkerHello(0, FACTS),
    ]
    for message in absurd:
        frontend.send(message)
    run, stranger = LogprobRun(-5, -1, big, -1), Dealer(engine, engine.workers)
    for message in (Logprobs(LogprobsHeader(0, 1, 0, (run,))), StepResult(ResultHeader(0, 1, 0, -big))):
        stranger.send(message)
    run_steps(worker, 4)
    assert len(tokens_of(frontend.until(is_end), 1)) == 4 and worker.epoch == 1
    assert load(frontend).held_blocks == 0 and "Traceback" not in engine.log(), engine.log()


def test_sockets_in_the_file_system_are_this_users_alone(engines: Any) -> None:
    engine, _ = engines()
    for endpoint in (engine.frontends, engine.workers):
        assert stat.S_IMODE(os.stat(endpoint.removeprefix("ipc://")).st_mode) == 0o600


# --------------------------------------------------------------------------------------------------------- other hosts


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    curve.make(tmp_path / "keys")
    return tmp_path / "keys"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_keys(engine: EngineProcess, keys: Keys | None) -> HandWorker:
    """A worker by way of tcp://."""
    worker = HandWorker.__new__(HandWorker)
    worker.socket = engine.context.socket(zmq.DEALER)
    worker.socket.setsockopt(zmq.LINGER, 0)
    if keys is not None:
        keys.set(worker.socket)
    worker.socket.connect(engine.workers)
    worker.executor, worker.link_id = SimExecutor(FACTS), ""
    worker.send(WorkerHello(0, FACTS))
    return worker


def test_a_worker_on_another_host_needs_the_right_key(engines: Any, keys: Path, tmp_path: Path) -> None:
    engine, frontend = engines(worker_endpoint=f"tcp://127.0.0.1:{free_port()}", worker_keys=str(keys))
    curve.make(tmp_path / "others")
    right, other = Keys.read(keys), Keys.read(tmp_path / "others")
    wrong_server = Keys(right.own_public, right.own_secret, other.core_public)
    wrong_own = Keys(other.own_public, other.own_secret, right.core_public)
    for wrong in (None, wrong_server, wrong_own):
        refused = with_keys(engine, wrong)
        assert frontend.receive(400) is None, "it has not joined"
        refused.close()
    worker = with_keys(engine, right)
    worker.welcome()
    assert len(undisturbed(frontend, worker, 4)) == 4


def test_keys_are_private_and_never_overwritten(keys: Path) -> None:
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in keys.glob("*.key_secret"))
    before = (keys / "core.key_secret").read_bytes()
    with pytest.raises(curve.StartError, match="never overwritten"):
        curve.make(keys)
    assert (keys / "core.key_secret").read_bytes() == before


@pytest.mark.parametrize("missing", ["core.key_secret", "worker.key"])
def test_a_missing_key_is_one_line(keys: Path, missing: str) -> None:
    (keys / missing).unlink()
    with pytest.raises(curve.StartError, match=re.escape(missing)):
        curve.CoreKeys.read(keys)
