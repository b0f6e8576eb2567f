"""Pool, index, tables and manager against their specification, on every sequence of actions of small worlds."""

from __future__ import annotations

import pytest

from tests.kvcache.spec import World, explore

ALL = {"shared held", "hit retiring", "hit cached", "evicted", "duplicate", "copied"}
# Blocks of one token are always full: nothing is ever copied.
ONE_TOKEN = dict(num_blocks=3, block_size=1, num_slots=2, prompts=[(0,), (0, 1), (0, 0, 1)], longest=3)
TWO_TOKENS = dict(num_blocks=3, block_size=2, num_slots=2, prompts=[(0, 0, 1), (0, 1)], longest=5)
THREE_SLOTS = dict(num_blocks=4, block_size=2, num_slots=3, prompts=[(0, 0, 1), (0, 0, 0)], longest=5)


@pytest.mark.parametrize(
    ("world", "depth", "num_states", "happens"),
    [
        (ONE_TOKEN, 7, 1650, ALL - {"copied"}),
        (TWO_TOKENS, 7, 1747, ALL),
        (THREE_SLOTS, 6, 1738, ALL - {"evicted"}),
    ],
)
def test_the_blocks_obey_their_rules_on_every_short_path(world: dict, depth: int, num_states: int, happens: set[str]) -> None:
    found, _, seen = explore(World(**world), depth)
    assert (found, seen) == (num_states, happens)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("world", "num_states", "happens"),
    [(ONE_TOKEN, 26537, ALL - {"copied"}), (TWO_TOKENS | dict(prompts=[(0, 0, 1)]), 50545, ALL)],
)
def test_the_blocks_obey_their_rules_in_all_states_that_there_are(world: dict, num_states: int, happens: set[str]) -> None:
    """To the end: no state is left that was not visited."""
    found, _, seen = explore(World(**world), depth=1000)
    assert (found, seen) == (num_states, happens)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_blocks_obey_their_rules_on_every_path_of_three_sequences() -> None:
    assert explore(World(**THREE_SLOTS), 8)[2] == ALL
