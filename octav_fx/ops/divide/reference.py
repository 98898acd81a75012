"""divide, in pure torch: the definition."""

from torch import Tensor


def divide(x: Tensor, y: Tensor) -> Tensor:
    """Map x and y [...], of one float dtype and broadcast against each other -> x / y [...], rounded to the nearest."""
    return x / y
