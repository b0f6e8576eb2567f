"""Layers give the same with kernels as without; what does not fit goes to torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from worker import kernels
from worker.layers.activation import silu_and_mul
from worker.layers.norm import LayerNorm, RMSNorm


class RandomWeights:
    dtype = torch.float32

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def take(self, name: str, *shape: int) -> torch.Tensor:
        return random(self._device, *shape)


def random(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def layers(device: torch.device) -> dict[str, Callable[[torch.Tensor, torch.Tensor], object]]:
    """Of x and residual [T, 48]."""
    weights = RandomWeights(device)
    rms = RMSNorm(weights, "norm", 48, 1e-5)
    affine, plain = (LayerNorm(weights, "norm", 48, 1e-5, affine) for affine in (True, False))
    return {
        "rms": lambda x, residual: rms(x),
        "rms of heads": lambda x, residual: rms(x.repeat(1, 3).view(len(x), 3, 48)),
        "add and rms": lambda x, residual: rms.add(residual, x),
        "affine": lambda x, residual: affine(x),
        "plain": lambda x, residual: plain(x),
        "add and affine": lambda x, residual: affine.add(residual, x),
        "add and plain": lambda x, residual: plain.add(residual, x),
        "activation": lambda x, residual: silu_and_mul(x),
    }


@pytest.mark.parametrize("name", layers(torch.device("cpu")))
def test_a_layer_gives_the_same_with_kernels_as_without(name: str, device: torch.device) -> None:
    x, residual, layer = random(device, 5, 48), random(device, 5, 48) + 1, layers(device)[name]
    ours, theirs = residual.clone(), residual.clone()
    fast = layer(x, ours)
    kernels.unload()
    torch.testing.assert_close((fast, ours), (layer(x, theirs), theirs), rtol=2e-6, atol=2e-6)


def test_a_layer_calls_the_kernel_where_its_input_fits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("rms_norm", "add_rms_norm", "layer_norm", "plain_layer_norm", "add_layer_norm", "silu_and_mul"):
        monkeypatch.setattr(kernels, name, lambda *_, name=name: called.append(name))
    for layer in layers(device).values():
        layer(random(device, 5, 48), random(device, 5, 48))
    expected = ["rms_norm", "rms_norm", "add_rms_norm", "layer_norm", "plain_layer_norm", "add_layer_norm", "plain_layer_norm"]
    assert called == [*expected, "silu_and_mul"]
    kernels.unload()
    for layer in layers(device).values():
        layer(random(device, 5, 48), random(device, 5, 48))
    assert len(called) == 8
