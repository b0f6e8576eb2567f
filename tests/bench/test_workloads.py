from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest

from bench import workloads
from bench.draws import Exponential, Lengths, arrivals_ns, gamma_gaps, generators
from bench.jobs import REPLY, Job, token_ids
from bench.workloads import ANYSCALE_CAPS, WorkloadError

# name: mean, median, p99 of prompts and of outputs, variation of the times between arrivals; as published
STATED = {
    "azure-conv-like": ((1155, 1020, 4142), (211, 129, 601), 1.09),
    "azure-code-like": ((2048, 1469, 7436), (28, 13, 252), 13.2),
    "mooncake-like": ((12_035, 6_909, 85_401), (343, 350, 1120), 3.0),
}


def jobs(name: str, count: int, rate: float = 10.0, seed: int = 3) -> list[Job]:
    return [job for first in workloads.by_name(name).jobs(rate, count, seed) for job in first.turns()]


@pytest.mark.parametrize("name", STATED)
def test_lengths_and_arrivals_have_the_stated_statistics(name: str) -> None:
    drawn = jobs(name, 60_000)
    prompt, output, variation = STATED[name]
    for lengths, (mean, median, p99) in (
        (np.array([job.prompt_tokens for job in drawn]), prompt),
        (np.array([job.output_tokens for job in drawn]), output),
    ):
        assert lengths.min() >= 1
        assert lengths.mean() == pytest.approx(mean, rel=0.03)
        assert np.median(lengths) == pytest.approx(median, rel=0.03)
        assert np.quantile(lengths, 0.99) == pytest.approx(p99, rel=0.03)
    gaps = np.diff([job.arrival_ns for job in drawn])
    assert gaps.min() >= 0
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.1)
    assert 1e9 / gaps.mean() == pytest.approx(10.0, rel=0.15)


@pytest.mark.parametrize("name", workloads.NAMES)
def test_the_same_seed_draws_the_same_and_the_rate_only_changes_the_times(name: str) -> None:
    first = jobs(name, 300)
    assert jobs(name, 300) == first
    assert jobs(name, 300, seed=4) != first
    faster = list(workloads.by_name(name).jobs(20.0, 300, 3))
    slower = list(workloads.by_name(name).jobs(10.0, 300, 3))
    assert [job.prompt for job in faster] == [job.prompt for job in slower]
    assert [job.arrival_ns for job in faster] == pytest.approx([job.arrival_ns / 2 for job in slower], abs=1)


@pytest.mark.parametrize("name", workloads.NAMES)
def test_a_workload_is_drawn_lazily_and_counts_every_turn(name: str) -> None:
    some = list(islice(workloads.by_name(name).jobs(10.0, 10**12, 0), 5))
    assert len(some) == 5
    assert len(jobs(name, 97)) == 97
    assert all(job.arrival_ns == 0 for job in workloads.by_name(name).jobs(math.inf, 50, 0))


def test_the_beginning_of_a_longer_workload_is_the_shorter_one() -> None:
    assert jobs("mooncake-like", 500)[:200] == jobs("mooncake-like", 200)


@pytest.mark.parametrize(("cap", "mean"), [*zip(ANYSCALE_CAPS, (15.9, 54.3, 122.6, 130.8), strict=True)])
def test_anyscale_lengths_are_as_in_the_post(cap: int, mean: float) -> None:
    drawn = jobs(f"anyscale-{cap}", 20_000)
    outputs = np.array([job.output_tokens for job in drawn])
    assert {job.prompt_tokens for job in drawn} == {512} and {job.max_tokens for job in drawn} == {cap}
    assert 1 <= outputs.min() <= outputs.max() <= cap
    error_of_theirs = outputs.std() / math.sqrt(1000)  # the post drew a thousand
    assert outputs.mean() == pytest.approx(mean, abs=2.5 * error_of_theirs)


def blocks(job: Job, size: int) -> list[bytes]:
    """Keys of the blocks of a prompt: everything up to their end."""
    ids = token_ids(job.prompt, 50_000)
    return [ids[: end * size].tobytes() for end in range(1, len(ids) // size + 1)]


def test_a_mooncake_like_workload_repeats_37_percent_of_its_blocks() -> None:
    size = 512  # as in the published trace
    seen: set[int] = set()
    repeated = total = 0
    for job in jobs("mooncake-like", 400):
        mine = [hash(block) for block in blocks(job, size)]
        repeated += sum(block in seen for block in mine)
        total += len(mine)
        seen.update(mine)
    assert repeated / total == pytest.approx(0.37, abs=0.015)


def test_a_conversation_goes_on_with_all_that_was_said() -> None:
    sessions = list(workloads.by_name("conversations").jobs(10.0, 200, 1))
    assert any(first.then is not None for first in sessions)
    for first in sessions:
        for job in first.turns():
            if job.then is None:
                continue
            assert job.then.prompt[: len(job.prompt)] == job.prompt
            reply, question = job.then.prompt[len(job.prompt) :]
            assert (reply.key, reply.length) == (REPLY, job.output_tokens) and question.key != REPLY
            assert job.then.arrival_ns > 0
    systems = {first.prompt[0] for first in sessions}
    assert 1 < len(systems) <= 8, "sessions share a few system prompts"
    questions = [part for first in sessions for job in first.turns() for part in job.prompt[-1:]]
    assert len({part.key for part in questions}) == len(questions), "no two questions are the same"


def test_independent_requests_share_no_text() -> None:
    drawn = jobs("azure-conv-like", 50) + jobs("azure-conv-like", 50, seed=4)
    beginnings = {token_ids(job.prompt, 1 << 30)[:1].tobytes() for job in drawn}
    assert len(beginnings) == len(drawn)


def test_an_unknown_workload_is_told_with_those_there_are() -> None:
    with pytest.raises(WorkloadError, match=r"unknown workload 'azure': choose one of azure-conv-like, .*anyscale-1536"):
        workloads.by_name("azure")


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(WorkloadError, match="above 0"):
        workloads.check_rate(rate)


def test_a_poisson_process_has_variation_one() -> None:
    times = np.array(list(islice(arrivals_ns(gamma_gaps(1.0), 5.0, generators(0, 1)[0]), 20_000)))
    gaps = np.diff(times) / 1e9
    assert gaps.mean() == pytest.approx(0.2, rel=0.03) and gaps.std() == pytest.approx(0.2, rel=0.03)


def test_what_one_generator_draws_does_not_depend_on_another() -> None:
    a, b = generators(7, 2)
    a.random(1000)
    assert b.random() == generators(7, 2)[1].random() != generators(7, 3)[2].random()


def test_lengths_that_no_curve_has_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="no curve"):
        _ = Lengths(mean=5000, median=100, p99=600, log_sd=1.0).exponent


def test_exponential_lengths_are_drawn_again_and_not_cut() -> None:
    drawn = Exponential(mean=100, cap=10).draw(generators(0, 1)[0], 20_000)
    assert np.bincount(drawn, minlength=11)[10] == pytest.approx(2000, rel=0.1), "the cap is no heap"
