"""The C++ passes that multiply codes, for CPUs with AVX-512 and VNNI: what they are given.

Each call of oneDNN's costs torch some 30 microseconds beside its kernel, which is as much as a small layer takes. The
passes compute what the references of integer_conv and integer_linear do, to the last bit.
"""

import functools
from typing import Any, Final

import torch
from torch import Tensor

from octav_fx.compat.tensors import has_vnni
from octav_fx.formats.grid import Grid
from octav_fx.ops import cpu, onednn

# Sums in a vector, and in a block of weights, whose codes lie in fours.
_SUMS: Final = 16
_BLOCK: Final = 64
_FOUR: Final = 4


@functools.cache
def library() -> Any | None:
    """Return the passes where this CPU can run those for VNNI, else None."""
    can = torch.backends.cpu.get_cpu_capability() == "AVX512" and has_vnni()
    return cpu.library() if can else None


def packed(w: Tensor) -> Tensor:
    """Return a weight [O, K], int8, K a multiple of 4, as integer_linear's pass reads it.

    Blocks of 64 rows, the last of a multiple of 16, one behind the other: [K / 4, rows, 4].
    """
    fours = padded(w).unflatten(1, (-1, _FOUR)).transpose(0, 1)
    return torch.cat([part.reshape(-1) for part in fours.split(_BLOCK, 1)])


def dealt(x: Tensor, columns: int = 1) -> Tensor:
    """Return what belongs to channels [C, K], C a multiple of 16, as the depthwise pass reads it.

    Blocks of 64 channels, then one of 32, twice, and one of 16, four times, each as [K / columns, 4, 16, columns]: the
    second axis says which four of each sixteen channels, the third goes through the sixteens and those four.
    """
    parts, at = [], 0
    for size in (64, 32, 16):
        while x.shape[0] - at >= size:
            block = x[at : at + size].reshape(size // 16, 4, 4, -1, columns).permute(3, 1, 0, 2, 4)
            parts.append(block.repeat(1, 1, 64 // size, 1, 1).reshape(-1))
            at += size
    return torch.cat(parts)


def padded(x: Tensor) -> Tensor:
    """Return a tensor [O, ...] with zeros behind it, up to a multiple of 16."""
    y = x.new_zeros((-(-x.shape[0] // _SUMS) * _SUMS, *x.shape[1:]))
    y[: x.shape[0]] = x
    return y


def operands(call: Any, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return codes of a weight [O, K], what sums begin with, scale and bias [O]; None where a byte holds no such codes.

    call: of integer_conv or integer_linear. An integer bias is part of the sum. Where it has a fraction, the codes are
    those of that unit.
    """
    zero, rows = onednn.zero_point(call.x_bits, call.x_signed), w.shape[0]
    scale = onednn.channel_scale(call.x_scale, call.w_scale, rows)
    if not onednn.is_integer(call.bias):
        bias = onednn.bias_levels(call.bias, scale, call.fraction)
        return w, -zero * w.sum(1, dtype=torch.int32), scale, torch.zeros(rows) if bias is None else bias
    wide = w.to(torch.int32) * 2**call.fraction
    w = wide.to(torch.int8)
    if not torch.equal(w.to(torch.int32), wide):
        return None
    multiplier = scale if call.step is None else scale / call.step
    return w, call.bias - zero * w.sum(1, dtype=torch.int32), multiplier / 2**call.fraction, torch.zeros(rows)


def ending(call: Any) -> tuple[bool, float, float, float, float, int]:
    """Return what follows the levels of a call, as the passes take it.

    Whether nothing does, 1 / step, zero point, both bounds, and what is added to rounded codes. The bounds are of codes
    where there is a step: of the clamp low .. high, and of the grid.
    """
    low, high = onednn.ends(call.low, call.high)
    if call.step is None:
        return True, 1.0, 0.0, low, high, 0
    grid = Grid(call.bits, call.signed)
    if onednn.is_integer(call.bias):
        return False, 1.0, 0.0, *onednn.code_bounds(call.low, call.high, call.step, grid), -grid.low
    inverse = 1 / call.step
    bottom, top = (torch.tensor([low, high]) * inverse - grid.low).clamp(0, grid.high - grid.low).tolist()
    return False, float(inverse), float(onednn.zero_point(call.bits, call.signed)), bottom, top, 0
