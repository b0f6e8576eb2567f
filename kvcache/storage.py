"""The keys and values themselves: one tensor per layer, and how it is laid out. Only the worker imports this.

Which block belongs to whom is not known here; see manager.py for the numbers.
"""

from __future__ import annotations

import torch


class KVStorage:
    """Keys and values of all layers, [2, 1 + num_blocks, num_kv_heads, block_size, head_dim] each; index 0 keys, 1 values.

    A block of one head is contiguous. Block 0 is the dump: padding rows write there, and nothing reads it. The memory is
    written once here, so that a pool which does not fit fails at start-up and not in the middle of a request.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (2, 1 + num_blocks, num_kv_heads, block_size, head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
