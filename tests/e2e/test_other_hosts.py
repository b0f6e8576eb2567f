"""A scheduler and a worker that share no file system: an encrypted link, keys from files, a wrong key refused."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from client.api import CarouselClient
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.server import CAROUSEL, Server, eventually

PATIENCE_S = 60


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=True)


def make_keys(folder: Path) -> Path:
    done = subprocess.run([CAROUSEL, "keys", str(folder)], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert sorted(Path(line).name for line in done.stdout.splitlines()) == [
        "core.key",
        "core.key_secret",
        "worker.key",
        "worker.key_secret",
    ]
    return folder


def start_worker(model_dir: Path, address: str, keys: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "worker", "--model", str(model_dir), "--device", "sim"]
    return subprocess.Popen([*command, "--connect", address, "--keys", str(keys)], stderr=subprocess.DEVNULL)


def test_workers_join_by_tcp_with_the_right_key_only_and_follow_one_another(model_dir: Path, tmp_path: Path) -> None:
    keys, others = make_keys(tmp_path / "keys"), make_keys(tmp_path / "others")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    server = Server("--model", str(model_dir), "--inner-address", address, "--inner-keys", str(keys))
    workers = [start_worker(model_dir, address, others)]
    try:
        assert eventually(lambda: "front end 1" in server.log(), PATIENCE_S)
        assert "has joined: simulated" not in server.log()
        workers.append(start_worker(model_dir, address, keys))
        server.wait_ready()
        with CarouselClient(server.target) as client:

            def generated() -> list[int]:
                return [token for message in client.generate("x", max_tokens=20, seed=3) for token in message.delta.token_ids]

            assert client.server_info().workers[0].pid == workers[1].pid
            before = generated()
            workers.append(start_worker(model_dir, address, keys))
            assert eventually(lambda: "stands by" in server.log(), PATIENCE_S)
            workers[1].kill()
            assert eventually(lambda: [w.pid for w in client.server_info().workers] == [workers[2].pid])
            assert generated() == before
        assert "worker" not in server.children(), "none is started here"
        assert workers[0].poll() is None and f"pid {workers[0].pid}" not in server.log()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        server.stop()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--inner-address", "tcp://127.0.0.1:1"], "--inner-keys go together"),
        (["--inner-address", "ipc:///x", "--inner-keys", "."], "tcp://HOST:PORT"),
        (["--inner-address", "tcp://127.0.0.1:1", "--inner-keys", "."], "core.key_secret"),
        (["--inner-address", "tcp://127.0.0.1:1", "--inner-keys", ".", "--standby", "1"], "start one more there"),
    ],
)
def test_what_is_missing_is_one_line(options: list[str], words: str, model_dir: Path) -> None:
    command = [CAROUSEL, "serve", "--model", str(model_dir), "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode in (1, 2) and words in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("carousel: ")]) == 1, done.stderr


def test_a_worker_by_tcp_without_keys_does_not_start(model_dir: Path) -> None:
    command = [sys.executable, "-m", "worker", "--model", str(model_dir), "--device", "sim", "--connect", "tcp://127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1 and "--keys DIR" in done.stderr
