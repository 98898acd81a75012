"""The integer grid of a quantizer: the only place that knows 2**(bits - 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """Equally spaced levels described by one clip, no zero point (arXiv 2206.06501, section 3).

    Signed grids are two's complement, codes -2**(bits-1) .. 2**(bits-1)-1 with step clip * 2**(1-bits): the lowest
    level is -clip, the highest one step below clip. Unsigned grids have codes 0 .. 2**bits-1, step clip * 2**-bits.
    """

    bits: int
    signed: bool

    @property
    def steps(self) -> int:
        """Return the steps between zero and the clip, clip / step: a power of two, so that dividing by it is exact."""
        return 2 ** (self.bits - 1) if self.signed else 2**self.bits

    @property
    def low(self) -> int:
        """Return the lowest code."""
        return -self.steps if self.signed else 0

    @property
    def high(self) -> int:
        """Return the highest code."""
        return self.steps - 1

    @property
    def noise(self) -> float:
        """Return the mean squared rounding error over clip**2, step**2 / 12 (eq. 4: 4**-B / 3 if signed)."""
        return 1 / (12 * self.steps**2)

    def step(self, clip: Tensor) -> Tensor:
        """Return the distance between levels, in the units of clip."""
        return clip / self.steps

    @property
    def underflow_code(self) -> int:
        """Return what ops/quantize writes below the lowest level; low - 1 is taken by zero on unsigned grids."""
        return self.low - 1 if self.signed else self.low - 2

    @property
    def ceiling_flag(self) -> int:
        """Return what an unsigned code is raised by where the value reached the ceiling of a clamp (ops/quantize)."""
        return 2 * self.steps

    @property
    def codes_dtype(self) -> torch.dtype:
        """Return the integers that hold all codes of ops/quantize and, as their least, what is not finite.

        One byte for up to 7 bits signed and 5 bits unsigned, else two.
        """
        greatest = self.high + 1 if self.signed else self.high + 1 + self.ceiling_flag
        return torch.int8 if self.underflow_code > -128 and greatest <= 127 else torch.int16


def nearest(quotient: Tensor, grid: Grid) -> Tensor:
    """Return the code nearest to x / step [...], ties to even, as a float; what rounds to -0 stays -0.

    No clamp: which of two zeros it returns differs between devices and versions of torch.
    """
    code = quotient.round()
    code = torch.where(code < grid.low, grid.low, code)
    return torch.where(code > grid.high, grid.high, code)


def magnitudes(x: Tensor, grid: Grid) -> Tensor:
    """Return what can be clipped: |x|, or the positive part of x on an unsigned grid; 0 where x is not finite."""
    return torch.where(x.isfinite(), x.abs() if grid.signed else x.clamp(min=0), 0)
