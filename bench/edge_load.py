"""`python -m bench.edge_load '{"port": …}'`: one load on one server, in a process of its own; its figures as JSON on stdout.

All answers are looked into once the last has come, so that the clock sees only the wire.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench import edge_echo
from bench.http2 import Answer, Call, Caller
from carousel.v1 import generation_pb2 as pb

GENERATE, MANY, ECHO = "generate", "many", "echo"
_PATHS = {GENERATE: "/carousel.v1.Generation/Generate", MANY: "/carousel.v1.Generation/GenerateMany", ECHO: edge_echo.PATH}
_OK = 0


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked."""

    kind: str  # GENERATE, MANY or ECHO
    port: int
    calls: int
    at_once: int = 0  # calls; 0: all
    connections: int = 1
    requests: int = 1  # of one call of MANY
    tokens: int = 1  # of each request
    text: bool = True
    prompt: int = 8  # tokens
    vocabulary: int = 4096  # prompt tokens are below this
    seed: int = 0
    pause_s: float = 0.0  # between calls that go one by one
    holds: bool = False  # no message may come before all calls have been heard of
    messages: int = 1  # of each call of ECHO …
    message_bytes: int = 16  # … and their size


@dataclass(frozen=True)
class Loaded:
    """What came of it. Times in seconds."""

    seconds: float  # from the first call to the last one's end
    cpu_s: float  # of this process, meanwhile
    calls: int
    served: int  # requests that ended by themselves with all their tokens; of ECHO: calls with all messages
    statuses: dict[str, int]  # gRPC statuses of the calls, by number
    failed: dict[str, int]  # requests of MANY that failed, by gRPC status
    tokens: int
    messages: int
    message_bytes: int  # of all of them
    deltas: int
    most_heard: int  # calls that the server had said something of, and that had not ended, at once
    heard_s: list[float]  # of each call: from its start to its headers
    first_s: list[float]  # of each call: from its start to its first message

    @property
    def messages_per_s(self) -> float:
        return self.messages / self.seconds


def calls_of(load: Load) -> list[Call]:
    path = _PATHS[load.kind]
    if load.kind == ECHO:
        return [Call(path, (edge_echo.request(load.messages, load.message_bytes),))] * load.calls
    random = np.random.default_rng(load.seed)
    prompts = random.integers(5, load.vocabulary, (load.calls * load.requests, load.prompt)).tolist()
    requests = [_request(prompt, load) for prompt in prompts]
    if load.kind == GENERATE:
        return [Call(path, (request.SerializeToString(),)) for request in requests]
    for number, request in enumerate(requests):
        request.request_id = f"r{number}"
    submits = [pb.GenerateManyRequest(submit=pb.Submit(request=request)).SerializeToString() for request in requests]
    return [Call(path, tuple(submits[first : first + load.requests])) for first in range(0, len(submits), load.requests)]


def _request(prompt: list[int], load: Load) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(temperature=0),
        stopping=pb.StoppingParams(max_tokens=load.tokens, ignore_eos=True),
        output=pb.OutputParams(text=load.text),
    )


def offer(load: Load) -> Loaded:
    """Raises CallError, OSError."""
    calls, caller = calls_of(load), Caller(load.port, load.connections, load.holds)
    try:
        begun_ns, cpu_s = time.monotonic_ns(), time.process_time()
        if load.pause_s:
            answers = [answer for call in calls for answer in _after(load.pause_s, caller, call)]
        else:
            answers = caller.run(calls, load.at_once or len(calls))
        return _look_into(load, answers, begun_ns, time.process_time() - cpu_s)
    finally:
        caller.close()


def _after(pause_s: float, caller: Caller, call: Call) -> list[Answer]:
    time.sleep(pause_s)
    return caller.run([call], 1)


def _look_into(load: Load, answers: Sequence[Answer], begun_ns: int, cpu_s: float) -> Loaded:
    served, tokens, deltas, failed = 0, 0, 0, dict[str, int]()
    for answer in answers:
        if load.kind == ECHO:
            served += answer.status == _OK and len(answer.messages) == load.messages
            continue
        told = _told(load.kind, answer)
        tokens, deltas = tokens + told.tokens, deltas + told.deltas
        served += sum(count == load.tokens for count in told.ended) if answer.status == _OK else 0
        for code in told.failed:
            failed[str(code)] = failed.get(str(code), 0) + 1
    ended = [answer.ended_ns for answer in answers]
    return Loaded(
        seconds=(max(ended) - begun_ns) / 1e9,
        cpu_s=cpu_s,
        calls=len(answers),
        served=served,
        statuses={str(status): count for status, count in _counted([answer.status for answer in answers])},
        failed=failed,
        tokens=tokens,
        messages=sum(len(answer.messages) for answer in answers),
        message_bytes=sum(map(len, (message for answer in answers for message in answer.messages))),
        deltas=deltas,
        most_heard=most_at_once([(answer.heard_ns, answer.ended_ns) for answer in answers]),
        heard_s=[(answer.heard_ns - answer.started_ns) / 1e9 for answer in answers],
        first_s=[(answer.first_ns - answer.started_ns) / 1e9 for answer in answers if answer.first_ns],
    )


@dataclass
class _Told:
    """Of one call."""

    tokens: int
    deltas: int
    ended: list[int]  # output tokens of each request, by its summary
    failed: list[int]  # gRPC statuses of requests of MANY


def _told(kind: str, answer: Answer) -> _Told:
    told = _Told(0, 0, [], [])
    for message in answer.messages:
        events: Sequence[Any] = (
            [pb.GenerateResponse.FromString(message)]
            if kind == GENERATE
            else pb.GenerateManyResponse.FromString(message).events
        )
        for event in events:
            match event.WhichOneof("event"):
                case "delta":
                    told.tokens += len(event.delta.token_ids)
                    told.deltas += 1
                case "summary":
                    told.ended.append(event.summary.usage.output_tokens)
                case "failed":
                    told.failed.append(event.failed.code)
    return told


def _counted(values: Sequence[int]) -> list[tuple[int, int]]:
    return [(value, values.count(value)) for value in sorted(set(values))]


def most_at_once(spans: Sequence[tuple[int, int]]) -> int:
    """How many of these spans overlap, at most."""
    changes = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    return int(np.cumsum([change for _, change in changes]).max(initial=0))


def main() -> None:
    loaded = offer(Load(**json.loads(sys.argv[1])))
    print(json.dumps(asdict(loaded)))


if __name__ == "__main__":
    main()
