"""Whether two runs of a request part because two tokens are as good as equally likely.

Sums in float32 in another order (a prompt computed again, in other chunks, in other company) differ in their last digits, and
then either token is right. Proven by the server's own log-probabilities of both tokens after the same beginning: greedy, their
difference; drawn, the difference after temperature and noise, which is known from the seed (worker/philox.py). What comes after
a near tie must be what the server gives for that beginning, from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.chaos_load import Job, Stream, follow
from bench.witness import first_difference
from client.aio.api import AsyncCarouselClient
from worker import philox

NEAR_TIE = 1e-4  # of scores; the parity tests' own
_MOST_TIES = 8  # of one output


@dataclass(frozen=True)
class Verdict:
    """ties: gaps of the near ties that were decided otherwise. why: the first difference that is none; empty: there is none."""

    ties: tuple[float, ...]
    why: str = ""


async def judge(client: AsyncCarouselClient, job: Job, got: list[int], expected: list[int]) -> Verdict:
    """got: an output of as many tokens as expected. Asks an undisturbed server."""
    ties: list[float] = []
    done = 0  # tokens that are settled
    while (at := first_difference(got[done:], expected[done:])) is not None:
        done += at
        mine, theirs = await scores_of(client, job, got[:done], (got[done], expected[done]))
        gap = abs(mine - theirs)
        if not gap < NEAR_TIE or len(ties) == _MOST_TIES:
            return Verdict(tuple(ties), f"token {done} is {got[done]}, not {expected[done]}, with a gap of {gap:.2g}")
        ties.append(gap)
        done += 1
        if done < len(got):
            rest = Stream(replace(job, prompt=(*job.prompt, *got[:done]), count=len(got) - done))
            await follow(client, rest)
            expected = [*got[:done], *rest.witness.tokens()]
            if len(expected) != len(got):
                return Verdict(tuple(ties), f"after a near tie at token {done - 1}: {rest.error or 'the rest is shorter'}")
    return Verdict(tuple(ties))


async def scores_of(client: AsyncCarouselClient, job: Job, before: list[int], tokens: Sequence[int]) -> list[float]:
    """Of tokens that might come after prompt and `before`, but for what they have in common: whichever has most is drawn."""
    known = [*job.prompt, *before]
    scores = [await _logprob(client, known, token) for token in tokens]
    if job.temperature:
        drawn = zip(scores, tokens, strict=True)
        scores = [score / job.temperature + _noise(job.seed, len(known), token) for score, token in drawn]
    return scores


def _noise(seed: int, position: int, token: int) -> float:
    """Of output 0."""
    numbers = (np.array([number], np.uint64) for number in (seed, token // philox.LANES, position, 0))
    return float(philox.gumbel(philox.words(*numbers)[0, token % philox.LANES]))


async def _logprob(client: AsyncCarouselClient, known: list[int], token: int) -> float:
    """Of a token that follows these, as a prompt's last token has it."""
    found = float("nan")
    async for event in client.generate([*known, token], max_tokens=1, prompt_logprobs=0, temperature=0.0):
        if event.delta.is_prompt and event.delta.logprobs:
            found = event.delta.logprobs[-1].logprob
    return found
