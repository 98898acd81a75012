"""Which layers are multiplied as codes, and by which way: what is exact, and what pays, from measured constants."""

import math
from dataclasses import dataclass
from typing import Final

import torch

from octav_fx.compat.tensors import has_vnni, multiplies_unsigned_bytes
from octav_fx.formats.grid import Grid
from octav_fx.ops import cpu, onednn
from octav_fx.ops.int_matmul.range import largest_k

# Seconds, measured on one thread of a Zen 5 with AVX512-VNNI and BF16, over the layers of ResNet-18, MobileNetV2 and a
# transformer. For each multiply-accumulate: a convolution in float32 takes 8e-12 and in bfloat16 4e-12 (a matmul 20e-12
# and 5e-12), one of codes 2.4e-12.
_SAVED: Final = {torch.float32: 5e-12, torch.bfloat16: 1.5e-12}
# For the calls and the operands of a layer, more than in floating point.
_CALLS: Final = 6e-5
# A convolution, for each element of its weight, which oneDNN lays out anew.
_LAID_OUT: Final = 1.1e-9
# A matmul: for each element that is copied together, for each sum, and for each multiply-accumulate, more than a
# convolution.
_COPIED: Final = 4e-11
_SUMS: Final = 1.5e-10
_MATMUL: Final = 0.8e-12


@dataclass(frozen=True, slots=True)
class Layer:
    """The sizes of a linear layer or of a convolution; kernel and what follows are empty for a linear one."""

    # Rows of x, or positions of the result in all images.
    positions: int
    # [O, K] or [O, C / groups, *kernel].
    weight: tuple[int, ...]
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def terms(self) -> int:
        """Return how many products make one number of the result."""
        return math.prod(self.weight[1:])

    @property
    def macs(self) -> int:
        """Return the multiply-accumulates."""
        return self.positions * math.prod(self.weight)

    @property
    def is_convolved(self) -> bool:
        """Tell whether it runs as a convolution, and not as a matmul: where oneDNN is right, and takes less time."""
        if self.groups > 1 or not has_vnni():
            return bool(self.weight[2:])
        return self.fits_convolution and math.prod(self.weight[2:]) > 1 and self.laid_out < self.multiplied

    @property
    def laid_out(self) -> float:
        """Return the seconds that a convolution takes besides its multiply-accumulates."""
        return math.prod(self.weight) * _LAID_OUT

    @property
    def multiplied(self) -> float:
        """Return the seconds that a matmul takes more than the multiply-accumulates of a convolution."""
        copied = self.positions * self.terms * _COPIED if math.prod(self.weight[2:]) > 1 else 0.0
        return copied + self.positions * self.weight[0] * _SUMS + self.macs * _MATMUL

    @property
    def fits_convolution(self) -> bool:
        """Tell whether oneDNN computes it rightly as a convolution (torch 2.13; found by comparing).

        Where each group has one input it may read beyond the rows.
        """
        kernel = self.weight[2:]
        return bool(kernel) and self.weight[1] > 1 and not onednn.fits_into_padding(kernel, self.padding, self.dilation)


def refusal(layer: Layer, x: Grid, w: Grid, dtype: torch.dtype) -> str | None:
    """Return why the codes of a layer with a result in dtype cannot be multiplied on the CPU; None if they can."""
    if dtype not in cpu.TYPES:
        return f"its result is {dtype}"
    if not w.signed or w.bits > 8 or x.bits > 8:
        return "its codes do not fit a byte, or those of its weight have no sign"
    if not layer.terms or layer.terms > (largest := largest_k(x.bits, x.signed, w.bits)):
        return f"sums over {layer.terms} products, and not over 1 to {largest}"
    if cpu.library() is None:
        return "there are no C++ passes"
    if layer.is_convolved and not layer.fits_convolution:
        return "oneDNN has no integer convolution that is right for its padding or its groups"
    if not layer.is_convolved and not has_vnni():
        return "integer matmuls are slow on this CPU, which has no VNNI"
    if not layer.is_convolved and not multiplies_unsigned_bytes():
        return f"torch {torch.__version__} multiplies no unsigned bytes"
    return onednn.refusal(x.bits, 2 ** (w.bits - 1))


def loss(layer: Layer, dtype: torch.dtype) -> str | None:
    """Return why a layer would gain nothing by it; None if it gains."""
    spent = _CALLS + (layer.laid_out if layer.is_convolved else layer.multiplied)
    if layer.macs * _SAVED.get(dtype, _SAVED[torch.bfloat16]) <= spent:
        return f"{layer.positions} positions of a weight {list(layer.weight)} gain nothing from integers"
    return None
