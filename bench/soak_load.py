"""`python -m bench.soak_load '{"target": …}'`: the load of `make soak`, a process of its own.

Now and then a line of JSON on stdout says how far it is, the last that it is done. Each request of soak_cases is carried to
its fate, by Generate, GenerateMany and Resume, and what came of it is judged at once. Now and then all pause, and the server
must hold nothing: no request, no row, no block.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field
from typing import TypeAlias

import grpc
import grpc.aio

from bench.soak_cases import WINDOW_MS, Case, Fate, cases
from bench.witness import Flaws, Witness
from carousel.v1 import control_pb2, generation_pb2_grpc
from carousel.v1 import generation_pb2 as pb
from client import CarouselError
from client.aio.api import AsyncCarouselClient
from client.aio.streams import AsyncGenerateStream
from client.connection import way_to
from client.errors import error_of, error_of_failed

_OK = grpc.StatusCode.OK
_CANCELLED, _DEADLINE = grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED
_UNAVAILABLE, _EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED
_NOT_FOUND, _EXISTS = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS
_CUT = "cut"  # ended with its connection or the core, as one without a window may
_RETRIES = 100
_AGAIN_S = (0.05, 0.3)  # before another attempt, at random
_SLOW_S = 0.1  # before a slow reader gives credit, or reads on …
_SLOW_TIMES = 15  # … so often; then it is as quick as all others
_SLOW_TOKENS = 4  # a slow reader's window
_SINGLES = 4  # connections of Generate
_LINES = 4  # connections of GenerateMany
_RESTS_S = 2 * WINDOW_MS / 1000  # what nobody has claimed is over then
_CASE_S = 180.0  # no request takes longer, whatever is killed
_TELL_S = 0.1  # whoever kills must know when it is enough
_MOST_TOLD = 40
_MOST_SLOW = 5

Status: TypeAlias = grpc.StatusCode | str


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the process is told."""

    target: str
    requests: int
    seed: int
    lanes: int  # requests at a time
    calm_from: int  # the number of the first request that meets no kill
    leg: int  # requests between two pauses


@dataclass
class Tally:
    """What came of it so far."""

    ended: Counter[str] = field(default_factory=Counter)  # by what became of them
    tokens: int = 0
    resumes: int = 0
    again: int = 0  # requests made once more: the server did not have them
    refused: int = 0  # for now; made again
    flaws: Flaws = field(default_factory=Flaws)
    violations: list[str] = field(default_factory=list)
    num_violations: int = 0
    slowest: list[tuple[float, str]] = field(default_factory=list)  # seconds and which; those that took longest
    rests: int = 0  # pauses at which the server held nothing
    counters: Counter[str] = field(default_factory=Counter)  # the cores' own, as far as they were seen

    def violated(self, what: str) -> None:
        self.num_violations += 1
        if len(self.violations) < _MOST_TOLD:
            self.violations.append(what)

    def took(self, seconds: float, case: Case) -> None:
        which = (
            f"request {case.number} ({case.fate}, {'GenerateMany' if case.by_many else 'Generate'}, window {case.has_window})"
        )
        self.slowest = sorted([*self.slowest, (seconds, which)], reverse=True)[:_MOST_SLOW]

    def judge(self, case: Case, witness: Witness, status: Status, calm_from: int) -> None:
        flaws = witness.flaws(case.expected)
        self.flaws += flaws
        self.tokens += witness.num_tokens
        became = _became(case, witness, status, calm_from)
        if became is None or flaws:
            seen = f"{witness.num_tokens} tokens, ends {sorted(map(str, witness.reasons))}, {flaws}"
            self.violated(f"request {case.number} ({case.fate}, window {case.has_window}): {status}; {seen}")
        self.ended[became or "failed"] += 1


def _became(case: Case, witness: Witness, status: Status, calm_from: int) -> str | None:
    """None: what must not be."""
    allowed = {pb.FINISH_REASON_LENGTH}
    match status:
        case grpc.StatusCode.OK if witness.is_whole:
            return "whole"
        case grpc.StatusCode.OK if case.fate is Fate.LATE and witness.reasons <= allowed | {pb.FINISH_REASON_DEADLINE}:
            return "late"
        case grpc.StatusCode.OK if case.fate is Fate.CANCELLED and witness.reasons <= allowed | {pb.FINISH_REASON_CANCELLED}:
            return "cancelled"
        case grpc.StatusCode.CANCELLED if case.fate is Fate.CANCELLED:
            return "cancelled"
        case grpc.StatusCode.DEADLINE_EXCEEDED if case.fate is Fate.LATE:
            return "late"
        case "cut" if not case.has_window and case.number < calm_from:
            return "cut"
    return None


class _Single:
    """Calls of one connection, a stream for each request."""

    def __init__(self, target: str, tally: Tally) -> None:
        way = way_to(target, None, None, None, None)
        self._channel = way.aio_channel()
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)
        self.client = AsyncCarouselClient(target, retries=_RETRIES, resume_window_ms=0)  # a case says itself
        self._tally = tally

    async def close(self) -> None:
        await self.client.close()
        await self._channel.close()

    async def carry(self, case: Case, witness: Witness, draws: random.Random) -> Status:
        if case.fate is Fate.BROKEN:
            return await self._broken(case, witness, draws)
        try:
            return await self._follow(case, witness, self.client.stream(case.request), draws)
        except CarouselError as error:
            return _CUT if error.code is _UNAVAILABLE and not case.has_window else _status(error)

    async def _follow(self, case: Case, witness: Witness, stream: AsyncGenerateStream, draws: random.Random) -> Status:
        """Through the client, which goes on by itself."""
        by_id, cancelled, pauses = draws.random() < 0.5, False, 0
        async with stream:
            if case.fate is Fate.CANCELLED and not case.after:
                await asyncio.sleep(0)  # it is sent
                return _CANCELLED
            async for event in stream:
                witness.take(event)
                pauses += 1
                if case.fate is Fate.SLOW and pauses <= _SLOW_TIMES:
                    await asyncio.sleep(_SLOW_S)
                if case.fate is Fate.CANCELLED and not cancelled and witness.num_tokens >= case.after:
                    cancelled = True
                    if not by_id:
                        return _CANCELLED
                    with contextlib.suppress(CarouselError):
                        await self.client.cancel(stream.request_id)
        return _OK

    async def _broken(self, case: Case, witness: Witness, draws: random.Random) -> Status:
        request = pb.GenerateRequest()
        request.CopyFrom(case.request)
        request.request_id = f"broken-{case.number}"
        while True:
            call = self._stub.Generate(request)
            try:
                async for event in call:
                    witness.take(event)
                    if witness.num_tokens >= case.after:
                        call.cancel()
                        break
                else:
                    return _OK
            except grpc.aio.AioRpcError as failed:
                error = error_of(failed, "", answered=True)
                if error.code is _EXHAUSTED:
                    self._tally.refused += 1
                elif error.code not in (_UNAVAILABLE, _EXISTS):
                    return _status(error)
            await asyncio.sleep(draws.uniform(*_AGAIN_S))
            status = await self.resume(request.request_id, witness, draws)
            if status is not _NOT_FOUND or witness.num_tokens:
                return status
            self._tally.again += 1

    async def resume(self, request_id: str, witness: Witness, draws: random.Random) -> Status:
        """Until it has ended. Each stream must bring exactly the rest."""
        until_s = time.monotonic() + WINDOW_MS / 1000
        while True:
            witness.resumed()
            self._tally.resumes += 1
            try:
                async for event in self._stub.Resume(witness.rest(request_id)):
                    witness.take(event)
                return _OK
            except grpc.aio.AioRpcError as failed:
                error = error_of(failed, "", answered=True)
                if error.code is not _UNAVAILABLE or time.monotonic() > until_s:
                    return _status(error)
            await asyncio.sleep(draws.uniform(*_AGAIN_S))


@dataclass(eq=False)
class _Carried:
    case: Case
    witness: Witness
    ended: asyncio.Future[CarouselError | None]  # None: it has its summary
    is_cancelled: bool = False
    pauses: int = 0  # that its slow reader has made


class _Line:
    """One GenerateMany at a time: when it breaks, the next request opens another."""

    def __init__(self, target: str, single: _Single, tally: Tally) -> None:
        self._channel = way_to(target, None, None, None, None).aio_channel()
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)
        self._single, self._tally = single, tally
        self._carried: dict[str, _Carried] = {}
        self._commands: asyncio.Queue[pb.GenerateManyRequest | None] | None = None
        self._reading: asyncio.Task[None] | None = None

    async def close(self) -> None:
        if self._commands is not None:
            self._commands.put_nowait(None)
        if self._reading is not None:
            await self._reading
        await self._channel.close()

    async def carry(self, case: Case, witness: Witness, draws: random.Random) -> Status:
        request_id = f"many-{case.number}"
        while True:
            carried = await self._submit(request_id, case, witness)
            error = await carried.ended
            if error is None:
                return _OK
            if error.code is _EXHAUSTED:
                self._tally.refused += 1
            elif error.code is _UNAVAILABLE:
                if not case.has_window:
                    return _CUT
                await asyncio.sleep(draws.uniform(*_AGAIN_S))
                status = await self._single.resume(request_id, witness, draws)
                if status is not _NOT_FOUND or witness.num_tokens:
                    return status
                self._tally.again += 1
            elif error.code is not _EXISTS or not case.has_window:
                return _status(error)
            await asyncio.sleep(draws.uniform(*_AGAIN_S))

    async def _submit(self, request_id: str, case: Case, witness: Witness) -> _Carried:
        if self._commands is None:
            self._commands = asyncio.Queue()
            self._reading = asyncio.create_task(self._read(self._commands))
        carried = self._carried[request_id] = _Carried(case, witness, asyncio.get_running_loop().create_future())
        request = pb.GenerateRequest()
        request.CopyFrom(case.request)
        request.request_id = request_id
        window = _SLOW_TOKENS if case.fate is Fate.SLOW else 0
        self._commands.put_nowait(pb.GenerateManyRequest(submit=pb.Submit(request=request, window_tokens=window)))
        if case.fate is Fate.CANCELLED and not case.after:
            carried.is_cancelled = True
            self._commands.put_nowait(pb.GenerateManyRequest(cancel=pb.CancelRequest(request_id=request_id)))
        return carried

    async def _read(self, commands: asyncio.Queue[pb.GenerateManyRequest | None]) -> None:
        error = CarouselError(_UNAVAILABLE, "the connection ended")
        try:
            async for message in self._stub.GenerateMany(_until_none(commands)):
                for event in message.events:
                    self._hear(event, commands)
        except grpc.aio.AioRpcError as failed:
            error = error_of(failed, "", answered=True)
        finally:
            commands.put_nowait(None)  # grpc's task waits for what is to be sent
            self._commands = None
            broken, self._carried = self._carried, {}
            for carried in broken.values():
                carried.ended.set_result(error)

    def _hear(self, event: pb.RequestEvent, commands: asyncio.Queue[pb.GenerateManyRequest | None]) -> None:
        request_id = event.request_id
        carried = self._carried.get(request_id)
        if carried is None:
            return self._tally.violated(f"an event of {request_id}, which has ended: {event.WhichOneof('event')}")
        case, witness = carried.case, carried.witness
        witness.take(event)
        if event.HasField("summary") or event.HasField("failed"):
            del self._carried[request_id]
            return carried.ended.set_result(error_of_failed(event.failed) if event.HasField("failed") else None)
        if case.fate is Fate.CANCELLED and not carried.is_cancelled and witness.num_tokens >= case.after:
            carried.is_cancelled = True
            commands.put_nowait(pb.GenerateManyRequest(cancel=pb.CancelRequest(request_id=request_id)))
        if case.fate is Fate.SLOW and event.delta.token_ids:
            credit = pb.AddCredit(request_id=request_id, num_tokens=len(event.delta.token_ids))
            carried.pauses += 1
            delay_s = _SLOW_S if carried.pauses <= _SLOW_TIMES else 0.0
            asyncio.get_running_loop().call_later(delay_s, commands.put_nowait, pb.GenerateManyRequest(credit=credit))
        return None


async def _until_none(commands: asyncio.Queue[pb.GenerateManyRequest | None]) -> AsyncIterator[pb.GenerateManyRequest]:
    while (command := await commands.get()) is not None:
        yield command


def _status(error: CarouselError) -> Status:
    """The code where a request may end with it, else in words."""
    return error.code if error.code in (_CANCELLED, _DEADLINE, _NOT_FOUND) else str(error)


class Soak:
    """The whole load."""

    def __init__(self, told: Told, tally: Tally) -> None:
        self._told, self._tally = told, tally
        self._counted: dict[str, int] = {}  # at the last pause

    async def run(self) -> None:
        told = self._told
        self._singles = [_Single(told.target, self._tally) for _ in range(_SINGLES)]
        self._lines = [_Line(told.target, self._singles[i % _SINGLES], self._tally) for i in range(_LINES)]
        vocab_size = (await self._singles[0].client.model_info()).vocab_size
        for first in range(0, told.requests, told.leg):
            leg = cases(told.seed, range(first, min(first + told.leg, told.requests)), vocab_size)
            await asyncio.gather(*(self._lane(number, leg) for number in range(told.lanes)))
            await self._rest()
        for line in self._lines:
            await line.close()
        for single in self._singles:
            await single.close()

    async def _lane(self, number: int, leg: Iterator[Case]) -> None:
        single, line = self._singles[number % _SINGLES], self._lines[number % _LINES]
        for case in leg:
            draws = random.Random(f"{self._told.seed} {case.number} fate")
            witness = Witness(len(case.expected))
            by, begun_s = line if case.by_many else single, time.monotonic()
            try:
                status = await asyncio.wait_for(by.carry(case, witness, draws), _CASE_S)
            except TimeoutError:
                status = f"not over after {_CASE_S:g} s"
            self._tally.took(time.monotonic() - begun_s, case)
            self._tally.judge(case, witness, status, self._told.calm_from)

    async def _rest(self) -> None:
        """Nothing is asked of the server: it must hold nothing."""
        until_s = time.monotonic() + _RESTS_S
        while held := _held(load := await self._load()):
            if time.monotonic() > until_s:
                return self._tally.violated(f"held though nobody asks for anything: {held}")
            await asyncio.sleep(0.1)
        self._tally.rests += 1
        for name in ("preemptions", "cached_tokens", "recomputed_tokens", "steps"):
            value, before = getattr(load, name), self._counted.get(name, 0)
            self._tally.counters[name] += value - before if value >= before else value  # a new core counts from 0
            self._counted[name] = value
        return None

    async def _load(self) -> control_pb2.GetLoadResponse:
        return await self._singles[0].client.load()


def _held(load: control_pb2.GetLoadResponse) -> str:
    """In words; empty: nothing."""
    held = {name: getattr(load, name) for name in ("running_requests", "waiting_requests", "held_blocks", "retiring_blocks")}
    held["missing blocks"] = load.total_blocks - load.free_blocks - load.cached_blocks if not any(held.values()) else 0
    return ", ".join(f"{name} {count}" for name, count in held.items() if count)


def _tell(tally: Tally, is_done: bool) -> None:
    told = {name: getattr(tally, name) for name in Tally.__dataclass_fields__}  # asdict can't copy a Counter
    print(json.dumps(told | {"flaws": asdict(tally.flaws), "done": is_done}), flush=True)


async def _run(told: Told) -> None:
    tally = Tally()

    async def tell() -> None:
        while True:
            _tell(tally, False)
            await asyncio.sleep(_TELL_S)

    telling = asyncio.create_task(tell())
    try:
        await Soak(told, tally).run()
    finally:
        telling.cancel()
    _tell(tally, True)


def main() -> None:
    asyncio.run(_run(Told(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
