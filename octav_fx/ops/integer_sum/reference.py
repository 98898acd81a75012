"""integer_sum, in pure torch: the definition."""

from torch import Tensor

from octav_fx.ops.integer_codes.reference import integer_codes


def integer_sum(x: Tensor, y: Tensor, relu: bool, scale: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Map x and y of one shape [...] -> x + y or its relu [...], and the codes of that: ops/integer_codes."""
    total = x + y
    total = total.relu() if relu else total
    return total, integer_codes(total, scale, bits, signed)
