"""What every recipe's data has: batches that depend on the seed and the step alone, so that a run can be resumed."""

from collections.abc import Iterator
from typing import Final, Protocol

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]

# What a net is judged by: files for testing, for what is reported; or a part of the training files, which is then left
# out of the training, for what is chosen.
TEST: Final = "test"
VALIDATION: Final = "validation"


class Data(Protocol):
    """Inputs and targets, both [N, ...]."""

    def batch(self, step: int) -> Batch:
        """Return the training batch of a step; the same whenever it is asked for."""
        ...

    def test(self) -> Iterator[Batch]:
        """Return all that a net is judged by, the same for every seed."""
        ...


def generator(*keys: int) -> torch.Generator:
    """Return random numbers that depend on the keys alone, each below 2**31."""
    # Mixed, so that neighbouring keys do not give overlapping streams.
    state = 0x9E3779B97F4A7C15
    for key in keys:
        state = ((state ^ key) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state % 2**63)
