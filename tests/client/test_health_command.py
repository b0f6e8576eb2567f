"""`carousel health` says by its exit code whether a server takes requests."""

from __future__ import annotations

import pytest

import client.cli
from tests.helpers.fake_server import FakeServer


def test_health_is_zero_once_the_server_takes_requests(capfd: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        assert client.cli.main(["health", "--target", server.target]) == 0
        assert capfd.readouterr().out == f"{server.target} takes requests\n"


def test_health_is_one_while_it_does_not(capfd: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        server.say_ready(False)
        assert client.cli.main(["health", "--target", server.target, "--timeout", "0.3"]) == 1
        [line] = capfd.readouterr().err.splitlines()
        assert line.startswith("carousel: ") and "not ready within 0.3 s" in line
