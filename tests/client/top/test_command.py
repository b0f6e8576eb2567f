"""`carousel top` as a command: stills of servers, the terminal, and how it ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import client.cli
from client import CarouselClient
from tests.helpers.fake_server import FakeServer
from tests.helpers.server import running

REPO = Path(__file__).parents[3]
MODEL = REPO / "demo" / "model"
WAIT_S = 20.0


def test_a_still_of_an_idle_server_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        assert client.cli.main(["top", "--once", "--target", server.target]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"fake {server.target}") and "no request is in the batch" in out and "\x1b" not in out


def test_json_of_a_still_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        assert client.cli.main(["top", "--once", "--json", "--target", server.target]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["blocks"]["total"] == 10 and told["rows"] == [] and told["policy"] == "continuous"


def test_a_running_server_shows_its_batch(capsys: pytest.CaptureFixture[str]) -> None:
    with running("--model", str(MODEL), "--device", "sim", "--max-batch-rows", "4") as server:
        over = threading.Event()
        threads = [threading.Thread(target=ask, args=(server.target, i, over)) for i in range(8)]
        for thread in threads:
            thread.start()
        try:
            assert client.cli.main(["top", "--once", "--json", "--target", server.target]) == 0
            told = json.loads(capsys.readouterr().out)
            assert client.cli.main(["top", "--once", "--target", server.target]) == 0
            text = capsys.readouterr().out
        finally:
            over.set()
            for thread in threads:
                thread.join(WAIT_S)
    assert 1 <= len(told["rows"]) <= 4 and told["max_batch_rows"] == 4
    assert {row["slot"] for row in told["rows"]} <= set(range(4)) and told["steps"] and told["tokens_per_s"] > 0
    assert any(row["tenant"] == "t" and row["prompt_tokens"] == 40 for row in told["rows"])
    assert "SLOT REQUEST" in text and "load-" in text and "tokens/s" in text and "blocks" in text


def ask(target: str, number: int, over: threading.Event) -> None:
    with CarouselClient(target) as caller:
        while not over.is_set():
            stream = caller.generate([5] * 40, max_tokens=400, ignore_eos=True, tenant="t", request_id=f"load-{number}")
            for _ in stream:
                if over.is_set():
                    break
            stream.close()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--once", "--target", "127.0.0.1:1"], 1, "no server answers at 127.0.0.1:1"),
        (["--json"], 2, "--json is for --once"),
        ([], 2, "there is no terminal to draw on"),
        (["--once", "--interval", "0"], 2, "--interval"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert client.cli.main(["top", *arguments]) == code
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and words in err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert client.cli.main(["top", "--help"]) == 0
    out = capsys.readouterr().out
    assert "carousel top --once --json | jq .tokens_per_s" in out and "q or Ctrl-C ends it" in " ".join(out.split())


def test_the_shell_completes_both_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for line, wanted in (
        ("carousel to", "top"),
        ("carousel dr", "draw"),
        ("carousel top --on", "--once"),
        ("carousel draw ", "file"),
    ):
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        monkeypatch.setenv("_CAROUSEL_COMPLETE", "bash_complete")
        with pytest.raises(SystemExit):
            client.cli.main([])
        assert wanted in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- terminal


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, target: str, columns: int = 80, rows: int = 24) -> None:
        self.keyboard, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self.theirs = theirs
        command = [sys.executable, "-m", "client", "top", "--target", target, "--interval", "0.2"]
        environment = os.environ | {"TERM": "xterm-256color", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            command, cwd=REPO, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment, start_new_session=True
        )
        self.said = b""

    def wait_for(self, words: bytes) -> None:
        until = time.monotonic() + WAIT_S
        while words not in self.said:
            assert time.monotonic() < until, self.said
            if select.select([self.keyboard], [], [], 0.2)[0]:
                self.said += os.read(self.keyboard, 65536)

    def end(self) -> tuple[int, bytes]:
        until = time.monotonic() + WAIT_S
        while self.process.poll() is None and time.monotonic() < until:
            if select.select([self.keyboard], [], [], 0.05)[0]:
                self.said += os.read(self.keyboard, 65536)
        assert self.process.stderr is not None
        return self.process.wait(1), self.process.stderr.read()


@contextlib.contextmanager
def terminal(target: str, columns: int = 80) -> Iterator[Terminal]:
    shown = Terminal(target, columns)
    try:
        yield shown
    finally:
        if shown.process.poll() is None:
            shown.process.kill()
            shown.process.wait()
        assert shown.process.stderr is not None
        shown.process.stderr.close()
        os.close(shown.keyboard)
        os.close(shown.theirs)


ENTERS, LEAVES = b"\x1b[?1049h", b"\x1b[?1049l"  # the other screen, on which nothing scrolls


def test_q_ends_it_and_the_terminal_is_as_it_was() -> None:
    with FakeServer() as server, terminal(server.target) as shown:
        shown.wait_for(b"nobody waits")
        assert ENTERS in shown.said and b"\x1b[2J" not in shown.said.partition(ENTERS)[2], "it is never wiped: that flickers"
        os.write(shown.keyboard, b"q")
        assert shown.end() == (0, b"")
        assert LEAVES in shown.said and termios.tcgetattr(shown.theirs) == shown.before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_the_terminal_is_as_it_was(number: signal.Signals) -> None:
    with FakeServer() as server, terminal(server.target, columns=40) as shown:
        shown.wait_for(b"nobody waits")
        shown.process.send_signal(number)
        assert shown.end() == (128 + number, b"")
        assert LEAVES in shown.said and termios.tcgetattr(shown.theirs) == shown.before


def test_a_server_that_goes_and_comes_back_is_shown_again() -> None:
    with FakeServer() as server:
        port = server.port
        with terminal(server.target) as shown:
            shown.wait_for(b"nobody waits")
            server.__exit__()
            shown.wait_for(b"trying again")
            with FakeServer(port=port):
                shown.said = b""
                shown.wait_for(b"fake ")
                os.write(shown.keyboard, b"q")
                assert shown.end() == (0, b"")


def test_a_server_that_is_gone_for_good_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import client.top.watching as watching

    monkeypatch.setattr(watching, "_GIVE_UP_S", 0.0)
    monkeypatch.setattr(watching, "_RETRY_S", 0.05)
    with FakeServer() as server, CarouselClient(server.target, retries=0) as caller, watching.Watcher(caller, 0.05) as watcher:
        server.__exit__()
        until = time.monotonic() + WAIT_S
        while watcher.failure is None and time.monotonic() < until:
            time.sleep(0.02)
        assert watcher.failure is not None and "no server answers" in watcher.failure.message
