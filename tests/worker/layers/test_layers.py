"""Layers equal their formulas, written out; stacked weights stand where their parts say."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from worker.layers.activation import ACTIVATIONS, silu_and_mul
from worker.layers.embedding import Embedding, Head
from worker.layers.linear import Linear
from worker.layers.norm import LayerNorm, RMSNorm
from worker.weights import CheckpointError


class InMemory:
    """Weights out of a dictionary."""

    dtype, device, num_parameters, deterministic = torch.float32, torch.device("cpu"), 0, False

    def __init__(self, quantization: str = "none", **tensors: Tensor) -> None:
        self.quantization = quantization
        self.tensors = {name.replace("__", "."): tensor for name, tensor in tensors.items()}

    def take(self, name: str, *shape: int) -> Tensor:
        return self.stack({name: shape[0]}, *shape[1:])

    def table(self, name: str, *shape: int) -> Tensor:
        return self.take(name, *shape).bfloat16()

    def stack(self, parts: Mapping[str, int], *rest: int) -> Tensor:
        for name, rows in parts.items():
            assert self.tensors[name].shape == (rows, *rest)
        return torch.cat([self.tensors[name] for name in parts])

    def same(self, name: str, tensor: Tensor) -> None:
        if name in self.tensors and not self.tensors[name].equal(tensor):
            raise CheckpointError(name)


def test_linear_stacks_its_parts() -> None:
    a, b, x = torch.randn(3, 8), torch.randn(5, 8), torch.randn(4, 8)
    bias = torch.randn(3), torch.randn(5)
    weights = InMemory(a__weight=a, b__weight=b, a__bias=bias[0], b__bias=bias[1])
    y_a, y_b = Linear(weights, {"a": 3, "b": 5}, 8, bias=True)(x).split((3, 5), dim=1)
    torch.testing.assert_close(y_a, x @ a.T + bias[0])
    torch.testing.assert_close(y_b, x @ b.T + bias[1])
    torch.testing.assert_close(Linear(weights, {"b": 5}, 8, bias=False)(x), x @ b.T)


def test_rms_norm_is_that_of_transformers_and_adds_the_residual_first() -> None:
    w, x, residual = torch.randn(16), torch.randn(5, 16), torch.randn(5, 16)
    theirs = LlamaRMSNorm(16, eps=1e-3)
    theirs.weight.data.copy_(w)
    norm = RMSNorm(InMemory(n__weight=w), "n", 16, 1e-3)
    torch.testing.assert_close(norm(x), theirs(x).detach())
    summed, normed = norm.add(residual.clone(), x)
    assert summed.equal(residual + x)
    torch.testing.assert_close(normed, theirs(residual + x).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_of_half_precision_squares_in_float32(dtype: torch.dtype) -> None:
    x = (300 * torch.randn(4, 64)).to(dtype)  # squares are beyond float16
    norm = RMSNorm(InMemory(n__weight=torch.ones(64)), "n", 64, 1e-6).to(dtype)
    exact = x.double() / x.double().pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(norm(x).double(), exact, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(affine: bool) -> None:
    w, b, x = torch.randn(16), torch.randn(16), torch.randn(5, 16)
    normed = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    norm = LayerNorm(InMemory(n__weight=w, n__bias=b), "n", 16, 1e-5, affine)
    torch.testing.assert_close(norm(x), normed * w + b if affine else normed)


@pytest.mark.parametrize("tied", [True, False])
def test_head_reads_the_embedding_or_its_own_table(tied: bool) -> None:
    table, own, x = torch.randn(10, 4).bfloat16().float(), torch.randn(10, 4), torch.randn(3, 4)
    weights = InMemory(e__weight=table) if tied else InMemory(e__weight=table, h__weight=own)
    embedding = Embedding(weights, "e", 10, 4)
    assert embedding(torch.tensor([7, 0])).equal(table[[7, 0]])
    torch.testing.assert_close(Head(weights, "h", embedding, tied)(x), x @ (table if tied else own).T)


def test_silu_and_mul() -> None:
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(silu_and_mul(torch.cat((gate, up), dim=1)), gate * torch.sigmoid(gate) * up)


def test_gelu_is_the_exact_one() -> None:
    x = torch.linspace(-4, 4, 50)
    torch.testing.assert_close(ACTIVATIONS["gelu"](x), x * 0.5 * (1 + torch.erf(x / 2**0.5)))
