"""What a machine could do at best: model shapes, machines, and the arithmetic of PERFORMANCE's limits. Pure.

decode step  >=  max(weights / bandwidth, 2 · parameters · rows / peak) + keys and values read / bandwidth
prefill      >=  2 · (parameters - head) · tokens / peak + attention
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kvcache.sizing import CUDA_SHARE, bytes_per_token

GB = 10**9


@dataclass(frozen=True)
class Shape:
    """A decoder, by its measures."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    max_len: int  # tokens
    gated: bool = True  # three matrices in the feed-forward part instead of two
    tied: bool = False  # the embedding is the head
    bytes_per_value: int = 2
    learnt_positions: int = 0  # rows of a position table

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @cached_property
    def body(self) -> int:
        """Parameters of all layers, norms and biases left out."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + (3 if self.gated else 2) * self.hidden * self.ffn)

    @property
    def head(self) -> int:
        return self.hidden * self.vocab

    @property
    def weight_bytes(self) -> int:
        """Read by a step: everything but an embedding table that is no head."""
        return (self.body + self.head) * self.bytes_per_value

    @property
    def stored_bytes(self) -> int:
        tables = self.learnt_positions * self.hidden + (0 if self.tied else self.head)
        return self.weight_bytes + tables * self.bytes_per_value

    @property
    def kv_bytes_per_token(self) -> int:
        return bytes_per_token(self.layers, self.kv_heads, self.head_dim, self.bytes_per_value)

    @property
    def flops_per_pair(self) -> int:
        """Of attention, for a token and one that it attends to: two products of head_dim in every head and layer."""
        return 4 * self.layers * self.heads * self.head_dim


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3-8b", 32, 4096, 32, 8, 14336, 128_256, 8_192),
        Shape("llama-3.1-8b", 32, 4096, 32, 8, 14336, 128_256, 131_072),
        Shape("llama-3.1-70b", 80, 8192, 64, 8, 28672, 128_256, 131_072),
        Shape("llama-3.2-1b", 16, 2048, 32, 8, 8192, 128_256, 131_072, tied=True),
        Shape("llama-3.2-3b", 28, 3072, 24, 8, 8192, 128_256, 131_072, tied=True),
        Shape("llama-2-7b", 32, 4096, 32, 32, 11008, 32_000, 4_096),
        Shape("llama-2-13b", 40, 5120, 40, 40, 13824, 32_000, 4_096),
        Shape("opt-13b", 40, 5120, 40, 40, 20480, 50_272, 2_048, gated=False, tied=True, learnt_positions=2_050),
        Shape("mistral-7b", 32, 4096, 32, 8, 14336, 32_768, 32_768),
        Shape("llama-30m", 8, 512, 8, 8, 1376, 8_192, 2_048, tied=True),
        Shape("smollm-135m", 30, 576, 9, 3, 1536, 49_152, 8_192, tied=True),
    )
}


@dataclass(frozen=True)
class Machine:
    """Memory and dense 16-bit peak, as the maker states them unless said otherwise."""

    name: str
    memory_bytes: int
    bandwidth: float  # bytes a second
    peak: float  # operations a second
    source: str = "data sheet"


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("h200", 141 * GB, 4.3e12, 790e12, "measured: copy, bf16 matrix product"),
        Machine("h100", 80 * GB, 3.35e12, 989e12),
        Machine("a100-80g", 80 * GB, 2.039e12, 312e12),
        Machine("a100-40g", 40 * GB, 1.555e12, 312e12),
        Machine("l40s", 48 * GB, 0.864e12, 362e12),
        Machine("l4", 24 * GB, 0.3e12, 121e12),
        Machine("a10g", 24 * GB, 0.6e12, 70e12),
        Machine("rtx-4090", 24 * GB, 1.008e12, 165e12),
    )
}


def kv_tokens(shape: Shape, machine: Machine) -> int:
    """Tokens of KV cache next to the weights; 0 or less: the weights alone are too large."""
    return int((machine.memory_bytes - shape.stored_bytes) * CUDA_SHARE) // shape.kv_bytes_per_token


@dataclass(frozen=True)
class Demand:
    """What a set of requests needs computed, whoever schedules it."""

    prompt_tokens: int  # less what a prefix cache had
    output_tokens: int
    pairs: int  # (token, token that it attends to) of the prompts
    context: int  # tokens attended to, summed over the decodes
    longest_output: int


def least_seconds(demand: Demand, shape: Shape, machine: Machine, pool_tokens: int, max_rows: int) -> float:
    """No schedule on this machine is faster: matrix products at their peak or weights at full bandwidth for as few steps as
    rows and KV cache allow, then keys and values at full bandwidth, one after the other. The steps of single requests are not
    overlapped with others' prefill."""
    steps = max(demand.output_tokens / max_rows, demand.context / pool_tokens, demand.longest_output)
    decode_flops = 2 * (shape.body + shape.head) * demand.output_tokens
    prefill_flops = 2 * shape.body * demand.prompt_tokens + shape.flops_per_pair * demand.pairs
    decode = max(steps * shape.weight_bytes / machine.bandwidth, decode_flops / machine.peak)
    return decode + prefill_flops / machine.peak + demand.context * shape.kv_bytes_per_token / machine.bandwidth
