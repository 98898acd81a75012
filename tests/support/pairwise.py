"""Fewer cases than a full product: errors that take three values at once to show are rare."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest


def pairs(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return rows of indices below sizes [A] so that any two values of any two axes stand together in a row."""
    axes = list(itertools.combinations(range(len(sizes)), 2))
    left = {(a, i, b, j) for a, b in axes for i in range(sizes[a]) for j in range(sizes[b])}
    rows = list(itertools.product(*map(range, sizes)))
    chosen = []
    while left:
        # Greedy: the row with the most new pairs, the first of equal ones.
        new = [{(a, row[a], b, row[b]) for a, b in axes} & left for row in rows]
        best = max(range(len(rows)), key=lambda index: len(new[index]))
        chosen.append(rows[best])
        left -= new[best]
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
