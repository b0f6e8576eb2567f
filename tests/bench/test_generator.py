from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.draws import Exponential, Uniform
from bench.figures import Slo
from bench.generator import Asking, Heard, Offered, offer
from bench.http2 import Caller, Peer
from bench.jobs import REPLY, Job, Part
from bench.load import fitting, peer
from bench.load_figures import gaps_ns, load_figures
from bench.load_watch import LoadWatch, seen
from bench.server import Server
from bench.workloads import Conversations, Independent
from carousel.v1 import control_pb2, generation_pb2
from client import CarouselClient
from wire.messages import I32

MODEL = Path(__file__).parents[2] / "demo" / "model"
MS = 1_000_000


@pytest.fixture(scope="module")
def simulated() -> Iterator[Server]:
    with Server(["--model", str(MODEL), "--device", "sim", "--max-batch-rows", "8"]) as server:
        yield server


@pytest.fixture(scope="module")
def real() -> Iterator[Server]:
    with Server(["--model", str(MODEL), "--device", "cpu", "--max-batch-rows", "8"]) as server:
        yield server


def run(server: Server, jobs: list[Job], *, at_once: int | None = None, **more: object) -> Offered:
    caller = Caller(server.port, 2)
    try:
        return offer(caller, Asking(4096), jobs, at_once=at_once, **more)  # type: ignore[arg-type]
    finally:
        caller.close()


def short(count: int, rate: float = math.inf, max_tokens: int = 0) -> list[Job]:
    return list(Independent("short", Uniform(3, 9), Exponential(6, 12), max_tokens=max_tokens).jobs(rate, count, 1))


def test_every_job_gets_its_tokens(simulated: Server) -> None:
    offered = run(simulated, short(40))
    assert (len(offered.heard), offered.unfinished, offered.unsent, offered.broke) == (40, 0, 0, "")
    for heard in offered.heard:
        assert heard.is_served and heard.output_tokens == heard.job.output_tokens
        assert heard.prompt_tokens == heard.job.prompt_tokens
        times = [at for at, _ in heard.tokens]
        assert times == sorted(times) and heard.due_ns <= heard.sent_ns <= heard.first_ns <= heard.ended_ns


def test_a_request_whose_length_nobody_knows_ends_at_its_length(real: Server) -> None:
    jobs = short(12, max_tokens=12)
    assert any(job.output_tokens == 1 for job in jobs) and len({job.output_tokens for job in jobs}) > 3
    offered = run(real, jobs)
    assert all(heard.output_tokens == heard.job.output_tokens for heard in offered.heard)
    request = Asking(4096).request(next(job for job in jobs if job.output_tokens < 12))
    assert request.stopping.max_tokens == 12, "the server is told the cap"


def test_an_open_loop_sends_at_the_drawn_times(simulated: Server) -> None:
    jobs = short(20, rate=100.0)
    offered = run(simulated, jobs)
    due = sorted(heard.due_ns - offered.began_ns for heard in offered.heard)
    assert due == [job.arrival_ns for job in jobs]


def test_a_closed_loop_never_has_more_at_once(simulated: Server) -> None:
    offered = run(simulated, short(30), at_once=3)
    changes = sorted([(h.sent_ns, 1) for h in offered.heard] + [(h.ended_ns, -1) for h in offered.heard])
    assert len(offered.heard) == 30
    assert max(np.cumsum([change for _, change in changes])) <= 3
    assert all(heard.sent_ns - heard.due_ns < 1e9 for heard in offered.heard), "it comes into being when there is a place"


def test_a_turn_follows_the_answer_and_holds_it(real: Server) -> None:
    chat = Conversations("chat", Uniform(3, 3), Uniform(20, 40), Uniform(4, 8), Uniform(3, 6), think_s=0.01, system_prompts=2)
    jobs = list(chat.jobs(50.0, 9, 0))
    asked: list[tuple[Job, I32 | None]] = []

    class Listening(Asking):
        def request(self, job: Job, reply: I32 | None = None) -> generation_pb2.GenerateRequest:
            asked.append((job, reply))
            return super().request(job, reply)

    caller = Caller(real.port, 1)
    offered = offer(caller, Listening(4096), jobs)
    caller.close()
    assert len(offered.heard) == 9 and all(heard.is_served for heard in offered.heard)
    begun = {heard.job: heard for heard in offered.heard}
    for job in jobs:
        for turn in job.turns():
            if turn.then is not None:
                assert begun[turn.then].due_ns == begun[turn].ended_ns + turn.then.arrival_ns
    for job, reply in asked:
        replies = sum(part.length for part in job.prompt if part.key == REPLY)
        assert (0 if reply is None else len(reply)) == replies
    assert sum(heard.cached_tokens for heard in offered.heard) > 0, "what was said before is found again"


def test_what_was_stopped_is_kept(simulated: Server) -> None:
    jobs = [*short(5), Job(60_000 * MS, (Part(1, 4),), 3)]
    ended = 0

    def tell(count: int, tokens: int) -> None:
        nonlocal ended
        ended = count

    offered = run(simulated, jobs, stop=lambda: ended == 5, tell=tell)
    assert (len(offered.heard), offered.unfinished, offered.unsent) == (5, 0, 1)


@pytest.mark.slow
def test_a_server_that_goes_away_is_told_and_what_came_is_kept() -> None:
    with Server(["--model", str(MODEL), "--device", "sim"]) as server:
        caller = Caller(server.port, 1)
        ended = 0

        def tell(count: int, tokens: int) -> None:
            nonlocal ended
            if count == 3 and not ended:
                server.stop()
            ended = count

        offered = offer(caller, Asking(4096), [*short(3), Job(60_000 * MS, (Part(1, 4),), 3)], tell=tell)
        caller.close()
    assert len(offered.heard) == 3 and offered.broke and offered.unsent == 1


def test_refusals_are_counted_by_status(simulated: Server) -> None:
    too_long = [Job(0, (Part(1, 5000),), 3), *short(2)]
    found = load_figures(run(simulated, too_long), Slo())
    assert (found.requests, found.errors) == (2, {"INVALID_ARGUMENT": 1})


def heard(due_ms: float, *tokens: tuple[float, int], status: str = "OK") -> Heard:
    one = Heard(Job(0, (Part(1, 10),), 1), int(due_ms * MS), int((due_ms + 1) * MS), status=status, prompt_tokens=10)
    one.tokens = [(int(at * MS), count) for at, count in tokens]
    one.ended_ns = one.tokens[-1][0] if tokens else one.sent_ns
    return one


def test_figures_of_known_times() -> None:
    everyone = [heard(0, (100, 1), (150, 1), (250, 2)), heard(100, (1200, 1), (1300, 1)), heard(0, status="UNAVAILABLE")]
    found = load_figures(Offered(everyone, 0, 2.0, 0.1, 3, 4), Slo(ttft_ms=1000, itl_ms=100))
    assert list(gaps_ns(everyone[0])) == [50 * MS, 100 * MS, 0]
    assert (found.requests, found.errors, found.unfinished, found.unsent) == (2, {"UNAVAILABLE": 1}, 3, 4)
    assert (found.output_tokens, found.prompt_tokens, found.tokens_per_s) == (6, 20, 13.0)
    assert (found.ttft.p50, found.ttft.most, found.e2e.most) == pytest.approx((0.1, 1.1, 1.2))
    assert found.good_share == pytest.approx(1 / 3), "one had its first token too late, one failed"
    assert found.goodput == pytest.approx(0.5)
    assert found.generator_cpu_share == pytest.approx(0.05) and not found.generator_limits
    slow = load_figures(Offered(everyone, 0, 2.0, 1.5, 0, 0), Slo())
    assert slow.generator_limits


def test_nothing_served_gives_figures_too() -> None:
    found = load_figures(Offered([], 0, 0.0, 0.0, 1, 2), Slo())
    assert (found.requests, found.output_tokens_per_s) == (0, 0.0) and math.isnan(found.ttft.p50)


def test_kv_waste_is_weighted_by_what_is_allocated() -> None:
    loads = [
        control_pb2.GetLoadResponse(
            total_blocks=10, held_blocks=blocks, kv_waste=waste, prompt_tokens=asked, cached_tokens=asked // 4
        )
        for blocks, waste, asked in ((0, 0.0, 100), (8, 0.25, 200), (2, 0.5, 300))
    ]
    found = seen(loads, 16)
    assert (found.samples, found.kv_waste, found.held_share) == (2, pytest.approx(0.3), pytest.approx(0.5))
    assert found.cached_share == pytest.approx(0.25)


def test_a_loaded_server_tells_of_its_blocks(simulated: Server) -> None:
    with CarouselClient(simulated.target) as client, LoadWatch(client, 0.1) as watch:
        run(simulated, short(20))
    assert watch.seen is not None and not watch.why and watch.seen.steps > 0


def test_sessions_are_cut_before_the_turn_that_is_too_long() -> None:
    third = Job(0, (Part(1, 300),), 10)
    second = Job(0, (Part(1, 100),), 10, then=third)
    first = Job(0, (Part(1, 50),), 10, then=second)
    kept, left_out = fitting([first, replace(third, max_tokens=5)], max_model_len=200, max_prompt=None)
    assert [[turn.prompt_tokens for turn in job.turns()] for job in kept] == [[50, 100]] and left_out == 2
    assert fitting([first], 200, max_prompt=60)[1] == 2


def test_a_target_is_host_and_port() -> None:
    nothing = dict.fromkeys(("tls_ca", "tls_cert", "tls_key", "token"))
    assert peer("[::1]:5", nothing) == Peer("::1", 5)
    assert peer("a:1", nothing | {"token": "t" * 200}).headers == (("authorization", "Bearer " + "t" * 200),)
    for wrong in ("a", "a:b", "a:0", "a:70000"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            peer(wrong, nothing)
