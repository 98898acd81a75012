"""Floating-point formats of 4 and 8 bits: E2M1 and E4M3FN, E5M2 of the OCP specifications, without inf and NaN."""

from dataclasses import dataclass

import torch
from torch import Tensor

from octav_fx.formats.codebook import Codebook, symmetric


@dataclass(frozen=True)
class FloatFormat(Codebook):
    """A codebook whose levels are mantissa * 2**exponent, so that rounding is arithmetic and no search in a table."""

    mantissa_bits: int = 0
    # Of the subnormal and the least normal numbers.
    least_exponent: int = 0

    def round(self, ratio: Tensor) -> Tensor:
        """See Format. Ties go to the even mantissa."""
        exponent = (torch.frexp(ratio).exponent - 1).clamp(min=self.least_exponent)
        quantum = torch.ldexp(torch.ones_like(ratio), exponent - self.mantissa_bits)
        return ((ratio / quantum).round() * quantum).clamp(self.least, self.greatest)


def _format(name: str, bits: int, mantissa_bits: int, bias: int, count: int) -> FloatFormat:
    """Return the format of the first count magnitudes in the order of their codes."""
    magnitudes = []
    for code in range(count):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        whole = mantissa / 2**mantissa_bits + (exponent > 0)
        magnitudes.append(whole * 2.0 ** (max(exponent, 1) - bias))
    return FloatFormat(name, bits, symmetric(magnitudes), True, mantissa_bits, 1 - bias)


E2M1 = _format("e2m1", 4, 1, 1, 8)
# The code of all ones is NaN.
E4M3 = _format("e4m3", 8, 3, 7, 127)
# The codes with the highest exponent are inf and NaN.
E5M2 = _format("e5m2", 8, 2, 15, 124)
FLOATS: tuple[Codebook, ...] = (E2M1, E4M3, E5M2)
