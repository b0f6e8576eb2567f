from __future__ import annotations

import pytest

from bench.cpu_bounds import (
    Cost,
    Limits,
    best_seconds,
    decode_share,
    demand,
    pace,
    prefill_share,
    serial_seconds,
    static_best_seconds,
)
from bench.cpu_workload import Request, offline_requests
from bench.roofline import SHAPES, Shape

# Body 2·(8·4·2·(2 + 1) + 3·8·16) = 1152, head 80; 4·2·2·4 = 64 operations a pair; keys and values of 2·2·1·4·4 = 64 bytes.
TINY = Shape("tiny", layers=2, hidden=8, heads=2, kv_heads=1, ffn=16, vocab=10, max_len=64, tied=True)
SLOW_READ = Limits(fp32=1e9, int8=4e9, bandwidth=1e3)
SLOW_PRODUCT = Limits(fp32=1e3, int8=4e3, bandwidth=1e9)
TWO = [Request([5, 6, 7], 3), Request([8, 9], 1)]


def test_a_cost_counts_the_weights_that_a_step_reads() -> None:
    assert TINY.body == 1152 and TINY.head == 80 and TINY.flops_per_pair == 64
    cost = Cost(TINY, SLOW_READ)
    assert (cost.weight_bytes, cost.kv_bytes) == (4 * 1232, 64)
    int8 = Cost(TINY, SLOW_READ, int8=True)
    assert (int8.weight_bytes, int8.kv_bytes, int8.peak) == (1232, 64, 4e9)


def test_the_first_token_comes_with_the_prompt() -> None:
    asked = demand(TWO)
    assert (asked.prompt_tokens, asked.output_tokens, asked.longest_output) == (5, 2, 2)
    assert asked.pairs == 3 * 4 // 2 + 2 * 3 // 2
    assert asked.context == 4 + 5  # the decodes attend to the prompt, what was made, and themselves


def test_best_seconds_are_the_longer_of_reading_and_computing() -> None:
    reading = (3 * 4 * 1232 + 9 * 64) / 1e3  # three steps of the longer request
    computing = (2 * (1152 * 7 + 80 * 4) + 64 * (9 + 9)) / 1e3
    assert best_seconds(TWO, Cost(TINY, SLOW_READ)) == pytest.approx(reading)
    assert best_seconds(TWO, Cost(TINY, SLOW_PRODUCT)) == pytest.approx(computing)


def test_attention_of_quantized_weights_is_computed_in_float32() -> None:
    computing = 2 * (1152 * 7 + 80 * 4) / 4e3 + 64 * (9 + 9) / 1e3
    assert best_seconds(TWO, Cost(TINY, SLOW_PRODUCT, int8=True)) == pytest.approx(computing)


def test_serial_seconds_read_the_weights_for_the_prompts_and_for_each_step() -> None:
    assert serial_seconds(TWO, Cost(TINY, SLOW_READ)) == pytest.approx((3 * 4 * 1232 + 9 * 64) / 1e3)
    prompts = 2 * (1152 * 5 + 80 * 2) + 64 * 9
    steps = 2 * 2 * 1232  # the second request has its only token; attention of decodes is reading
    assert serial_seconds(TWO, Cost(TINY, SLOW_PRODUCT)) == pytest.approx((prompts + steps) / 1e3, rel=1e-3)


def test_a_static_batch_computes_all_rows_until_the_longest_has_its_tokens() -> None:
    cost = Cost(TINY, SLOW_PRODUCT)
    padded = [Request(TWO[0].prompt_ids, 3), Request(TWO[1].prompt_ids, 3)]
    assert static_best_seconds(TWO, 2, cost) == pytest.approx(serial_seconds(padded, cost))
    assert static_best_seconds(TWO, 1, cost) == pytest.approx(sum(serial_seconds([one], cost) for one in TWO))


def test_no_order_of_the_work_beats_the_bound() -> None:
    limits = Limits(fp32=225e9, int8=780e9, bandwidth=20e9)
    for shape, count in (("smollm-135m", 64), ("llama-3.2-1b", 16)):
        requests = offline_requests(SHAPES[shape].vocab, count)
        for int8 in (False, True):
            cost = Cost(SHAPES[shape], limits, int8)
            assert best_seconds(requests, cost) <= serial_seconds(requests, cost) < static_best_seconds(requests, 4, cost)


def test_the_limit_of_the_published_workload() -> None:
    """The issue that set the targets: 315 to 380 tokens a second, at 209 to 240 GFLOP/s."""
    requests = offline_requests(49152, 64)
    made = sum(request.max_tokens for request in requests)
    for gflops, low, high in ((209, 290, 335), (240, 330, 385)):
        cost = Cost(SHAPES["smollm-135m"], Limits(gflops * 1e9, 800e9, 20e9))
        assert low < made / best_seconds(requests, cost) < high


def test_the_pace_of_static_batches_tells_what_other_batches_take() -> None:
    # Batches of 2: first tokens after 1.0 s and 1.2 s, steps of 0.1 s.
    requests = [Request([5], 3), Request([6], 1), Request([7], 2), Request([8], 5)]
    token_s = [[1.0, 1.1, 1.2], [1.0], [2.4, 2.5], [2.4, 2.5, 2.6, 2.7, 2.8]]
    measured = pace(requests, token_s, 2)
    assert (measured.first_s, measured.step_s) == pytest.approx((1.1, 0.1))
    assert measured.seconds(requests, 2) == pytest.approx(2.8)  # those it was measured on: what they took
    assert measured.seconds([*requests, Request([9], 11)], 2) == pytest.approx(2.8 + 1.1 + 1.0)


def test_shares_of_the_limits() -> None:
    limits = Limits(fp32=1e6, int8=1e6, bandwidth=1e5)
    assert decode_share(10.0, Cost(TINY, limits)) == pytest.approx(10 * 4 * 1232 / 1e5)
    assert prefill_share(4, 0.1, Cost(TINY, limits)) == pytest.approx((2 * (1152 * 4 + 80) + 64 * 10) / 1e6 / 0.1)
