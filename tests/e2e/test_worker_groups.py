"""Several workers under one scheduler: requests are spread over them, and the kill of one in mid-stream costs a pause."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from client.api import CarouselClient
from client.errors import CarouselError
from scheduler import curve
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.server import Server, eventually, kill, running

PROMPTS = ["for i in", "def main", "import os\n" * 4, "class A:\n    x = 1\n" * 6, "while True:", "return x", "a = [", "# "]
PATIENCE_S = 120


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=True, max_position_embeddings=2048)


def tokens(client: CarouselClient, prompt: str, wanted: dict[str, Any], began: Callable[[], None] = lambda: None) -> list[int]:
    got: list[int] = []
    for message in client.generate(prompt, **wanted):
        got.extend(message.delta.token_ids)
        if got:
            began()
    return got


def all_at_once(client: CarouselClient, wanted: dict[str, Any], disturb: Callable[[], None]) -> list[list[int]]:
    """All prompts together, while `disturb` does what it does once all have begun."""
    begun: set[int] = set()
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        jobs = [
            threads.submit(tokens, client, prompt, wanted, lambda number=number: begun.add(number))  # type: ignore[misc]
            for number, prompt in enumerate(PROMPTS)
        ]
        assert eventually(lambda: len(begun) == len(PROMPTS), PATIENCE_S)
        disturb()
        return [job.result(PATIENCE_S) for job in jobs]


def groups(client: CarouselClient) -> list[int]:
    """Of all requests that are alive."""
    return sorted(request.group for request in client.list_requests().requests)


def metrics(server: Server) -> str:
    found = re.search(r"metrics are served on (http://\S+)", server.log())
    assert found is not None
    with urllib.request.urlopen(found[1], timeout=30) as answer:
        return str(answer.read().decode())


def start_worker(model_dir: Path, address: str, keys: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "worker", "--model", str(model_dir), "--device", "sim", "--num-blocks", "400"]
    command += ["--sim-base-ns", "10000000", "--connect", address, "--keys", str(keys)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def test_two_workers_that_join_by_tcp_share_the_work_and_one_that_is_killed_loses_nothing(
    model_dir: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    curve.make(keys)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    options = ("--inner-address", address, "--inner-keys", str(keys), "--max-groups", "16", "--metrics-port", "0")
    server = Server("--model", str(model_dir), *options)
    workers = [start_worker(model_dir, address, keys)]
    wanted: dict[str, Any] = dict(max_tokens=150, seed=3, ignore_eos=True)
    try:
        server.wait_ready()
        with CarouselClient(server.target) as client:
            alone = all_at_once(client, wanted, lambda: None)
            workers.append(start_worker(model_dir, address, keys))

            def computing() -> dict[int, int]:
                return {worker.group: worker.pid for worker in client.server_info().workers}

            assert eventually(lambda: len(computing()) == 2, PATIENCE_S)
            assert computing() == {0: workers[0].pid, 1: workers[1].pid}

            def disturb() -> None:
                assert set(groups(client)) == {0, 1}
                kill(workers[1].pid)
                assert eventually(lambda: set(groups(client)) == {0})

            assert all_at_once(client, wanted, disturb) == alone
            assert computing() == {0: workers[0].pid} and "its requests go to other groups" in server.log()
            workers.append(start_worker(model_dir, address, keys))
            assert eventually(lambda: computing() == {0: workers[0].pid, 1: workers[2].pid}, PATIENCE_S)

            def disturb_the_other() -> None:
                kill(workers[0].pid)
                assert eventually(lambda: set(groups(client)) == {1})

            assert all_at_once(client, wanted, disturb_the_other) == alone
            exported = metrics(server)
            assert 'carousel_group_worker_up{group="0"} 0.0' in exported and "carousel_ready 1.0" in exported
            assert 'carousel_group_worker_up{group="1"} 1.0' in exported
            load = client.load()
            assert (load.finished_requests, load.running_requests, load.held_blocks) == (3 * len(PROMPTS), 0, 0)
            assert (client.block_tables(1).group, client.block_tables(1).num_blocks) == (1, 400)
            with pytest.raises(CarouselError) as caught:
                client.block_tables(7)
            assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        assert server.stop() == 0


@pytest.mark.slow
def test_workers_of_its_own_give_the_tokens_of_one_and_one_that_is_killed_comes_back(model_dir: Path) -> None:
    options = ("--model", str(model_dir), "--device", "cpu", "--num-blocks", "400", "--threads", "1", "--workers", "2")
    wanted: dict[str, Any] = dict(max_tokens=160, temperature=0, ignore_eos=True)
    with running(*options) as server, CarouselClient(server.target) as client:
        assert eventually(lambda: len(client.server_info().workers) == 2, PATIENCE_S)
        alone = [tokens(client, prompt, wanted) for prompt in PROMPTS]
        before = {worker.group: worker.pid for worker in client.server_info().workers}

        def disturb() -> None:
            assert set(groups(client)) == {0, 1}
            kill(before[0])

        assert all_at_once(client, wanted, disturb) == alone
        assert eventually(lambda: len(client.server_info().workers) == 2, PATIENCE_S)
        after = {worker.group: worker.pid for worker in client.server_info().workers}
        assert after[1] == before[1] and after[0] != before[0]
        replaced = client.replace_worker(group=1)
        after = {worker.group: worker.pid for worker in client.server_info().workers}
        assert after[1] == replaced.pid != before[1]
        assert [tokens(client, prompt, wanted) for prompt in PROMPTS] == alone
