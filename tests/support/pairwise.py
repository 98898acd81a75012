"""Fewer cases than a full product: errors that take three values at once to show are rare."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest


def pairs(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return rows of indices below sizes [A] so that any two values of any two axes stand together in a row."""
    rows = np.array(list(itertools.product(*map(range, sizes))))
    left = {(a, b): np.ones((sizes[a], sizes[b]), int) for a, b in itertools.combinations(range(len(sizes)), 2)}
    chosen = []
    while any(pairs.any() for pairs in left.values()):
        # Greedy: the row with the most new pairs, the first of equal ones.
        new = sum(pairs[rows[:, a], rows[:, b]] for (a, b), pairs in left.items())
        best = rows[np.argmax(new)]
        chosen.append(tuple(best.tolist()))
        for (a, b), pairs in left.items():
            pairs[best[a], best[b]] = 0
    return sorted(chosen)


def pairwise(axes: Mapping[str, Sequence[Any]]) -> pytest.MarkDecorator:
    """Parametrize a test by axes, a name or "several, names" -> values; every pair of values is in some case."""
    values = [list(axis) for axis in axes.values()]
    cases = []
    for row in pairs([len(axis) for axis in values]):
        chosen = [axis[index] for axis, index in zip(values, row, strict=True)]
        several = ["," in name for name in axes]
        cases.append([x for value, many in zip(chosen, several, strict=True) for x in (value if many else [value])])
    return pytest.mark.parametrize(", ".join(axes), cases)
