"""Least squares with coefficients that are not negative. Numbers only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_ENOUGH = 1e-10


def nnls(matrix: Floats, target: Floats) -> Floats:
    """x >= 0 with the least |matrix x - target|; Lawson and Hanson 1974, chapter 23."""
    scale = np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
    matrix = matrix / scale
    num = matrix.shape[1]
    found, free = np.zeros(num), np.zeros(num, bool)
    for _ in range(10 * num):
        slope = matrix.T @ (target - matrix @ found)
        if free.all() or slope[~free].max() <= _ENOUGH * max(1.0, float(np.abs(target).max())):
            break
        free[np.flatnonzero(~free)[slope[~free].argmax()]] = True
        while True:
            step = np.zeros(num)
            step[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            if (step[free] > 0).all():
                break
            below = free & (step <= 0)
            reach = (found[below] / (found[below] - step[below])).min()
            found = found + reach * (step - found)
            free &= found > 1e-12
        found = step
    unscaled: Floats = found / scale
    return unscaled


def relative(matrix: Floats, target: Floats) -> Floats:
    """The same, for relative errors."""
    return nnls(matrix / target[:, None], np.ones(len(target)))


def hats(at: Floats, x: Floats) -> Floats:
    """[len(x), len(at)] weights with which values at the points `at` give the straight lines between them at `x`; level before
    the first point, on beyond the last."""
    if len(at) == 1:
        return np.ones((len(x), 1))
    left = np.clip(np.searchsorted(at, x, side="right") - 1, 0, len(at) - 2)
    share = np.maximum(x - at[left], 0.0) / (at[left + 1] - at[left])
    weights = np.zeros((len(x), len(at)))
    rows = np.arange(len(x))
    weights[rows, left] = 1 - share
    weights[rows, left + 1] = share
    return weights
