"""How long launches take on the device. On a CPU, where kernels are interpreted, one launch by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_WARM, _ROUNDS = 3, 9


def seconds(device: str, launch: Callable[[int], object], count: int = 10) -> float:
    """Of one launch, the median. launch(i) is called with 0 to count - 1, so that it can take buffers in turn which the L2
    cache does not hold together; all are captured as one graph, so that what a launch costs the host is not in it."""
    if device == "cpu":
        began = time.perf_counter()
        launch(0)
        return time.perf_counter() - began
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for index in range(count):
            launch(index)  # compiles; libraries make their workspaces
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            launch(index)
    return replay_seconds(graph.replay, _ROUNDS) / count


def replay_seconds(replay: Callable[[], object], rounds: int) -> float:
    """Of one replay, the median by CUDA events."""
    for _ in range(_WARM):
        replay()
    took = []
    for _ in range(rounds):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        replay()
        ended.record()
        ended.synchronize()
        took.append(began.elapsed_time(ended) / 1e3)
    median: float = statistics.median(took)
    return median


def back_to_back_seconds(device: str, launch: Callable[[], object], count: int) -> float:
    """Of one of `count` launches, one behind the other without a gap."""
    if device == "cpu":
        return seconds(device, lambda _: launch())
    for _ in range(_WARM):
        launch()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(count):
        launch()
    ended.record()
    ended.synchronize()
    took: float = began.elapsed_time(ended) / 1e3 / count
    return took
