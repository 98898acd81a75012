"""torch.ops.octav.code_sum: where two paths of codes meet, the codes of their sum, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from octav_fx.ops import cpu
from octav_fx.ops.code_sum import reference
from octav_fx.ops.register import register_op


class Call(NamedTuple):
    """The arguments of code_sum, by name; reference.py says what they are."""

    x: Tensor
    y: Tensor
    x_scale: Tensor
    y_scale: Tensor
    step: Tensor
    x_bits: int
    x_signed: bool
    y_bits: int
    y_signed: bool
    bits: int
    signed: bool
    low: float | None = None
    high: float | None = None


def _empty(x: Tensor, y: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x if x.shape == y.shape else x + y)


def _cpu(*args: Any, out: Tensor) -> bool:
    call, library = Call(*args), cpu.library()
    x = call.x
    if library is None or x.shape != call.y.shape or not cpu.is_dense(x) or not cpu.same_layout(x, out):
        return False
    y = cpu.lying_as(call.y, x)
    scales = [cpu.checked(scale, ()) for scale in (call.x_scale, call.y_scale, call.step)]
    library.octav_code_sum(
        *(x.data_ptr(), y.data_ptr(), *(scale.data_ptr() for scale in scales), out.data_ptr(), x.numel()),
        *(call.x_bits, call.x_signed, call.y_bits, call.y_signed, call.bits, call.signed),
        *(*cpu.bounds(call.low, call.high), torch.get_num_threads()),
    )
    return True


code_sum = register_op(
    "code_sum",
    "Tensor x, Tensor y, Tensor x_scale, Tensor y_scale, Tensor step, int x_bits, bool x_signed, int y_bits, "
    "bool y_signed, int bits, bool signed, float? low=None, float? high=None",
    empty=_empty,
    reference=reference.code_sum,
    cpu=_cpu,
)
