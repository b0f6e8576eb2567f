"""The demo's callers: each request in a thread with a stream of its own, and one thread that watches the steps.

They put what they see into a queue; whoever reads it decides what to show. Knows the client only.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from carousel.v1 import inspect_pb2
from client import CarouselClient, CarouselError, GenerateStream, Stream
from demo.figures import Outcome
from demo.workload import Work

# Every run makes the same tokens, whatever the batch; the seed is for a simulated worker, which knows no greedy choice.
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "seed": 0}


@dataclass(frozen=True)
class Sent:
    work: Work


@dataclass(frozen=True)
class Text:
    """New tokens of a request, and their text."""

    label: str
    num_tokens: int
    text: str


@dataclass(frozen=True)
class Ended:
    outcome: Outcome


@dataclass(frozen=True)
class Failed:
    who: str
    error: CarouselError


Seen: TypeAlias = Sent | Text | Ended | Failed | inspect_pb2.WatchStepsResponse
SeenQueue: TypeAlias = "queue.SimpleQueue[Seen]"


def request_id(work: Work) -> str:
    return f"demo-{work.label}"


def send(client: CarouselClient, work: Work, seen: SeenQueue) -> None:
    """Sends the request now (calls arrive in their order), and reads the answer in a thread of its own."""
    seen.put(Sent(work))
    sent_s = time.monotonic()
    stream = client.generate(work.prompt, request_id=request_id(work), max_tokens=work.max_tokens, **GREEDY)
    _start(lambda: _read(stream, work.label, sent_s, seen))


def watch(client: CarouselClient, seen: SeenQueue) -> Stream[inspect_pb2.WatchStepsResponse]:
    """Starts to watch the steps; close the stream to end it."""
    steps = client.watch_steps()

    def forward() -> None:
        try:
            for step in steps:
                seen.put(step)
        except CarouselError as error:
            seen.put(Failed("the watcher of steps", error))

    _start(forward)
    return steps


def _start(target: Callable[[], None]) -> None:
    threading.Thread(target=target, daemon=True).start()


def _read(stream: GenerateStream, label: str, sent_s: float, seen: SeenQueue) -> None:
    first_token_s = 0.0
    token_ids: list[int] = []
    try:
        for event in stream:
            if event.WhichOneof("event") == "delta":
                first_token_s = first_token_s or time.monotonic()
                token_ids += event.delta.token_ids
                seen.put(Text(label, len(event.delta.token_ids), event.delta.text))
    except CarouselError as error:
        seen.put(Failed(f"request {label}", error))
    else:
        seen.put(Ended(Outcome(label, sent_s, first_token_s, time.monotonic(), tuple(token_ids))))
