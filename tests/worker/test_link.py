"""The worker's link, over a real ipc socket, against a core that does as it likes."""

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from tests.helpers.plans import PlanMaker
from wire import (
    AbortRequest,
    Heartbeat,
    Message,
    Probe,
    Retired,
    StepFailed,
    StepPlan,
    StepResult,
    Welcome,
    WorkerHello,
    decode,
    encode,
)
from worker.executor import Deliver
from worker.link import Link
from worker.sim_executor import Latency, SimExecutor, sim_facts

FACTS = sim_facts(pid=77)
GROUP = 3


class ThreadedExecutor:
    """Answers from a thread of its own, as an executor with a device may."""

    def __init__(self) -> None:
        self.facts = FACTS
        self._inner = SimExecutor(FACTS)
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        self._jobs.put(self._inner.reset)

    def submit(self, plan: StepPlan, deliver: Deliver) -> None:
        self._jobs.put(lambda: self._inner.submit(plan, deliver))

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(10)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class Core:
    """A ROUTER that keeps one peer."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.context = zmq.Context()
        self.peer = b""
        self.beats: list[Heartbeat] = []
        self.link_thread: threading.Thread
        self.bind()

    def bind(self) -> None:
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, 20_000)
        self.socket.bind(self.address)

    def receive(self) -> Message:
        """The next message that is no heartbeat."""
        while True:
            peer, *frames = self.socket.recv_multipart()
            message = decode(frames)
            if isinstance(message, Heartbeat):
                self.beats.append(message)
                continue
            self.peer = peer
            return message

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.socket.send_multipart([self.peer, *encode(message)])

    def send_raw(self, *frames: bytes) -> None:
        self.socket.send_multipart([self.peer, *frames])

    def welcome(self, epoch: int) -> PlanMaker:
        self.send(Welcome(GROUP, epoch))
        return PlanMaker(FACTS, epoch=epoch, group=GROUP)


@pytest.fixture(params=[lambda: SimExecutor(FACTS), ThreadedExecutor], ids=["inline", "threaded"])
def core(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Core]:
    """A core to which a worker has just said hello."""
    core = Core(f"ipc://{tmp_path}/core")
    executor = request.param()
    link = Link(core.address, GROUP, executor)
    core.link_thread = thread = threading.Thread(target=link.run)
    thread.start()
    try:
        assert is_hello(core.receive())
        yield core
    finally:
        link.stop()
        thread.join(20)
        assert not thread.is_alive()
        executor.close()
        link.close()
        core.context.destroy(linger=0)


def is_hello(message: Message) -> bool:
    assert isinstance(message, WorkerHello) and message.link_id and message.heartbeat_ms > 0
    return (message.group, message.facts, message.replaces) == (GROUP, FACTS, False)


def result_of(core: Core) -> StepResult:
    answer = core.receive()
    assert isinstance(answer, StepResult), answer
    return answer


def test_plans_are_answered_in_order_two_deep(core: Core) -> None:
    maker = core.welcome(1)
    maker.start(0, [1, 2, 3])
    core.send(maker.plan(), maker.plan())
    for step in range(6):
        result = result_of(core)
        assert (result.header.group, result.header.epoch, result.header.step_id) == (GROUP, 1, step)
        assert result.slots.tolist() == [0] and len(result.tokens) == 1
        core.send(maker.plan())


def test_plans_before_the_welcome_and_of_another_epoch_or_group_are_dropped(core: Core) -> None:
    early = PlanMaker(FACTS, epoch=1, group=GROUP)
    early.start(0, [1])
    core.send(early.plan())
    maker = core.welcome(2)
    maker.start(1, [1])
    other_group = PlanMaker(FACTS, epoch=2, group=GROUP + 1)
    other_group.start(0, [1])
    core.send(early.plan(), other_group.plan(), maker.plan())
    result = result_of(core)
    assert (result.header.epoch, result.header.step_id, result.slots.tolist()) == (2, 0, [1])


def test_the_welcome_says_which_group_it_computes_for(core: Core) -> None:
    before = core.welcome(2)
    before.start(1, [1])
    maker = PlanMaker(FACTS, epoch=9, group=GROUP + 1)
    maker.start(0, [1])
    core.send(Welcome(GROUP + 1, 9), before.plan(), maker.plan())
    result = result_of(core)
    assert (result.header.group, result.header.epoch, result.slots.tolist()) == (GROUP + 1, 9, [0])


def test_a_second_welcome_starts_over_with_an_empty_mirror(core: Core) -> None:
    first = core.welcome(1)
    first.start(0, [1, 2])
    core.send(first.plan())
    before = result_of(core).tokens.tolist()
    second = core.welcome(2)
    second.start(0, [1, 2])
    core.send(second.plan())
    result = result_of(core)
    assert (result.header.epoch, result.header.step_id) == (2, 0) and result.tokens.tolist() == before


def test_probes_garbage_and_strange_messages_change_nothing(core: Core) -> None:
    maker = core.welcome(1)
    maker.start(0, [5])
    core.send(Probe())
    core.send_raw(b"")
    core.send_raw(b"\x01\xff\xff", b"junk")
    core.send_raw(b"\x63" + encode(Probe())[0][1:])
    core.send_raw(*encode(maker.plan())[:1])
    core.send(AbortRequest(4))
    again = PlanMaker(FACTS, epoch=1, group=GROUP)
    again.start(0, [5])
    core.send(Probe(), again.plan())
    assert result_of(core).header.step_id == 0


def test_after_a_failed_step_nothing_is_computed_until_the_next_welcome(core: Core) -> None:
    maker = core.welcome(1)
    maker.start(0, [5])
    good = maker.plan()
    core.send(good, good, maker.plan(), maker.plan())
    assert result_of(core).header.step_id == 0
    failed = core.receive()
    assert failed == StepFailed(GROUP, 1, 0, "PlanError: step 0 came where step 1 was expected")
    fresh = core.welcome(2)
    fresh.start(4, [5])
    core.send(fresh.plan())
    result = result_of(core)
    assert (result.header.epoch, result.slots.tolist()) == (2, [4])


def test_a_core_that_comes_back_gets_a_hello_again(core: Core) -> None:
    maker = core.welcome(1)
    maker.start(0, [5])
    core.send(maker.plan())
    result_of(core)
    core.socket.close()
    core.bind()
    assert is_hello(core.receive())
    maker = core.welcome(1)
    maker.start(2, [5])
    core.send(maker.plan())
    assert result_of(core).slots.tolist() == [2]


def test_heartbeats_carry_the_links_name_and_come_while_a_step_computes(tmp_path: Path) -> None:
    """The step ends only after the third beat that came while it was computing."""
    core, release = Core(f"ipc://{tmp_path}/core"), threading.Event()
    link = Link(core.address, GROUP, SimExecutor(FACTS, Latency(base_ns=60_000_000_000), sleep=lambda _: assert_set(release)))
    thread = threading.Thread(target=link.run)
    thread.start()
    try:
        hello = core.receive()
        assert isinstance(hello, WorkerHello)
        maker = core.welcome(1)
        maker.start(0, [5])
        core.send(maker.plan())
        seen = len(core.beats)
        while len(core.beats) < seen + 3:
            core.beats.append(decode(core.socket.recv_multipart()[1:]))  # type: ignore[arg-type]
        assert all(beat == Heartbeat(hello.link_id, 0) for beat in core.beats), "a simulated step sleeps: that is no stall"
        release.set()
        assert result_of(core).header.step_id == 0
    finally:
        release.set()
        link.stop()
        thread.join(20)
        link.close()
        core.context.destroy(linger=0)


def assert_set(event: threading.Event) -> None:
    assert event.wait(20)


def test_a_worker_that_is_retired_leaves(core: Core) -> None:
    core.welcome(1)
    core.send(Retired("another one computes"))
    core.link_thread.join(20)
    assert not core.link_thread.is_alive()
