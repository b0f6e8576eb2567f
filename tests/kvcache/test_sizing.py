"""Sizes of the KV pool: exact numbers for wishes, defaults and limits, and what the system's files say of memory."""

from pathlib import Path

import pytest

from kvcache.sizing import (
    CPU_SHARE,
    DEFAULT_CPU_BYTES,
    DEFAULT_SWAP_BYTES,
    GIB,
    PoolSize,
    SizingError,
    Wish,
    available_memory,
    bytes_per_token,
    size_host_pool,
    size_pool,
)

PER_TOKEN = 1024


def pool(wish: Wish = Wish(), **changes: int) -> PoolSize:  # noqa: B008  (frozen)
    arguments = {"model_len": 2048, "max_batch_rows": 8, "available_bytes": 100 * GIB, "block_size": 16} | changes
    return size_pool(bytes_per_token=PER_TOKEN, share=CPU_SHARE, default_bytes=DEFAULT_CPU_BYTES, wish=wish, **arguments)


def test_llama_3_8b_takes_128_kib_per_token() -> None:
    assert bytes_per_token(num_layers=32, num_kv_heads=8, head_dim=128, bytes_per_value=2) == 128 * 1024


def test_the_default_is_what_all_rows_can_use() -> None:
    size = pool()
    assert (size.num_blocks, size.max_model_len, size.lowered_from) == (8 * 128, 2048, None)


def test_the_default_is_bounded_by_four_gib_and_by_half_of_the_available_memory() -> None:
    assert pool(max_batch_rows=100_000).num_bytes == 4 * GIB
    assert pool(max_batch_rows=100_000, available_bytes=2 * GIB).num_bytes == GIB


def test_the_dump_block_is_counted_in_the_memory() -> None:
    assert pool(Wish(memory_bytes=11 * 16 * PER_TOKEN), model_len=64).num_blocks == 10


def test_wishes_are_met_exactly() -> None:
    assert pool(Wish(num_blocks=128)).num_blocks == 128
    assert pool(Wish(num_blocks=5_000)).num_tokens == 80_000, "more than the rows can use, but asked for"
    assert pool(Wish(max_model_len=100)).max_model_len == 100
    assert pool(Wish(max_model_len=100)).num_blocks == 8 * 7


def test_a_long_wished_length_takes_more_than_the_default() -> None:
    size = pool(Wish(max_model_len=8_000_000), model_len=8_000_000)
    assert size.max_model_len == 8_000_000 and size.num_blocks == 500_000


def test_a_length_that_nobody_asked_for_is_lowered_to_the_pool() -> None:
    size = pool(model_len=8_000_000)
    assert size.num_bytes == 4 * GIB and size.max_model_len == size.num_tokens and size.lowered_from == 8_000_000
    assert "the model's 8,000,000 lowered" in str(size)


def test_a_length_that_was_asked_for_is_refused_with_the_numbers() -> None:
    with pytest.raises(SizingError, match=r"2,000 tokens needs 125 blocks \(2 MiB\), the KV cache has 100 \(2 MiB\)"):
        pool(Wish(num_blocks=100, max_model_len=2000))


@pytest.mark.parametrize("wish", [Wish(num_blocks=7_000_000), Wish(memory_bytes=110 * GIB)])
def test_more_than_there_is_is_refused_with_the_numbers(wish: Wish) -> None:
    with pytest.raises(SizingError, match=r"needs \d+\.\d+ GiB, 100\.00 GiB are available"):
        pool(wish)


@pytest.mark.parametrize("wish, available", [(Wish(memory_bytes=20_000), GIB), (Wish(), 50_000), (Wish(), 0)])
def test_no_room_for_a_single_block_is_refused(wish: Wish, available: int) -> None:
    with pytest.raises(SizingError, match=r"needs 32\.0 KiB at least"):
        pool(wish, available_bytes=available)


def test_the_line_says_what_the_blocks_are_worth() -> None:
    assert (
        str(pool(Wish(num_blocks=160))) == "1.0 KiB per token, 160 blocks of 16 = 2,560 tokens in 3 MiB, 1.2 sequences of 2,048"
    )


def test_swap_space_is_four_gib_or_a_tenth_of_what_is_available() -> None:
    assert size_host_pool(1 << 20, 100 * GIB, None) == DEFAULT_SWAP_BYTES >> 20
    assert size_host_pool(1 << 20, 10 * GIB, None) == 1024
    assert size_host_pool(1 << 20, 1 << 20, None) == 0


def test_swap_space_that_was_asked_for_is_met_or_refused_with_the_numbers() -> None:
    assert size_host_pool(1 << 20, 100 * GIB, 50 * GIB) == 50 * 1024
    assert size_host_pool(1 << 20, 0, 0) == 0
    assert size_host_pool(1000, 10_000, 1999) == 1
    with pytest.raises(SizingError, match=r"swap space is to have 5\.00 GiB, 2\.00 GiB are available: lower --swap-gib"):
        size_host_pool(1 << 20, 2 * GIB, 5 * GIB)
    with pytest.raises(SizingError, match=r"swap space of 1\.0 KiB holds no block, which takes 2\.0 KiB: raise --swap-gib"):
        size_host_pool(2048, GIB, 1024)


# --------------------------------------------------------------------------------------------------------------- the system


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in (files | {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    8000 kB\nSwapFree: 1 kB\n"}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(limit: str, usage: int, inactive: int, v2: bool = True) -> dict[str, str]:
    if v2:
        return {"memory.max": limit, "memory.current": str(usage), "memory.stat": f"anon 1\ninactive_file {inactive}\n"}
    stat = f"inactive_file 0\ntotal_inactive_file {inactive}\n"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": str(usage), "memory.stat": stat}


def under(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


def test_without_limits_it_is_what_the_system_says(tmp_path: Path) -> None:
    assert available_memory(system(tmp_path, {})) == 8000 * 1024


def test_the_tightest_group_of_version_2_counts(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/outer/inner\n"}
    files |= under("sys/fs/cgroup/outer/inner", group("max", 5, 0)) | under("sys/fs/cgroup/outer", group("5000000", 900, 100))
    assert available_memory(system(tmp_path, files)) == 5_000_000 - 900 + 100


def test_a_group_of_version_1_counts(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "5:cpu:/x\n4:hugetlb,memory:/job\n0::/\n"}
    files |= under("sys/fs/cgroup/memory/job", group("3000000", 1_000_000, 50, v2=False))
    files |= under("sys/fs/cgroup/memory", group(str(2**63 - 4096), 0, 0, v2=False))
    assert available_memory(system(tmp_path, files)) == 2_000_050


def test_in_a_container_the_mount_is_the_group(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/docker/0123abcd\n"} | under("sys/fs/cgroup", group("4000000", 1_000_000, 0))
    assert available_memory(system(tmp_path, files)) == 3_000_000


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n"} | under("sys/fs/cgroup", group("1000", 5000, 0))
    assert available_memory(system(tmp_path, files)) == 0


def test_this_machine_has_some_memory() -> None:
    assert available_memory() > 0
