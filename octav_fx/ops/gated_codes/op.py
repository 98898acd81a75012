"""torch.ops.octav.gated_codes: the product of codes and a gate for each channel of each image, as codes, in one pass.

What a squeeze-and-excitation block does to the tensor that it has averaged (arXiv 1709.01507).
"""

import torch
from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.ops import cpu
from octav_fx.ops.gated_codes import reference
from octav_fx.ops.register import register_op

_LAST = torch.channels_last


def _empty(x: Tensor, *_: Tensor | int | bool) -> Tensor:
    return torch.empty_like(x, memory_format=_LAST)


def _cpu(
    x: Tensor,
    x_scale: Tensor,
    gate: Tensor,
    step: Tensor,
    x_bits: int,
    x_signed: bool,
    bits: int,
    signed: bool,
    *,
    out: Tensor,
) -> bool:
    library, grid = cpu.library(), Grid(bits, signed)
    is_gate = gate.dtype is torch.float32 and gate.shape == (*x.shape[:2], 1, 1)
    if library is None or not is_gate or not out.is_contiguous(memory_format=_LAST):
        return False
    images, channels, height, width = x.shape
    x, gate = x.contiguous(memory_format=_LAST), gate.contiguous()
    scales = [cpu.checked(scale, ()) for scale in (x_scale, step)]
    library.octav_gated_codes(
        *(x.data_ptr(), gate.data_ptr(), *(scale.data_ptr() for scale in scales), out.data_ptr()),
        *(images, height * width, channels, Grid(x_bits, x_signed).low, grid.low, grid.high, torch.get_num_threads()),
    )
    return True


gated_codes = register_op(
    "gated_codes",
    "Tensor x, Tensor x_scale, Tensor gate, Tensor step, int x_bits, bool x_signed, int bits, bool signed",
    empty=_empty,
    reference=reference.gated_codes,
    cpu=_cpu,
)
