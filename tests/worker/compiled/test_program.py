"""Operations of a program give what their twins give, whatever the number of rows, of threads, and what stands beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.attention_case import MIXED, Case, close
from worker import compiled
from worker.attention.base import AttentionInputs
from worker.attention.cpu import CpuAttention, queries_of
from worker.compiled import threads
from worker.layers.heads import norm_rotate_and_write, rotate_and_write
from worker.layers.norm import RMSNorm
from worker.layers.products import CompiledProduct, Int8Product, PlainProduct, product
from worker.weights import RandomWeights

panels = pytest.importorskip("worker.compiled.panels", reason="numba is not installed")
pytestmark = pytest.mark.skipif(not panels.HAS_FLOATS, reason="this processor has no AVX512")
NEEDS_BYTES = pytest.mark.skipif(not panels.HAS_BYTES, reason="this processor has no VNNI")
QUANTIZATIONS = ["none", pytest.param("int8", marks=NEEDS_BYTES)]

ROWS = [0, 1, 2, 7, 11, 12, 13, 23, 24, 25, 48, 49, 200]
SHAPES = [(1, 1), (3, 5), (16, 4), (17, 3), (33, 130), (48, 96), (130, 33), (512, 1024)]  # outputs, inputs


@pytest.fixture(autouse=True, params=[1, 2, 3], ids="{} threads".format)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    compiled.load()
    yield
    compiled.unload()
    torch.set_num_threads(before)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# --------------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_product_is_its_twin(outputs: int, inputs: int, with_bias: bool, quantization: str) -> None:
    weight, bias = random(outputs, inputs), random(outputs) if with_bias else None
    chosen = product(weight, bias, quantization)
    assert isinstance(chosen, CompiledProduct)
    twin = (PlainProduct if quantization == "none" else Int8Product)(weight, bias)
    for rows in ROWS:
        x = random(rows, inputs)
        torch.testing.assert_close(chosen(x), twin(x), atol=1e-5 * inputs**0.5, rtol=1e-5)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_row_is_the_same_bits_in_any_company_at_any_place(quantization: str) -> None:
    chosen, x = product(random(130, 70), random(130), quantization), random(200, 70)
    whole = chosen(x)
    for rows in ROWS[1:]:
        for at in (0, 1, 31, 200 - rows):
            if at + rows <= 200:
                assert torch.equal(chosen(x[at : at + rows]), whole[at : at + rows]), (rows, at)
    assert torch.equal(chosen(torch.cat((x, x), dim=1)[:, :70]), whole), "of wider rows"
    assert torch.equal(chosen(x.t().contiguous().t()), whole), "column by column"


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(quantization: str, poison: float) -> None:
    chosen, x = product(random(96, 64), random(96), quantization), random(40, 64)
    expected = chosen(x)
    x[17, 5] = poison
    got = chosen(x)
    assert not got[17].isfinite().any()
    got[17] = expected[17]
    assert torch.equal(got, expected)


@NEEDS_BYTES
def test_products_of_bytes_are_exact_at_the_ends_of_the_range() -> None:
    chosen = product(torch.ones(20, 4096), None, "int8")
    for sign in (1, -1):
        torch.testing.assert_close(chosen(sign * torch.ones(8, 4096)), torch.full((8, 20), sign * 4096.0))
    assert torch.equal(chosen(torch.zeros(3, 4096)), torch.zeros(3, 20))


def test_other_dtypes_are_for_other_products() -> None:
    assert not isinstance(product(random(16, 16).bfloat16(), None, "none"), CompiledProduct)
    compiled.unload()
    assert not isinstance(product(random(16, 16), None, "none"), CompiledProduct)


def test_where_instructions_are_lacking_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "HAS_BYTES", False)
    compiled.load()
    assert isinstance(product(random(16, 16), None, "none"), CompiledProduct)
    assert isinstance(product(random(16, 16), None, "int8"), Int8Product)
    monkeypatch.setattr(panels, "HAS_FLOATS", False)
    assert compiled.load().startswith("numba ")
    assert not isinstance(product(random(16, 16), None, "none"), CompiledProduct)


# ------------------------------------------------------------------------------------------------------- row by row


def filled(program: Any, name: str, x: Tensor) -> Any:
    rows = program.scratch(name, x.shape[1])
    rows.array[: len(x)] = x.numpy()
    return rows


@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 576), (3, 7), (33, 100), (200, 501)])
def test_norms_activations_and_sums(count: int, size: int) -> None:
    x, gate_up, weight, residual = 3 * random(count, size), 9 * random(count, 2 * size), random(size), random(count, size)
    matrix = product(random(size, size), random(size), "none")
    assert isinstance(matrix, CompiledProduct)
    program = compiled.new_program(count + 3)
    normed, inner, total = program.scratch("normed", size), program.scratch("inner", size), filled(program, "total", residual)
    rows = filled(program, "x", x)
    program.rms_norm(rows, weight.numpy(), 1e-5, normed)
    program.silu_and_mul(filled(program, "gate_up", gate_up), inner)
    centred, plain, relu, gelu = (program.scratch(name, size) for name in ("centred", "plain", "relu", "gelu"))
    program.layer_norm(rows, weight.numpy(), residual[0].numpy(), 1e-5, centred)
    program.layer_norm(rows, None, None, 1e-5, plain)
    program.activate("relu", rows, relu)
    program.activate("gelu", rows, gelu)
    program.product(rows, matrix.matrix, total, plus=total)
    program.run(count)

    def got(rows: Any) -> Tensor:
        return torch.from_numpy(rows.array[:count])

    torch.testing.assert_close(got(normed), F.rms_norm(x, (size,), weight, 1e-5))
    torch.testing.assert_close(got(centred), F.layer_norm(x, (size,), weight, residual[0], 1e-5), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got(plain), F.layer_norm(x, (size,), None, None, 1e-5), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got(relu), F.relu(x))
    torch.testing.assert_close(got(gelu), F.gelu(x))
    torch.testing.assert_close(got(inner), F.silu(gate_up[:, :size]) * gate_up[:, size:])
    torch.testing.assert_close(got(total), residual + matrix(x))


def test_activations_at_the_ends_of_the_range() -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 200.0, 1e30, torch.inf, torch.nan]])
    program = compiled.new_program(1)
    out = program.scratch("out", gate.shape[1])
    program.silu_and_mul(filled(program, "gate_up", torch.cat((gate, torch.ones_like(gate)), dim=1)), out)
    program.run(1)
    torch.testing.assert_close(torch.from_numpy(out.array[:1]), F.silu(gate), equal_nan=True)


# -------------------------------------------------------------------------------------------------------------- attention


def attended(case: Case, stored: torch.dtype = torch.float32) -> Tensor:
    """By a program, of queries that need not be turned any more."""
    _, num_heads, size = case.q_THD.shape
    inputs, kv_layer, tokens = case.inputs, case.kv_layer.to(stored), len(case.q_THD)
    queries = queries_of(np.arange(len(inputs.context_lens_cpu)), inputs)
    program = compiled.new_program(tokens)
    qkv = program.scratch("qkv", (num_heads + 2 * kv_layer.shape[2]) * size)
    qkv.array[:, : num_heads * size] = case.q_THD.flatten(1).numpy()
    out = program.scratch("out", num_heads * size)
    program.attend(qkv, num_heads, compiled.array(kv_layer), case.scale, out)
    turns = torch.ones(tokens, 1, max(1, size // 2))
    compiled.run(program, (turns, turns), inputs.slot_mapping, queries.tables[queries.row], queries.length)
    return torch.from_numpy(out.array[:tokens].copy()).view(tokens, num_heads, size)


@pytest.mark.parametrize("block_size", [1, 16, 24, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (6, 2), (9, 3), (8, 1), (16, 1), (8, 8)])
def test_attention_equals_the_reference(block_size: int, num_heads: int, num_kv_heads: int) -> None:
    case = Case(MIXED, num_heads=num_heads, num_kv_heads=num_kv_heads, block_size=block_size)
    close(attended(case), case.reference())


@pytest.mark.parametrize("head_dim", [8, 16, 32, 40, 48, 64, 80, 96, 112, 128, 256])
def test_attention_of_any_head_size(head_dim: int) -> None:
    case = Case(MIXED, head_dim=head_dim)
    close(attended(case), case.reference())


@pytest.mark.parametrize("rows", [[(1, 1)], [(1, 500)], [(300, 300)], [(150, 400), (1, 3)]], ids=str)
def test_attention_of_any_rows(rows: list[tuple[int, int]]) -> None:
    case = Case(rows, head_dim=64)
    close(attended(case), case.reference())


@pytest.mark.parametrize("head_dim", [40, 64])
def test_attention_over_keys_and_values_in_bfloat16(head_dim: int) -> None:
    case = Case(MIXED, head_dim=head_dim)
    got = attended(case, torch.bfloat16)
    case.kv_layer = case.kv_layer.bfloat16().float()
    close(got, case.reference())


def test_a_row_attends_the_same_bits_in_any_company() -> None:
    case = Case(MIXED, head_dim=64)
    together = attended(case).split([count for count, _ in case.rows])
    assert all(torch.equal(attended(case.only(row)), got) for row, got in enumerate(together))


@pytest.mark.parametrize("part", ["q", "k"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_attends_to_something_not_finite_has_it_alone(part: str, poison: float) -> None:
    case = Case(MIXED, head_dim=64)
    expected = attended(case)
    row, first = 6, sum(count for count, _ in MIXED[:6])
    if part == "q":
        case.q_THD[first, 0, 3] = poison
    else:
        block, offset = case.tables[row][4], 5
        case.kv_layer[0, block, :, offset, 3] = poison
    got = attended(case)
    hit = slice(first, first + (1 if part == "q" else MIXED[row][0]))
    assert not got[hit, 0].isfinite().any()
    got[hit] = expected[hit]
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("rows", "heads", "kv_heads", "size"), [(1, 4, 1, 64), (7, 6, 3, 32), (30, 12, 4, 40)])
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_queries_are_turned_and_keys_and_values_written(
    rows: int, heads: int, kv_heads: int, size: int, with_norms: bool, stored: torch.dtype
) -> None:
    qkv, cos_sin = random(rows, heads + 2 * kv_heads, size), (random(rows, 1, size // 2), random(rows, 1, size // 2) - 1)
    norms = RMSNorm(RandomWeights(0, "cpu", torch.float32), "q", size, 1e-6), norm_of(random(size))
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:rows]
    counts = np.ones(rows, np.int32)
    inputs = AttentionInputs.of(np.arange(rows + 1, dtype=np.int32), counts, np.zeros((rows, 1), np.int32), slots.numpy())
    expected, got = (torch.full((2, 4, kv_heads, 16, size), torch.nan, dtype=stored) for _ in range(2))
    program = compiled.new_program(rows)
    place = filled(program, "qkv", qkv.flatten(1))
    weights = (tuple(norm.weight.numpy() for norm in norms), 1e-6) if with_norms else ()
    program.rotate_and_write(place, heads, compiled.array(got), *weights)
    compiled.run(program, cos_sin, slots, np.zeros((rows, 1), np.int32), np.ones(rows, np.int64))
    compiled.unload()
    if with_norms:
        turned = norm_rotate_and_write(qkv, heads, *norms, cos_sin, CpuAttention(), expected, inputs)
    else:
        turned = rotate_and_write(qkv, heads, cos_sin, CpuAttention(), expected, inputs)
    torch.testing.assert_close(torch.from_numpy(place.array[:rows, : heads * size]).view(rows, heads, size), turned)
    torch.testing.assert_close(got, expected, equal_nan=True)


def norm_of(weight: Tensor) -> RMSNorm:
    norm = RMSNorm(RandomWeights(0, "cpu", torch.float32), "k", len(weight), 1e-6)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


# --------------------------------------------------------------------------------------------------------------- threads


def test_nobody_waits_for_a_helper_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is to be done, whoever begins late finds done, and leaves alone what has been written since."""
    late = []
    monkeypatch.setattr(threads, "_call", lambda compute, helpers: late.extend([compute] * helpers))
    chosen, x = product(random(700, 300), random(700), "none"), random(30, 300)
    got = chosen(x)
    expected = PlainProduct(random(700, 300), random(700))(x)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    got.zero_()
    for compute in late:
        compute()
    assert not got.any() and len(late) == torch.get_num_threads() - 1


def test_many_steps_by_threads_that_meet_often() -> None:
    size, count = 64, 300
    program = compiled.new_program(5)
    x, y = filled(program, "x", random(5, size)), program.scratch("y", size)
    halving = product(torch.eye(size) / 2, None, "none")
    for _ in range(count):
        program.product(x, halving.matrix, y)
        program.product(y, halving.matrix, x, plus=y)
    expected = random(5, size)
    for _ in range(count):
        expected = expected / 2 + expected / 2 / 2
    program.run(5)
    torch.testing.assert_close(torch.from_numpy(x.array[:5]), expected)
