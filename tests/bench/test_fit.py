from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from bench.fit import Floats, hats, nnls, relative


def best_of_all_subsets(matrix: Floats, target: Floats) -> float:
    """The least error of any choice of columns whose least squares need no negative number."""
    least = float((target**2).sum())
    for size in range(1, matrix.shape[1] + 1):
        for chosen in combinations(range(matrix.shape[1]), size):
            numbers = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
            if (numbers >= 0).all():
                least = min(least, float(((matrix[:, chosen] @ numbers - target) ** 2).sum()))
    return least


@pytest.mark.parametrize("seed", range(40))
def test_it_finds_the_least_squares_without_negative_numbers(seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((12, 5)) * 10.0 ** random.integers(-4, 5, 5)
    target = random.standard_normal(12) * 10
    found = nnls(matrix, target)
    assert (found >= 0).all()
    assert float(((matrix @ found - target) ** 2).sum()) == pytest.approx(best_of_all_subsets(matrix, target), rel=1e-6)


def test_relative_errors_weigh_small_and_large_alike() -> None:
    matrix = np.array([[1.0, 1.0], [1.0, 1e6], [1.0, 2e6]])
    assert relative(matrix, matrix @ np.array([50.0, 0.003])) == pytest.approx([50.0, 0.003])


def test_hats_are_the_straight_lines_between_points() -> None:
    at = np.array([1.0, 2.0, 4.0])
    values = np.array([10.0, 20.0, 0.0])
    x = np.array([0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0])
    assert (hats(at, x) @ values).tolist() == [10.0, 10.0, 15.0, 20.0, 10.0, 0.0, -10.0]
    assert hats(np.array([3.0]), x).tolist() == [[1.0]] * 7
