"""The `carousel` command as a process, against a real gRPC server with scripted streams."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest

import client.cli
import client.request_options
from carousel.v1 import generation_pb2
from tests.helpers.fake_server import (
    WAIT_S,
    FakeServer,
    bad_request,
    delta,
    ending,
    finished,
    refuse,
    retry_after,
    summary,
    words,
)

PIPE = subprocess.PIPE
REPO = Path(__file__).parents[2]


@pytest.fixture
def server():
    with FakeServer() as running:
        yield running


def command(server: FakeServer, *options: str) -> list[str]:
    return [sys.executable, "-m", "client", "generate", "--target", server.target, *options]


def start(server: FakeServer, *options: str, **pipes) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(server, *options), cwd=REPO, **({"stdout": PIPE, "stderr": PIPE} | pipes))


def generate(server: FakeServer, *options: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Runs the command to its end."""
    with start(server, *options, stdin=PIPE) as process:
        out, err = process.communicate(stdin, timeout=WAIT_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Gate:
    """A script that sends "one ", and goes on only when the test opens it; then sends until the reader has gone."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def __call__(self, request, context):
        yield delta("one ")
        context.add_callback(self._open.set)  # whoever leaves need not wait
        assert self._open.wait(WAIT_S)
        offset = 1
        while context.is_active() and offset < 1_000_000:
            yield delta("more ", offset)
            offset += 1


# ---------------------------------------------------------------------------------------------------------- streaming


def test_text_reaches_a_pipe_before_the_next_token_is_made(server):
    heard = [threading.Event() for _ in range(3)]

    def script(request, context):
        for i, event in enumerate(heard):
            yield delta(f"<{i}>", i)
            assert event.wait(WAIT_S)  # the next token exists only after the test has read this one
        yield from ending(request, 3)

    server.script = script
    with start(server, "--prompt", "p") as process:
        for i, event in enumerate(heard):
            assert process.stdout.read(3) == f"<{i}>".encode()
            event.set()
        assert process.stdout.read() == b""  # the text and nothing else, no line end of ours
        assert process.wait(WAIT_S) == 0 and process.stderr.read() == b""


def test_text_is_utf8_in_a_pipe_whatever_the_locale(server, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    server.script = words("né", " 轮")
    assert generate(server, "--prompt", "p").stdout == "né 轮".encode()


def on_a_terminal(server: FakeServer, *options: str) -> str:
    """What appears on a terminal."""
    ours, theirs = pty.openpty()
    with start(server, *options, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the last one has closed it
                break
            if not part:
                break
            shown += part
        os.close(ours)
        assert process.wait(WAIT_S) == 0
    return shown.decode()


def test_a_terminal_gets_a_line_end_and_no_escape_sequences(server):
    server.script = words("def f", "\x1b[2J\r", "():")
    assert on_a_terminal(server, "--prompt", "p") == "def f\ufffd[2J\ufffd():\r\n"


def test_a_terminal_gets_no_second_line_end(server):
    server.script = words("pass\n")
    assert on_a_terminal(server, "--prompt", "p") == "pass\r\n"


def test_json_prints_one_event_a_line_with_the_protos_names(server):
    done = generate(server, "--prompt", "p", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [next(iter(event)) for event in events] == ["delta", "delta", "delta", "finished", "summary"]
    first = {"output_index": 0, "token_offset": 0, "text_offset": "0", "token_ids": [1], "text": "a"}
    assert events[0]["delta"] == first | {"logprobs": [], "is_prompt": False}
    assert events[3]["finished"]["reason"] == "FINISH_REASON_LENGTH"
    assert events[4]["summary"]["usage"]["output_tokens"] == 3


def test_stats_say_counts_and_times_on_stderr(server):
    done = generate(server, "--prompt", "p", "--stats")
    assert done.stdout == b"abc"
    line = done.stderr.decode()
    assert line.count("\n") == 1 and line.startswith("carousel: 3 tokens in ")
    for part in ("ended by length", "first token after 7 ms (1 ms of it in the queue)", "prompt 5 tokens", "seed 3"):
        assert part in line


def two_outputs(request, context):
    yield delta("def a(", 0, 0)
    yield delta("x = 1\ny", 0, 1)
    yield delta("):\n    pass", 1, 0)
    yield delta(" = 2", 1, 1)
    yield finished(1, generation_pb2.FINISH_REASON_STOP)
    yield delta("\n", 2, 0)
    yield finished(0)
    yield summary(request, 5)


def test_lines_of_several_outputs_carry_their_number(server):
    server.script = two_outputs
    done = generate(server, "--prompt", "p", "--num-outputs", "2", "--stats")
    assert done.stdout.decode() == "[1] x = 1\n[0] def a():\n[1] y = 2\n[0]     pass\n"
    assert b"5 tokens in" in done.stderr and b"ended by length, stop;" in done.stderr


def test_json_of_several_outputs_is_the_events_as_they_are(server):
    server.script = two_outputs
    done = generate(server, "--prompt", "p", "--num-outputs", "2", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["delta"]["output_index"] for event in events if "delta" in event] == [0, 1, 0, 1, 0]


def test_incomplete_lines_of_several_outputs_are_written_when_the_stream_breaks(server):
    def script(request, context):
        yield delta("half", 0, 1)
        context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is gone")

    server.script = script
    done = generate(server, "--prompt", "p", "--num-outputs", "2")
    assert (done.returncode, done.stdout) == (1, b"[1] half\n")


# ------------------------------------------------------------------------------------------------------------- prompts


def test_the_prompt_comes_from_an_option_a_file_or_stdin_as_it_is(server, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes("dé\n".encode())
    for options in (("--prompt", "dé\n"), ("--file", str(file)), ("--file", "-"), ("-",)):
        assert generate(server, *options, stdin="dé\n".encode()).returncode == 0
        assert server.requests.get(timeout=WAIT_S).text == "dé\n"


def test_options_reach_the_request(server):
    options = "--token-ids 1,2,3 --max-tokens 9 --temperature 0 --top-k 4 --top-p 0.5 --min-p 0.25 --seed 7"
    options += " --repetition-penalty 1.5 --presence-penalty -1 --frequency-penalty 0.5 --logit-bias 11:-100,42:2.5"
    options += " --num-outputs 2 --tenant team-a --max-time-ms 900 --on-timeout partial --cache-salt s --priority batch"
    done = generate(server, *options.split(), "--stop", "a", "--stop", "b", "--ignore-eos", "--echo", "--logprobs", "0")
    assert done.returncode == 0
    request = server.requests.get(timeout=WAIT_S)
    assert list(request.token_ids.ids) == [1, 2, 3]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed) == (0, 4, 0.5, 0.25, 7)
    assert sampling.HasField("temperature") and dict(sampling.logit_bias) == {11: -100, 42: 2.5}
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -1, 0.5)
    assert request.stopping.max_tokens == 9 and request.stopping.ignore_eos and list(request.stopping.stop) == ["a", "b"]
    scheduling = request.scheduling
    assert request.output.HasField("logprobs") and not request.output.HasField("prompt_logprobs")
    assert request.output.echo and scheduling.priority == generation_pb2.PRIORITY_CLASS_BATCH
    assert (sampling.num_outputs, scheduling.tenant, scheduling.max_time_ms, scheduling.cache_salt) == (2, "team-a", 900, "s")
    assert scheduling.on_timeout == generation_pb2.ON_TIMEOUT_RETURN_PARTIAL


def test_options_that_were_not_given_are_absent(server):
    generate(server, "--prompt", "p")
    request = server.requests.get(timeout=WAIT_S)
    groups = {"sampling", "stopping", "output", "scheduling"}
    assert {field.name for field, _ in request.ListFields()} <= {"request_id", "text", *groups}
    for message in (request.sampling, request.stopping, request.output):
        assert message.ListFields() == []
    assert request.scheduling == generation_pb2.SchedulingParams(resume_window_ms=30_000), "the client's own default"


# --------------------------------------------------------------------------------------------------- ends of all kinds


def test_ctrl_c_cancels_the_request_and_exits_with_130(server):
    server.script = Gate()
    with start(server, "--prompt", "p") as process:
        assert process.stdout.read(4) == b"one "
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
        assert process.stderr.read() == b"carousel: interrupted: the request is cancelled\n"
    request_id = server.requests.get(timeout=WAIT_S).request_id
    assert server.dropped.get(timeout=WAIT_S) == request_id
    assert server.cancels.get(timeout=WAIT_S) == request_id


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_ends_the_process_ends_its_request(server, number):
    server.script = Gate()
    with start(server, "--prompt", "p") as process:
        assert process.stdout.read(4) == b"one "
        process.send_signal(number)
        assert process.wait(WAIT_S) == 128 + number
    assert server.cancels.get(timeout=WAIT_S) == server.requests.get(timeout=WAIT_S).request_id


def test_a_closed_pipe_cancels_the_request_without_a_word(server):
    gate = server.script = Gate()
    with start(server, "--prompt", "p") as process:
        assert process.stdout.read(4) == b"one "
        process.stdout.close()
        gate.open()
        assert process.wait(WAIT_S) == 141
        assert process.stderr.read() == b""
    request_id = server.requests.get(timeout=WAIT_S).request_id
    assert server.dropped.get(timeout=WAIT_S) == request_id
    assert server.cancels.get(timeout=WAIT_S) == request_id


REFUSALS = [
    (
        refuse(grpc.StatusCode.INVALID_ARGUMENT, "too long", bad_request("stopping.max_tokens", "at most 512")),
        "too long; stopping.max_tokens: at most 512 (INVALID_ARGUMENT)",
    ),
    (
        refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", retry_after(2)),
        "the queue is full; try again in 2 s (RESOURCE_EXHAUSTED)",
    ),
    (
        refuse(grpc.StatusCode.INTERNAL, "two\nlines, error 17"),
        "two lines, error 17; the server's log says more (INTERNAL)",
    ),
    (
        refuse(
            grpc.StatusCode.PERMISSION_DENIED,
            "tenant 'x' has no quota",
            bad_request("scheduling.tenant", "tenant 'x' has no quota"),
        ),
        "scheduling.tenant: tenant 'x' has no quota (PERMISSION_DENIED)",
    ),
    (refuse(grpc.StatusCode.CANCELLED, "cancelled elsewhere"), "cancelled elsewhere (CANCELLED)"),
]


@pytest.mark.parametrize(("script", "line"), REFUSALS)
def test_a_refusal_is_one_line_and_exit_code_1(server, capsys, script, line):
    server.script = script
    assert client.cli.main(["generate", "--target", server.target, "--prompt", "p"]) == 1
    assert capsys.readouterr().err == f"carousel: {line}\n"


def test_an_unreachable_server_is_one_line_that_names_target_and_remedy(capsys):
    with FakeServer() as server:
        target = server.target
    assert client.cli.main(["generate", "--target", target, "--prompt", "p"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith(f"carousel: no server answers at {target} (") and "`carousel serve --model DIR`" in line


def test_a_broken_stream_keeps_the_text_and_fails(server):
    def script(request, context):
        yield delta("half ")
        context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is gone")

    server.script = script
    done = generate(server, "--prompt", "p")
    assert (done.returncode, done.stdout) == (1, b"half ")
    said = f"the connection to {server.target} broke: the worker is gone; it could not be resumed: Method not implemented!"
    assert done.stderr == f"carousel: {said} (UNAVAILABLE)\n".encode()


def test_a_busy_server_is_asked_again_where_that_is_wanted(server):
    refusals = iter([refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", retry_after(0, 1)), words("a")])
    server.script = lambda request, context: next(refusals)(request, context)
    done = generate(server, "--prompt", "p", "--retries", "1")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a", b"")


WRONG_USAGE = [
    ("generate",),
    ("generate", "--prompt", "a", "--token-ids", "1"),
    ("generate", "--prompt", "a", "-"),
    ("generate", "other"),
    ("generate", "--token-ids", "1,x"),
    ("generate", "--prompt", "a", "--logit-bias", "5"),
    ("generate", "--prompt", "a", "--logit-bias", "5:a"),
    ("generate", "--token-ids", "4294967296"),
    ("generate", "--prompt", "a", "--max-tokens", "-1"),
    ("generate", "--prompt", "a", "--max-tokens", "0"),
    ("generate", "--prompt", "a", "--max-tokens", "4294967296"),
    ("generate", "--prompt", "a", "--num-outputs", "0"),
    ("generate", "--prompt", "a", "--num-outputs", "65"),
    ("generate", "--prompt", "\udcff"),
    ("generate", "--prompt", "a", "--priority", "first"),
    ("generate", "--prompt", "a", "--on-timeout", "never"),
    ("generate", "--prompt", "a", "--max-time-ms", "-5"),
    ("generate", "--prompt", "a", "--tenant", "\udcff"),
    ("explain",),
    ("explain", "\udcff"),
    ("policy", "a", "b"),
    ("requests", "--limit", "0"),
    ("blocks", "more"),
    ("generate", "--file", "no-such-file"),
    ("generate", "--prompt", "a", "--no-such-option"),
    ("serve",),
    ("serve", "--model", "m", "--device", "tpu"),
    ("serve", "--model", "m", "--record", "r", "--record-limit-mib", "0.00001"),
    ("no-such-command",),
]


@pytest.mark.parametrize("arguments", WRONG_USAGE)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, arguments):
    assert client.cli.main(arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("carousel: ") and "--help`" in line


def test_a_file_that_is_no_text_is_one_line_and_exit_code_1(capsys, tmp_path):
    file = tmp_path / "picture"
    file.write_bytes(b"ok\xff")
    assert client.cli.main(["generate", "--file", str(file)]) == 1
    assert capsys.readouterr().err == f"carousel: {file} is not UTF-8 text: see byte 2\n"


# --------------------------------------------------------------------------------------------------------------- serve


class Started(Exception):
    pass


def serve(monkeypatch, *options: str) -> tuple[list[str], dict[str, str]]:
    """What `carousel serve` would become."""

    def execve(path, argv, environment):
        assert path == sys.executable
        raise Started(argv, environment)

    monkeypatch.setattr("os.execve", execve)
    with pytest.raises(Started) as started:
        client.cli.main(["serve", *options])
    return started.value.args


def test_serve_becomes_the_scheduler_with_the_options_that_were_given(monkeypatch):
    argv, environment = serve(monkeypatch, "--model", "m", "--port", "8001", "--kv-memory-gib", "0.5", "--", "--new", "1")
    assert argv == [sys.executable, "-m", "scheduler", "--model", "m", "--port", "8001", "--kv-memory-gib", "0.5", "--new", "1"]
    assert environment["PYTHONSAFEPATH"] == "1"  # a scheduler.py where the user stands is not ours


def test_serve_has_the_schedulers_options_and_their_limits():
    from scheduler.main import serve_command

    def options(command) -> dict[str, tuple]:
        """By name: whether it must be given, and its type with choices or limits."""
        named = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        return {option.opts[0]: (option.required, option.type.to_info_dict()) for option in named}

    assert options(client.cli.serve) == options(serve_command)


def test_the_most_outputs_are_the_servers():
    from scheduler.frontend.validation import MAX_OUTPUTS

    assert client.request_options.MOST_OUTPUTS == MAX_OUTPUTS


def test_nothing_but_the_client_is_imported():
    others = ("torch", "numpy", "scheduler", "worker", "wire", "kvcache", "zmq", "rich")
    code = f"import client.cli, sys; print([name for name in {others} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=REPO).stdout == b"[]\n"
