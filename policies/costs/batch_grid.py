"""Where the seconds of a batch's forwards are known by numbers of their own, and what is between."""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

import numpy as np

from policies.base import MAX_GAMMA
from policies.batches import MOST_ROWS

#: Most tokens that a forward may read, and the knots of V.
MOST: Final = MOST_ROWS * (MAX_GAMMA + 1)
KNOTS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, MOST], dtype=float)
#: Standard deviation of u from one knot to the next, and of u as a whole.
WALK, LEVEL = 0.12, 3.0


class Grid(NamedTuple):
    """Where V is known by numbers of its own, and what is between.

    Attributes
    ----------
    n : ndarray
        1, 2, ... to the most tokens that a forward may read.
    at, part : ndarray
        For each of them the knot below, and how far it is from there to the next one, 0 to 1.
    knots : int
        How many there are.
    precision : ndarray
        Prior precision of u: differences, and hardly the level.
    parts : tuple of int
        Sizes of the sums, all in one vector: V's matrix and vector, the draft's, and the matrix of both.
    ends : list of int
        Where each of them ends, but for the last one.
    """

    n: np.ndarray
    at: np.ndarray
    part: np.ndarray
    knots: int
    precision: np.ndarray
    parts: tuple[int, int, int, int, int]
    ends: list[int]


@cache
def grid(most: int) -> Grid:
    """Return the grid of forwards of at most so many tokens; beyond :data:`MOST` knots are a factor of two apart."""
    knots = KNOTS
    while knots[-1] < most:
        knots = np.append(knots, 2.0 * knots[-1])
    n = np.arange(1, int(knots[-1]) + 1, dtype=float)
    at = np.minimum(np.searchsorted(knots, n, side="right") - 1, len(knots) - 2)
    walk = np.diff(np.eye(len(knots)), axis=0)
    precision = walk.T @ walk / WALK**2 + np.eye(len(knots)) / (LEVEL**2 * len(knots))
    sizes = (len(knots) ** 2, len(knots), 16, 4, 4 * len(knots))
    ends = np.cumsum(sizes[:-1]).tolist()
    return Grid(n, at, (n - knots[at]) / np.diff(knots)[at], len(knots), precision, sizes, ends)
