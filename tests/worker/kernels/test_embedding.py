"""Rows of a table, by id or by what a slot drew last."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.interpreter import as_stored
from worker import kernels


def table(device: torch.device, count: int, size: int) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(count)).to(device)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "size"), [(1, 3), (7, 64), (3, 1500)])
def test_rows_by_id(tokens: int, size: int, index: torch.dtype, device: torch.device) -> None:
    rows = table(device, 50, size)
    ids = torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(1)).to(device, index)
    last = torch.zeros(4, dtype=torch.int32, device=device)
    assert torch.equal(kernels.embedding(ids, rows, last, torch.float32), rows[ids.long()])
    assert torch.equal(kernels.embedding(ids, rows, last, torch.bfloat16), as_stored(rows[ids.long()], torch.bfloat16))


def test_a_negative_id_is_what_that_slot_drew_last(device: torch.device) -> None:
    rows, last = table(device, 50, 40), torch.tensor([7, 0, 49, -1], dtype=torch.int32, device=device)
    ids = torch.tensor([-1, 5, -3, -2, 49], dtype=torch.int32, device=device)
    expected = rows[torch.tensor([7, 5, 49, 0, 49])]
    assert torch.equal(kernels.embedding(ids, rows, last, torch.float32), expected)
    last[0] = 11  # another step's draw
    assert torch.equal(kernels.embedding(ids, rows, last, torch.float32)[0], rows[11])


def test_an_id_that_does_not_exist_gives_zeros(device: torch.device) -> None:
    rows, last = table(device, 50, 40), torch.tensor([50, -1], dtype=torch.int32, device=device)
    ids = torch.tensor([50, 2**31 - 1, -1, -2], dtype=torch.int32, device=device)
    assert not kernels.embedding(ids, rows, last, torch.float32).any()
