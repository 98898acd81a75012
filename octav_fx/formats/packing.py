"""Integer codes of a weight, and two 4-bit codes to a byte."""

import torch
from torch import Tensor

from octav_fx.formats.granularity import along
from octav_fx.formats.grid import Grid


def integer_codes(x: Tensor, clip: Tensor, grid: Grid, dim: int | None) -> Tensor:
    """Return the codes of ops/fake_quantize for finite x [...] and a clip [] or [C]: int8 [...]; signed grids."""
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    step = grid.step(along(clip, x, dim).to(value.dtype))
    code = torch.where(step > 0, grid.codes(value / step), 0)
    return code.to(torch.int8)


def pack(codes: Tensor) -> Tensor:
    """Pack n codes [...] in -8..7 into uint8 [(n + 1) // 2], in order, the first of each two in the low bits."""
    flat = codes.reshape(-1)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    low, high = (flat.reshape(-1, 2).to(torch.uint8) & 15).unbind(-1)
    return low | high << 4


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo pack: uint8 [(n + 1) // 2] -> codes, int8, in a shape of n elements."""
    count = 1
    for size in shape:
        count *= size
    nibbles = torch.stack([packed & 15, packed >> 4], -1).reshape(-1)[:count]
    # Two's complement of four bits: the highest one counts -8.
    return ((nibbles ^ 8).to(torch.int8) - 8).reshape(shape)
