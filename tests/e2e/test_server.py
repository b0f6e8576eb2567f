"""What a user does: start the server, talk to it from other processes, interrupt, kill, read the errors."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.api import CarouselClient
from client.streams import GenerateStream
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.fake_hub import FakeHub
from tests.helpers.server import CAROUSEL, Server, eventually, is_alive, kill, running

PROMPTS = ["a", "def main", "import os\n" * 5, "class A:\n    x = 1\n" * 8, "return " * 60]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=True, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    with running("--model", str(model_dir), "--device", "cpu", "--num-blocks", "400") as server:
        yield server


def generate(server: Server, prompt: str, max_tokens: int) -> subprocess.Popen[str]:
    options = ["--target", server.target, "--prompt", prompt, "--max-tokens", str(max_tokens), "--ignore-eos"]
    return subprocess.Popen([CAROUSEL, "generate", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def nothing_is_held(server: Server) -> bool:
    load = server.load()
    return (load.running_requests, load.waiting_requests, load.held_blocks, load.retiring_blocks) == (0, 0, 0, 0)


def test_five_clients_at_once_and_one_interrupted_leave_nothing_held(server: Server) -> None:
    lengths = [20, 60, 1500, 35, 80]
    clients = [generate(server, prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    assert eventually(lambda: server.load().running_requests == 1 or server.load().running_requests == 5)
    assert clients[2].stdout is not None
    clients[2].stdout.read(1)  # its text has begun to come
    clients[2].send_signal(signal.SIGINT)
    outputs = [client.communicate(timeout=60) for client in clients]
    assert [client.returncode for client in clients] == [0, 0, 130, 0, 0], outputs
    assert all(output for i, (output, _) in enumerate(outputs) if i != 2)
    assert eventually(lambda: nothing_is_held(server)), server.load()
    assert server.load().cancelled_requests >= 1


def test_a_killed_worker_comes_back_and_the_stream_goes_on(server: Server) -> None:
    with CarouselClient(server.target) as client:
        options = dict(max_tokens=200, temperature=0.8, seed=7, ignore_eos=True)
        undisturbed = all_tokens(client.generate("for i in", **options))
        stream = client.generate("for i in", **options)
        got = list(next_tokens(stream))
        [worker] = server.children()["worker"]
        kill(worker)
        for message in stream:
            got.extend(message.delta.token_ids)
        assert got == undisturbed
    assert eventually(lambda: nothing_is_held(server))
    assert server.children()["worker"] != [worker]


def all_tokens(stream: GenerateStream) -> list[int]:
    return [token for message in stream for token in message.delta.token_ids]


def next_tokens(stream: GenerateStream) -> list[int]:
    """The first delta with tokens in it."""
    for message in stream:
        if message.delta.token_ids:
            return list(message.delta.token_ids)
    raise AssertionError("the stream ended")


def test_a_killed_front_end_comes_back(server: Server) -> None:
    [frontend] = server.children()["frontend"]
    kill(frontend)
    assert eventually(lambda: server.children().get("frontend", [frontend]) != [frontend])
    with CarouselClient(server.target) as client:
        client.wait_ready(30)
        assert len(all_tokens(client.generate("x", max_tokens=5, ignore_eos=True))) == 5


def test_port_in_use_is_said_and_nothing_is_shared(model_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [CAROUSEL, "serve", "--model", str(model_dir), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0 and port in done.stderr and "in use" in done.stderr


def test_two_servers_can_not_share_a_port(server: Server, model_dir: Path) -> None:
    port = server.target.rpartition(":")[2]
    command = [CAROUSEL, "serve", "--model", str(model_dir), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "in use" in done.stderr


def test_an_unknown_model_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    command = [CAROUSEL, "serve", "--model", str(tmp_path / "nowhere"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0 and "nowhere" in done.stderr


def test_a_worker_that_can_not_start_ends_the_server_with_its_reason(model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_dir.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    command = [CAROUSEL, "serve", "--model", str(broken), "--port", "0", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("worker: ")]
    assert "model.safetensors" in line


def test_sigterm_drains_and_leaves_no_process(model_dir: Path) -> None:
    server = Server("--model", str(model_dir), "--device", "cpu", "--num-blocks", "100")
    try:
        server.wait_ready()
        pids = [pid for pids in server.children().values() for pid in pids]
        assert len(pids) == 3
        with CarouselClient(server.target) as client:
            stream = client.generate("x", max_tokens=60, ignore_eos=True)
            got = next_tokens(stream)
            server.process.send_signal(signal.SIGTERM)
            for message in stream:
                got.extend(message.delta.token_ids)
        assert len(got) == 60
        assert server.stop() == 0
        assert not any(is_alive(pid) for pid in pids)
    finally:
        server.stop()


def test_no_orphan_remains_when_the_supervisor_is_killed(model_dir: Path) -> None:
    server = Server("--model", str(model_dir), "--device", "sim")
    try:
        server.wait_ready()
        pids = [pid for pids in server.children().values() for pid in pids]
        kill(server.process.pid)
        assert eventually(lambda: not any(is_alive(pid) for pid in pids))
    finally:
        server.process.kill()
        server.process.wait()


def test_the_simulated_worker_serves_without_torch(model_dir: Path) -> None:
    with running("--model", str(model_dir), "--device", "sim") as server, CarouselClient(server.target) as client:
        assert len(all_tokens(client.generate("x", max_tokens=50, ignore_eos=True))) == 50
        [worker] = server.children()["worker"]
        assert "libtorch" not in Path(f"/proc/{worker}/maps").read_text()


def test_a_hub_id_is_served_at_the_revision_asked_for(tmp_path: Path) -> None:
    other, wanted = (
        make_checkpoint(tmp_path / name, "qwen3", seed=seed, tokenizer=True, max_shard_size="200KB")
        for seed, name in enumerate(("other", "wanted"))
    )
    with FakeHub({"org/tiny": {"main": other, "v1": wanted}}) as hub:
        options = ("--model", "org/tiny", "--revision", "v1", "--device", "cpu", "--num-blocks", "50")
        environment = hub.environment(tmp_path / "home")
        with running(*options, environment=environment) as server, CarouselClient(server.target) as client:
            assert client.model_info().served_model_name == "tiny"
            from_hub = all_tokens(client.generate("x = ", max_tokens=20, temperature=0, ignore_eos=True))
    options = ("--model", str(wanted), "--device", "cpu", "--num-blocks", "50")
    with running(*options) as server, CarouselClient(server.target) as client:
        assert all_tokens(client.generate("x = ", max_tokens=20, temperature=0, ignore_eos=True)) == from_hub


def test_help_is_given() -> None:
    done = subprocess.run([sys.executable, "-m", "scheduler", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--max-step-tokens" in done.stdout
