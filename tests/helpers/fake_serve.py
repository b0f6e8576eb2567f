"""Stands in for the `carousel` command: `python -m tests.helpers.fake_serve serve OPTIONS` serves a batch without a model.

One thread steps it: one prompt chunk or one token per row and step, with both policies' rules of who may join. The tokens of a
request depend on its prompt alone. The model named "broken" ends it with exit code 3, that named
"full" refuses every request.
"""

from __future__ import annotations

import queue
import signal
import sys
import threading
import time
import zlib
from dataclasses import dataclass, field

import click
import grpc

from carousel.v1 import control_pb2, generation_pb2, inspect_pb2
from tests.helpers.fake_server import FakeServer, refuse

BLOCK_SIZE, NUM_BLOCKS = 16, 512
STEP_S = 0.001


@dataclass
class Sequence:
    request_id: str
    prompt_tokens: int
    max_tokens: int
    first_token: int
    answers: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)  # token ids, then None
    made: int = 0
    computed: int = 0
    joined: bool = True

    @property
    def ended(self) -> bool:
        return self.made == self.max_tokens


class FakeBatch:
    """The rows and the queue; `step` turns the batch once."""

    def __init__(self, num_rows: int, policy: str) -> None:
        self.rows: list[Sequence | None] = [None] * num_rows
        self.policy = policy
        self.waiting: list[Sequence] = []
        self.watchers: list[queue.SimpleQueue] = []
        self.changed = threading.Condition()
        self.num_steps = 0

    def add(self, sequence: Sequence) -> None:
        with self.changed:
            self.waiting.append(sequence)
            self.changed.notify()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or any(self.rows))
                self.step()
            time.sleep(STEP_S)

    def step(self) -> None:
        if self.policy == "continuous" or not any(row and not row.ended for row in self.rows):
            self.rows = [row if row and not row.ended else None for row in self.rows]
            for slot, row in enumerate(self.rows):
                if row is None and self.waiting:
                    self.rows[slot] = self.waiting.pop(0)
        record = inspect_pb2.WatchStepsResponse(
            step_id=self.num_steps, total_blocks=NUM_BLOCKS, waiting_requests=len(self.waiting)
        )
        self.num_steps += 1
        for slot, row in enumerate(self.rows):
            if row is not None:
                self._compute(slot, row, record)
        for watcher in self.watchers:
            watcher.put(record)

    def _compute(self, slot: int, row: Sequence, record: inspect_pb2.WatchStepsResponse) -> None:
        reserved = row.prompt_tokens + (row.max_tokens if self.policy == "static" else row.made)
        record.held_blocks += -(-reserved // BLOCK_SIZE)
        record.kv_tokens += row.computed
        num_tokens = row.prompt_tokens if row.joined else 1
        record.rows.add(
            request_id=row.request_id,
            slot=slot,
            num_tokens=num_tokens,
            sampled=not row.ended,
            joined=row.joined,
            padding=row.ended,
        )
        if not row.ended:
            row.answers.put((row.first_token + row.made) % 1000)
            row.made += 1
            row.computed += num_tokens
            row.joined = False
            if row.ended:
                row.answers.put(None)
                record.leaves.add(request_id=row.request_id, reason="length")


class FakeServe(FakeServer):
    """The public services over a FakeBatch."""

    def __init__(self, num_rows: int, policy: str, port: int) -> None:
        super().__init__(self._script, port)
        self.batch = FakeBatch(num_rows, policy)

    def _script(self, request, context):
        sequence = Sequence(
            request.request_id, max(1, len(request.text) // 4), request.stopping.max_tokens, zlib.crc32(request.text.encode())
        )
        self.batch.add(sequence)
        for offset, token in enumerate(iter(sequence.answers.get, None)):
            text = f" t{token}" if offset % 10 != 9 else "\n    line"
            yield generation_pb2.GenerateResponse(delta=generation_pb2.Delta(token_offset=offset, token_ids=[token], text=text))
        length = generation_pb2.FINISH_REASON_LENGTH
        yield generation_pb2.GenerateResponse(finished=generation_pb2.Finished(reason=length))
        yield generation_pb2.GenerateResponse(summary=generation_pb2.Summary(request_id=request.request_id))

    def WatchSteps(self, request, context):
        records: queue.SimpleQueue = queue.SimpleQueue()
        self.batch.watchers.append(records)
        context.add_callback(lambda: records.put(None))
        yield from iter(records.get, None)

    def GetServerInfo(self, request, context):
        return control_pb2.GetServerInfoResponse(max_batch_rows=len(self.batch.rows), policy=self.batch.policy)


@click.command()
@click.option("--model")
@click.option("--device")
@click.option("--policy")
@click.option("--max-batch-rows", type=int)
@click.option("--drain-timeout")
@click.option("--port", type=int)
def serve(model: str, device: str, policy: str, max_batch_rows: int, drain_timeout: str, port: int) -> None:
    if model == "broken":
        print("the worker exited with code 1", flush=True)
        sys.exit(3)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with FakeServe(max_batch_rows, policy, port) as server:
        if model == "full":
            server.script = refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        print(f"{model} is served on {server.target}", flush=True)
        threading.Thread(target=server.batch.run, daemon=True).start()
        signal.pause()


if __name__ == "__main__":
    serve(sys.argv[2:])
