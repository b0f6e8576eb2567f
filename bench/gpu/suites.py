"""The kernels' tests, run on the GPU: a process for each file, several at a time, as most of their time is compiling."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.check import Check, Figure

_ROOT = Path(__file__).parents[2]
_FOLDERS = ("tests/worker/kernels", "tests/worker/gpu")
_OFFLINE = "test_offline.py"  # compiles for other devices, needs none, and takes long
_MOST_AT_A_TIME = 6


@dataclass(frozen=True)
class Result:
    file: str
    passed: int
    skipped: int
    failed: list[str]  # names
    end: str  # how it ended, where it is not by itself


def run(check: Check) -> None:
    check.attempt("kernel tests", lambda: _all(check), 20)


def _all(check: Check) -> Iterator[Figure]:
    files = [path for folder in _FOLDERS for path in (_ROOT / folder).glob("test_*.py") if path.name != _OFFLINE]
    files.sort(key=lambda path: path.stat().st_size, reverse=True)  # those that take long begin early
    if not files:
        raise RuntimeError("the tests are not here: they are in the repository, not in what is installed")
    if check.tiny:
        files = [min(files, key=lambda path: path.stat().st_size)]
    at_a_time = max(1, min(_MOST_AT_A_TIME, len(os.sched_getaffinity(0)) // 2))
    deadline = time.monotonic() + check.left_s - 3
    with ThreadPoolExecutor(at_a_time) as pool:
        results = list(pool.map(lambda path: _one(path.relative_to(_ROOT), deadline), files))
    for folder in _FOLDERS:
        of_folder = [result for result in results if result.file.startswith(folder)]
        if of_folder:
            yield _figure(folder, of_folder)


def _figure(folder: str, results: Sequence[Result]) -> Figure:
    passed, skipped = sum(result.passed for result in results), sum(result.skipped for result in results)
    failed = [name for result in results for name in result.failed]
    ends = [f"{Path(result.file).name} {result.end}" for result in results if result.end]
    words = [f"{passed} passed, {skipped} skipped", *failed[:3], *ends]
    more = {"passed": passed, "skipped": skipped, "failed": failed, "ends": ends}
    # A file that broke off, or a folder without a test, is a failure too.
    count = len(failed) + len(ends) + (passed == 0)
    return Figure("parity", f"tests that fail in {folder}", count, "", "0", 0, True, "; ".join(words), more)


def _one(path: Path, deadline: float) -> Result:
    left = deadline - time.monotonic()
    if left < 1:
        return Result(str(path), 0, 0, [], "not run: no time left")
    command = [sys.executable, "-m", "pytest", "-vv", "--tb=line", "-p", "no:cacheprovider", "-m", "not slow", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=_ROOT) as process:
        try:
            output, end = process.communicate(timeout=left)[0], ""
        except subprocess.TimeoutExpired:
            process.kill()
            output, end = process.communicate()[0], "not finished: no time left"
    lines = output.splitlines()
    if not end and process.returncode not in (0, 1):
        end = f"exit code {process.returncode}: {lines[-1] if lines else 'no output'}"
    print("\n".join(lines[-20:]), file=sys.stderr)
    # "FAILED" stands behind a test as it ends, and before it in the summary: counted where it ends.
    ended = [line.split() for line in lines if line.startswith("tests/")]
    failed = [words[0].partition("::")[2] for words in ended if {"FAILED", "ERROR"} & set(words)]
    passed, skipped = (sum(word in words for words in ended) for word in ("PASSED", "SKIPPED"))
    return Result(str(path), passed, skipped, failed, end)
