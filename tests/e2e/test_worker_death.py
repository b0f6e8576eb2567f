"""A worker dies in every way that it can, under load: each stream goes on with the tokens of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from client.api import CarouselClient
from client.errors import CarouselError
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.server import CAROUSEL, Server, eventually, is_alive, kill, running

pytestmark = pytest.mark.slow

PROMPTS = ["for i in", "def main", "import os\n" * 4, "class A:\n    x = 1\n" * 6]
SAMPLED: dict[str, Any] = dict(max_tokens=160, temperature=0.8, seed=7, ignore_eos=True)
GREEDY: dict[str, Any] = dict(max_tokens=160, temperature=0, ignore_eos=True)
POISON = "poison " * 3
PATIENCE_S = 240  # a worker that loads its model a dozen times


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=True, max_position_embeddings=2048)


def options(model_dir: Path) -> tuple[str, ...]:
    return ("--model", str(model_dir), "--device", "cpu", "--num-blocks", "400", "--threads", "1", "--no-prefix-caching")


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    with running(*options(model_dir)) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[list[int]]:
    with CarouselClient(server.target) as client:
        return [tokens(client, prompt, wanted) for prompt in PROMPTS for wanted in (SAMPLED, GREEDY)]


def tokens(client: CarouselClient, prompt: str, wanted: dict[str, Any], began: Callable[[], None] = lambda: None) -> list[int]:
    got: list[int] = []
    for message in client.generate(prompt, **wanted):
        got.extend(message.delta.token_ids)
        if got:
            began()
    return got


def all_at_once(server: Server, disturb: Callable[[], None]) -> list[list[int]]:
    """The same requests together, while `disturb` does what it does once all have begun."""
    jobs = [(prompt, wanted) for prompt in PROMPTS for wanted in (SAMPLED, GREEDY)]
    begun: set[int] = set()
    with CarouselClient(server.target) as client, ThreadPoolExecutor(len(jobs)) as threads:
        running = [
            threads.submit(tokens, client, prompt, wanted, lambda number=number: begun.add(number))  # type: ignore[misc]
            for number, (prompt, wanted) in enumerate(jobs)
        ]
        assert eventually(lambda: len(begun) == len(jobs))
        disturb()
        return [job.result(PATIENCE_S) for job in running]


def worker_of(server: Server) -> int:
    with CarouselClient(server.target) as client:
        assert eventually(lambda: len(client.server_info().workers) == 1)
        return client.server_info().workers[0].pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGSTOP], ids=lambda n: n.name)
def test_streams_go_on_with_the_same_tokens(number: int, server: Server, undisturbed: list[list[int]]) -> None:
    """SIGSTOP: a process that hangs, found by its missing heartbeats and killed."""
    pid = worker_of(server)
    assert all_at_once(server, lambda: os.kill(pid, number)) == undisturbed
    assert eventually(lambda: not is_alive(pid)) and worker_of(server) != pid
    assert ("nothing was heard of it" in server.log()) == (number == signal.SIGSTOP)


def test_a_standby_takes_over(model_dir: Path, undisturbed: list[list[int]]) -> None:
    with running(*options(model_dir), "--standby", "1") as server:
        assert eventually(lambda: "stands by" in server.log())
        for _ in range(2):  # the one that was killed comes back as the next standby
            pid = worker_of(server)
            assert all_at_once(server, lambda pid=pid: kill(pid)) == undisturbed  # type: ignore[misc]
            assert worker_of(server) != pid
            assert eventually(lambda: len(server.children()["worker"]) == 2 and server.log().count("stands by") >= 2)
        assert "its requests wait for the next one" not in server.log()


def test_a_worker_is_replaced_under_load_and_no_request_fails(server: Server, undisturbed: list[list[int]]) -> None:
    for _ in range(2):
        pid = worker_of(server)
        command = [CAROUSEL, "replace-worker", "--target", server.target]

        def replace(command: list[str] = command) -> None:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
            assert done.returncode == 0 and "computes now" in done.stdout, done.stderr

        assert all_at_once(server, replace) == undisturbed
        assert worker_of(server) != pid and eventually(lambda pid=pid: not is_alive(pid))  # type: ignore[misc]
    assert len(server.children()["worker"]) == 1
    kill(worker_of(server))  # the new one is watched as the first was
    with CarouselClient(server.target) as client:
        assert tokens(client, PROMPTS[0], SAMPLED) == undisturbed[0]


# What a worker does with a step that computes a prompt that begins with POISON. Every Python of the server runs it first.
SABOTAGE = """
import os, sys
from importlib.machinery import PathFinder

def spoil(cls):
    inner, bad = cls._step, set()
    def step(executor, plan):
        bad.difference_update(plan.ended.tolist(), [start.slot for start in plan.header.starts])
        tokens = plan.start_tokens.tolist()
        for start in plan.header.starts:
            if tokens[:len(POISON)] == POISON:
                bad.add(start.slot)
            del tokens[:start.num_tokens]
        if bad & set(plan.slots.tolist()):
            bad.clear()
            HOW
        return inner(executor, plan)
    cls._step = step

class Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        if name != "worker.model_executor":
            return None
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), spoil(module.ModelExecutor))
        return spec

sys.meta_path.insert(0, Finder)
"""
HOWS = {
    "exit": "os._exit(9)",
    "memory": "raise MemoryError('no room')",
    "hang": "__import__('threading').Event().wait()",
    "hold": "__import__('ctypes').PyDLL(None).sleep(60)",
}


@pytest.mark.parametrize("how", HOWS)
def test_a_poison_request_fails_alone(
    how: str, model_dir: Path, tmp_path: Path, server: Server, undisturbed: list[list[int]]
) -> None:
    """exit: the process ends. memory: the step fails. hang: it waits for ever. hold: it never gives the interpreter back."""
    with CarouselClient(server.target) as client:
        poison = client.tokenize(POISON)
    program = SABOTAGE.replace("HOW", HOWS[how]).replace("POISON", repr(list(poison)))
    (tmp_path / "sitecustomize.py").write_text(program)
    environment = {"PYTHONPATH": str(tmp_path)}
    asked = (*options(model_dir), "--standby", "1", "--worker-timeout", "1")
    with (
        running(*asked, environment=environment) as server,
        CarouselClient(server.target) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        culprit: list[Future[list[int]]] = []
        assert all_at_once(server, lambda: culprit.append(threads.submit(tokens, client, POISON, GREEDY))) == undisturbed
        with pytest.raises(CarouselError) as failed:
            culprit[0].result(PATIENCE_S)
        assert failed.value.code is grpc.StatusCode.INTERNAL
        assert "the worker failed 2 times while it computed this request alone" in server.log()
        assert tokens(client, PROMPTS[0], SAMPLED) == undisturbed[0]
