"""llama.cpp's server, called over HTTP with one thread for each request. Standard library only."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from harness import Request, job, measure  # type: ignore[import-not-found]

_HOST = "127.0.0.1"
_READY_S = 300.0
_POLL_S = 0.1
_SILENT_S = 900.0  # between two tokens


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _command(found: dict[str, Any], port: int) -> list[str]:
    rows, threads = found["max_rows"], str(found["threads"])
    return [
        *(found["server"], "--model", found["model"], "--host", _HOST, "--port", str(port)),
        *("--parallel", str(rows), "--ctx-size", str(rows * found["max_len"]), "--cont-batching"),
        *("--threads", threads, "--threads-batch", threads, "--no-webui", "--offline", "--cache-ram", "0"),
    ]


def _wait_ready(server: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + _READY_S
    while time.monotonic() < until:
        if server.poll() is not None:
            raise SystemExit(f"llama-server ended with exit code {server.returncode}")
        try:
            connection = http.client.HTTPConnection(_HOST, port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(_POLL_S)
    raise SystemExit(f"llama-server was not ready after {_READY_S:g} s")


def _one(port: int, request: Request, began: float) -> list[float]:
    prompt, max_tokens = request
    body = {
        "prompt": prompt,
        "n_predict": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "samplers": ["temperature"],  # the others cost time and change nothing
        "stream": True,
        "return_tokens": True,
        "cache_prompt": False,
    }
    connection = http.client.HTTPConnection(_HOST, port, timeout=_SILENT_S)
    connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"llama-server answered {response.status}: {response.read().decode(errors='replace')[:500]}")
    times: list[float] = []
    for line in response:
        if line.startswith(b"data: {"):
            times += [time.perf_counter() - began] * len(json.loads(line[6:])["tokens"])
    connection.close()
    return times


def main() -> None:
    found = job()
    port = _free_port()
    server = subprocess.Popen(_command(found, port), stdin=subprocess.DEVNULL)
    try:
        _wait_ready(server, port)

        def generate(requests: Sequence[Request]) -> list[list[float]]:
            with ThreadPoolExecutor(len(requests)) as pool:
                began = time.perf_counter()
                return list(pool.map(lambda request: _one(port, request, began), requests))

        measure(found, generate, {"llama-cpp-python": found["version"]})
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
