"""The worker process: what it says when it can't start, how it stops, and a whole run over ipc."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.plans import PlanMaker
from wire import StepResult, Welcome, WorkerHello, decode, encode
from worker.config import ConfigError, SimConfig, WorkerConfig
from worker.main import SUPERVISOR_PID, make_executor, parse

ROOT = Path(__file__).parents[2]


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "worker", *options]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*options), capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


class Core:
    """Waits for a worker's hello at an ipc address."""

    def __init__(self, folder: Path) -> None:
        self.address = f"ipc://{folder}/workers"
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.RCVTIMEO, 60_000)
        self.socket.bind(self.address)
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *options: str, **environment: str) -> WorkerHello:
        process = subprocess.Popen(
            command("--connect", self.address, *options),
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | environment,
        )
        self.processes.append(process)
        self.peer, *frames = self.socket.recv_multipart()
        hello = decode(frames)
        assert isinstance(hello, WorkerHello)
        return hello

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        self.context.destroy(linger=0)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    core = Core(tmp_path)
    yield core
    core.close()


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str, code: int = 1) -> None:
    assert done.returncode == code and done.stdout == "", (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("worker: "), done.stderr
    for part in parts:
        assert part in lines[0]


def test_a_path_that_is_not_there_is_one_line_and_exit_1(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    assert_one_line(run("--connect", "ipc://x", "--model", missing, "--device", "cpu"), missing)


def test_an_unknown_architecture_is_one_line_and_exit_1(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    assert_one_line(run("--connect", "ipc://x", "--model", str(tmp_path), "--device", "cpu"), "MambaForCausalLM", "config.json")


def test_missing_weights_are_one_line_and_exit_1(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    assert_one_line(run("--connect", "ipc://x", "--model", str(tmp_path), "--device", "cpu"), str(tmp_path))


def test_too_large_a_cache_is_one_line_with_the_numbers_and_exit_1(checkpoint: Path) -> None:
    done = run("--connect", "ipc://x", "--model", str(checkpoint), "--device", "cpu", "--kv-memory-gib", "1000000")
    assert_one_line(done, "1000000.00 GiB", "are available")


def test_more_threads_than_processors_are_one_line_with_both_numbers_and_exit_1(checkpoint: Path) -> None:
    done = run("--connect", "ipc://x", "--model", str(checkpoint), "--device", "cpu", "--threads", "100000")
    assert_one_line(done, "--threads 100000: this process may use ")


def test_a_bad_address_is_one_line_and_exit_1() -> None:
    assert_one_line(run("--connect", "nonsense://x", "--device", "sim"), "--connect")


@pytest.mark.parametrize(
    "options, part",
    [
        (["--device", "sim"], "--connect"),
        (["--connect", "ipc://x", "--device", "cpu"], "--model is missing"),
        (["--connect", "ipc://x", "--device", "tpu"], "tpu"),
        (["--connect", "ipc://x", "--device", "sim", "--block-size", "0"], "--block-size 0"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(options: list[str], part: str) -> None:
    assert_one_line(run(*options), part, code=2)


def test_options_arrive_in_the_configuration() -> None:
    line = (
        "--connect ipc://x --model m --revision r --device cpu --dtype float16 --max-model-len 100 --block-size 32"
        " --quantization int8 --weights random:7"
        " --num-blocks 9 --max-batch-rows 3 --max-step-tokens 44 --threads 5 --group 2 --log-level debug --log-format json"
        " --swap-gib 1.5 --sim-base-ns 1 --sim-end-chance 0.5 --sim-swap-block-ns 7 --sim-copy-block-ns 8 --sim-host-blocks 9"
    )
    config, level, form = parse(line.split())
    assert (level, form) == ("debug", "json") and config == WorkerConfig(
        connect="ipc://x", model="m", revision="r", device="cpu", dtype="float16", max_model_len=100, block_size=32,
        quantization="int8", weights="random:7",
        num_blocks=9, swap_gib=1.5, max_batch_rows=3, max_step_tokens=44, threads=5, group=2, sim=config.sim,
    )  # fmt: skip
    assert parse(["--connect", "ipc://x", "--model", "m", "--deterministic"])[0].deterministic and not config.deterministic
    assert config.sim.base_ns == 1 and config.sim.end_chance == 0.5 and config.swap_bytes == 3 << 29
    assert (config.sim.swap_block_ns, config.sim.copy_block_ns, config.sim.host_blocks) == (7, 8, 9)
    assert parse(["--connect", "ipc://x", "--device", "sim"])[0].swap_bytes is None
    assert parse(["--connect", "ipc://x", "--device", "sim", "--kv-memory-gib", "0.5"])[0].wish.memory_bytes == 1 << 29


@pytest.mark.parametrize(
    "option, value, part",
    [
        ("connect", "x", "ZeroMQ"), ("max_model_len", 1, "--max-model-len"), ("num_blocks", 0, "--num-blocks"),
        ("kv_memory_gib", 0.0, "--kv-memory-gib"), ("kv_memory_gib", float("inf"), "--kv-memory-gib"),
        ("swap_gib", -0.5, "--swap-gib"), ("swap_gib", float("nan"), "--swap-gib"),
        ("max_batch_rows", 65_536, "--max-batch-rows"), ("max_step_tokens", 0, "--max-step-tokens"),
        ("threads", 0, "--threads"), ("group", -1, "--group"),
        ("dtype", "int8", "--dtype"), ("quantization", "int4", "--quantization int4"),
        ("weights", "random", "--weights random"), ("weights", "random:x", "random:SEED"), ("weights", "zeros:1", "stored, or"),
        ("sim", SimConfig(host_blocks=-1), "--sim-host-blocks"),
    ],
)  # fmt: skip
def test_an_impossible_option_is_refused_by_name(option: str, value: object, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        WorkerConfig(**({"connect": "ipc://x", "model": "m"} | {option: value}))


@pytest.mark.parametrize("device", ["cuda", "sim"])
def test_quantization_is_for_a_cpu(device: str) -> None:
    assert WorkerConfig("ipc://x", "m", quantization="int8").device == "auto"
    with pytest.raises(ConfigError, match=f"--quantization int8 is for --device cpu, not for --device {device}"):
        WorkerConfig("ipc://x", "m", device=device, quantization="int8")


def test_number_of_blocks_and_memory_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="give one"):
        WorkerConfig("ipc://x", "m", num_blocks=3, kv_memory_gib=1.0)


def test_a_simulated_worker_takes_its_facts_from_the_options(core: Core) -> None:
    limits = ("--max-batch-rows", "7", "--max-model-len", "99", "--num-blocks", "50", "--sim-host-blocks", "30")
    hello = core.start("--device", "sim", "--group", "3", "--sim-swap-block-ns", "4000", *limits)
    facts = hello.facts
    assert hello.group == 3 and facts.device == "sim" and facts.pid == core.processes[0].pid
    assert (facts.max_batch_rows, facts.max_model_len, facts.num_blocks, facts.vocab_size) == (7, 99, 50, 32_000)
    assert (facts.num_host_blocks, facts.swap_block_ns) == (30, 4000)


def test_a_simulated_worker_swaps_to_as_much_as_it_is_told(core: Core, checkpoint: Path) -> None:
    facts = core.start("--device", "sim", "--model", str(checkpoint), "--swap-gib", "0.5").facts
    assert facts.num_host_blocks == (1 << 29) // (16 * facts.kv_bytes_per_token)
    assert "512 MiB of host memory to swap to" in facts.description
    with pytest.raises(ConfigError, match="--swap-gib and --sim-host-blocks"):
        WorkerConfig("ipc://x", device="sim", swap_gib=1.0, sim=SimConfig(host_blocks=5))


def test_a_simulated_worker_is_no_longer_than_its_model(checkpoint: Path, tmp_path: Path) -> None:
    usage = ("--connect", "ipc://x", "--device", "sim", "--max-model-len", "100000000")
    assert_one_line(run(*usage, "--model", str(checkpoint)), "--max-model-len 100,000,000", "512 tokens")
    config = json.loads((checkpoint / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": yarn}))
    config = WorkerConfig("ipc://x", str(tmp_path), device="sim", max_model_len=2048)
    assert make_executor(config).facts.max_model_len == 2048


def test_too_little_memory_for_the_length_names_the_option() -> None:
    length = str(1 << 40)
    assert_one_line(run("--connect", "ipc://x", "--device", "sim", "--max-model-len", length), "lower --max-model-len")


def test_a_simulated_worker_takes_its_shape_from_a_model_directory(core: Core, checkpoint: Path) -> None:
    facts = core.start("--device", "sim", "--model", str(checkpoint)).facts
    assert (facts.vocab_size, facts.max_model_len, facts.architecture) == (384, 512, "LlamaForCausalLM")
    assert facts.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4


def test_a_worker_with_a_model_says_hello_and_computes(core: Core, checkpoint: Path) -> None:
    facts = core.start("--model", str(checkpoint), "--device", "cpu", "--threads", "1").facts
    assert facts.device == "cpu" and facts.max_model_len == 512
    maker = PlanMaker(facts, epoch=4)
    maker.start(0, [5, 6, 7])
    for message in (Welcome(0, 4), maker.plan(), maker.plan()):
        core.socket.send_multipart([core.peer, *encode(message)])
    for step_id in range(2):
        result = decode(core.socket.recv_multipart()[1:])
        assert isinstance(result, StepResult) and result.header.step_id == step_id and len(result.tokens) == 1
    process = core.processes[0]
    process.terminate()
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0 and len(stderr.splitlines()) == 1 and "blocks of 16" in stderr, stderr


def test_terminate_ends_a_waiting_worker_with_exit_0(core: Core) -> None:
    core.start("--device", "sim")
    core.processes[0].terminate()
    assert core.processes[0].wait(20) == 0


def test_under_a_supervisor_ctrl_c_is_left_to_it(core: Core) -> None:
    facts = core.start("--device", "sim", **{SUPERVISOR_PID: str(os.getpid())}).facts
    core.processes[0].send_signal(signal.SIGINT)
    maker = PlanMaker(facts)
    maker.start(0, [1])
    for message in (Welcome(0, 1), maker.plan()):
        core.socket.send_multipart([core.peer, *encode(message)])
    assert isinstance(decode(core.socket.recv_multipart()[1:]), StepResult)


def test_without_a_supervisor_ctrl_c_ends_it_quietly(core: Core) -> None:
    core.start("--device", "sim")
    core.processes[0].send_signal(signal.SIGINT)
    _, stderr = core.processes[0].communicate(timeout=20)
    assert core.processes[0].returncode == 130 and "Traceback" not in stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_no_worker_outlives_its_supervisor(core: Core) -> None:
    """A process starts a worker and is killed; the worker's connection closes."""
    program = (
        "import os, subprocess, sys, time\n"
        f"os.environ[{SUPERVISOR_PID!r}] = str(os.getpid())\n"
        "subprocess.Popen([sys.executable, '-m', 'worker', '--device', 'sim', '--connect', sys.argv[1]])\n"
        "time.sleep(600)"
    )
    monitor = core.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    supervisor = subprocess.Popen([sys.executable, "-c", program, core.address], cwd=ROOT)
    try:
        hello = decode(core.socket.recv_multipart()[1:])
        assert isinstance(hello, WorkerHello)
    finally:
        supervisor.kill()
        supervisor.wait()
    if not monitor.poll(20_000):
        os.kill(hello.facts.pid, signal.SIGKILL)
        raise AssertionError("the worker is still connected")
    core.socket.disable_monitor()


def test_a_worker_whose_supervisor_is_another_process_ends_at_once() -> None:
    environment = os.environ | {SUPERVISOR_PID: str(os.getppid())}
    options = command("--connect", "ipc://x", "--device", "sim")
    done = subprocess.run(options, capture_output=True, timeout=60, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("asked", "device", "expected"),
    [
        ({}, "cpu", (64, 512)),
        ({}, "cuda", (256, 2048)),
        ({"max_batch_rows": 1024}, "cpu", (1024, 1024)),
        ({"max_step_tokens": 32}, "cuda", (32, 32)),
        ({"max_batch_rows": 4, "max_step_tokens": 100}, "cuda", (4, 100)),
    ],
)
def test_a_limit_that_is_not_asked_for_follows_from_the_device_and_the_other(
    asked: dict[str, int], device: str, expected: tuple[int, int]
) -> None:
    assert WorkerConfig(connect="ipc://x", model="m", **asked).limits(device) == expected


def test_as_json_its_lines_have_the_keys_of_the_schedulers() -> None:
    script = "import logging, worker.main as m; m._log_to_stderr('info', 'json'); logging.getLogger('x').info('%d \"ü\"', 3)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    told = json.loads(done.stderr)
    assert told.keys() == {"time", "role", "pid", "level", "message"} and told["message"] == '3 "ü"'


def test_a_signal_ends_it_though_the_main_thread_sleeps_where_no_signal_wakes_it() -> None:
    """As in a poll that begins just after the signal came: here another thread gets it."""
    code = """
import ctypes, signal, threading
from worker.main import _end_at_signals
_end_at_signals()
threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)).start()
ctypes.CDLL(None).sleep(300)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=100, check=False).returncode == 0
