"""Gradients through a fake-quantizer (arXiv 2206.06501, section 4.2), as factors on the incoming gradient.

The clip is a constant here: it is computed from the data and gets no gradient. |x| equal to the clip counts as
inside. On an unsigned grid values below zero are clipped to zero, so their factor is that of a clip at 0.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor


def straight_through(x: Tensor, clip: Tensor, signed: bool) -> Tensor:
    """Return 1 everywhere (STE)."""
    return torch.ones_like(x)


def piecewise_linear(x: Tensor, clip: Tensor, signed: bool) -> Tensor:
    """Return 1 inside the clip, 0 outside (PWL). x [...], clip broadcastable to it."""
    return ((x.abs() <= clip) & (x >= 0 if not signed else True)).to(x.dtype)


def magnitude_aware(x: Tensor, clip: Tensor, signed: bool) -> Tensor:
    """Return 1 inside the clip, clip / |x| outside (MAD, proposition 4.3). x [...], clip broadcastable to it."""
    factor = torch.where(x.abs() <= clip, 1, clip / x.abs())
    return factor if signed else torch.where(x >= 0, factor, 0)


GRADIENTS: Final[dict[str, Callable[[Tensor, Tensor, bool], Tensor]]] = {
    "ste": straight_through,
    "pwl": piecewise_linear,
    "mad": magnitude_aware,
}
