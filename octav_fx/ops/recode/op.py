"""torch.ops.octav.recode: a narrower quantizer that reads the codes of a wider one, in one pass."""

from typing import Any

import torch
from torch import Tensor

from octav_fx.ops import cpu
from octav_fx.ops.recode import reference
from octav_fx.ops.register import register_op


def _empty(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _cpu(
    x: Tensor,
    x_scale: Tensor,
    step: Tensor,
    x_bits: int,
    x_signed: bool,
    bits: int,
    signed: bool,
    *,
    out: Tensor,
) -> bool:
    library = cpu.library()
    if library is None or not cpu.is_dense(x) or not cpu.same_layout(x, out):
        return False
    scales = [cpu.checked(scale, ()) for scale in (x_scale, step)]
    library.octav_recode(
        *(x.data_ptr(), *(scale.data_ptr() for scale in scales), out.data_ptr(), x.numel()),
        *(x_bits, x_signed, bits, signed, torch.get_num_threads()),
    )
    return True


recode = register_op(
    "recode",
    "Tensor x, Tensor x_scale, Tensor step, int x_bits, bool x_signed, int bits, bool signed",
    empty=_empty,
    reference=reference.recode,
    cpu=_cpu,
)
