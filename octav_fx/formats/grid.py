"""The integer grid of a quantizer: the only place that knows 2**(bits - 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from octav_fx.formats.format import Format


@dataclass(frozen=True)
class Grid(Format):
    """Equally spaced levels described by one clip, no zero point (arXiv 2206.06501, section 3).

    Signed grids are two's complement, codes -2**(bits-1) .. 2**(bits-1)-1 with step clip * 2**(1-bits): the lowest
    level is -clip, the highest one step below clip. Unsigned grids have codes 0 .. 2**bits-1, step clip * 2**-bits.
    Level and code are the same number. narrow: without the lowest code of a signed grid, as some runtimes want it.
    """

    bits: int
    signed: bool
    narrow: bool = False

    @property
    def name(self) -> str:
        """See Format."""
        return f"{'int' if self.signed else 'uint'}{self.bits}{'-narrow' if self.narrow else ''}"

    @property
    def label(self) -> str:
        """See Format."""
        return f"{self.bits} bits"

    @property
    def steps(self) -> int:
        """Return the steps between zero and the clip, clip / step: a power of two, so that dividing by it is exact."""
        return 2 ** (self.bits - 1) if self.signed else 2**self.bits

    @property
    def low(self) -> int:
        """Return the lowest code."""
        return -self.steps + self.narrow if self.signed else 0

    @property
    def high(self) -> int:
        """Return the highest code."""
        return self.steps - 1

    @property
    def noise(self) -> float:
        """Return the mean squared rounding error over clip**2, step**2 / 12 (eq. 4: 4**-B / 3 if signed)."""
        return 1 / (12 * self.steps**2)

    @property
    def least(self) -> float:
        """See Format."""
        return self.low

    @property
    def greatest(self) -> float:
        """See Format."""
        return self.high

    def codes(self, ratio: Tensor) -> Tensor:
        """See Format; ties go to the even code, and what rounds to -0 stays -0.

        No clamp: which of two zeros it returns differs between devices and versions of torch.
        """
        code = ratio.round()
        code = torch.where(code < self.low, self.low, code)
        return torch.where(code > self.high, self.high, code)

    def levels(self, codes: Tensor) -> Tensor:
        """See Format."""
        return codes
