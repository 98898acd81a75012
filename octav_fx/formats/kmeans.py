"""Levels found in each tensor, at every step: those with the least squared error of all (clips/kmeans.py).

The simplest form of a learned codebook. There is nothing to train and no state: like a clip the levels follow from the
values. They take the place of the clip, 2**bits of them in the units of the tensor, ascending.
"""

import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from octav_fx.formats.codebook import edges_between, level_of
from octav_fx.formats.format import Format

# More levels than sixteen gain little over even ones, and kernels look for them one by one.
KMEANS_BITS = range(2, 5)
SPELLING = re.compile(r"kmeans([2-4])")


@dataclass(frozen=True)
class KMeans(Format):
    """2**bits levels, for a tensor whose levels are not known yet; fitted() returns the format that knows them."""

    bits: int
    # [2**bits], ascending, the greatest magnitude 1; None: not known yet.
    table: Tensor | None = field(default=None, compare=False)
    signed: bool = True

    @property
    def name(self) -> str:
        """See Format."""
        return f"kmeans{self.bits}"

    @property
    def steps(self) -> float:
        """See Format."""
        return 1.0

    @property
    def low(self) -> int:
        """Return the lowest code; which of the levels is zero, if one is, differs from tensor to tensor."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """See Format."""
        return 2 ** (self.bits - 1) - 1

    def fitted(self, levels: Tensor) -> tuple["KMeans", Tensor]:
        """Return the format of these levels [2**bits], in the units of a tensor, and its clip []."""
        clip = levels.abs().amax()
        return replace(self, table=torch.where(clip > 0, levels / clip, 0)), clip

    def codes(self, ratio: Tensor) -> Tensor:
        """See Format."""
        return torch.bucketize(ratio.contiguous(), self.edges(ratio.dtype)).to(ratio.dtype) + self.low

    def levels(self, codes: Tensor) -> Tensor:
        """See Format."""
        return level_of(codes - self.low, self._known().to(codes))

    def edges(self, dtype: torch.dtype) -> Tensor:
        """Return the greatest number of a dtype that belongs to each level but the highest, ascending."""
        levels = self._known()
        edges = edges_between(levels.double(), self.low, dtype)
        # Of equal levels all numbers get the first, whose edge is that of the last.
        equal = levels[1:] == levels[:-1]
        return torch.where(equal, torch.inf, edges).flip(0).cummin(0).values.flip(0)

    def _known(self) -> Tensor:
        assert self.table is not None, "levels that are not known yet: Spec.fitted(clip)"
        return self.table
