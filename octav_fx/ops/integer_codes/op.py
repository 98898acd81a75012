"""torch.ops.octav.integer_codes: floats as the unsigned codes that integer_conv and integer_linear multiply."""

import torch
from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.ops import cpu
from octav_fx.ops.integer_codes import reference
from octav_fx.ops.register import register_op


def _empty(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


def _cpu(x: Tensor, scale: Tensor, bits: int, signed: bool, *, out: Tensor) -> bool:
    library, grid = cpu.library(), Grid(bits, signed)
    fits = cpu.is_dense(x) and cpu.same_layout(out, x) and out.dtype is torch.uint8
    if library is None or not fits or x.dtype is not torch.float32:
        return False
    step = cpu.checked(scale, ())
    library.octav_integer_codes(
        x.data_ptr(), step.data_ptr(), out.data_ptr(), x.numel(), grid.low, grid.high, torch.get_num_threads()
    )
    return True


integer_codes = register_op(
    "integer_codes",
    "Tensor x, Tensor scale, int bits, bool signed",
    empty=_empty,
    reference=reference.integer_codes,
    cpu=_cpu,
)
