"""torch.ops.octav.integer_sum: where two paths meet, the sum for the next sum and the codes for the next layer."""

import torch
from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.ops import cpu
from octav_fx.ops.integer_sum import reference
from octav_fx.ops.register import register_allocating


def _empty(x: Tensor, y: Tensor, relu: bool, scale: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x)
    return total, torch.empty_like(x, dtype=torch.uint8)


def _cpu(x: Tensor, y: Tensor, relu: bool, scale: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor] | None:
    library, grid = cpu.library(), Grid(bits, signed)
    fits = x.dtype is y.dtype is torch.float32 and cpu.is_dense(x) and cpu.same_layout(x, y)
    if library is None or not fits:
        return None
    (total, codes), step = _empty(x, y, relu, scale, bits, signed), cpu.checked(scale, ())
    library.octav_integer_sum(
        *(x.data_ptr(), y.data_ptr(), step.data_ptr(), total.data_ptr(), codes.data_ptr(), x.numel()),
        *(relu, grid.low, grid.high, torch.get_num_threads()),
    )
    return total, codes


integer_sum = register_allocating(
    "integer_sum",
    "Tensor x, Tensor y, bool relu, Tensor scale, int bits, bool signed",
    returns="(Tensor, Tensor)",
    empty=_empty,
    reference=reference.integer_sum,
    cpu=_cpu,
)
