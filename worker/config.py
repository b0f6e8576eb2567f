"""What a worker is told at its start: one frozen dataclass, checked once. What it finds out itself travels in its hello."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kvcache.sizing import GIB, Wish

DEVICES = ("auto", "cpu", "cuda", "sim")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8")  # of the matrices that are multiplied with

_LIMITS, _GPU_LIMITS = (64, 512), (256, 2048)  # a GPU reads its weights in the time in which it computes some 200 rows
STORED = "stored"  # weights: those of the checkpoint


class ConfigError(Exception):
    """An option that can't be; the text names it."""


def random_seed(weights: str) -> int:
    """SEED of "random:SEED". Raises ConfigError."""
    kind, _, seed = weights.partition(":")
    if kind != "random" or not seed.isdecimal() or int(seed) >= 1 << 63:
        raise ConfigError(f"--weights {weights}: {STORED}, or random:SEED with a whole number")
    return int(seed)


@dataclass(frozen=True, slots=True)
class SimConfig:
    """What only the simulated executor reads; worker.sim_executor.Latency explains the nanoseconds."""

    base_ns: int = 0
    per_row_ns: int = 0
    per_token_ns: int = 0
    per_context_token_ns: int = 0
    swap_block_ns: int = 0
    copy_block_ns: int = 0
    host_blocks: int = 0  # that sequences can be swapped to
    end_chance: float = 0.0  # of drawing the request's first stop token, per token
    vocab_size: int = 32_000  # when there is no --model to say it


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    connect: str  # ZeroMQ address of the core
    model: str | None = None  # directory or hub id; only a simulated worker can do without
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "none"
    deterministic: bool = False  # a row's numbers depend on its own sequence alone, bit for bit
    weights: str = STORED
    max_model_len: int | None = None  # tokens; None: the model's, or what the memory holds
    block_size: int = 16  # tokens
    num_blocks: int | None = None
    kv_memory_gib: float | None = None
    swap_gib: float | None = None  # of host memory, for swapped sequences; None: 0 on a CPU, some on a GPU
    max_batch_rows: int | None = None  # None: by device, as `limits` says
    max_step_tokens: int | None = None
    threads: int | None = None  # None: one per processor that this process may use
    group: int = 0
    keys: str = ""  # folder of the keys that encrypt the link; needed for tcp://
    replaces: bool = False  # it comes to take the place of the worker that is there
    sim: SimConfig = field(default_factory=SimConfig)

    def __post_init__(self) -> None:
        def check(holds: bool, what: str) -> None:
            if not holds:
                raise ConfigError(what)

        check("://" in self.connect, f"--connect {self.connect}: a ZeroMQ address such as ipc:///path or tcp://host:port")
        check(self.device in DEVICES, f"--device {self.device}: one of {', '.join(DEVICES)}")
        check(self.dtype in DTYPES, f"--dtype {self.dtype}: one of {', '.join(DTYPES)}")
        check(self.quantization in QUANTIZATIONS, f"--quantization {self.quantization}: one of {', '.join(QUANTIZATIONS)}")
        only_cpu = f"--quantization {self.quantization} is for --device cpu, not for --device {self.device}"
        check(self.quantization == "none" or self.device in ("auto", "cpu"), only_cpu)
        if self.deterministic:
            only_cpu = f"--deterministic is for --device cpu so far, not for --device {self.device}"
            check(self.device != "cuda", only_cpu + ", whose libraries choose by the number of rows how they add up")
            check(self.dtype in ("auto", "float32"), f"--deterministic computes in float32, not in --dtype {self.dtype}")
        if self.weights != STORED:
            random_seed(self.weights)
        check(self.model is not None or self.device == "sim", "--model is missing: a checkpoint directory or a hub id")
        check(self.max_model_len is None or self.max_model_len >= 2, f"--max-model-len {self.max_model_len}: 2 at least")
        check(1 <= self.block_size <= 256, f"--block-size {self.block_size}: 1 to 256")
        check(self.num_blocks is None or self.num_blocks >= 1, f"--num-blocks {self.num_blocks}: 1 at least")
        kv_gib, swap_gib = self.kv_memory_gib, self.swap_gib
        check(kv_gib is None or 0 < kv_gib < math.inf, f"--kv-memory-gib {kv_gib}: more than 0")
        both = self.num_blocks is not None and kv_gib is not None
        check(not both, "--num-blocks and --kv-memory-gib both say how large the KV cache is: give one")
        check(swap_gib is None or 0 <= swap_gib < math.inf, f"--swap-gib {swap_gib}: 0 at least")
        rows, tokens = self.max_batch_rows, self.max_step_tokens
        check(rows is None or 1 <= rows <= 65_535, f"--max-batch-rows {rows}: 1 to 65535")
        check(tokens is None or tokens >= 1, f"--max-step-tokens {tokens}: 1 at least")
        check(self.threads is None or self.threads >= 1, f"--threads {self.threads}: 1 at least")
        check(self.group >= 0, f"--group {self.group}: 0 at least")
        check(0 <= self.sim.end_chance <= 1, f"--sim-end-chance {self.sim.end_chance}: 0 to 1")
        check(self.sim.host_blocks >= 0, f"--sim-host-blocks {self.sim.host_blocks}: 0 at least")
        both = self.device == "sim" and self.sim.host_blocks > 0 and bool(swap_gib)
        check(not both, "--swap-gib and --sim-host-blocks both say where to swap to: give one")
        check(self.sim.vocab_size >= 2, f"--sim-vocab-size {self.sim.vocab_size}: 2 at least")

    def limits(self, device: str) -> tuple[int, int]:
        """(sequences in the batch, tokens of the largest step) on this device: as asked for, or its default."""
        rows, tokens = self.max_batch_rows, self.max_step_tokens
        default_rows, default_tokens = _GPU_LIMITS if device == "cuda" else _LIMITS
        rows = rows or min(default_rows, tokens or default_rows)  # each sequence computes a token at least
        return rows, tokens or max(default_tokens, rows)

    @property
    def wish(self) -> Wish:
        """What of the KV cache's size was asked for."""
        memory_bytes = None if self.kv_memory_gib is None else int(self.kv_memory_gib * GIB)
        return Wish(self.num_blocks, memory_bytes, self.max_model_len)

    @property
    def swap_bytes(self) -> int | None:
        """Host memory that was asked for; None: choose."""
        return None if self.swap_gib is None else int(self.swap_gib * GIB)
