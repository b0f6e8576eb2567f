"""`carousel serve` under a load from this process: all requests at once over one gRPC connection; and probes of its own.

Knows the client and bench.server; not what the others run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from bench.cpu_workload import Outcome, Request, Times, peak_tree_bytes, single_rate, together_rate
from bench.server import Server
from client import CarouselClient, CarouselError

# An offline burst: nobody reads along, so prompts need not wait for the time between two tokens.
OPTIONS = ("--device", "cpu", "--target-itl-ms", "0")
_WARM_TOKENS = 8
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True)
class Probes:
    """What Carousel is asked besides the workload, when that is over."""

    prompts: Sequence[Request]  # long ones for one token, one after the other: C3
    together: Sequence[Request]  # decode together, equally long: C5


@dataclass(frozen=True)
class Probed:
    prefill_s: list[float]  # of each long prompt, to its token
    together_tokens_per_s: float  # while all of them decode


def run(
    engine: str,
    model: Path,
    requests: Sequence[Request],
    single: Request,
    options: Sequence[str] = OPTIONS,
    probe: Callable[[CarouselClient], Any] | None = None,
) -> tuple[Outcome, Any]:
    """One server from its start to its end; probe: called after the requests, its answer is handed back. Raises
    ServerFailedError and CarouselError."""
    began = time.monotonic()
    with Server(["--model", str(model), *options]) as server, CarouselClient(server.target) as client:
        ready_s = time.monotonic() - began
        _offer(client, [Request(single.prompt_ids[::-1], _WARM_TOKENS)])  # no prefix of a later one
        alone = single_rate(_offer(client, [single])[0])
        token_s = _offer(client, requests)
        probed = None if probe is None else probe(client)
        peak = peak_tree_bytes(server.pid)
    return Outcome.of(engine, requests, token_s, peak, ready_s=ready_s, single_tokens_per_s=alone), probed


def probed(client: CarouselClient, probes: Probes) -> Probed:
    prefill = [_offer(client, [prompt])[0][-1] for prompt in probes.prompts]
    return Probed(prefill, together_rate(_offer(client, probes.together)))


def _offer(client: CarouselClient, requests: Sequence[Request]) -> Times:
    """Seconds of every request's tokens since all were offered. Token ids only, as the others are asked for."""
    times: dict[str, list[float]] = {}
    begin = time.monotonic()
    with client.generate_many() as many:
        for request in requests:
            asked = many.submit(request.prompt_ids, max_tokens=request.max_tokens, temperature=0, ignore_eos=True, text=False)
            times[asked] = []
        many.finish()
        for event in many:
            if event.HasField("failed"):
                raise CarouselError(_CODES[event.failed.code], event.failed.message)
            times[event.request_id] += [time.monotonic() - begin] * len(event.delta.token_ids)
    return list(times.values())
