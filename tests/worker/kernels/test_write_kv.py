"""Keys and values reach their slots, and nothing else; rotation and norms equal the layers' own, in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from worker import kernels
from worker.layers.rotary import rotate

HEADS, KV_HEADS = 6, 2


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def poisoned(device: torch.device, head_dim: int, block_size: int = 16, kv_heads: int = KV_HEADS, blocks: int = 9, **kw):
    return torch.full((2, 1 + blocks, kv_heads, block_size, head_dim), float("nan"), device=device, **kw)


def some_slots(device: torch.device, count: int, kv_layer: torch.Tensor) -> torch.Tensor:
    """In blocks 1 and up, each at most once, in no order."""
    _, blocks, _, block_size, _ = kv_layer.shape
    order = torch.randperm((blocks - 1) * block_size, generator=torch.Generator().manual_seed(count))
    return (block_size + order[:count]).to(device)


def written(kv_layer: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [T, K, D] of the slots; everything else must be NaN still."""
    block_size = kv_layer.shape[3]
    untouched = torch.ones(kv_layer.shape[1], block_size, dtype=torch.bool)
    untouched[slots.cpu() // block_size, slots.cpu() % block_size] = False
    assert kv_layer.cpu().transpose(2, 3)[:, untouched].isnan().all(), "a slot of somebody else's was written"
    return tuple(half[slots // block_size, :, slots % block_size] for half in kv_layer)


def angles(device: torch.device, tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = random(device, tokens, 1, head_dim // 2) * 7
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "block_size"), [(32, 1, 16), (64, 8, 32), (80, 3, 16), (128, 2, 128), (256, 5, 16)]
)
def test_keys_and_values_are_copied(
    head_dim: int, kv_heads: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    fused = random(device, 11, 4 + 2 * kv_heads, head_dim, dtype=dtype)
    _, k, v = fused.split((4, kv_heads, kv_heads), dim=1)
    kv_layer = poisoned(device, head_dim, block_size, kv_heads, dtype=dtype)
    slots = some_slots(device, 11, kv_layer)
    kernels.write_kv(k, v, kv_layer, slots)
    assert all(torch.equal(ours, twin) for ours, twin in zip(written(kv_layer, slots), (k, v), strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("head_dim", [32, 48, 64, 80, 96, 112, 128, 256])
def test_rotation_and_write(head_dim: int, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    qkv = random(device, 5, HEADS + 2 * KV_HEADS, head_dim, dtype=dtype)
    kv_layer, (cos, sin) = poisoned(device, head_dim, dtype=dtype), angles(device, 5, head_dim)
    slots = some_slots(device, 5, kv_layer)
    q = kernels.rotate_and_write(qkv, HEADS, cos, sin, kv_layer, slots)
    k, v = written(kv_layer, slots)
    turned = rotate(qkv.float(), cos, sin, HEADS + KV_HEADS)
    assert q.is_contiguous() and q.dtype is dtype and torch.equal(v, qkv[:, HEADS + KV_HEADS :])
    torch.testing.assert_close(q.float(), turned[:, :HEADS], rtol=tolerance, atol=tolerance / 4)
    torch.testing.assert_close(k.float(), turned[:, HEADS:], rtol=tolerance, atol=tolerance / 4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_norm_rotation_and_write(head_dim: int, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    qkv = random(device, 5, HEADS + 2 * KV_HEADS, head_dim, dtype=dtype) * 4
    q_weight, k_weight = random(device, head_dim, dtype=dtype), random(device, head_dim + 1, dtype=dtype)[1:]
    kv_layer, (cos, sin) = poisoned(device, head_dim, dtype=dtype), angles(device, 5, head_dim)
    slots = some_slots(device, 5, kv_layer)
    q = kernels.norm_rotate_and_write(qkv, HEADS, q_weight, k_weight, 1e-6, cos, sin, kv_layer, slots)
    k, v = written(kv_layer, slots)
    normed_q = F.rms_norm(qkv[:, :HEADS].float(), (head_dim,), q_weight.float(), 1e-6)
    normed_k = F.rms_norm(qkv[:, HEADS : HEADS + KV_HEADS].float(), (head_dim,), k_weight.float(), 1e-6)
    assert torch.equal(v, qkv[:, HEADS + KV_HEADS :])
    torch.testing.assert_close(q.float(), rotate(normed_q, cos, sin), rtol=tolerance, atol=tolerance / 2)
    torch.testing.assert_close(k.float(), rotate(normed_k, cos, sin), rtol=tolerance, atol=tolerance / 2)


def test_one_key_head_in_many_and_rows_of_a_wider_tensor(device: torch.device) -> None:
    qkv = random(device, 3, 71 + 4, 32)[:, :73]
    kv_layer, (cos, sin) = poisoned(device, 32, kv_heads=1), angles(device, 3, 32)
    slots = some_slots(device, 3, kv_layer)
    q = kernels.rotate_and_write(qkv, 71, cos, sin, kv_layer, slots)
    k, v = written(kv_layer, slots)
    torch.testing.assert_close(torch.cat((q, k), dim=1), rotate(qkv[:, :72].contiguous(), cos, sin))
    assert torch.equal(v, qkv[:, 72:])


def test_values_are_copied_though_they_are_not_finite(device: torch.device) -> None:
    qkv = random(device, 2, HEADS + 2 * KV_HEADS, 32)
    qkv[0, -1, 3] = float("inf")
    kv_layer, (cos, sin) = poisoned(device, 32), angles(device, 2, 32)
    slots = some_slots(device, 2, kv_layer)
    kernels.rotate_and_write(qkv, HEADS, cos, sin, kv_layer, slots)
    assert torch.equal(written(kv_layer, slots)[1], qkv[:, HEADS + KV_HEADS :])


def test_padding_tokens_go_to_block_zero(device: torch.device) -> None:
    """A graph's unused rows all have slot 0."""
    qkv = random(device, 4, HEADS + 2 * KV_HEADS, 32)
    kv_layer, (cos, sin) = poisoned(device, 32), angles(device, 4, 32)
    slots = torch.tensor([0, 37, 0, 0], device=device)
    kernels.rotate_and_write(qkv, HEADS, cos, sin, kv_layer, slots)
    assert torch.equal(written(kv_layer, slots[:2])[1][1], qkv[1, HEADS + KV_HEADS :])


def test_offsets_pass_32_bits(device: torch.device) -> None:
    """A layer of 2³¹ numbers and more; most of its pages are never touched, so no memory stands behind them."""
    kv_layer = torch.empty(2, 1 + (1 << 15), 8, 128, 32 + 32, dtype=torch.bfloat16, device=device)
    assert kv_layer.numel() > 1 << 31
    k, v = random(device, 1, 8, 64, dtype=torch.bfloat16), random(device, 1, 8, 65, dtype=torch.bfloat16)[..., 1:]
    slots = torch.tensor([kv_layer.shape[1] * 128 - 1], device=device)
    kernels.write_kv(k, v, kv_layer, slots)
    assert torch.equal(kv_layer[0, -1, :, -1], k[0]) and torch.equal(kv_layer[1, -1, :, -1], v[0])
