from __future__ import annotations

import pytest

from bench.cost_models import Roofline, StepWork
from bench.roofline import MACHINES, SHAPES, Demand, kv_tokens, least_seconds

GB = 1e9
H200 = MACHINES["h200"]


@pytest.mark.parametrize(
    ("name", "weight_gb", "kv_kib", "alone"),
    [
        ("opt-13b", 25.7, 800, 167),
        ("llama-2-13b", 25.7, 800, 167),
        ("llama-3-8b", 15.0, 128, 286),
        ("llama-3.2-1b", 2.47, 32, 1740),
    ],
)
def test_shapes_have_the_published_weights_keys_and_speed_alone(name: str, weight_gb: float, kv_kib: int, alone: float) -> None:
    shape = SHAPES[name]
    assert shape.weight_bytes / GB == pytest.approx(weight_gb, rel=0.005)
    assert shape.kv_bytes_per_token == kv_kib * 1024
    assert H200.bandwidth / shape.weight_bytes == pytest.approx(alone, rel=0.01)


@pytest.mark.parametrize(
    ("name", "rows", "tokens_per_s"),
    [
        ("llama-3-8b", 32, 7_100),
        ("llama-3-8b", 128, 17_100),
        ("llama-3.2-1b", 32, 39_000),
        ("llama-3.2-1b", 512, 91_000),
        ("opt-13b", 32, 2_600),
    ],
)
def test_a_decode_step_reaches_the_published_limit(name: str, rows: int, tokens_per_s: float) -> None:
    full = Roofline(SHAPES[name], H200, bandwidth_share=1.0, peak_share=1.0)
    step = full.step_ns(StepWork(decodes=rows, decode_context=rows * 1000, sampled=rows))
    assert rows / step * GB == pytest.approx(tokens_per_s, rel=0.05)


def test_prefill_reaches_the_published_limit() -> None:
    full = Roofline(SHAPES["llama-3-8b"], H200, bandwidth_share=1.0, peak_share=1.0)
    n = 8192
    step = full.step_ns(StepWork(0, 0, chunks=1, chunk_tokens=n, chunk_context=n, chunk_pairs=0))
    assert n / step * GB == pytest.approx(57_000, rel=0.01)


def test_shares_of_the_limits_and_attention_and_extras_add_up() -> None:
    shape = SHAPES["llama-3-8b"]
    half = Roofline(shape, H200, bandwidth_share=0.5, peak_share=0.5, step_ns_more=1000)
    full = Roofline(shape, H200, bandwidth_share=1.0, peak_share=1.0)
    decode = StepWork(decodes=8, decode_context=8000, sampled=8)
    assert half.step_ns(decode) == pytest.approx(2 * full.step_ns(decode) + 1000, abs=2)
    chunk = StepWork(0, 0, 1, 2000, 10_000, 2000 * 9000)
    without = StepWork(0, 0, 1, 2000)
    attention_s = (full.step_ns(chunk) - full.step_ns(without)) / GB
    assert attention_s == pytest.approx(2000 * 9000 * 4 * 32 * 4096 / H200.peak, rel=1e-3)


def test_the_pool_is_what_the_weights_leave() -> None:
    shape = SHAPES["llama-3-8b"]
    assert kv_tokens(shape, H200) * shape.kv_bytes_per_token == pytest.approx((141 * GB - 16.06 * GB) * 0.88, rel=1e-3)
    assert kv_tokens(SHAPES["llama-3.1-70b"], H200) <= 0


def test_no_schedule_is_faster_than_its_parts() -> None:
    shape = SHAPES["llama-3-8b"]
    one = Demand(prompt_tokens=1000, output_tokens=0, pairs=0, context=0, longest_output=0)
    assert least_seconds(one, shape, H200, 10**6, 256) == pytest.approx(2 * shape.body * 1000 / H200.peak)
    alone = Demand(prompt_tokens=0, output_tokens=100, pairs=0, context=0, longest_output=100)
    assert least_seconds(alone, shape, H200, 10**6, 256) == pytest.approx(100 * shape.weight_bytes / H200.bandwidth)
    crowd = Demand(prompt_tokens=0, output_tokens=100, pairs=0, context=100_000, longest_output=1)
    steps = 100_000 / 5000  # a pool of 5,000 tokens holds no more context at a time
    kv_s = 100_000 * shape.kv_bytes_per_token / H200.bandwidth
    assert least_seconds(crowd, shape, H200, 5000, 256) == pytest.approx(steps * shape.weight_bytes / H200.bandwidth + kv_s)
