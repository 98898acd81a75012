"""lookup, in pure torch: the definition."""

from torch import Tensor


def lookup(codes: Tensor, table: Tensor) -> Tensor:
    """Return table[code] of each code, uint8 [...] -> uint8 [...]; the table is uint8 [256]."""
    return table[codes.int()]
