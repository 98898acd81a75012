"""zero_clipped_, in pure torch: the definition."""

from torch import Tensor


def zero_clipped_(grad: Tensor, codes: Tensor, low: int, high: int) -> None:
    """Set grad [...] to zero where its code [...] is none from low to high, in place."""
    grad.masked_fill_((codes < low) | (codes > high), 0)
