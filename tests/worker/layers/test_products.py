"""Packed and quantized products equal their slow twins, row by row, whatever the other rows are."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from worker.layers import products
from worker.layers.products import (
    QUANTIZATIONS,
    TILES,
    ZERO,
    Int8Product,
    PackedProduct,
    PlainProduct,
    TiledProduct,
    can_pack,
    product,
    quantize_rows,
    quantize_weight,
)

ROWS = [0, 1, 2, 3, 4, 5, 7, 16, 33, 64, 65, 200]
SHAPES = [(1, 1), (3, 5), (48, 96), (96, 64), (130, 33), (512, 1024)]  # outputs, inputs


def case(outputs: int, inputs: int, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(outputs + inputs + rows)
    shapes = ((outputs, inputs), (outputs,), (rows, inputs))
    weight, bias, x = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return weight, bias, x


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_packed_is_plain(outputs: int, inputs: int, with_bias: bool) -> None:
    weight, bias, _ = case(outputs, inputs, 0)
    chosen = product(weight, bias if with_bias else None, "none")
    plain = PlainProduct(weight, bias if with_bias else None)
    assert isinstance(chosen, PackedProduct)
    for rows in ROWS:
        x = case(outputs, inputs, rows)[2]
        torch.testing.assert_close(chosen(x), plain(x), atol=1e-5 * inputs**0.5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_are_packed_where_the_processor_can(dtype: torch.dtype) -> None:
    weight, bias, x = case(96, 64, 9, dtype)
    chosen = product(weight, bias, "none")
    assert isinstance(chosen, PackedProduct if can_pack(dtype) else PlainProduct)
    assert chosen(x).dtype == dtype
    exact = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(chosen(x).double(), exact, atol=0.1, rtol=1e-2)


def test_packed_takes_views_of_wider_rows() -> None:
    weight, bias, x = case(96, 64, 9)
    wide = torch.cat((x, torch.full((9, 10), torch.nan)), dim=1)
    torch.testing.assert_close(PackedProduct(weight, bias)(wide[:, :64]), PlainProduct(weight, bias)(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("quantization", products.QUANTIZATIONS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 40])
def test_a_row_with_nan_is_the_only_one_that_has_it(quantization: str, rows: int) -> None:
    weight, bias, x = case(96, 64, rows)
    chosen = product(weight, bias, quantization)
    expected = chosen(x)
    x[rows // 2, 5] = torch.nan
    got = chosen(x)
    assert got[rows // 2].isnan().all()
    got[rows // 2] = expected[rows // 2]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------------- int8


def int8_slowly(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Twin of Int8Product: the same integers, in float64, which holds their sums exactly."""
    quantized, scale = quantize_weight(weight)
    rows, row_scale = quantize_rows(x)
    sums = (rows.double() - ZERO) @ quantized.double().T
    return (sums * scale * row_scale + (0 if bias is None else bias)).to(x.dtype)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_int8_is_the_exact_product_of_the_integers(outputs: int, inputs: int, with_bias: bool) -> None:
    weight, bias, _ = case(outputs, inputs, 0)
    chosen = product(weight, bias if with_bias else None, "int8")
    assert isinstance(chosen, Int8Product)
    for rows in ROWS:
        x = case(outputs, inputs, rows)[2]
        torch.testing.assert_close(chosen(x), int8_slowly(weight, bias if with_bias else None, x), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("inputs", [64, 576, 2048])
def test_int8_differs_from_float_by_one_percent(inputs: int) -> None:
    weight, bias, x = case(256, inputs, 32)
    exact = PlainProduct(weight, bias)(x)
    error = (Int8Product(weight, bias)(x) - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.015


def test_a_row_of_int8_does_not_depend_on_its_neighbours() -> None:
    weight, bias, x = case(96, 64, 40)
    chosen = product(weight, bias, "int8")
    alone = torch.cat([chosen(row[None]) for row in x])
    assert chosen(x).equal(alone)
    x[7] *= 1e6
    others = [row for row in range(40) if row != 7]
    assert chosen(x)[others].equal(alone[others])


def test_quantized_rows_use_all_levels_and_come_back() -> None:
    x = torch.randn(50, 300) * torch.logspace(-20, 20, 50)[:, None]
    quantized, scale = quantize_rows(x)
    assert quantized.dtype == torch.uint8 and quantized.min() >= 1
    assert ((quantized.int() - ZERO).abs().amax(dim=1) == products.LEVELS).all()
    torch.testing.assert_close((quantized.float() - ZERO) * scale / scale, x / scale, atol=0.51, rtol=0)


def test_rows_of_zeros_and_weights_of_zeros_give_the_bias() -> None:
    weight, bias, x = case(96, 64, 3)
    weight[5], x[1] = 0, 0
    got = product(weight, bias, "int8")(x)
    assert got[1].equal(bias) and (got[:, 5] == bias[5]).all()


OLDER = """
import torch
torch.cpu._is_vnni_supported = lambda: False
from worker.layers.products import Int8Product
weight, x = torch.ones(16, 512), torch.ones(8, 512)
product = Int8Product(weight, None)
print(product(x).unique().tolist(), product(-x).unique().tolist())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="an x86 processor can do as if it were older")
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_int8_adds_up_exactly_on_older_processors(instructions: str) -> None:
    """Their instruction adds two products up in 16 bits: this is where it would overflow."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    command, folder = [sys.executable, "-c", OLDER], Path(__file__).parents[3]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[512.0] [-512.0]\n"


def test_int8_adds_up_exactly_at_the_ends_of_the_range() -> None:
    weight, x = torch.ones(16, 512), torch.ones(8, 512)
    torch.testing.assert_close(Int8Product(weight, None)(x), torch.full((8, 16), 512.0))
    torch.testing.assert_close(Int8Product(weight, None)(-x), torch.full((8, 16), -512.0))


def test_int8_keeps_the_activations_dtype() -> None:
    weight, bias, x = case(96, 64, 9, torch.bfloat16)
    got = product(weight, bias, "int8")(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), PlainProduct(weight.float(), bias.float())(x.float()), atol=0.6, rtol=0)


# -------------------------------------------------------------------------------------------------------------- in tiles


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_in_tiles_a_row_is_the_same_bits_in_any_company_at_any_place(
    outputs: int, inputs: int, with_bias: bool, quantization: str
) -> None:
    weight, bias, x = case(outputs, inputs, 200)
    chosen = product(weight, bias if with_bias else None, quantization, deterministic=True)
    assert isinstance(chosen, TiledProduct)
    whole = chosen(x)
    torch.testing.assert_close(whole, product(weight, bias if with_bias else None, quantization)(x), atol=1e-4, rtol=1e-5)
    for rows in [*ROWS, *TILES, *(size + 1 for size in TILES)]:
        for at in (0, 1, 31, 200 - rows):
            if 0 <= at <= 200 - rows:
                assert torch.equal(chosen(x[at : at + rows]), whole[at : at + rows]), (rows, at)
    assert torch.equal(chosen(torch.cat((x, x), dim=1)[:, :inputs]), whole), "of wider rows"


def test_tiles_that_give_other_bits_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Choosing(PlainProduct):
        def __call__(self, x_TI: Tensor) -> Tensor:
            sizes.append(len(x_TI))
            each_alone = torch.cat([super(Choosing, self).__call__(row[None]) for row in x_TI])
            return each_alone * (1 + 2**-20 * (len(x_TI) in (4, 16)))

    monkeypatch.setattr(products, "PackedProduct", Choosing)
    weight, bias, x = case(48, 96, 150)
    chosen = product(weight, bias, "none", deterministic=True)
    sizes.clear()
    whole = chosen(x)
    assert sizes == [64, 64, 24]
    for rows in (0, 1, 3, 5, 9, 17, 33, 64, 65, 81):
        sizes.clear()
        assert torch.equal(chosen(x[:rows]), whole[:rows])
        assert set(sizes) <= {8, 24, 32, 48, 64}
