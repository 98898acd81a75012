"""Format: the levels that a number can take, in units of a step, and the integer codes that stand for them."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


def divided(x: Tensor, number: float) -> Tensor:
    """Return x / number, rounded to the nearest: a GPU multiplies by the reciprocal of what is no tensor."""
    return x / (number if math.frexp(number)[0] == 0.5 else torch.full_like(x, number))


class Format(ABC):
    """Levels in ascending order, each with a code, the codes in a row from low to high.

    One clip says how large a step is: clip / steps. A further format is a file with its levels, and a row in
    registry.py.
    """

    # The bits that a code takes when it is stored.
    bits: int
    # Whether levels below zero exist.
    signed: bool

    @property
    @abstractmethod
    def name(self) -> str:
        """Return how specs spell it: "int4", "uint8", "e2m1"."""

    @property
    @abstractmethod
    def steps(self) -> float:
        """Return the steps between zero and the clip, clip / step."""

    @property
    @abstractmethod
    def low(self) -> int:
        """Return the lowest code."""

    @property
    @abstractmethod
    def high(self) -> int:
        """Return the highest code."""

    @abstractmethod
    def codes(self, ratio: Tensor) -> Tensor:
        """Return the codes of the levels nearest to x / step [...], in floating point; NaN where that is NaN."""

    @abstractmethod
    def levels(self, codes: Tensor) -> Tensor:
        """Return the levels [...] of codes low .. high [...] of a floating-point dtype, in steps, in that dtype."""

    def round(self, ratio: Tensor) -> Tensor:
        """Return the levels nearest to x / step [...], in steps."""
        return self.levels(self.codes(ratio))

    @property
    def least(self) -> float:
        """Return the lowest level, in steps."""
        return float(self.levels(torch.tensor(float(self.low), dtype=torch.float64)))

    @property
    def greatest(self) -> float:
        """Return the highest level, in steps."""
        return float(self.levels(torch.tensor(float(self.high), dtype=torch.float64)))

    @property
    def label(self) -> str:
        """Return how tables and messages name it."""
        return self.name

    def step(self, clip: Tensor) -> Tensor:
        """Return what one step is, in the units of clip."""
        return divided(clip, self.steps)

    @property
    def underflow_code(self) -> int:
        """Return what ops/quantize writes below the lowest level; low - 1 is taken by zero on unsigned grids."""
        return self.low - 1 if self.signed else self.low - 2

    @property
    def ceiling_flag(self) -> int:
        """Return what an unsigned code is raised by where the value reached the ceiling of a clamp (ops/quantize)."""
        return 2 * (self.high + 1)

    @property
    def codes_dtype(self) -> torch.dtype:
        """Return the integers that hold all codes of ops/quantize and, as their least, what is not finite.

        One byte for up to 7 bits signed and 5 bits unsigned, else two.
        """
        greatest = self.high + 1 if self.signed else self.high + 1 + self.ceiling_flag
        return torch.int8 if self.underflow_code > -128 and greatest <= 127 else torch.int16


def representable(level: Tensor, dtype: torch.dtype) -> Tensor:
    """Return levels [...], and the greatest number of a dtype where one lies beyond what that holds."""
    greatest = min(torch.finfo(dtype).max, torch.finfo(level.dtype).max)
    return level.clamp(-greatest, greatest)


def magnitudes(x: Tensor, form: Format) -> Tensor:
    """Return what can be clipped: |x|, or the positive part of x on an unsigned grid; 0 where x is not finite."""
    return torch.where(x.isfinite(), x.abs() if form.signed else x.clamp(min=0), 0)
