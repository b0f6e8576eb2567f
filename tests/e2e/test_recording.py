"""What a live server recorded under mixed load, with a worker that dies, replays to the byte with the installed command."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from pathlib import Path

import pytest

from client.api import CarouselClient
from client.errors import CarouselError
from scheduler.recording import Recording, Verb
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.server import CAROUSEL, Server, eventually, kill, running

OPTIONS = ("--device", "sim", "--num-blocks", "60", "--max-batch-rows", "6", "--max-step-tokens", "64")
TENANTS = ("--tenant", "a:weight=2:blocks=40", "--tenant", "*", "--max-unread-tokens", "64")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=True, max_position_embeddings=1024)


def load(server: Server, user: int) -> None:
    """Some requests of all kinds, one after the other; some are refused, some are dropped in the middle."""
    with CarouselClient(server.target) as client:
        for number in range(6):
            prompt = "def main(argument):\n" * (1 + user % 3) + f"{user} {number}"
            stream = client.generate(
                prompt,
                max_tokens=[5, 40, 150][(user + number) % 3],
                num_outputs=1 + number % 3,
                priority=("batch", "normal", "interactive")[user % 3],
                tenant="a" if user % 2 else "",
                max_time_ms=30 if number == 4 else None,
                ignore_eos=True,
                resume_window_ms=0,  # a reader that goes ends its request
            )
            with contextlib.suppress(CarouselError):
                for count, _ in enumerate(stream):
                    if number == 5 and count == 3:
                        stream.close()
                        break


def replay(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CAROUSEL, "replay", str(path), *options], capture_output=True, text=True, timeout=120)


def test_a_server_under_load_records_what_replays(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "load.rec"
    with running("--model", str(model_dir), *OPTIONS, *TENANTS, "--record", str(path)) as server:
        users = [threading.Thread(target=load, args=(server, user)) for user in range(6)]
        for user in users:
            user.start()
        assert eventually(lambda: server.load().steps > 50)
        [worker] = server.children()["worker"]
        kill(worker)
        for user in users:
            user.join(60)
        assert eventually(lambda: server.load().running_requests == 0)
        finished = server.load().finished_requests
    done = replay(path)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert "every plan is the same, byte for byte" in done.stdout and "the same with PYTHONHASHSEED 1" in done.stdout
    verbs = [event.verb for event in Recording(path).events()]
    assert verbs.count(Verb.WORKER_JOINED) == 2 and verbs.count(Verb.ADD) >= finished
    assert {Verb.ABORT, Verb.CREDIT, Verb.DRAIN, Verb.WORKER_LOST} <= set(verbs)


def test_a_recording_that_is_there_already_is_one_line_and_exit_code_1(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.rec"
    path.write_text("precious")
    command = [CAROUSEL, "serve", "--model", str(model_dir), "--port", "0", "--record", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0 and "never overwritten" in done.stderr
    assert path.read_text() == "precious"
