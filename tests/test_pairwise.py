"""pairwise: all pairs of values, in few cases."""

import itertools

import pytest

from tests.support.pairwise import pairs, pairwise


@pytest.mark.parametrize("sizes", [(2, 2), (8, 2, 4, 4), (7, 5, 4), (3, 1, 2), (2, 2, 2, 2, 2)])
def test_pairs_are_all_there_in_few_rows(sizes: tuple[int, ...]) -> None:
    rows = pairs(sizes)
    for a, b in itertools.combinations(range(len(sizes)), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(range(sizes[a]), range(sizes[b])))
    largest, second = sorted(sizes, reverse=True)[:2]
    assert largest * second <= len(rows) == len(set(rows)) <= largest * second + 3


@pairwise({"x": "ab", "y, z": [(1, 2), (3, 4)]})
def test_several_names_take_one_axis(x: str, y: int, z: int) -> None:
    assert x in "ab" and (y, z) in ((1, 2), (3, 4))
