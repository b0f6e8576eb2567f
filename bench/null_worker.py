"""`python -m bench.null_worker ENDPOINT ROWS`: a worker process that computes nothing, for what a hop costs.

It is a worker's own link with an executor that keeps no sequences and answers each plan with a token for every row; `echo`
instead of ROWS: a bare ZeroMQ socket that sends back what it gets.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import zmq

from wire import ResultHeader, StepPlan, StepResult, WorkerFacts
from worker.executor import Deliver
from worker.link import Link
from worker.sim_executor import sim_facts


class NullExecutor:
    """Every row of a plan samples token 1."""

    def __init__(self, facts: WorkerFacts) -> None:
        self.facts = facts

    def reset(self) -> None:
        pass

    def submit(self, plan: StepPlan, deliver: Deliver) -> None:
        header = ResultHeader(plan.header.group, plan.header.epoch, plan.header.step_id, 0)
        deliver(StepResult(header, np.ones(len(plan.slots), np.int32), plan.slots))

    def close(self) -> None:
        pass


def main() -> None:
    endpoint, what = sys.argv[1:]
    if what != "echo":
        Link(endpoint, 0, NullExecutor(sim_facts(max_batch_rows=int(what), pid=os.getpid()))).run()
    socket = zmq.Context().socket(zmq.DEALER)
    socket.connect(endpoint)
    socket.send(b"")
    while True:
        socket.send_multipart(socket.recv_multipart())


if __name__ == "__main__":
    main()
