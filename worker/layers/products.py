"""Products of activations with a weight matrix: how the matrix lies in memory, and what multiplies with it.

On a CPU the matrix is packed once, as oneDNN wants it, and the one that came in is dropped: a step of few rows is bound by
reading the weights, and so is no slower on matrices that are read in the order in which they lie. int8 takes a quarter of the
memory, and of the time to read it. Everything else multiplies with the matrix as it is. Knows no layer and no model.

Legend: T rows of activations, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worker import compiled
from worker.config import QUANTIZATIONS

Product = Callable[[Tensor], Tensor]  # [T, I] -> [T, O], in the activations' dtype

_PACKED_FOR = 64  # rows that oneDNN lays the matrix out for; it multiplies with any number, and 16 to 512 differ by 3%
_FEWEST_ROWS = 4  # fewer are padded: oneDNN takes longer for one or two rows than for four (31 against 40 µs, 960×576)
_LEAST_SCALE = 1e-30  # of a row of zeros


def product(weight_OI: Tensor, bias_O: Tensor | None, quantization: str, deterministic: bool = False) -> Product:
    """The fastest that this device has for the matrix; the tensor is not kept where a packed one takes its place.
    deterministic: the fastest whose rows do not depend on one another, bit for bit."""
    assert quantization in QUANTIZATIONS
    if compiled.multiplies(weight_OI, quantization):
        return CompiledProduct(weight_OI, bias_O, quantization)
    if deterministic:
        return TiledProduct(weight_OI, bias_O, quantization)
    if quantization == "int8":
        return Int8Product(weight_OI, bias_O)
    if weight_OI.device.type == "cpu" and can_pack(weight_OI.dtype):
        return PackedProduct(weight_OI, bias_O)
    return PlainProduct(weight_OI, bias_O)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies with packed matrices of this dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


class PlainProduct:
    """x Wᵀ + b. The slow twin of the packed one."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._weight_OI, self._bias_O = weight_OI, bias_O

    def __call__(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self._weight_OI, self._bias_O)


class PackedProduct:
    """The same with a matrix that oneDNN has packed."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _PACKED_FOR)
        self._bias_O = bias_O

    def __call__(self, x_TI: Tensor) -> Tensor:
        rows = len(x_TI)
        if rows < _FEWEST_ROWS - 1:
            x_TI = F.pad(x_TI, (0, 0, 0, _FEWEST_ROWS - rows))
        y_TO = torch.ops.mkldnn._linear_pointwise(x_TI, self._packed, self._bias_O, "none", [], "")
        return y_TO[:rows]


class CompiledProduct:
    """x Wᵀ + b by compiled loops, in float32 or as Int8Product. A row's bits do not depend on the other rows."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, quantization: str) -> None:
        scale_O = None
        if quantization == "int8":
            weight_OI, scale_O = quantize_weight(weight_OI)
        self.matrix = compiled.new_matrix(weight_OI, bias_O, scale_O)

    def __call__(self, x_TI: Tensor) -> Tensor:
        return compiled.multiply(self.matrix, x_TI)


class TiledProduct:
    """Any of the others, on tiles of a few fixed sizes, the last one filled up with zeros. By the number of rows a library may
    choose how it divides a product, and with it the order in which a row's numbers are added up. So only those sizes are taken
    of which it has been seen, with a matrix of this shape, that they all give a row the same bits, wherever it stands."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, quantization: str) -> None:
        """The bias is added behind the product: one rounding a number, in any company."""
        self._product, self._bias_O = product(weight_OI, None, quantization), bias_O
        seen = (type(self._product), weight_OI.shape, weight_OI.dtype, torch.get_num_threads())
        if seen not in _agreeing:
            _agreeing[seen] = _agreeing_sizes(self._product, weight_OI.shape[1], weight_OI.dtype)
        self._sizes = _agreeing[seen]

    def __call__(self, x_TI: Tensor) -> Tensor:
        tiles = [self._product(_filled_up(x_TI[at:end], size)) for at, end, size in _tiles(len(x_TI), self._sizes)]
        y_TO = (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[: len(x_TI)]
        return y_TO if self._bias_O is None else y_TO.add_(self._bias_O)


TILES = (4, 8, 16, 24, 32, 48, 64)  # rows; with twice as many a row takes no less time

_ALIGNED = 64  # bytes
_agreeing: dict[tuple[Any, ...], tuple[int, ...]] = {}  # by kind of product, shape, dtype and threads


def _agreeing_sizes(multiply: Product, num_inputs: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The largest of TILES, and those others that give each row what it gives."""
    most = TILES[-1]
    x_TI = torch.randn(2 * most, num_inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    y_TO = torch.cat((multiply(x_TI[:most]), multiply(x_TI[most:])))

    def agrees(size: int) -> bool:
        begins = (0, 3, most - 1)  # other rows at other places
        return all(torch.equal(multiply(x_TI[at : at + size].clone()), y_TO[at : at + size]) for at in begins)

    return (*filter(agrees, TILES[:-1]), most)


def _tiles(rows: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first, end, size of the tile): the largest, and for the rest the smallest that holds it. One at least."""
    for at in range(0, max(rows, 1), sizes[-1]):
        end = min(at + sizes[-1], rows)
        yield at, end, next(size for size in sizes if size >= end - at)


def _filled_up(x_TI: Tensor, rows: int) -> Tensor:
    """In memory as torch lays out a tensor of its own: how a product is divided may depend on that too."""
    if len(x_TI) < rows:
        return F.pad(x_TI, (0, 0, 0, rows - len(x_TI)))
    as_it_lies = x_TI.is_contiguous() and x_TI.data_ptr() % _ALIGNED == 0
    return x_TI if as_it_lies else x_TI.contiguous().clone()


class Int8Product:
    """x Wᵀ + b in 8-bit integers: a scale for each row of the matrix, and one for each row of activations that is found as the
    row comes (LLM.int8(), arXiv:2208.07339, section 2.1). A scale for all rows of a step would be found faster, but then a
    request's tokens would depend on its neighbours. The integers are multiplied and added up exactly."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        assert weight_OI.device.type == "cpu" and torch.backends.mkldnn.is_available()
        quantized_OI, self._scale_O = quantize_weight(weight_OI)
        self._zero_O = torch.zeros(len(quantized_OI), dtype=torch.int32)
        self._packed = torch.ops.onednn.qlinear_prepack(quantized_OI, [_PACKED_FOR, quantized_OI.shape[1]])
        self._bias_O = bias_O

    def __call__(self, x_TI: Tensor) -> Tensor:
        quantized_TI, scale_T1 = quantize_rows(x_TI)
        y_TO = torch.ops.onednn.qlinear_pointwise(
            quantized_TI, 1.0, ZERO, self._packed, self._scale_O, self._zero_O, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y_TO = y_TO.mul_(scale_T1) if self._bias_O is None else torch.addcmul(self._bias_O, y_TO, scale_T1)
        return y_TO.to(x_TI.dtype)


# Activations are unsigned, as the instructions want them: −LEVELS..LEVELS around ZERO. The older instruction (AVX2, AVX512
# without VNNI) adds two products up in 16 bits, which only activations of seven bits do not overflow: 2 · 127 · 127 < 2¹⁵.
ZERO, LEVELS = (128, 127) if torch.cpu._is_vnni_supported() else (64, 63)
_WEIGHT_LEVELS = 127
_ROWS_AT_ONCE = 1024


def quantize_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """w ≈ scale · q with q in −127..127, int8, and a scale for each row, float32."""
    scale_O = torch.maximum(weight_OI.amax(dim=1), -weight_OI.amin(dim=1)).float()
    scale_O.clamp_(min=_LEAST_SCALE).div_(_WEIGHT_LEVELS)
    quantized_OI = torch.empty_like(weight_OI, dtype=torch.int8)
    for at in range(0, len(scale_O), _ROWS_AT_ONCE):  # not to have the whole matrix three times
        rows = slice(at, at + _ROWS_AT_ONCE)
        quantized_OI[rows] = (weight_OI[rows].float() / scale_O[rows, None]).round_()
    return quantized_OI, scale_O


def quantize_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """x ≈ scale · (q − ZERO) with q in 1..2·ZERO−1, uint8, and a scale for each row, [T, 1] float32. NaN stays in its row: its
    scale is NaN then."""
    x_TI = x_TI.float()
    if compiled.fits(x_TI):
        return compiled.quantize_rows(x_TI, LEVELS, ZERO, _LEAST_SCALE)
    # As a vector norm it would be one operation, and take eight times as long.
    scale_T1 = x_TI.abs().amax(dim=1, keepdim=True).clamp_(min=_LEAST_SCALE).div_(LEVELS)
    return (x_TI / scale_T1).add_(ZERO + 0.5).to(torch.uint8), scale_T1
