"""ratio, in pure torch: the definition."""

from torch import Tensor


def ratio(x: Tensor, step: Tensor) -> Tensor:
    """Map x [...] and one step [], float32, above zero -> x / step, rounded to the nearest.

    Below 2**-100 and above 2**18 in magnitude any number will do that is beyond them, too, with the sign of x: on every
    grid both ends are one code. NaN stays NaN.
    """
    return x / step
