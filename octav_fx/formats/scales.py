"""Formats of the scale itself: a step is rounded before codes are chosen, so that they are best for what is stored."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from octav_fx.formats.floats import E4M3
from octav_fx.formats.format import Format, divided

# So many bits of the float32 scale of a tensor are kept: its product with a level and with a scale of 8 bits is exact.
_KEPT: Final = 12
# The least positive E4M3, and float16.
_SMALLEST: Final = 2.0**-9
_LEAST_FLOAT16: Final = 2.0**-24


def tensor_scale(x: Tensor, form: Format) -> Tensor:
    """Return the float32 scale [] above the scales of groups: the group with the largest magnitude gets the largest."""
    return scale_for(torch.where(x.isfinite(), x.abs(), 0).amax() if x.numel() else x.new_zeros(()), form)


def scale_for(largest: Tensor, form: Format) -> Tensor:
    """Return the float32 scale [] of a tensor with this largest magnitude []."""
    fraction, exponent = torch.frexp(divided(largest, form.steps * E4M3.steps))
    return torch.ldexp((fraction * 2**_KEPT).ceil(), exponent - _KEPT)


def _float32(step: Tensor, unit: Tensor) -> Tensor:
    return step


def _bfloat16(step: Tensor, unit: Tensor) -> Tensor:
    return step.to(torch.bfloat16).to(step.dtype)


def _float16(step: Tensor, unit: Tensor) -> Tensor:
    rounded = step.to(torch.float16).to(step.dtype)
    # As below, none is zero: of E5M2 the step is a 57344th of the largest value, and few are larger than it.
    return torch.where(step > 0, rounded.clamp(_LEAST_FLOAT16, torch.finfo(torch.float16).max), 0)


def _e8m0(step: Tensor, unit: Tensor) -> Tensor:
    """Round to a power of two, 2**-127 .. 2**127; 1.5 is half-way between 1 and 2."""
    # Infinity has no exponent: near the end of float32 a clip may lie beyond it.
    fraction, exponent = torch.frexp(step.clamp(max=2.0**127))
    power = (exponent - 1 + (fraction >= 0.75).to(exponent.dtype)).clamp(-127, 127)
    return torch.where(step > 0, torch.ldexp(torch.ones_like(step), power), 0)


def _e4m3(step: Tensor, unit: Tensor) -> Tensor:
    """Round to a positive E4M3 times unit."""
    ratio = torch.where(unit > 0, step / unit, 0)
    # A scale of zero would lose the group.
    return torch.where(step > 0, E4M3.round(ratio).clamp(min=_SMALLEST) * unit, 0)


# Step and the float32 scale of the tensor, in the units of x -> the nearest step that can be stored.
SCALES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "float32": _float32,
    "bfloat16": _bfloat16,
    "float16": _float16,
    "e8m0": _e8m0,
    "e4m3": _e4m3,
}
# Bits of each; E4M3 comes with 32 for the tensor.
SCALE_BITS: Final = {"float32": 32, "bfloat16": 16, "float16": 16, "e8m0": 8, "e4m3": 8}
