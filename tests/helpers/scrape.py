"""A server with metrics on, some load for it, and what it exports."""

from __future__ import annotations

import contextlib
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
from prometheus_client.parser import text_string_to_metric_families

from carousel.v1 import generation_pb2 as pb
from carousel.v1 import generation_pb2_grpc
from tests.helpers.server import Server, eventually, running

DEMO = Path(__file__).parents[2] / "demo" / "model"


@dataclass
class Measured:
    server: Server
    url: str

    def scrape(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """Label sets and values by the name of a sample."""
        with urllib.request.urlopen(self.url, timeout=10) as answer:
            text = answer.read().decode()
        samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
        return samples

    def value(self, name: str, **labels: str) -> float:
        """The sum of all samples with these labels; 0 where there is none."""
        found = self.scrape().get(name, [])
        return sum(value for theirs, value in found if labels.items() <= theirs.items())

    def settles(self, name: str, value: float, **labels: str) -> bool:
        """Front ends tell of a request just after its caller has its last word."""
        return eventually(lambda: self.value(name, **labels) == value)


@contextlib.contextmanager
def measured(*options: str) -> Iterator[Measured]:
    with running("--model", str(DEMO), "--device", "sim", "--metrics-port", "0", *options) as server:
        assert eventually(lambda: "metrics are served on" in server.log()), server.log()
        found = re.search(r"metrics are served on (\S+/metrics)", server.log())
        assert found is not None
        yield Measured(server, found[1])


def request(max_tokens: int, tenant: str = "", num_prompt: int = 20) -> pb.GenerateRequest:
    made = pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(10, 10 + num_prompt)))
    made.stopping.max_tokens, made.stopping.ignore_eos = max_tokens, True
    if tenant:
        made.scheduling.tenant = tenant
    return made


def generate(target: str, made: pb.GenerateRequest) -> int:
    """Over a connection of its own, so that front ends share the calls. Returns the number of tokens."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(target, options=options) as channel:
        events = generation_pb2_grpc.GenerationStub(channel).Generate(made, timeout=60)
        return sum(len(event.delta.token_ids) for event in events)


def refused(target: str) -> grpc.StatusCode:
    try:
        generate(target, pb.GenerateRequest(text=""))
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    raise AssertionError("an empty prompt was taken")


def load(target: str, requests: list[pb.GenerateRequest]) -> int:
    """All at once; returns the number of tokens."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return sum(pool.map(lambda made: generate(target, made), requests))
