"""The integer grid of a quantizer: the only place that knows 2**(bits - 1)."""

from dataclasses import dataclass

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
        """Steps between zero and the clip: clip / step. A power of two, so dividing by it is exact."""
        return 2 ** (self.bits - 1) if self.signed else 2**self.bits

    @property
    def low(self) -> int:
        """The lowest code."""
        return -self.steps if self.signed else 0

    @property
    def high(self) -> int:
        """The highest code."""
        return self.steps - 1

    @property
    def noise(self) -> float:
        """Mean squared rounding error over clip**2: step**2 / 12 (eq. 4: 4**-B / 3 signed, 4**-B / 12 unsigned)."""
        return 1 / (12 * self.steps**2)

    def step(self, clip: Tensor) -> Tensor:
        """The distance between levels, in the units of clip."""
        return clip / self.steps
