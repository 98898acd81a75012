"""Codebook: a format whose levels are data. A float format, a ternary one, powers of two: a table each."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octav_fx.formats.format import Format


@dataclass(frozen=True)
class Codebook(Format):
    """Levels in ascending order, in steps; the clip is the greatest magnitude among them.

    Codes are positions, counted from zero: those of levels below zero are negative. Where zero and its neighbours are
    at the middle, a tie goes to the even code, which for the float formats is the even mantissa.
    """

    key: str
    bits: int
    table: tuple[float, ...]
    signed: bool = True

    @property
    def name(self) -> str:
        """See Format."""
        return self.key

    @property
    def steps(self) -> float:
        """See Format."""
        return max(-self.table[0], self.table[-1])

    @property
    def low(self) -> int:
        """See Format."""
        return -sum(level < 0 for level in self.table)

    @property
    def high(self) -> int:
        """See Format."""
        return len(self.table) - 1 + self.low

    @property
    def least(self) -> float:
        """See Format."""
        return self.table[0]

    @property
    def greatest(self) -> float:
        """See Format."""
        return self.table[-1]

    def codes(self, ratio: Tensor) -> Tensor:
        """See Format."""
        return torch.bucketize(ratio.contiguous(), self.edges(ratio.dtype).to(ratio.device)).to(ratio.dtype) + self.low

    def levels(self, codes: Tensor) -> Tensor:
        """See Format."""
        return level_of(codes - self.low, torch.tensor(self.table, dtype=codes.dtype, device=codes.device))

    def edges(self, dtype: torch.dtype) -> Tensor:
        """Return the greatest number of a dtype that belongs to each level but the highest, ascending."""
        return edges_between(torch.tensor(self.table, dtype=torch.float64), self.low, dtype)


def level_of(places: Tensor, levels: Tensor) -> Tensor:
    """Return the levels [...] at these places [...], counted from 0; some level where a place is NaN."""
    return levels[places.nan_to_num().long().clamp(0, len(levels) - 1)]


def edges_between(levels: Tensor, low: int, dtype: torch.dtype) -> Tensor:
    """Return the greatest number of a dtype that belongs to each of some levels, float64, but the highest.

    low: the code of the lowest. A tie at the middle goes to the even code.
    """
    middles = ((levels[:-1] + levels[1:]) / 2).to(dtype)
    above = torch.arange(low + 1, low + len(levels), device=levels.device)
    down = middles.nextafter(torch.full_like(middles, -math.inf))
    return torch.where(above % 2 == 0, down, middles)


def symmetric(magnitudes: list[float]) -> tuple[float, ...]:
    """Return these magnitudes, zero, and their negatives, in ascending order."""
    rising = sorted(set(magnitudes) - {0.0})
    return (*(-level for level in reversed(rising)), 0.0, *rising)
