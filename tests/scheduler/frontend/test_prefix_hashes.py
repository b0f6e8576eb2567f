"""What the front end tells the core for the prefix cache: a key of model and salt, the hashes of the prompt's full blocks."""

from __future__ import annotations

from typing import Any

import pytest

from kvcache import prefix_index
from tests.helpers.fake_core import FakeCore, ready_facts, worker_facts
from tests.helpers.frontend import Frontend
from tests.helpers.streams import collect, make
from wire import AddRequest

BLOCK = 16


def heard(core: FakeCore, frontend: Frontend, prompt: list[int], **options: Any) -> AddRequest:
    request = make(prompt, max_tokens=1, **options)
    summary = collect(frontend.generation.Generate(request)).summary
    return core.wait_for(AddRequest, lambda add: add.header.request_id == summary.request_id)


@pytest.mark.parametrize("num_tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 6 * BLOCK - 1])
def test_full_blocks_are_hashed_in_order(num_tokens: int, core: FakeCore, frontend: Frontend) -> None:
    prompt = [7 * i % 500 for i in range(num_tokens)]
    add = heard(core, frontend, prompt)
    key = prefix_index.root("tiny", "", "")
    assert (add.header.prefix_key, add.header.hash_block_size) == (key, BLOCK)
    assert add.prefix_hashes.tobytes() == prefix_index.hash_blocks(key, add.prompt, BLOCK)
    assert len(add.prefix_hashes) == prefix_index.DIGEST_BYTES * (num_tokens // BLOCK)


def test_prompts_with_the_same_beginning_share_its_hashes(core: FakeCore, frontend: Frontend) -> None:
    first, second = ([*range(3 * BLOCK), *range(100 + i, 132 + i)] for i in (0, 1))
    one, two = (heard(core, frontend, prompt).prefix_hashes.tobytes() for prompt in (first, second))
    assert one[: 3 * 16] == two[: 3 * 16] and one[3 * 16 : 4 * 16] != two[3 * 16 : 4 * 16]


def test_another_salt_is_another_chain(core: FakeCore, frontend: Frontend) -> None:
    adds = [heard(core, frontend, [5] * 40, **options) for options in ({}, dict(cache_salt=""), dict(cache_salt="mine"))]
    assert adds[0].header.prefix_key == adds[1].header.prefix_key
    assert adds[2].header.prefix_key == prefix_index.root("tiny", "", "mine") != adds[0].header.prefix_key
    assert adds[2].prefix_hashes.tobytes() != adds[0].prefix_hashes.tobytes()


def test_the_workers_block_size_counts(core: FakeCore, frontend: Frontend) -> None:
    core.tell(ready_facts(worker_facts(block_size=32)))
    frontend.hear_core()
    add = heard(core, frontend, [5] * 100)
    assert (add.header.hash_block_size, len(add.prefix_hashes)) == (32, 3 * 16)
