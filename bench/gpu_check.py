"""`python -m bench.gpu_check`: all that needs a GPU, within ten minutes: parity, kernels against their limits, the engine
against its targets (PERFORMANCE's G1–G6, G8–G11, G14–G16), with the limit beside each figure.

Every part runs in a process of its own, so that none can take another with it: a GPU that has refused an operation refuses all
later ones of that process. Imports the standard library only, as it also says what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import provenance
from bench.gpu.check import Check, Figure, Limits, Problem, Said, heard, one_line

_ROOT = Path(__file__).parents[1]
_MINUTES = 9.5
_GRACE_S = 8.0  # that a part has to end by itself when its time is over
_LEAST_S = 15.0  # of time left, to begin a part
_H200 = Limits(4.3e12, 790e12)  # where nothing was measured
_NEEDED = ("msgspec", "numpy", "torch", "triton", "transformers", "safetensors", "tokenizers", "pytest")
_WHEELS = ("msgspec", "pytest", "pytest-timeout", "iniconfig", "pluggy", "pygments", "packaging")

_DOWNLOAD = (
    f"pip download --dest DIR --only-binary :all: --python-version 3.12 --platform manylinux2014_x86_64 {' '.join(_WHEELS)}"
)


@dataclass(frozen=True)
class Part:
    name: str
    module: str  # of bench.gpu
    function: str
    seconds: float  # that it may take
    about: str


# By value: what does not fit into the time is at the end.
PARTS = (
    Part("environment", "environment", "run", 45, "versions, copy bandwidth, matrix product"),
    Part("suites", "suites", "run", 110, "the kernels' tests, on the GPU"),
    Part("parity", "parity", "run", 75, "the engine against transformers"),
    Part("kernels", "kernels", "run", 75, "G9, G10, the other kernels"),
    Part("8b", "serving", "run_8b", 170, "Llama-3-8B: start, G8, G6, G16, G4, G11, G15, G14"),
    Part("1b", "serving", "run_1b", 50, "Llama-3.2-1B: start, G8, G6"),
    Part("anyscale", "anyscale", "run", 175, "OPT-13B: G1, G2, G3"),
    Part("transformers", "against_transformers", "run", 70, "G5"),
)


# ------------------------------------------------------------------------------------------------------------- one part


def run_part(part: Part, check: Check) -> None:
    """In this process."""
    # Said in both cases: the tests would guess by the name of the device file, which differs in containers.
    os.environ["TRITON_INTERPRET"] = "1" if check.device == "cpu" else "0"
    if check.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    getattr(importlib.import_module(f"bench.gpu.{part.module}"), part.function)(check)


# ----------------------------------------------------------------------------------------------------- all of them, in turn


class Report:
    """What was said so far: kept, written to the file, shown as it comes."""

    def __init__(self, path: Path | None, options: argparse.Namespace) -> None:
        self.said: list[tuple[str, Said]] = []
        self._path, self._options = path, options
        self._about: dict[str, Any] = {}  # of the environment

    def add(self, part: str, said: Said) -> None:
        self.said.append((part, said))
        if isinstance(said, Figure) and "versions" in said.more:
            self._about = {"device": said.what, "versions": said.more["versions"]}
        print("  " + " | ".join(_row(said, self._options.tiny)), file=sys.stderr, flush=True)
        if self._path is not None:
            provenance.append(self._path, self._line(part, said))

    def _line(self, part: str, said: Said) -> dict[str, Any]:
        line = provenance.provenance(said.what)
        line["versions"] |= self._about.get("versions", {})
        line |= {"device": self._about.get("device", self._options.device), "part": part}
        line |= {"tiny": self._options.tiny, "quick": self._options.quick}
        if isinstance(said, Problem):
            return line | {"problem": said.why}
        return line | asdict(said) | {"holds": said.holds}

    @property
    def limits(self) -> Limits:
        """As the environment's part measured them, else an H200's."""
        measured = {said.unit: said.value for part, said in self.said if part == "environment" and isinstance(said, Figure)}
        return Limits(measured.get("B/s", _H200.bandwidth), measured.get("FLOP/s", _H200.peak))

    def table(self) -> Iterator[str]:
        header = ("target", "what", "ours", "goal", "limit or best known", "holds?", "how")
        rows = [_row(said, self._options.tiny) for _, said in self.said]
        shown = [header, *sorted((row for row in rows if row[0]), key=_by_target), *(row for row in rows if not row[0])]
        widths = [max(len(row[column]) for row in shown) for column in range(len(header) - 1)]
        for row in shown:
            yield "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()


def _by_target(row: Sequence[str]) -> tuple[int, int, str]:
    target = row[0]
    return (0, int(target[1:]), "") if target[1:].isdecimal() else (1, 0, target)


def _row(said: Said, tiny: bool) -> tuple[str, ...]:
    if isinstance(said, Problem):
        return ("", said.what, "–", "", "", "NOT MEASURED", said.why)
    goal = "" if said.goal is None else f"{'≤' if said.at_most else '≥'} {said.goal:g}"
    means_nothing = tiny and said.target.startswith("G")
    holds = "–" if means_nothing else {None: "", True: "holds", False: "FAILS"}[said.holds]
    return (said.target, said.what, _number(said.value, said.unit), goal, said.limit, holds, said.note)


def _number(value: float, unit: str) -> str:
    if unit in ("B/s", "FLOP/s"):
        value, unit = value / 1e12, f"T{unit}"
    digits = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    return f"{digits} {unit}".rstrip()


def run_all(parts: Sequence[Part], options: argparse.Namespace, report: Report) -> None:
    deadline = time.monotonic() + 60 * options.minutes
    for part in parts:
        left = deadline - time.monotonic()
        if left < min(_LEAST_S, part.seconds):
            report.add(part.name, Problem(f"{part.name} ({part.about})", "not run: no time left"))
            continue
        seconds = left if options.tiny else min(left, part.seconds * (0.6 if options.quick else 1))
        print(f"{part.name}: {part.about}, {seconds:.0f} s at most", file=sys.stderr, flush=True)
        _one_process(part, options, report, max(1.0, seconds - _GRACE_S))


def _one_process(part: Part, options: argparse.Namespace, report: Report, seconds: float) -> None:
    command = _command(part, options, report.limits, seconds)
    with tempfile.TemporaryFile("w+") as errors:
        # A group of its own: what the part has started itself ends with it.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=_ROOT, start_new_session=True)
        reader = threading.Thread(target=_read, args=(process, part, report), daemon=True)
        reader.start()
        why = ""
        try:
            process.wait(seconds + _GRACE_S)
        except subprocess.TimeoutExpired:
            why = f"stopped after {seconds + _GRACE_S:.0f} s"
        finally:
            _end(process)
            reader.join(5)
        errors.seek(0)
        lines = [line.rstrip() for line in errors if line.strip()]
        if options.verbose:
            print("\n".join(lines), file=sys.stderr)
        if not why and process.returncode:
            why = f"ended with status {process.returncode}: {lines[-1] if lines else 'no word'}"
        if why:
            report.add(part.name, Problem(f"the rest of {part.name} ({part.about})", why[:300]))


def _command(part: Part, options: argparse.Namespace, limits: Limits, seconds: float) -> list[str]:
    command = [sys.executable, "-m", "bench.gpu_check", "--part", part.name, "--device", options.device]
    command += ["--seconds", str(seconds), "--limits", json.dumps(asdict(limits))]
    return [*command, *["--tiny"] * options.tiny, *["--quick"] * options.quick]


def _read(process: subprocess.Popen[str], part: Part, report: Report) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said = heard(line)
        if said is not None:
            report.add(part.name, said)


def _end(process: subprocess.Popen[str]) -> None:
    """The part, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# -------------------------------------------------------------------------------------------------------------- the way in


def missing() -> list[str]:
    return [name for name in _NEEDED if importlib.util.find_spec(name) is None]


def _install(wheels: Path, folder: str) -> None:
    """What is missing, from a folder of wheels, to a folder that this process and its parts look into: the environment stays as
    it is. Raises subprocess.CalledProcessError."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels), "--target", folder]
    subprocess.run([*pip, *missing()], check=True)
    sys.path.append(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), folder]))
    importlib.invalidate_caches()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description="Measures all that needs a GPU and says which targets hold. Exit code 1: one does not or was not measured.",
        epilog="parts: " + "; ".join(f"{part.name}: {part.about}" for part in PARTS),
    )
    parser.add_argument("--parts", default=",".join(names), help="only these, with commas between them")
    parser.add_argument("--quick", action="store_true", help="half of everything")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="for all parts together (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="append a line for each figure to this file, as it comes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: kernels interpreted, with --tiny only")
    parser.add_argument("--tiny", action="store_true", help="whether everything runs: a few tokens, figures without meaning")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="take what is missing from these wheels, for this run only")
    parser.add_argument("--verbose", action="store_true", help="show what the parts write to standard error")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--limits", type=json.loads, default=asdict(_H200), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    wanted = options.parts.split(",")
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        parser.error(f"--parts: no {', '.join(unknown)}; there are {', '.join(names)}")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu interprets the kernels, which takes hours for real shapes: add --tiny")
    options.parts = [part for part in PARTS if part.name in wanted]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.part is not None:
        part = next(part for part in PARTS if part.name == options.part)
        deadline = time.monotonic() + options.seconds
        run_part(part, Check(options.device, options.tiny, options.quick, Limits(**options.limits), deadline))
        return 0
    # Whoever ends this process ends its parts with it, and sees what they found.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        why = _not_ready(options, folder)
        if why:
            print(f"gpu-check: {why}", file=sys.stderr)
            return 2
        return _measured(options)


def _measured(options: argparse.Namespace) -> int:
    """The exit code."""
    report = Report(options.json, options)
    interrupted = False
    try:
        run_all(options.parts, options, report)
    except KeyboardInterrupt:
        interrupted = True
    print("\n".join(report.table()))
    figures = [said for _, said in report.said if isinstance(said, Figure)]
    problems = len(report.said) - len(figures)
    judged = [figure for figure in figures if not (options.tiny and figure.target.startswith("G"))]
    held, failed = (sum(figure.holds is holds for figure in judged) for holds in (True, False))
    words = f"{held} hold, {failed} fail, {problems} not measured"
    print(f"\n{words}{' (interrupted)' if interrupted else ''}")
    if options.tiny:
        print("Tiny models and a few tokens: the figures mean nothing, only that everything runs.")
    return 130 if interrupted else int(bool(failed or problems))


def _not_ready(options: argparse.Namespace, folder: str) -> str:
    """Why nothing can be measured here, and what to do; empty: it can. folder: where wheels may be installed."""
    if missing() and options.wheels is not None:
        try:
            _install(options.wheels, folder)
        except (OSError, subprocess.CalledProcessError) as error:
            return f"pip could not install {', '.join(missing())} from {options.wheels} ({one_line(error)})"
    if missing():
        return (
            f"these packages are missing here: {', '.join(missing())}. With a network: pip install {' '.join(missing())}; "
            f"without: --wheels DIR, a folder made elsewhere by\n  {_DOWNLOAD}"
        )
    if options.device == "cuda" and not importlib.import_module("torch").cuda.is_available():
        return "torch finds no GPU here; --device cpu --tiny shows whether everything runs"
    return ""


if __name__ == "__main__":
    sys.exit(main())
