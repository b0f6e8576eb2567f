"""Seeded mistakes in the code of the blocks, each of which this folder's tests must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from itertools import product
from types import ModuleType
from typing import Any

import pytest

from tests.kvcache import test_block_pool, test_block_table, test_manager, test_prefix_index
from tests.kvcache.mutants import MUTANTS, Mutant, mutated
from tests.kvcache.spec import World, explore

EXACT = [test_prefix_index, test_block_pool, test_block_table, test_manager]
WORLDS = [
    (World(3, 1, 2, [(0,), (0, 1), (0, 0, 1)], 3), 6),
    (World(3, 2, 2, [(0, 0, 1), (0, 1)], 5), 7),
    (World(4, 2, 3, [(0, 0, 1), (0, 0, 0)], 5), 5),
]


def exact_tests(module: ModuleType) -> Iterator[Callable[[], None]]:
    """The module's tests with all their parameters, as pytest would call them."""
    for name, test in vars(module).items():
        if name.startswith("test_"):
            marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            for values in product(*(arguments for _, arguments in marks)):
                given: dict[str, Any] = {}
                for (names, _), value in zip(marks, values, strict=True):
                    given |= {names: value} if isinstance(names, str) else dict(zip(names, value, strict=True))
                yield lambda test=test, given=given: call(test, given)


def call(test: Callable[..., None], given: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test(**given, **({"monkeypatch": patch} if "monkeypatch" in signature(test).parameters else {}))


def run_exact_tests() -> None:
    for module in EXACT:
        for test in exact_tests(module):
            test()


def run_explorations() -> None:
    for world, depth in WORLDS:
        explore(world, depth)


def fails(run: Callable[[], None]) -> bool:
    try:
        run()
    except (Exception, pytest.fail.Exception):
        return True
    return False


def test_the_code_as_it_stands_passes() -> None:
    run_exact_tests()
    run_explorations()
    assert len(list(exact_tests(test_block_pool))) > 50


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_mistake_is_noticed(mutant: Mutant) -> None:
    with mutated(mutant):
        if mutant.breaks_the_rules:
            assert fails(run_explorations), "the exploration of small worlds does not see it"
        else:
            assert fails(run_exact_tests), "no exact test sees it"


def test_no_mutation_is_left_behind() -> None:
    mutant = MUTANTS[0]
    with mutated(mutant):
        assert fails(run_exact_tests)
    run_exact_tests()


def test_mutants_are_different() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len({mutant.source for mutant in MUTANTS}) == len(MUTANTS) >= 25
