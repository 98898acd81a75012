"""Equality without tolerance."""

import torch
from torch import Tensor

EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}


def assert_same_bits(y: Tensor, expected: Tensor) -> None:
    """Equal, NaN in the same places, and the same sign on every zero."""
    torch.testing.assert_close(y, expected, **EXACT)
    # Equal is not the same for zeros, which have a sign; that of a NaN is nothing anyone promises.
    assert torch.equal(y.signbit() & ~y.isnan(), expected.signbit() & ~expected.isnan())
