"""`carousel draw`: what is drawn of a recording is what stands in it, and what is wrong is one line."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from bench import shadow
from bench.draw import PICTURES, draw_command, timeline_picture
from bench.observed import Observed, recorded, simulated, workload_of
from bench.pictures.canvas import Area, Rect, Text
from bench.pictures.memory import memory_picture
from bench.pictures.steps import DECODE, PADDING, PREFILL, kind_of
from bench.pictures.watched import Sharing, steps_of
from carousel.v1 import inspect_pb2
from scheduler.recording import Recording, Verb
from tests.helpers.fake_server import FakeServer
from tests.helpers.recordings import MS, jobs_of_all_kinds, record
from wire import StepPlan

REPO = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
POOL = 30  # blocks: too few for all of them


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recordings") / "day.crec"
    done = record(path, jobs_of_all_kinds(), num_blocks=POOL)
    assert done.counters["preemptions"] > 0, "the recording shows what the pictures are to show"
    return path


def plans(path: Path) -> list[StepPlan]:
    return [
        event.message for event in Recording(path).events() if event.verb is Verb.PLAN and isinstance(event.message, StepPlan)
    ]


def draw(path: Path, out: Path, *options: str) -> None:
    done = CliRunner().invoke(draw_command, [str(path), "--out", str(out), *options])
    assert done.exit_code == 0, done.output


def rects(file: Path) -> list[tuple[str, float]]:
    """(role, y) of every bar; the legend's are left out."""
    tree = ElementTree.parse(file).getroot()
    legend = max(float(text.get("y", 0)) for text in tree.iter(f"{SVG}text") if (text.text or "").startswith("slot"))
    found = ((rect.get("class") or "", float(rect.get("y") or 0)) for rect in tree.iter(f"{SVG}rect"))
    return [(role, y) for role, y in found if y <= legend]


def test_each_row_has_the_bars_that_its_plans_name(recording: Path, tmp_path: Path) -> None:
    draw(recording, tmp_path, "--only", "timeline", "--steps", "0-9999")
    made = plans(recording)
    wanted: Counter[int] = Counter()
    chunks: Counter[int] = Counter()
    for plan in made:
        starts = {start.slot for start in plan.header.starts}
        for slot, tokens in zip(plan.slots.tolist(), plan.num_tokens.tolist(), strict=True):
            wanted[slot] += 1
            chunks[slot] += tokens > 1 or slot in starts
    seen = recorded(recording)
    assert Counter(row.slot for step in seen.steps for row in step.rows) == wanted
    assert Counter(row.slot for step in seen.steps for row in step.rows if kind_of(row) == PREFILL) == chunks
    assert sum(row.joined for step in seen.steps for row in step.rows) == sum(len(plan.header.starts) for plan in made)

    bars = rects(tmp_path / "timeline.svg")
    heights = sorted({y for role, y in bars if role == "idle"})
    assert len(heights) == 4, "one line per row"
    drawn = Counter(heights.index(y) for role, y in bars if role == "prefill")
    assert drawn == chunks


def test_every_decode_step_is_a_bar_where_there_is_room(recording: Path, tmp_path: Path) -> None:
    draw(recording, tmp_path, "--only", "timeline", "--steps", "0-79")
    steps = recorded(recording).steps[:80]
    kinds = Counter(kind_of(row) for step in steps for row in step.rows)
    drawn = Counter(role for role, _ in rects(tmp_path / "timeline.svg"))
    tokens = drawn["decode"] + drawn["decode-next"]
    assert tokens + drawn["padding"] == kinds[DECODE] + kinds[PADDING] and drawn["prefill"] == kinds[PREFILL]
    assert drawn["decode"] and drawn["decode-next"], "one request is told from the next"


def test_preemptions_and_ends_are_marked(recording: Path, tmp_path: Path) -> None:
    draw(recording, tmp_path, "--only", "timeline", "--steps", "0-9999")
    bars = Counter(role for role, _ in rects(tmp_path / "timeline.svg"))
    done = shadow.read(recording).run
    assert bars["preempted"] == done.counters["preemptions"]
    steps = recorded(recording).steps
    ran = {row.request_id for step in steps for row in step.rows}
    ends = [request for step in steps for request, reason in step.leaves if reason != "preempted" and request in ran]
    assert bars["ink"] == len(ends) == len(done.requests.reason) - 1, "one was cancelled in the queue"


def test_the_bands_of_the_kv_cache_add_up_to_the_pool(recording: Path) -> None:
    steps = recorded(recording).steps
    for step in steps:
        memory = step.memory
        assert memory.held + memory.cached + memory.free + memory.retiring == POOL
        assert 0 <= memory.used <= memory.held and memory.wasted >= 0 and memory.shared <= memory.held
    assert max(step.memory.shared for step in steps) >= 4, "64 tokens are shared"
    assert max(step.memory.reserved for step in steps) > POOL, "reserving everybody's longest output would not fit"
    assert steps[-1].memory.held < steps[len(steps) // 2].memory.held


def test_the_same_requests_run_under_three_policies(recording: Path, tmp_path: Path) -> None:
    found = shadow.read(recording)
    work = workload_of(found, 0, 4)
    assert simulated(workload_of(found, 3, 32), "continuous").num_rows == 32, "more than were recorded"
    sampled = {}
    for policy in ("static", "prefill_first", "continuous"):
        seen = simulated(work, policy)
        assert {step.policy for step in seen.steps} == {policy}
        sampled[policy] = seen.steps[-1].end_ns
        kinds = {kind_of(row) for step in seen.steps for row in step.rows}
        assert (PADDING in kinds) == (policy == "static")
    assert sampled["continuous"] < sampled["static"]
    draw(recording, tmp_path, "--only", "policies", "--requests", "0")
    texts = [text.text for text in ElementTree.parse(tmp_path / "policies.svg").getroot().iter(f"{SVG}text")]
    panels = [text for text in texts if text in ("static batching", "prefill first", "continuous batching")]
    assert panels == ["static batching", "prefill first", "continuous batching"]
    assert sum((text or "").startswith("slot ") for text in texts) == 3 * 4


def test_a_narrow_step_is_drawn_in_one_with_its_neighbours(tmp_path: Path) -> None:
    record(tmp_path / "long.crec", jobs_of_all_kinds() * 8, num_blocks=200, rows=8)
    draw(tmp_path / "long.crec", tmp_path, "--only", "timeline", "--steps", "0-99999")
    drawn = Counter(role for role, _ in rects(tmp_path / "timeline.svg"))
    tokens = sum(kind_of(row) == DECODE for step in recorded(tmp_path / "long.crec").steps for row in step.rows)
    assert 0 < drawn["decode"] + drawn["decode-next"] < tokens / 10


def test_all_three_are_written_and_named(recording: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "client", "draw", str(recording), "--out", str(tmp_path / "new" / "folder")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.splitlines()]
    assert sorted(file.stem for file in files) == sorted(PICTURES)
    for file in files:
        root = ElementTree.parse(file).getroot()
        assert root.get("role") == "img" and root.get("aria-label"), "it says what it shows"
        assert "prefers-color-scheme:dark" in file.read_text()


def test_png_is_drawn_by_matplotlib(recording: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(recording, tmp_path, "--format", "png", "--only", "memory", "--theme", "dark")
    assert (tmp_path / "memory.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_png_without_matplotlib_is_one_line(recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    done = CliRunner().invoke(draw_command, [str(recording), "--format", "png", "--only", "memory", "--out", str(tmp_path)])
    assert done.exit_code == 1 and "carousel-serve[bench]" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none.crec"], 1, "No such file"),
        ([__file__], 1, "is not a recording"),
        (["--only", "clouds"], 2, "'clouds' is none of timeline, policies, memory"),
        (["--steps", "9-3"], 2, "FIRST-LAST"),
        (["--format", "gif"], 2, "'gif' is none of svg, png"),
        (["--target", "127.0.0.1:1"], 1, "no server answers at 127.0.0.1:1"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(draw_command, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == code and words in done.stderr and done.stderr.count("\n") == 1


def test_steps_that_are_not_there_are_one_line(recording: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(draw_command, [str(recording), "--steps", "70000-70001", "--out", str(tmp_path)])
    assert done.exit_code == 1 and "none of 70000-70001" in done.stderr


def test_a_server_without_work_is_one_line(tmp_path: Path) -> None:
    with FakeServer() as server:
        options = ["--target", server.target, "--seconds", "0.2", "--out", str(tmp_path)]
        done = CliRunner().invoke(draw_command, options)
    assert done.exit_code == 1 and "computed no step" in done.stderr


def step(number: int, *rows: inspect_pb2.StepRow, **more: int) -> inspect_pb2.WatchStepsResponse:
    times = {"planned_ns": number * 10 * MS, "duration_ns": 9 * MS, "step_id": number}
    blocks = {"total_blocks": 10, "held_blocks": 4, "cached_blocks": 1, "free_blocks": 5, "kv_tokens": 60}
    return inspect_pb2.WatchStepsResponse(rows=rows, policy="continuous", token_budget=64, **(times | blocks | more))


def row(request_id: str, slot: int, num_tokens: int = 1, **more: bool | str) -> inspect_pb2.StepRow:
    return inspect_pb2.StepRow(request_id=request_id, slot=slot, num_tokens=num_tokens, sampled=True, **more)


def test_a_running_server_is_drawn_from_what_it_tells(tmp_path: Path) -> None:
    with FakeServer() as server:
        first = step(0, row("a", 0, 8, joined=True), row("b", 1, 4, joined=True))
        server.steps = [first, *(step(i, row("a", 0), row("b", 1)) for i in range(1, 30))]
        done = CliRunner().invoke(draw_command, ["--target", server.target, "--seconds", "5", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    drawn = Counter(role for role, _ in rects(tmp_path / "timeline.svg"))
    assert (drawn["prefill"], drawn["decode"]) == (2, 2 * 29) and drawn["idle"] == 4
    assert (tmp_path / "memory.svg").exists() and (tmp_path / "policies.svg").exists()


def test_watched_steps_follow_each_other_and_blocks_are_never_more_than_there_are() -> None:
    told = [step(0, row("a", 0)), step(1, row("a", 0), duration_ns=50 * MS), step(2, row("a", 0), cached_blocks=9), step(3)]
    steps = steps_of(told, 16, [Sharing(2, 3, 2)])
    assert all(one.start_ns < one.end_ns <= two.start_ns for one, two in pairwise(steps))
    assert steps[1].end_ns == 30 * MS, "the next but one was planned then"
    assert [each.memory.shared for each in steps] == [0, 0, 3, 3] and [each.memory.used_tokens for each in steps] == [
        60,
        60,
        28,
        28,
    ]
    for each in steps:
        assert each.memory.held + each.memory.cached + each.memory.free <= 10


def test_a_pause_of_the_kv_cache_is_left_blank() -> None:
    told = [step(i, row("a", 0)) for i in (*range(20), *range(60, 80))]
    picture = memory_picture("x", steps_of(told, 16))
    held = [shape for shape in picture.shapes if isinstance(shape, Area) and shape.role == "used"]
    assert len(held) == 2
    one, two = ([x for x, _ in area.points] for area in held)
    assert max(one) + 300 < min(two) and any(isinstance(shape, Text) and shape.text == "no step" for shape in picture.shapes)


def test_ctrl_c_draws_what_was_seen_so_far(tmp_path: Path) -> None:
    with FakeServer() as server:
        # More than the transport holds: when all are sent, most have been read.
        server.steps = [step(i, row("a", 0, joined=not i, tenant="x" * 20_000)) for i in range(100)]
        server.steps_go_on = True
        command = [sys.executable, "-m", "client", "draw", "--target", server.target, "--seconds", "500", "--only", "timeline"]
        with subprocess.Popen(
            [*command, "--out", str(tmp_path)], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert server.steps_seen.wait(30)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, b"") and out.endswith(b"timeline.svg\n")
    assert 1 <= sum(role in ("prefill", "decode") for role, _ in rects(tmp_path / "timeline.svg")) <= 100


def test_of_a_huge_batch_the_first_rows_are_drawn_and_that_is_said() -> None:
    rows = [row(f"r{slot}", slot, joined=True) for slot in range(4096)]
    seen = Observed("x", steps_of([step(i, *rows) for i in range(3)]), 4096)
    picture = timeline_picture(seen, None)
    texts = [shape.text for shape in picture.shapes if isinstance(shape, Text)]
    assert "the first 32 of 4096 slots" in texts
    assert sum(isinstance(shape, Rect) and shape.role == "idle" for shape in picture.shapes) == 32 + 1, "and the legend's"


def test_help_shows_examples() -> None:
    done = CliRunner().invoke(draw_command, ["--help"])
    assert "carousel draw run.crec --out pictures" in done.output
