"""How many blocks the KV cache gets: arithmetic over bytes and tokens, and what the system says of its memory. No tensors."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
DEFAULT_CPU_BYTES = 4 * GIB  # the pool on a CPU unless told otherwise; less where the memory or the use is smaller
CPU_SHARE = 0.5  # of the available memory: activations, the page cache and the neighbours live from the rest
CUDA_SHARE = 0.88  # of what is free after the weights: activations and the library's workspaces live from the rest
DEFAULT_SWAP_BYTES = 4 * GIB  # host memory that sequences of a GPU are swapped to, unless told otherwise …
SWAP_SHARE = 0.1  # … and at most this share of what is available: it is locked in memory


class SizingError(Exception):
    """The pool can't be what was asked for; the text is one line with the numbers."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for; None: choose."""

    num_blocks: int | None = None
    memory_bytes: int | None = None
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class PoolSize:
    """The outcome. num_blocks leaves out the dump block, which takes memory too."""

    num_blocks: int
    block_size: int  # tokens
    bytes_per_token: int
    max_model_len: int  # tokens
    lowered_from: int | None = None  # the model's own length, where the pool holds less

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.bytes_per_token

    @property
    def num_bytes(self) -> int:
        return (self.num_blocks + 1) * self.block_bytes

    def __str__(self) -> str:
        text = (
            f"{format_bytes(self.bytes_per_token)} per token, {self.num_blocks:,} blocks of {self.block_size} "
            f"= {self.num_tokens:,} tokens in {format_bytes(self.num_bytes)}, "
            f"{self.num_tokens / self.max_model_len:.1f} sequences of {self.max_model_len:,}"
        )
        if self.lowered_from is not None:
            text += f" (the model's {self.lowered_from:,} lowered to what the cache holds)"
        return text


def bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, bytes_per_value: int) -> int:
    return 2 * num_layers * num_kv_heads * head_dim * bytes_per_value


def size_pool(
    *,
    bytes_per_token: int,
    block_size: int,
    model_len: int,
    max_batch_rows: int,
    available_bytes: int,
    share: float,
    default_bytes: int | None,
    wish: Wish,
) -> PoolSize:
    """The pool for a model of `model_len` tokens, or of a wished length that it can do, out of `available_bytes`.

    A wish for blocks or memory is met or refused. Without one the pool takes `share` of the available memory, at most
    `default_bytes` (None: no such bound) unless one sequence of a wished length needs more, and at most what max_batch_rows
    full sequences can use. One sequence of max_model_len must fit: a length that was not wished for is lowered to the pool.
    """
    length = wish.max_model_len or model_len
    block_bytes = block_size * bytes_per_token
    one_sequence = -(-length // block_size)
    if wish.num_blocks is not None:
        blocks = wish.num_blocks
    elif wish.memory_bytes is not None:
        blocks = wish.memory_bytes // block_bytes - 1
    else:
        budget = int(share * available_bytes)
        if default_bytes is not None:
            needed = (one_sequence + 1) * block_bytes if wish.max_model_len is not None else 0
            budget = min(budget, max(default_bytes, needed))
        blocks = min(budget // block_bytes - 1, max_batch_rows * one_sequence)
    if blocks < 1:
        have = wish.memory_bytes if wish.memory_bytes is not None and wish.num_blocks is None else available_bytes
        raise SizingError(f"the KV cache needs {format_bytes(2 * block_bytes)} at least, {format_bytes(have)} are there for it")
    if (blocks + 1) * block_bytes > available_bytes:
        raise SizingError(
            f"a KV cache of {blocks:,} blocks needs {format_bytes((blocks + 1) * block_bytes)}, "
            f"{format_bytes(available_bytes)} are available: lower --num-blocks or --kv-memory-gib"
        )
    if blocks >= one_sequence:
        return PoolSize(blocks, block_size, bytes_per_token, length)
    if wish.max_model_len is not None:
        raise SizingError(
            f"one sequence of {length:,} tokens needs {one_sequence:,} blocks ({format_bytes(one_sequence * block_bytes)}), "
            f"the KV cache has {blocks:,} ({format_bytes(blocks * block_bytes)}): lower --max-model-len to "
            f"{blocks * block_size:,} or give it more"
        )
    return PoolSize(blocks, block_size, bytes_per_token, blocks * block_size, lowered_from=length)


def size_host_pool(block_bytes: int, available_bytes: int, wished_bytes: int | None) -> int:
    """Blocks of host memory for swapped sequences: what was wished for or a refusal; without a wish a small share of it."""
    if wished_bytes is None:
        return min(DEFAULT_SWAP_BYTES, int(SWAP_SHARE * available_bytes)) // block_bytes
    if wished_bytes > available_bytes:
        raise SizingError(
            f"the swap space is to have {format_bytes(wished_bytes)}, {format_bytes(available_bytes)} are available: "
            "lower --swap-gib"
        )
    if 0 < wished_bytes < block_bytes:
        raise SizingError(
            f"the swap space of {format_bytes(wished_bytes)} holds no block, which takes {format_bytes(block_bytes)}: "
            "raise --swap-gib, or set it to 0"
        )
    return wished_bytes // block_bytes


def format_bytes(count: int) -> str:
    if count < 1 << 20:
        return f"{count / 1024:.1f} KiB"
    return f"{count / (1 << 20):.0f} MiB" if count < GIB else f"{count / GIB:.2f} GiB"


# --------------------------------------------------------------------------------------------------------------- the system


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take before something is killed: the system's MemAvailable, and what the limits of
    its control groups (version 1 or 2, and their parents) leave. `root` is where proc and sys are found."""
    return max(0, min(_mem_available(root), *_left_in_cgroups(root), sys.maxsize))


def _mem_available(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # not Linux: half of all there is


def _left_in_cgroups(root: Path) -> list[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            left += _walk(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            left += _walk(root / "sys/fs/cgroup/memory", path, *names)
    return left


def _walk(mount: Path, path: str, limit: str, usage: str, reclaimable: str) -> list[int]:
    """What is left in the group at `path` and in each of its parents. In a container the path may be the host's, which does
    not exist here; the walk ends at the mount, which is the container's own group then."""
    folder, left = mount / path.strip("/"), []
    while folder == mount or mount in folder.parents:
        amount = _left_in(folder, limit, usage, reclaimable)
        if amount is not None:
            left.append(amount)
        folder = folder.parent
    return left


def _left_in(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if most == "max" else int(most) - used + int(stat.get(reclaimable, 0))
