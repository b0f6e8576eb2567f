"""`carousel batch`: what it reads, what it leaves behind, how it goes on. With scripted answers; once with a whole server."""

from __future__ import annotations

import fcntl
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
from tests.helpers.fake_many import FakeManyServer, done, failed
from tests.helpers.fake_server import WAIT_S
from tests.helpers.server import eventually

REPO = Path(__file__).parents[2]


@pytest.fixture
def server():
    with FakeManyServer() as running:
        yield running


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def write(path: Path, *lines: object) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def read(path: Path) -> dict[object, dict]:
    results = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({result["id"] for result in results}) == len(results)
    return {result["id"]: result for result in results}


def batch(server: FakeManyServer, files: tuple[Path, Path], *options: str) -> int:
    return client.cli.main(["batch", *map(str, files), "--target", server.target, *options])


# ------------------------------------------------------------------------------------------------------------------ lines


def test_each_line_gets_a_line_with_its_id_or_its_number(server, files):
    write(files[0], {"id": "a", "prompt": "x"}, "", {"prompt": "y"}, {"id": 77, "prompt": [5, 6]})
    assert batch(server, files, "--with-token-ids") == 0
    usage = {"prompt_tokens": 3, "output_tokens": 2, "cached_tokens": 0, "recomputed_tokens": 0, "accepted_tokens": 0}
    results = read(files[1])
    assert results["a"] == {"id": "a", "text": "X", "token_ids": [1, 2], "finish_reason": "length", "usage": usage}
    assert results[3]["text"] == "Y" and results.keys() == {"a", 3, 77}


def test_options_hold_for_lines_without_parameters_of_their_own(server, files):
    write(files[0], {"prompt": "x", "max_tokens": 5}, {"prompt": "y"})
    assert batch(server, files, "--max-tokens", "9", "--stop", "a", "--stop", "b", "--seed", "3") == 0
    by_text = {request.text: request for request in server.seen}
    assert (by_text["x"].stopping.max_tokens, by_text["y"].stopping.max_tokens) == (5, 9)
    assert list(by_text["x"].stopping.stop) == ["a", "b"] and by_text["y"].sampling.seed == 3


def test_bad_lines_fail_alone_with_their_number_and_what_is_wrong(server, files, capsys):
    bad = ("no json", [1], {"id": 7.5, "prompt": "x"}, {"prompt": "x", "max_token": 5}, {"id": "q", "prompt": "", "seed": "a"})
    write(files[0], {"id": "q0", "prompt": "x"}, *bad, {"id": "q0", "prompt": "again"}, {"prompt": "y"})
    assert batch(server, files) == 1
    results = read(files[1])
    said = {own_id: result["error"]["message"] for own_id, result in results.items() if "error" in result}
    assert said["line 2"].startswith("line 2: it is not JSON: ")
    assert said["line 3"].startswith("line 3: it is not a JSON object")
    assert said["line 4"] == "line 4: id: it is not text or a whole number"
    assert said[5] == "line 5: max_token: there is no such field; did you mean max_tokens?"
    assert said["q"].startswith("line 6: seed: 'a' is not a whole number")
    assert said["line 7"] == "line 7: id: a line before it has 'q0', too"
    assert results["q0"]["text"] == "X" and results[8]["text"] == "Y"
    assert {result["error"]["code"] for result in results.values() if "error" in result} == {"INVALID_ARGUMENT"}
    err = capsys.readouterr().err.splitlines()
    assert "carousel: line 5 failed: max_token: there is no such field; did you mean max_tokens? (INVALID_ARGUMENT)" in err
    assert err[-1].startswith("carousel: 8 lines done, 6 of them failed; 4 tokens in ")


def test_a_bad_lines_id_is_no_other_lines(server, files):
    write(files[0], "no json", {"id": 1, "prompt": "x"})
    assert batch(server, files) == 1
    assert read(files[1])[1]["text"] == "X"


def test_no_more_than_ten_failures_are_named(server, files, capsys):
    write(files[0], *["no json"] * 30)
    assert batch(server, files) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 11 and err[9].endswith("; no more of them are named here")


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(server, files, capsys, monkeypatch):
    monkeypatch.setattr("client.batch_command._SAY_EVERY_S", 0.0)
    write(files[0], *[{"prompt": f"p{i}"} for i in range(4)])
    assert batch(server, files) == 0
    *lines, _ = capsys.readouterr().err.splitlines()
    assert [line.partition(" lines, ")[0] for line in lines] == [f"carousel: {i} of 4" for i in range(1, 5)]
    assert all("tokens/s, " in line and line.endswith(" left") for line in lines)


def test_several_outputs_are_a_list(server, files):
    def answer(request):
        events = done(request)
        other = done(request, "second")[0]
        other.delta.output_index = 1
        return [other, *events]

    server.answer = answer
    write(files[0], {"prompt": "x", "num_outputs": 2})
    assert batch(server, files) == 0
    outputs = read(files[1])[1]["outputs"]
    assert outputs == [{"text": "X", "finish_reason": "length"}, {"text": "second", "finish_reason": "error"}]


def test_a_refusal_of_the_server_is_written_with_its_code(server, files):
    server.answer = lambda request: failed(request, grpc.StatusCode.UNIMPLEMENTED, "no such thing")
    write(files[0], {"prompt": "x"})
    assert batch(server, files) == 1
    assert read(files[1]) == {1: {"id": 1, "error": {"code": "UNIMPLEMENTED", "message": "no such thing"}}}


def test_json_is_the_summary_on_stdout(server, files, capsys):
    write(files[0], {"prompt": "x"}, "bad")
    assert batch(server, files, "--json") == 1
    summary = json.loads(capsys.readouterr().out)
    assert summary.pop("elapsed_s") >= 0
    counts = {"total": 2, "done": 2, "skipped": 0, "failed": 1, "failed_before": 0}
    assert summary == counts | {"prompt_tokens": 3, "output_tokens": 2, "complete": True}


# --------------------------------------------------------------------------------------------------------------- going on


def test_lines_whose_result_is_there_are_skipped(server, files, capsys):
    write(files[0], *[{"prompt": f"p{i}"} for i in range(6)])
    write(files[1], {"id": 2, "text": "kept"}, {"id": 5, "error": {"code": "INTERNAL", "message": "kept"}})
    assert batch(server, files) == 1  # one has failed, though not now
    results = read(files[1])
    assert results.keys() == {1, 2, 3, 4, 5, 6} and len(server.seen) == 4
    assert results[2]["text"] == results[5]["error"]["message"] == "kept"
    assert "has 2 results already (1 of them failed: --retry-failed sends those again)" in capsys.readouterr().err


def test_failed_lines_are_sent_again_when_asked(server, files):
    write(files[0], {"prompt": "a"}, {"prompt": "b"})
    write(files[1], {"id": 1, "error": {"code": "INTERNAL", "message": "?"}}, {"id": 2, "text": "kept"})
    assert batch(server, files, "--retry-failed") == 0
    results = read(files[1])
    assert (results[1]["text"], results[2]["text"], len(server.seen)) == ("A", "kept", 1)
    assert sorted(path.name for path in files[1].parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_when_all_is_done_no_server_is_needed(server, files):
    write(files[0], {"prompt": "a"})
    write(files[1], {"id": 1, "text": "kept"})
    assert client.cli.main(["batch", *map(str, files), "--model", "no-such-model"]) == 0


@pytest.mark.parametrize("torn", ['{"id": 2, "text": "hal', '{"i', '{"id": 2, "text": "whole but for the line end"}'])
def test_a_torn_last_line_is_taken_out_and_told(server, files, capsys, torn):
    write(files[0], {"prompt": "a"}, {"prompt": "b"})
    files[1].write_text('{"id": 1, "text": "kept"}\n' + torn)
    assert batch(server, files) == 0
    results = read(files[1])
    assert (results[1]["text"], results[2]["text"]) == ("kept", "B")
    assert "its last line was incomplete and is taken out" in capsys.readouterr().err


@pytest.mark.parametrize("foreign", ["a letter", "a letter\n", '{"prompt": "x"}\n', "[1]\n", '{"id": 1, "text": "x"}\nletter'])
def test_a_file_of_somebody_else_is_left_as_it_is(server, files, capsys, foreign):
    write(files[0], {"prompt": "a"})
    files[1].write_text(foreign)
    assert batch(server, files, "--retry-failed") == 1
    assert files[1].read_text() == foreign and server.seen == []
    assert "is not a result of `carousel batch`" in capsys.readouterr().err


def test_two_at_a_time_do_not_write_one_file(server, files, capsys):
    write(files[0], {"prompt": "a"})
    with files[1].open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert batch(server, files) == 1
    assert capsys.readouterr().err == f"carousel: {files[1]}: another `carousel batch` writes to it\n"


# ---------------------------------------------------------------------------------------------------------- as a process


def start(server: FakeManyServer, *arguments: str, **pipes) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "client", "batch", *arguments, "--target", server.target]
    return subprocess.Popen(command, cwd=REPO, **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | pipes))


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(server, files):
    asked = threading.Event()
    release = threading.Event()

    def answer(request):
        if request.text == "p3" and not release.is_set():
            asked.set()
            return []
        return done(request)

    server.answer = answer
    write(files[0], *[{"prompt": f"p{i}"} for i in range(8)])
    arguments = [str(path) for path in files]
    with start(server, *arguments, "--concurrency", "1") as process:
        assert asked.wait(WAIT_S) and eventually(lambda: files[1].read_bytes().count(b"\n") == 3)
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
        (line,) = process.stderr.read().decode().splitlines()
    assert line.startswith("carousel: interrupted: 3 lines done; ") and line.endswith("; the same command goes on from here")
    assert read(files[1]).keys() == {1, 2, 3}
    assert server.gone.get(timeout=WAIT_S) == 4  # the fourth was cancelled
    release.set()
    with start(server, *arguments) as process:
        assert process.wait(WAIT_S) == 0
    assert read(files[1]).keys() == set(range(1, 9))


def test_a_result_is_in_the_file_before_the_next_one_is_made(server, files):
    def answer(request):
        if request.text == "second":
            assert json.loads(files[1].read_text())["text"] == "FIRST"
        return done(request)

    server.answer = answer
    write(files[0], {"prompt": "first"}, {"prompt": "second"})
    assert batch(server, files, "--concurrency", "1") == 0
    assert len(read(files[1])) == 2


def test_lines_go_through_pipes_one_by_one(server):
    with start(server, "-", "-", stdin=subprocess.PIPE) as process:
        for i in range(3):  # the next prompt is sent only after the answer to the one before
            process.stdin.write(json.dumps({"prompt": f"p{i}"}).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["text"] == f"P{i}"
        process.stdin.close()
        assert process.wait(WAIT_S) == 0
        assert process.stdout.read() == b""


def test_ctrl_c_while_a_pipe_is_silent_ends_it(server):
    with start(server, "-", "-", stdin=subprocess.PIPE) as process:
        process.stdin.write(b'{"prompt": "a"}\n')
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["text"] == "A"
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
        assert b"interrupted: 1 line done" in process.stderr.read()


def test_a_closed_pipe_ends_it_without_a_word(server, files):
    write(files[0], *[{"prompt": f"p{i}"} for i in range(2000)])
    with start(server, str(files[0]), "-") as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(WAIT_S) == 141
        assert process.stderr.read() == b""


def test_a_terminal_gets_a_bar_with_counts_and_rate(server, files):
    write(files[0], {"prompt": "a"}, {"prompt": "b"})
    ours, theirs = pty.openpty()
    with start(server, *map(str, files), stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # the last one has closed it
            pass
        assert process.wait(WAIT_S) == 0
    os.close(ours)
    assert b"2/2" in shown and b"tokens/s" in shown and b"2 lines done; 4 tokens" in shown


WRONG_USAGE = [
    ("batch",),
    ("batch", "{in}"),
    ("batch", "no-such-file", "{out}"),
    ("batch", "{in}", "{out}", "--model", "m", "--target", "127.0.0.1:1"),
    ("batch", "{in}", "{out}", "--device", "cpu"),
    ("batch", "{in}", "{out}", "--", "--threads", "1"),
    ("batch", "{in}", "{out}", "--concurrency", "0"),
    ("batch", "{in}", "{out}", "--max-tokens", "0"),
    ("batch", "{in}", "{out}", "--model", "m", "--device", "tpu"),
]


@pytest.mark.parametrize("arguments", WRONG_USAGE)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, files, arguments):
    files[0].write_text("")
    names = {"{in}": str(files[0]), "{out}": str(files[1])}
    assert client.cli.main([names.get(argument, argument) for argument in arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("carousel: ") and "--help`" in line
    assert not files[1].exists()


def test_nobody_at_the_target_is_one_line_that_says_what_to_do(capsys, files):
    with FakeManyServer() as server:
        pass
    write(files[0], {"prompt": "x"})
    assert batch(server, files) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"no server answers at {server.target}" in line and "carousel serve --model" in line


def test_a_server_of_its_own_that_does_not_start_is_one_line_in_its_words(capsys, files):
    write(files[0], {"prompt": "x"})
    assert client.cli.main(["batch", *map(str, files), "--model", "/no/such/folder"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "no directory /no/such/folder" in line


def test_a_server_of_its_own_answers_and_ends(files):
    write(files[0], *[{"prompt": f"p{i}", "max_tokens": 3} for i in range(20)])
    options = ["--model", str(REPO / "demo" / "model"), "--device", "sim", "--", "--max-batch-rows", "4"]
    assert client.cli.main(["batch", *map(str, files), *options]) == 0
    assert {result["usage"]["output_tokens"] for result in read(files[1]).values()} == {3}
