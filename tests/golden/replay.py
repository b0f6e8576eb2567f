"""Golden traces: inputs to the core (lines that begin with `>`) and, below each, what the core then said.

`python -m tests.golden.replay` replays the inputs of every trace beside this file and writes what the core says now;
look at the difference before you commit it. With `--digest` it prints one hash of all plans' bytes instead, those of
seeded random inputs included.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from scheduler.core import CoreConfig
from tests.helpers.core_driver import CoreDriver
from tests.helpers.fake_worker import worker_facts
from wire import Refused, StepPlan, encode

HERE = Path(__file__).parent
TRACES = sorted(HERE.glob("*.trace"))


def replay(text: str) -> str:
    """The trace that the inputs of `text` give now."""
    tracer = Tracer()
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            lines.append(line)
        elif line.startswith("> "):
            lines += [line, *tracer.do(line[2:])]
    return "\n".join(lines) + "\n"


class Tracer:
    """Does one input after the other and puts what came of it into words. An input is a verb, then names or key=value."""

    def __init__(self) -> None:
        self.driver: CoreDriver | None = None

    def do(self, line: str) -> Iterator[str]:
        verb, *words = line.split()
        names = [word for word in words if "=" not in word]
        options: dict[str, str] = dict(word.split("=") for word in words if "=" in word)
        if verb == "core":
            self.driver = _driver(options)
            return
        assert self.driver is not None, "a trace begins with `> core`"
        yield from getattr(self, verb)(self.driver, *names, **options)

    def add(self, driver: CoreDriver, name: str, prompt: str, max: str = "0", cls: str = "2", stop: str = "") -> Iterator[str]:
        """prompt: its length; the tokens follow from the name."""
        tokens = [(ord(name[0]) * 7 + 3 * i) % 100 for i in range(int(prompt))]
        stops = [int(token) for token in stop.split(",") if token]
        answer = driver.add(tokens, int(max), priority=int(cls), stop=stops, request_id=name)
        if isinstance(answer, Refused):
            yield f"  refused {answer.code}: {answer.message}"

    def plan(self, driver: CoreDriver, times: str = "1") -> Iterator[str]:
        for _ in range(int(times)):
            mirror = dict(self._names(driver))
            plan = driver.plan()
            yield "  no plan" if plan is None else _describe(plan, mirror | dict(self._names(driver)))

    def answer(self, driver: CoreDriver, times: str = "1") -> Iterator[str]:
        for _ in range(int(times)):
            step = driver.core.in_flight[0].step_id
            yield from self._heard(driver, f"result {driver.core.epoch}.{step}", driver.answer)

    def turn(self, driver: CoreDriver, times: str = "1") -> Iterator[str]:
        """A plan, and the answer of the one before. When no plan can be made, only the answer."""
        for _ in range(int(times)):
            before = len(driver.core.in_flight)
            yield from self.plan(driver)
            if before and len(driver.core.in_flight) in (before, 2):
                yield from self.answer(driver)

    def cancel(self, driver: CoreDriver, name: str) -> Iterator[str]:
        yield from self._heard(driver, "cancel", lambda: driver.cancel(name))

    def truncate(self, driver: CoreDriver, name: str, outputs: str) -> Iterator[str]:
        request = next(request for request in driver.requests if request.request_id == name)
        yield from self._heard(driver, "truncate", lambda: driver.truncate(request, int(outputs)))

    def lost(self, driver: CoreDriver) -> Iterator[str]:
        yield from self._heard(driver, "lost", driver.lost)

    def failed(self, driver: CoreDriver) -> Iterator[str]:
        yield from self._heard(driver, "failed", driver.step_failed)

    def joined(self, driver: CoreDriver, **facts: str) -> Iterator[str]:
        new = worker_facts(**{name: int(value) for name, value in facts.items()}) if facts else None
        yield from self._heard(driver, "joined", lambda: driver.joined(new))

    def finish(self, driver: CoreDriver) -> Iterator[str]:
        """Turns until nothing is left."""
        while driver.core.num_requests or driver.core.in_flight:
            yield from self.turn(driver)
        driver.finish()
        load = driver.core.load(0)
        yield f"  {load.steps} steps, {load.output_tokens} output tokens, {load.preemptions} preemptions"

    def _heard(self, driver: CoreDriver, what: str, act: object) -> Iterator[str]:
        before = {request.sequence_id: len(request.got) for request in driver.requests}
        ended = {request.sequence_id for request in driver.requests if request.over}
        assert callable(act)
        act()
        words = [what]
        for request in driver.requests:
            words += [f"{request.request_id} {token}" for token in request.got[before[request.sequence_id] :]]
        for request in driver.requests:
            if request.end is not None and request.sequence_id not in ended:
                words.append(f"{request.request_id} ended {request.end.reason.value}, {request.end.stats.output_tokens} tokens")
        yield "  " + " | ".join(words)

    def _names(self, driver: CoreDriver) -> Iterator[tuple[int, str]]:
        assert driver.worker is not None or not driver.core.connected
        for slot, known in driver.worker.sequences.items() if driver.worker is not None else ():
            yield slot, driver.requests[known.start.sequence_id].request_id


def _driver(options: dict[str, str]) -> CoreDriver:
    config = {name: int(value) for name, value in options.items() if name in CoreConfig.__slots__ and name != "policy"}
    facts = {name: int(value) for name, value in options.items() if name in ("num_blocks", "block_size", "max_model_len")}
    assert {*config, *facts, "policy"} >= set(options), f"unknown: {options}"
    return CoreDriver(CoreConfig(policy=options["policy"], **config), worker_facts(**facts))  # type: ignore[arg-type]


def _describe(plan: StepPlan, names: dict[int, str]) -> str:
    parts = [f"  step {plan.header.epoch}.{plan.header.step_id}"]
    if len(plan.ended):
        parts.append(f"forget slots {_list(plan.ended)}")
    blocks = plan.start_blocks.tolist()
    for start in plan.header.starts:
        mine, blocks = blocks[: start.num_blocks], blocks[start.num_blocks :]
        parts.append(f"start {names[start.slot]} in slot {start.slot}, {start.num_tokens} tokens, blocks {_list(mine)}")
    for slot, block in zip(plan.grow_slots.tolist(), plan.grow_blocks.tolist(), strict=True):
        parts.append(f"{names[slot]} + block {block}")
    rows = zip(plan.slots.tolist(), plan.num_tokens.tolist(), strict=True)
    parts.append("compute " + ", ".join(f"{names[slot]} {count}" for slot, count in rows))
    if len(plan.padding):
        parts.append("pad " + ", ".join(names[slot] for slot in plan.padding.tolist()))
    return " | ".join(parts)


def _list(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))


def random_inputs(policy: str, seed: int, length: int = 400) -> str:
    """Seeded inputs of all kinds, on a pool that is small enough for preemption."""
    rng = random.Random(seed)
    lines = [
        f"> core policy={policy} max_batch_rows=6 max_step_tokens={rng.choice([7, 16, 31])} num_blocks=20 max_model_len=60"
    ]
    alive: list[str] = []
    for number in range(length):
        match rng.choices(["add", "turn", "plan", "cancel", "truncate", "lost"], [30, 100, 10, 5, 3, 1])[0]:
            case "add":
                alive.append(f"{rng.choice('abcdefgh')}{number}")
                prompt, limit, priority = rng.randint(1, 25), rng.randint(0, 25), rng.randint(1, 3)
                lines.append(f"> add {alive[-1]} prompt={prompt} max={limit} cls={priority} stop={rng.randrange(100)}")
            case "cancel" if alive:
                lines.append(f"> cancel {rng.choice(alive)}")
            case "truncate" if alive:
                lines.append(f"> truncate {rng.choice(alive)} {rng.randint(0, 3)}")
            case "lost":
                lines += ["> lost", "> joined"]
            case "plan":
                lines.append("> plan")
            case _:
                lines.append("> turn")
    return "\n".join([*lines, "> finish"])


def digest() -> str:
    """One hash of the bytes of all plans, of the traces and of random inputs."""
    hashed = hashlib.sha256()
    texts = [path.read_text() for path in TRACES]
    texts += [random_inputs(policy, seed) for policy in ("continuous", "static") for seed in range(3)]
    for text in texts:
        tracer = Tracer()
        for line in text.splitlines():
            if line.startswith("> "):
                hashed.update("\n".join(tracer.do(line[2:])).encode())
        assert tracer.driver is not None
        for plan in tracer.driver.plans:
            for frame in encode(plan):
                hashed.update(frame)
    return hashed.hexdigest()


if __name__ == "__main__":
    if "--digest" in sys.argv[1:]:
        print(digest())
    else:
        for path in TRACES:
            path.write_text(replay(path.read_text()))
